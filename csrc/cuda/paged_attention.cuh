// The parts that the kernels of paged_attention share: the division of keys among blocks, the keys
// that a row sees, the merge of a row's partial results.
//
// A unit is the rows of q that read the keys of one sequence and one key head: S * group of them
// (or one row group of those). The tiles of 64 keys of all units are numbered consecutively, and
// every block takes `share` consecutive tiles, across units:
//
//     units    | sequence 0, head 0 | 0, 1 | ...      | sequence 1, head 0 | ...
//     blocks   |     0     |     1     |     2     |     3     |     4     |
//
// A block that has a full unit finishes it. Where several blocks share a unit, each writes its
// largest score, sum and out in float32 to a slot: block i uses slot 2 i for a unit that an earlier
// block began, and slot 2 i + 1 for a unit that a later block ends. The block that begins such a
// unit records it, and `paged_combine_kernel` adds the slots in order. Blocks compute their tiles
// from seq_lens: the host reads nothing from the device.
#pragma once

#include <cmath>

#include "cuda/launch.h"
#include "cuda/ops.h"

namespace fastlm::paged {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct PagedWork {
  const int* seq_lens;
  int batch, queries;
  int window;   // 0: none
  int longest;  // keys that the page table can hold
  int units;    // per sequence: key heads * row_groups
  int row_groups;
  int min_tiles;  // the fewest tiles of a block
};

struct QueryStrides {
  int64_t outer, row, head;  // strides of sequence, query, head
};
struct CacheStrides {
  int page, row;  // 32 bits: one multiplication to 64 each
  int64_t head;
};

// n / by for 0 <= n < 2^31 (Granlund and Montgomery 1994)
struct Divisor {
  uint32_t magic, shift;
  int by;
};
inline Divisor divisor(int by) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < static_cast<uint64_t>(by)) ++shift;
  return {static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + by - 1) / by), shift, by};
}
DEVICE int divide(int n, const Divisor& d) {
  return static_cast<int>(__umulhi(static_cast<uint32_t>(n) << 1, d.magic) >> d.shift);
}

template <class T, class C>
struct PagedProblem {
  const T* q;        // (B, S, H, D)
  const C *k, *v;    // (pages, page_size, Hkv, D or Dv)
  T* out;            // (B, S, H, Dv)
  float* lse;        // (B, H, S)
  float* part;       // (2 blocks, ROWS, Dv)
  float2* part_sum;  // (2 blocks, ROWS): largest score and sum, in units of log2(e)
  int4* record;      // (blocks,): sequence, unit, slots of the unit that continues after the block
  const int* table;  // (B, ..), row stride table_row
  const float *k_scale, *v_scale;            // (Hkv,) or null
  const float *sinks, *alibi_slopes, *bias;  // (H,), (H,), (B, H, S, T) or null
  int64_t bias_step[4];                      // strides of sequence, head, query, key
  int bias_keys;
  QueryStrides q_step;
  CacheStrides k_step, v_step;
  int64_t table_row;
  Divisor page_size;
  int pages, heads, group, rows, d, dv;
  float scale, softcap, softcap_inverse;  // in units of log2(e); softcap 0: none
  bool causal;
  bool plain;  // no softcap, slopes, bias
  PagedWork work;
};

struct KeySpan {
  int first, end, all;  // of a sequence: the range that some row sees, and its number of keys
};
DEVICE KeySpan keys_of(const PagedWork& w, int b) {
  const int all = min(max(load(w.seq_lens + b), 0), w.longest);
  return {w.window ? max(all - w.queries - w.window + 1, 0) : 0, all, all};
}
DEVICE int tiles_of(const KeySpan& k) {
  return max((k.end - k.first + PAGED_TILE - 1) / PAGED_TILE, 1);
}

// One block's part of a unit.
struct Piece {
  int b, kv_head, row_group;
  int begin, end, all;  // keys begin to end - 1 of the sequence's `all`
  int slot;             // -1: the full unit
};

template <int THREADS>
DEVICE int exclusive_sum_of_block(int n, int& total) {
  SHARED(int, part, THREADS / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = n;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  __syncthreads();  // `part` may still be read
  if (lane == 31) store(part + warp, sum);
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) {
    const int of_warp = load(part + w);
    if (w < warp) before += of_warp;
    total += of_warp;
  }
  return before + sum - n;
}

