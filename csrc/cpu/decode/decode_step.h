// Runs M tokens through the full decoder, in one parallel region: the next token of each sequence,
// or several consecutive tokens of one, as of a prompt. Body of decode_step.cpp, compiled per
// instruction set.
//
//   prepare  residual, norm        ->  x (M, K), rounded to int8 where the weight needs that
//   project  x . W^T, in tiles of 16 rows of W, each tile by one thread, for all M rows
//
//   layer, | ends a phase:
//     prepare -> qkv | rope, cache, attention | prepare -> out | prepare -> gate, up, act |
//     prepare -> down |
//
// A row reads the keys of its sequence's earlier rows from the cache. So with several rows of one
// sequence, writing keys and values is a phase before attention. The same holds with many rows,
// since the queries are then rotated once, not in every task of attention.
//
// A phase ends when its work is done, not when all threads have arrived at a barrier (phases.h);
// any thread may do any part of it. With few rows, every thread that works in a phase prepares all
// rows for itself, which is cheaper than fetching them from another core; with many rows, preparing
// is a separate phase. The residual stream, products and sums are float32. A step is
// batch-invariant, and no result depends on the number of threads: no sum is split between threads,
// and attention always runs in chunks of DECODE_KEYS keys.
//
// A step is an OpenMP region, so it shares torch's threads and follows set_num_threads; a separate
// thread pool would spin on the cores where torch's threads spin. Only the end of the region, once
// per step, waits for every thread.
//
// W is read from the memory once per step, in place; 16 of its rows are transposed, so that each
// lane computes one output and no sum crosses lanes:
//
//   lane i of vector l   4 bytes of row n + i: columns [l * PER_LANE, ...)    x broadcast
//
//   W        once per step from the memory; with more rows of x than one pass takes, a tile again
//            from the L2 (decode_linear.h)
//   x        (M, K) is written once per phase and read by every tile, from the L1 or L2
//   keys     once per step from the memory (decode_attention.h)
//   logits   written once
//
// Index legend:
//
//   m   row of the step, a token: M (`rows`)    n   output of a linear, a row of W
//   i   layer, or one of several linears        k   input of a linear, a column of W
//   t   task of attention                       u   unit of a phase: a tile of 16 rows of W
//   g, h, c, j   key head, query head, chunk, key (decode_attention.h)
#include "cpu/base/gemm.h"
#include "cpu/quantized/quantized_weight.h"
//
#include "cpu/base/gemm_int8.h"
#include "cpu/base/simd_int8.h"

#include "cpu/decode/decode_linear.h"
//
#include "cpu/decode/decode_attention.h"

constexpr int64_t SPLIT_ROWS = 4;  // of x: from this many on, threads share their preparation

struct DecodeWork {  // arrays of one step; everything is written before it is read
  float *qkv, *q, *branch, *inner, *partials, *max, *sum;  // q: null without `split`
  float* streams[2];  // residual streams of two versions, for a thread that missed a phase
  struct Slot {       // the output of `prepare`: one, or one per thread
    float* stream;
    Activations x;
  }* slots;
  struct Thread {
    uint8_t* panel;
    float *out, *q, *scores;
  }* threads;
};

struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

inline int64_t round16(int64_t n) { return (n + 15) / 16 * 16; }