// Calls attend(piece) for every piece of this block, all threads together.
template <int THREADS, class F>
DEVICE void for_each_piece(const PagedWork& w, int4* record, F&& attend) {
  SHARED(int, location, 2);
  int tiles = 0, total;
  for (int b = threadIdx.x; b < w.batch; b += THREADS) tiles += tiles_of(keys_of(w, b));
  exclusive_sum_of_block<THREADS>(tiles, total);
  total *= w.units;
  const int blocks = gridDim.x, block = blockIdx.x;
  const int share = max((total + blocks - 1) / blocks, w.min_tiles);
  const int first = block * share;
  int remaining = min(share, total - first);
  if (threadIdx.x == 0) store(record + block, int4{0, 0, 0, 0});
  if (remaining <= 0) return;
  for (int from = 0, before = 0; before <= first; from += THREADS) {
    const int b = from + threadIdx.x;
    const int n = b < w.batch ? tiles_of(keys_of(w, b)) * w.units : 0;
    const int begin = before + exclusive_sum_of_block<THREADS>(n, total);
    if (begin <= first && first < begin + n) {
      store(location, b);
      store(location + 1, first - begin);
    }
    before += total;
  }
  __syncthreads();
  int b = load(location), at = load(location + 1);
  while (remaining > 0) {
    const KeySpan keys = keys_of(w, b);
    const int n = tiles_of(keys), unit = at / n, tile = at - unit * n;
    const int count = min(remaining, n - tile);
    const bool begins = tile == 0, ends = tile + count == n;
    const int begin = keys.first + tile * PAGED_TILE;
    const int kv_head = unit / w.row_groups;
    const Piece piece{b,
                      kv_head,
                      unit - kv_head * w.row_groups,
                      begin,
                      min(begin + count * PAGED_TILE, keys.end),
                      keys.all,
                      begins && ends ? -1 : 2 * block + begins};
    if (begins && !ends && threadIdx.x == 0)
      store(record + block, int4{b, unit, 1 + (n - count + share - 1) / share, 0});
    remaining -= count;
    at += count;
    if (at == n * w.units) ++b, at = 0;
    attend(piece);
  }
}

// Offsets in elements of key j of sequence b in k and in v, for head 0.
struct KeyAt {
  int64_t k, v;
};
template <class T, class C>
DEVICE int page_of(const PagedProblem<T, C>& p, int b, int j) {
  const int page = load(p.table + b * p.table_row + divide(j, p.page_size));
  return min(max(page, 0), p.pages - 1);  // a kernel cannot raise an error: stay inside the cache
}
template <class T, class C>
DEVICE KeyAt key_at(const PagedProblem<T, C>& p, int page, int j) {
  const int slot = j - divide(j, p.page_size) * p.page_size.by;
  return {int64_t{page} * p.k_step.page + int64_t{slot} * p.k_step.row,
          int64_t{page} * p.v_step.page + int64_t{slot} * p.v_step.row};
}

// A row of q: its position, and the keys that it sees. `score` reads the values that only options
// need, because registers are scarce.
struct QueryRow {
  int query, head;
  int first, end;
  DEVICE bool exists() const { return query >= 0; }
};
template <int ROWS, class T, class C>
DEVICE QueryRow row_of(const PagedProblem<T, C>& p, const Piece& piece, int r) {
  r += piece.row_group * ROWS;
  if (r >= p.rows) return {-1, 0, 0, 0};
  const int query = r / p.group, head = piece.kv_head * p.group + r % p.group;
  const int position = query + piece.all - p.work.queries;  // among the keys
  return {query, head, p.work.window ? max(position - p.work.window + 1, 0) : 0,
          p.causal ? min(piece.all, position + 1) : piece.all};
}

// log2(e) times the score of key j, from q k: scale, softcap, ALiBi, bias, mask. `scale` includes
// the factor log2(e).
template <class T, class C>
DEVICE float score(const PagedProblem<T, C>& p, const Piece& piece, const QueryRow& row, int j,
                   float product, float scale) {
  const bool is_visible = j >= row.first && j < min(row.end, piece.end);
  product *= scale;
  if (!p.plain) {
    if (p.softcap > 0) product = tanhf(product * p.softcap_inverse) * p.softcap;
    if (p.alibi_slopes && is_visible) {
      const int distance = row.query + piece.all - p.work.queries - j;
      product -= load(p.alibi_slopes + row.head) * kLog2e * fabsf(static_cast<float>(distance));
    }
    if (p.bias && is_visible && j < p.bias_keys)
      product += load(p.bias + piece.b * p.bias_step[0] + row.head * p.bias_step[1] +
                      row.query * p.bias_step[2] + j * p.bias_step[3]) *
                 kLog2e;
  }
  return is_visible ? product : -INFINITY;
}