// Divides the workspace at `base` and returns its size; base null: only returns the size.
inline int64_t divide_workspace(const DecodePlan& p, int64_t rows, int64_t longest, int threads,
                                bool split, char* base, DecodeWork& w) {
  Arena a{base};
  const int64_t q_width = p.heads * p.head_dim, kv_width = p.kv_heads * p.head_dim;
  const int64_t chunks = (longest + DECODE_KEYS - 1) / DECODE_KEYS, ratio = p.heads / p.kv_heads;
  w.qkv = a.take<float>(rows * (q_width + 2 * kv_width));
  w.q = a.take<float>(rows * p.heads * query_size(p.head_dim));
  if (!split) w.q = nullptr;
  w.branch = a.take<float>(rows * p.hidden);
  w.inner = a.take<float>(rows * p.inner);
  w.partials = a.take<float>(rows * p.heads * chunks * partial_size(p.head_dim));
  w.max = a.take<float>(rows * p.heads * chunks);
  w.sum = a.take<float>(rows * p.heads * chunks);
  const int64_t widest = std::max({p.hidden, q_width, p.inner}), runs = (widest + 7) / 8;
  const int64_t slots = split ? 1 : threads;
  for (float*& stream : w.streams) stream = a.take<float>(rows * p.hidden);
  w.slots = a.take<DecodeWork::Slot>(slots);
  w.threads = a.take<DecodeWork::Thread>(threads);
  for (int64_t s = 0; s < slots; ++s) {
    DecodeWork::Slot slot{};
    slot.stream = a.take<float>(rows * p.hidden);
    slot.x.stride = round16(widest), slot.x.rows = rows;
    slot.x.x = a.take<float>(rows * slot.x.stride);
    for (Activations::Format& f : slot.x.formats) {
      f.q = a.take<int8_t>(rows * slot.x.stride);
      f.scale = a.take<float>(rows * runs);
      f.sum = a.take<float>(rows * runs);
      f.start = a.take<int32_t>(rows * runs);
    }
    if (base) w.slots[s] = slot;
  }
  for (int t = 0; t < threads; ++t) {
    DecodeWork::Thread scratch{};
    scratch.panel = a.take<uint8_t>(PANELS * PANEL_BYTES);
    scratch.out = a.take<float>(2 * rows * DECODE_TILE);
    scratch.q = a.take<float>(ratio * query_size(p.head_dim));
    scratch.scores = a.take<float>(ratio * DECODE_KEYS);
    if (base) w.threads[t] = scratch;
  }
  return a.used;
}

inline int64_t decode_workspace(const DecodePlan& p, int64_t rows, int64_t longest, int threads) {
  DecodeWork w;
  return divide_workspace(p, rows, longest, threads, rows >= SPLIT_ROWS, nullptr, w);
}

// A step's operands, checked (`decode_batch`).
struct DecodeBatch {
  const int64_t *tokens, *lengths;  // lengths: cached tokens of each row, without the new one
  const int32_t* table;             // (rows, max_pages)
  const int64_t* logits_indices;    // rows whose logits are computed
  int64_t rows, logits_count, max_pages, pages, page_size;
  int64_t shortest, longest;  // of all rows, with the new token
  bool chained;               // some row continues the one before it
  float* scales;              // of int8: (layers, 2, pages, kv_heads, page_size)
  const float* rotary[16];    // cos, sin, cos, sin ..
  int64_t rotary_width[8];
  float* logits;

  bool split() const { return rows >= SPLIT_ROWS || chained; }
};

template <class C>
struct DecodeStep : DecodeBatch {
  const DecodePlan& p;
  const DecodeWork& w;
  C* cache;  // (layers, 2, pages, kv_heads, page_size, head_dim)
  // one per thread
  int thread = 0;
  int prepared = -1, version = -1;  // the phase that the slot is for; additions in its stream

  DecodeStep(const DecodeBatch& batch, const DecodePlan& p, const DecodeWork& w, C* cache)
      : DecodeBatch(batch), p(p), w(w), cache(cache) {}

  enum Kind { QKV, ATTEND, OUT, GLU, DOWN, KINDS };  // phases of a layer; the head comes last

  DecodeWork::Slot& slot() const { return w.slots[split() ? 0 : thread]; }
  DecodeWork::Thread& scratch() const { return w.threads[thread]; }
  // the work of every layer, then the head's; with SPLIT_ROWS, each after its preparation
  int works() const { return int(p.layers.size()) * KINDS + 1; }

  int phases() const { return split() ? 2 * works() : works(); }
  int64_t units(int phase) const {
    if (!split()) return work_units(phase);
    if (phase % 2) return work_units(phase / 2);
    if (phase / 2 == works() - 1) return logits_count;
    return phase / 2 % KINDS == ATTEND ? rows * p.kv_heads : rows;
  }
  void run(int phase, int64_t from, int64_t to) {
    if (split()) {
      phase % 2 ? do_work(phase / 2, from, to) : prepare_rows(phase / 2, from, to);
      return;
    }
    if (phase != prepared) {
      const int additions = version_of(phase);
      if (additions > 0 && additions != version + 1)  // this thread missed a phase
        memcpy(slot().stream, w.streams[(additions - 1) % 2], stream_bytes());
      prepare_rows(phase, 0, phase == works() - 1 ? logits_count : rows);
      prepared = phase;
      if (additions >= 0) version = additions;
      if (additions >= 0 && from == 0)
        memcpy(w.streams[additions % 2], slot().stream, stream_bytes());
    }
    do_work(phase, from, to);
  }
  // The number of branches added to the residual stream once `work` is prepared; -1: it adds none.
  int version_of(int work) const {
    const int kind = work % KINDS;
    return kind == QKV || kind == GLU ? work / KINDS * 2 + (kind == GLU) : -1;
  }
  size_t stream_bytes() const { return size_t(rows * p.hidden) * sizeof(float); }

  // Calls f(row) for rows [from, to), then converts them to the formats that `linears` need.
  template <class F>
  void prepare(std::initializer_list<const DecodeLinear*> linears, int64_t from, int64_t to, F f) {
    prepare(linears.begin(), int(linears.size()), from, to, f);
  }
  template <class F>
  void prepare(const DecodeLinear* const* linears, int count, int64_t from, int64_t to, F f) {
    const Activations& x = slot().x;
    for (int64_t m = from; m < to; ++m) {
      float* row = x.x + m * x.stride;
      f(m, slot().stream + m * p.hidden, row);
      const int64_t k = linears[0]->k;
      for (int64_t i = k; i < round16(k); ++i) row[i] = 0.f;
      for (int i = 0; i < count; ++i)
        if (format_of(linears, i) == i) round_row(*linears[i], x, x.formats[i], m);
    }
  }

  static int64_t tiles(const DecodeLinear& l) { return (l.n + DECODE_TILE - 1) / DECODE_TILE; }

  static void copy_tile(const float* tile, int64_t count, int64_t width, float* y, int64_t stride) {
    for (int64_t m = 0; m < count; ++m, tile += DECODE_TILE, y += stride)
      if (width == DECODE_TILE)
        memcpy(y, tile, DECODE_TILE * sizeof(float));
      else
        memcpy(y, tile, size_t(width) * sizeof(float));
  }

  // y[m * stride + n] = x W^T + bias for tiles [from, to) of several concatenated W
  void project(const DecodeLinear* const* linears, int count, int64_t from, int64_t to, float* y,
               int64_t stride) {
    int64_t column = 0, first = 0;
    for (int i = 0; i < count; ++i) {
      const DecodeLinear& l = *linears[i];
      const int64_t last = first + tiles(l);
      for (int64_t u = std::max(from, first); u < std::min(to, last); ++u) {
        const int64_t n = (u - first) * DECODE_TILE, width = std::min(DECODE_TILE, l.n - n);
        tile_product(l, n, slot().x, format_of(linears, i), rows, scratch().panel, scratch().out);
        copy_tile(scratch().out, rows, width, y + column + n, stride);
      }
      first = last, column += l.n;
    }
  }

  // inner = act(gate) * up
  void project_glu(const DecodeLayer& layer, int64_t from, int64_t to) {
    const DecodeLinear* const both[] = {&layer.gate, &layer.up};
    float *gate = scratch().out, *up = gate + rows * DECODE_TILE;
    const int act = p.act == "silu" ? 0 : p.act == "gelu_tanh" ? 1 : p.act == "gelu" ? 2 : 3;
    for (int64_t u = from; u < to; ++u) {
      const int64_t n = u * DECODE_TILE, width = std::min(DECODE_TILE, layer.gate.n - n);
      tile_product(layer.gate, n, slot().x, 0, rows, scratch().panel, gate);
      tile_product(layer.up, n, slot().x, format_of(both, 1), rows, scratch().panel, up);
      for (int64_t i = 0; i < rows * DECODE_TILE; i += VL)
        store(gate + i, activate(act, load(gate + i)) * load(up + i));
      copy_tile(gate, rows, width, w.inner + n, layer.gate.n);
    }
  }