// The keys that all rows of a piece see; none where an option changes the scaled product.
struct KeyRange {
  int first, end;
  DEVICE bool has(int begin, int count) const { return begin >= first && begin + count <= end; }
};
template <class T, class C>
DEVICE KeyRange visible_to_all(const PagedProblem<T, C>& p, const Piece& piece) {
  if (!p.plain) return {0, 0};
  return {p.work.window ? max(piece.all - p.work.window, 0) : 0,
          p.causal ? min(piece.all - p.work.queries + 1, piece.end) : piece.end};
}

template <class T, class C>
DEVICE float scale_of(const PagedProblem<T, C>& p, int kv_head) {
  return p.scale * (p.k_scale ? load(p.k_scale + kv_head) : 1.0f);
}

DEVICE float or_zero(float top) { return top == -INFINITY ? 0.0f : top; }

// Adds the sink. Returns the factor of out, and the natural lse, from `top` and `sum` of all keys.
struct RowFinish {
  float factor, lse;
};
template <class T, class C>
DEVICE RowFinish finish(const PagedProblem<T, C>& p, int head, int kv_head, float top, float sum) {
  const float sink = p.sinks ? load(p.sinks + head) * kLog2e : -INFINITY;
  const float highest = fmaxf(top, sink), zero = or_zero(highest);
  const float weight = exp2f(top - zero), total = sum * weight + exp2f(sink - zero);
  if (total == 0) return {0, -INFINITY};
  const float v_scale = p.v_scale ? load(p.v_scale + kv_head) : 1.0f;
  return {v_scale * weight / total, (zero + log2f(total)) * kLn2};
}

// Merges the results of the COPIES warps that shared the keys of a piece, `out` (COPIES, ROWS,
// pitch) and `sums` (COPIES, ROWS), and writes them: finished, or to the piece's slot.
template <int THREADS, int COPIES, int ROWS, class T, class C>
DEVICE void write_rows(const PagedProblem<T, C>& p, const Piece& piece, const float* out, int pitch,
                       const float2* sums) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < ROWS; r += THREADS / 32) {
    const QueryRow row = row_of<ROWS>(p, piece, r);
    if (!row.exists()) break;
    float2 sum[COPIES];
    float top = -INFINITY, total = 0;
#pragma unroll
    for (int c = 0; c < COPIES; ++c) {
      sum[c] = load(sums + c * ROWS + r);
      top = fmaxf(top, sum[c].x);
    }
#pragma unroll
    for (int c = 0; c < COPIES; ++c) {
      sum[c].x = exp2f(sum[c].x - or_zero(top));
      total += sum[c].y * sum[c].x;
    }
    const bool complete = piece.slot < 0;
    const int64_t to = complete
                           ? (int64_t{piece.b} * p.work.queries + row.query) * p.heads + row.head
                           : int64_t{piece.slot} * ROWS + r;
    RowFinish last{1, 0};
    if (complete) last = finish(p, row.head, row.head / p.group, top, total);
    for (int at = lane; at < p.dv; at += 32) {
      float x = 0;
#pragma unroll
      for (int c = 0; c < COPIES; ++c) x += load(out + (c * ROWS + r) * pitch + at) * sum[c].x;
      if (complete)
        store(p.out + to * p.dv + at, from_float<T>(x * last.factor));
      else
        store(p.part + to * p.dv + at, x);
    }
    if (lane == 0 && complete)
      store(p.lse + (int64_t{piece.b} * p.heads + row.head) * p.work.queries + row.query, last.lse);
    if (lane == 0 && !complete) store(p.part_sum + to, float2{top, total});
  }
}

// Rows of 16 bits by matrix instructions, `rows` (16 or 64) of a unit at once
// (paged_attention_mma.cu).
template <class T, class C>
void start_mma(const PagedProblem<T, C>& p, int rows, int blocks, cudaStream_t stream);

}  // namespace fastlm::paged