  static vfloat activate(int act, vfloat x) {
    if (act == 0) return x * vsigmoid(x);
    if (act == 1)
      return x * 0.5f * (1.f + vtanh((x + x * x * x * 0.044715f) * 0.7978845608028654f));
    if (act == 2) return x * 0.5f * (1.f + verf(x * 0.7071067811865476f));
    const vfloat positive = vmax(splat(0.f), x);  // relu2
    return positive * positive;
  }

  void project_head(int64_t from, int64_t to) {
    const int64_t n_all = p.head.n;
    for (int64_t u = from; u < to; ++u) {
      const int64_t n = u * DECODE_TILE, width = std::min(DECODE_TILE, n_all - n);
      float* out = scratch().out;
      tile_product(p.head, n, slot().x, 0, logits_count, scratch().panel, out);
      if (p.logit_softcap > 0)
        for (int64_t i = 0; i < logits_count * DECODE_TILE; i += VL)
          store(out + i, vtanh(load(out + i) * (1.f / p.logit_softcap)) * p.logit_softcap);
      copy_tile(out, logits_count, width, logits + n, n_all);
    }
  }

  // stream += after(branch); row = before(stream)
  void add_and_norm(int64_t m, float* stream, float* row, const float* after, const float* before) {
    const float* branch = w.branch + m * p.hidden;
    if (after) {
      rms_norm_into(branch, after, p.eps, p.hidden, row);
      branch = row;
    }
    add(stream, branch, p.hidden);
    if (before)
      rms_norm_into(stream, before, p.eps, p.hidden, row);
    else
      memcpy(row, stream, size_t(p.hidden) * sizeof(float));
  }

  DecodeAttention<C> attention(size_t index) const {
    const DecodeLayer& layer = p.layers[index];
    const int64_t slots = pages * p.kv_heads * page_size, plane = slots * p.head_dim;
    DecodeAttention<C> a{};
    a.heads = p.heads, a.kv_heads = p.kv_heads, a.head_dim = p.head_dim;
    a.width = (p.heads + 2 * p.kv_heads) * p.head_dim;
    a.qkv = w.qkv, a.keys = cache + int64_t(index) * 2 * plane, a.values = a.keys + plane;
    if (scales)
      a.key_scales = scales + int64_t(index) * 2 * slots, a.value_scales = a.key_scales + slots;
    a.table = table, a.max_pages = max_pages, a.page_size = page_size, a.lengths = lengths;
    a.shortest = shortest, a.longest = longest, a.window = layer.window;
    a.chunks = a.last_chunk() + 1, a.partials = w.partials;
    a.max = w.max, a.sum = w.sum, a.q = w.q;
    a.q_norm = layer.q_norm, a.k_norm = layer.k_norm, a.norm_all_heads = layer.norm_all_heads;
    a.eps = p.eps, a.scale = p.scale, a.softcap = p.softcap;
    if (layer.rotary >= 0) {
      a.cos = rotary[size_t(2 * layer.rotary)], a.sin = rotary[size_t(2 * layer.rotary + 1)];
      a.rotary_width = rotary_width[layer.rotary];
    }
    return a;
  }

  int64_t work_units(int work) const {
    if (work == works() - 1) return logits_count ? tiles(p.head) : 0;
    const size_t i = size_t(work / KINDS);
    const DecodeLayer& layer = p.layers[i];
    switch (work % KINDS) {
      case QKV: {
        int64_t all = 0;
        for (const DecodeLinear& l : layer.qkv) all += tiles(l);
        return all;
      }
      case ATTEND: {
        const DecodeAttention<C> a = attention(i);
        return rows * p.kv_heads * (a.last_chunk() + 1 - a.first_chunk());
      }
      case OUT:
        return tiles(layer.out);
      case GLU:
        return tiles(layer.gate);
      default:
        return tiles(layer.down);
    }
  }

  // Prepares the operand of `work` for rows [from, to). The head's operand is prepared for the rows
  // of `logits_indices`, attention's for pairs of a row and a key head.
  void prepare_rows(int work, int64_t from, int64_t to) {
    if (work == works() - 1)
      return prepare({&p.head}, from, to, [&](int64_t i, float*, float* row) {
        const int64_t m = logits_indices[i];
        add_and_norm(m, slot().stream + m * p.hidden, row, p.layers.back().norms[3], p.norm);
      });
    const size_t i = size_t(work / KINDS);
    const DecodeLayer& layer = p.layers[i];
    switch (work % KINDS) {
      case QKV: {
        const DecodeLinear* qkv[3];
        const int parts = layer.parts(qkv);
        return prepare(qkv, parts, from, to, [&](int64_t m, float* stream, float* row) {
          if (i) {
            add_and_norm(m, stream, row, p.layers[i - 1].norms[3], layer.norms[0]);
            return;
          }
          embed(p.embedding, tokens[m], p.embedding_scale, stream);
          if (layer.norms[0])
            rms_norm_into(stream, layer.norms[0], p.eps, p.hidden, row);
          else
            memcpy(row, stream, size_t(p.hidden) * sizeof(float));
        });
      }
      case ATTEND: {
        if (!split()) return;  // the tasks do it
        const DecodeAttention<C> a = attention(i);
        for (int64_t t = from; t < to; ++t)
          begin_row(a, t / p.kv_heads, t % p.kv_heads, scratch().q);
        return;
      }
      case OUT: {
        const DecodeAttention<C> attended = attention(i);
        return prepare({&layer.out}, from, to,
                       [&](int64_t m, float*, float* row) { combine(attended, m, row); });
      }
      case GLU:
        return prepare({&layer.gate, &layer.up}, from, to,
                       [&](int64_t m, float* stream, float* row) {
                         add_and_norm(m, stream, row, layer.norms[1], layer.norms[2]);
                       });
      default:
        return prepare({&layer.down}, from, to, [&](int64_t m, float*, float* row) {
          memcpy(row, w.inner + m * layer.down.k, size_t(layer.down.k) * sizeof(float));
        });
    }
  }

  void do_work(int work, int64_t from, int64_t to) {
    if (work == works() - 1) return project_head(from, to);
    const size_t i = size_t(work / KINDS);
    const DecodeLayer& layer = p.layers[i];
    const DecodeLinear *out = &layer.out, *down = &layer.down;
    switch (work % KINDS) {
      case QKV: {
        const DecodeLinear* qkv[3];
        const int parts = layer.parts(qkv);
        return project(qkv, parts, from, to, w.qkv, (p.heads + 2 * p.kv_heads) * p.head_dim);
      }
      case ATTEND: {
        const DecodeAttention<C> a = attention(i);
        const int64_t first = a.first_chunk(), chunks = a.last_chunk() + 1 - first;
        for (int64_t t = from; t < to; ++t) {
          if (chained)  // rows of a sequence after each other, for their keys in the L1
            attend_chunk(a, t % rows, t / rows % p.kv_heads, first + t / rows / p.kv_heads,
                         scratch().q, scratch().scores);
          else
            attend_chunk(a, t / chunks / p.kv_heads, t / chunks % p.kv_heads, first + t % chunks,
                         scratch().q, scratch().scores);
        }
        return;
      }
      case OUT:
        return project(&out, 1, from, to, w.branch, p.hidden);
      case GLU:
        return project_glu(layer, from, to);
      default:
        return project(&down, 1, from, to, w.branch, p.hidden);
    }
  }
};

template <class T>
void check_range(const char* argument, const T* x, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (x[i] < 0 || x[i] >= end)
      throw std::invalid_argument(std::string(argument) + ": expected values in [0, " +
                                  std::to_string(end) + "), got " + std::to_string(x[i]));
}

// Throws where an operand's size differs from the plan's or from another operand's. Values are
// checked in `decode_batch`.
inline void check_decode_sizes(const DecodePlan& p, const TensorView& tokens,
                               const TensorView& lengths, const TensorView& table,
                               const TensorView& cache, const TensorView& logits_indices,
                               const TensorView& logits) {
  check_contiguous("tokens", tokens), check_contiguous("lengths", lengths);
  check_contiguous("table", table), check_contiguous("cache", cache);
  check_contiguous("logits_indices", logits_indices), check_contiguous("logits", logits);
  check_size("cache", "layers:", int64_t(p.layers.size()), cache.size(0));
  check_size("cache", "heads:", p.kv_heads, cache.size(3));
  check_size("cache", "features:", p.head_dim, cache.size(5));
  check_size("lengths", "elements:", tokens.numel(), lengths.numel());
  check_size("table", "rows:", tokens.numel(), table.size(0));
  check_size("logits", "elements:", logits_indices.numel() * p.head.n, logits.numel());
  if (table.size(1) > 1 && cache.size(4) % 16)  // runs of scores are stored as whole vectors
    throw std::invalid_argument("cache: expected pages of a multiple of 16 tokens, got " +
                                std::to_string(cache.size(4)));
}

// The scales of an int8 cache, null for another.
inline float* scales_of_cache(const DecodePlan& p, const TensorView& cache,
                              const OptionalTensor& scales) {
  const bool scaled = cache.dtype() == DType::i8;
  if (scales.has_value() != scaled)
    throw std::invalid_argument(std::string("scales: expected ") + (scaled ? "those" : "none") +
                                " of a cache of " + name(cache.dtype()) + ", got " +
                                (scaled ? "none" : "some"));
  if (!scales) return nullptr;
  check_contiguous("scales", *scales);
  check_size("scales", "elements:", cache.numel() / p.head_dim, scales->numel());
  return scales->data<float>("scales");
}

// Throws where a token, a length or a page that will be read is out of range.
inline void check_decode_values(const DecodePlan& p, const DecodeBatch& s) {
  check_range("tokens", s.tokens, s.rows, p.embedding.n);
  check_range("logits_indices", s.logits_indices, s.logits_count, s.rows);
  if (!std::is_sorted(s.logits_indices, s.logits_indices + s.logits_count,
                      std::less_equal<int64_t>{}))
    throw std::invalid_argument("logits_indices: expected rows in order, each once");
  check_range("lengths", s.lengths, s.rows, s.max_pages * s.page_size);
  for (int64_t m = 0; m < s.rows; ++m)  // later entries are not read
    check_range("table", s.table + m * s.max_pages, s.lengths[m] / s.page_size + 1, s.pages);
}

// Whether some row continues the one before it: it has one more cached token, and the page that the
// one before writes to.
inline bool is_chained(const DecodeBatch& s) {
  for (int64_t m = 1; m < s.rows; ++m) {  // two sequences never write to one page
    const int64_t page = s.lengths[m - 1] / s.page_size;
    if (s.lengths[m] == s.lengths[m - 1] + 1 &&
        s.table[m * s.max_pages + page] == s.table[(m - 1) * s.max_pages + page])
      return true;
  }
  return false;
}

// Adds the tables of the rotary embedding: a pair for every layer that has one.
inline void add_rotary(const DecodePlan& p, const std::vector<TensorView>& rotary, DecodeBatch& s) {
  if (rotary.size() > 16) throw std::invalid_argument("rotary: expected at most 8 pairs of tables");
  for (size_t i = 0; i < rotary.size(); ++i) {
    check_contiguous("rotary", rotary[i]);
    if (rotary[i].size(0) < s.longest)
      throw std::invalid_argument("rotary: expected tables of at least " +
                                  std::to_string(s.longest) + " positions, got " +
                                  std::to_string(rotary[i].size(0)));
    s.rotary[i] = rotary[i].data<float>("rotary");
    const int64_t width = s.rotary_width[i / 2] = rotary[i].size(1);
    if (width > p.head_dim) check_size("rotary", "columns:", p.head_dim, width);
  }
  for (const DecodeLayer& layer : p.layers)
    if (layer.rotary >= int64_t(rotary.size() / 2))
      throw std::invalid_argument("rotary: expected tables for every layer, got " +
                                  std::to_string(rotary.size() / 2) + " pairs");
}

inline DecodeBatch decode_batch(const DecodePlan& p, const TensorView& tokens,
                                const TensorView& lengths, const TensorView& table,
                                const TensorView& cache, const OptionalTensor& scales,
                                const std::vector<TensorView>& rotary,
                                const TensorView& logits_indices, const TensorView& logits) {
  check_decode_sizes(p, tokens, lengths, table, cache, logits_indices, logits);
  DecodeBatch s{};
  s.scales = scales_of_cache(p, cache, scales);
  s.rows = tokens.numel(), s.logits_count = logits_indices.numel(), s.max_pages = table.size(1);
  s.pages = cache.size(2), s.page_size = cache.size(4);
  s.tokens = tokens.data<int64_t>("tokens"), s.lengths = lengths.data<int64_t>("lengths");
  s.table = table.data<int32_t>("table"),
  s.logits_indices = logits_indices.data<int64_t>("logits_indices");
  s.logits = logits.data<float>("logits");
  check_decode_values(p, s);
  s.chained = is_chained(s);
  s.shortest = *std::min_element(s.lengths, s.lengths + s.rows) + 1;
  s.longest = *std::max_element(s.lengths, s.lengths + s.rows) + 1;
  add_rotary(p, rotary, s);
  return s;
}

// The arrays of a step, in `workspace`.
inline DecodeWork decode_work(const DecodePlan& p, const DecodeBatch& s, int threads,
                              const TensorView& workspace) {
  DecodeWork work;
  const int64_t bytes = divide_workspace(p, s.rows, s.longest, threads, s.split(), nullptr, work);
  char* base = reinterpret_cast<char*>(workspace.data<uint8_t>("workspace"));
  char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(base) + 63) / 64 * 64);
  if (aligned - base + bytes > workspace.numel())
    throw std::invalid_argument("workspace: expected " + std::to_string(bytes + 64) +
                                " bytes, got " + std::to_string(workspace.numel()));
  divide_workspace(p, s.rows, s.longest, threads, s.split(), aligned, work);
  return work;
}

// tokens (M) int64; lengths (M) int64: cached tokens of each row; table (M, max_pages) int32: its
// pages in order (rows of another sequence write to none of them); cache (layers, 2, pages,
// kv_heads, page_size, head_dim): each row's next key and value are written to it; scales, of an
// int8 cache, (layers, 2, pages, kv_heads, page_size) float32; rotary: cos, sin, cos, sin ..
// (positions, R) float32; logits_indices (L) int64: rows; logits (L, V) float32 of these rows. Rows
// of one sequence are consecutive and in order.
inline void decode_step(const DecodePlan& p, const TensorView& tokens, const TensorView& lengths,
                        const TensorView& table, const TensorView& cache,
                        const OptionalTensor& scales, const std::vector<TensorView>& rotary,
                        const TensorView& workspace, const TensorView& logits_indices,
                        const TensorView& logits) {
  if (tokens.numel() == 0) return;
  const DecodeBatch batch =
      decode_batch(p, tokens, lengths, table, cache, scales, rotary, logits_indices, logits);
  const int threads = omp_get_max_threads();
  const DecodeWork work = decode_work(p, batch, threads, workspace);
  const auto run = [&](auto tag) {
    using C = decltype(tag);
    DecodeStep<C> step(batch, p, work, cache.data<C>("cache"));
    Phases phases(step);
#pragma omp parallel num_threads(threads) firstprivate(step)
    {
      FlushDenormals flush;
      step.thread = omp_get_thread_num();
      phases.work(step, omp_get_num_threads());
    }
  };
  if (cache.dtype() == DType::i8)
    run(int8_t{});
  else
    with_float(cache.dtype(), "cache", run);
}
