// Decoding: a few rows of one sequence and key head against a long cache. The rows are S queries x
// the heads that share the key head, at most MAX_ROWS; with one query any number of heads, MAX_ROWS
// at a time. Reading the cache is the bottleneck, so keys and values are read once, in place and in
// the dtype of the cache, without packing. The cache is divided into chunks of CHUNK keys, so that
// one sequence and head keeps several threads busy. The size of a chunk is fixed: results do not
// depend on the number of threads.
//
//   partial of a chunk, per row: m, l, O (Dv)   ->   combined in the chunks' order

constexpr int64_t MAX_ROWS = 8;  // with more, packing costs less than reading each key for each row
constexpr int64_t CHUNK =
    512;  // keys: 128 KiB of a bf16 cache at D 64, 20 us: a task worth a switch

FASTLM_INLINE bool decodes(const AttentionShape& s, const ScoreOptions& o, int64_t queries) {
  return !s.packed && !o.dropout && (queries == 1 || queries * (s.H / s.Hkv) <= MAX_ROWS);
}

template <class C>
FASTLM_INLINE vfloat load_cached(const C* p, int64_t n) {
  return n >= VL ? load(p) : load(p, int(n));
}

// scores[r][j] = q[r] . k[j] for `count` keys `stride` apart, VL keys at a time.
template <int R, class C>
void dot_rows(const float* q, int64_t ldq, const C* k, int64_t stride, int64_t count, int64_t D,
              float* scores, int64_t lds) {
  for (int64_t j = 0; j < count; j += VL) {
    vfloat sums[R][VL];
    const int group = int(std::min<int64_t>(VL, count - j));
    for (int t = 0; t < group; ++t) {
      const C* row = k + (j + t) * stride;
      vfloat acc[R] = {};
      for (int64_t d = 0; d < D; d += VL) {
        const vfloat x = load_cached(row + d, D - d);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r] += x * load(q + r * ldq + d);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][t] = acc[r];
    }
    for (int t = group; t < VL; ++t)
      for (int r = 0; r < R; ++r) sums[r][t] = vfloat{};
    for (int r = 0; r < R; ++r) {
      const vfloat total = sums_of(sums[r]);
      if (group == VL)
        store(scores + r * lds + j, total);
      else
        store(scores + r * lds + j, total, group);
    }
  }
}

// O[r] += sum over j of P[r][j] v[j]
template <int R, class C>
void weigh_rows(const float* P, int64_t ldp, const C* v, int64_t stride, int64_t count, int64_t Dv,
                float* O, int64_t ldo) {
  constexpr int W = R <= 2 ? 4 : R <= 4 ? 4 : 2;  // R x W accumulators stay in 16 registers
  for (int64_t d = 0; d < Dv; d += W * VL) {
    vfloat acc[R][W];
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w)
        acc[r][w] = d + w * VL < Dv ? load(O + r * ldo + d + w * VL) : vfloat{};
    const bool full = d + W * VL <= Dv;
    for (int64_t j = 0; j < count; ++j) {
      vfloat x[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w)
        x[w] = full              ? load_cached(v + j * stride + d + w * VL, VL)
               : d + w * VL < Dv ? load_cached(v + j * stride + d + w * VL, Dv - d - w * VL)
                                 : vfloat{};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vfloat p = splat(P[r * ldp + j]);
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) acc[r][w] += p * x[w];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w)
        if (d + w * VL < Dv) store(O + r * ldo + d + w * VL, acc[r][w]);
  }
}

template <class F>
FASTLM_INLINE void with_rows(int64_t rows, F&& f) {
  switch (rows) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    case 6:
      return f(std::integral_constant<int, 6>{});
    case 7:
      return f(std::integral_constant<int, 7>{});
    default:
      return f(std::integral_constant<int, 8>{});
  }
}

// One chunk of one sequence and key head, for the rows from row0 on; partial: MAX_ROWS x (2 +
// padded Dv) floats.
template <class T, class C>
void decode_chunk(const AttentionSequence<T, C>& p, const AttentionShape& s, const ScoreOptions& o,
                  int64_t b, int64_t g, int64_t row0, int64_t chunk, float k_scale, float* partial,
                  Buffer& memory) {
  const int64_t G = s.H / s.Hkv, rows = std::min(MAX_ROWS, G * p.queries - row0),
                ldq = round_up(s.D, VL), ldo = round_up(s.Dv, VL), ldp = 2 + ldo;
  float* q = memory.take<float>(MAX_ROWS * ldq);
  float* scores = memory.take<float>(MAX_ROWS * CHUNK);
  float* O = memory.take<float>(MAX_ROWS * ldo);
  const float scale = o.scale * k_scale;
  const bool plain = o.plain() && scale > 0;
  int64_t low = p.keys, high = 0;  // keys that some row of the chunk sees
  for (int64_t i = 0; i < p.queries; ++i) {
    const KeySpan see = s.span(i, p.queries, p.keys);
    low = std::min(low, see.first), high = std::max(high, see.end);
  }
  low = std::max(low, chunk * CHUNK), high = std::min(high, (chunk + 1) * CHUNK);
  memset(O, 0, size_t(rows * ldo) * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = g * G + (row0 + r) / p.queries, i = (row0 + r) % p.queries;
    const T* row = p.q + h * s.q.head + i * s.q.row;
    for (int64_t d = 0; d < s.D; d += VL)
      store(q + r * ldq + d, s.D - d >= VL ? load(row + d) : load(row + d, int(s.D - d)));
    partial[r * ldp] = -INFINITE, partial[r * ldp + 1] = 0;
  }
  if (low < high) {
    with_rows(rows, [&](auto R) {
      for (int64_t j = low; j < high;) {
        const C* k;
        const int64_t count = p.k.run(g, j, high, &k);
        dot_rows<R.value>(q, ldq, k, s.k.row, count, s.D, scores + j - low, CHUNK);
        j += count;
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = g * G + (row0 + r) / p.queries, i = (row0 + r) % p.queries;
      const KeySpan see = s.span(i, p.queries, p.keys);
      const int64_t first = std::max(see.first, low) - low, stop = std::min(see.end, high) - low;
      float* x = scores + r * CHUNK;
      if (first >= stop) {
        memset(x, 0, size_t(high - low) * sizeof(float));
        continue;
      }
      if (!plain)
        finish_scores(o, scale, b, h, i, i + p.keys - p.queries, low, high - low, x, nullptr);
      softmax_row<float>(x, first, stop, high - low, plain ? scale : 1.f, nullptr,
                         partial + r * ldp, partial + r * ldp + 1, x);
    }
    with_rows(rows, [&](auto R) {
      for (int64_t j = low; j < high;) {
        const C* v;
        const int64_t count = p.v.run(g, j, high, &v);
        weigh_rows<R.value>(scores + j - low, CHUNK, v, s.v.row, count, s.Dv, O, ldo);
        j += count;
      }
    });
  }
  for (int64_t r = 0; r < rows; ++r)
    memcpy(partial + r * ldp + 2, O + r * ldo, size_t(ldo) * sizeof(float));
}

// Combines row r of `chunks` partials, `stride_c` floats apart, to out and lse. A partial's m is
// overwritten by its weight.
template <class T>
void combine_chunks(float* partial, int64_t chunks, int64_t stride_c, float sink, float scale,
                    int64_t Dv, T* out, float* lse) {
  float m = sink, l = 0;
  for (int64_t c = 0; c < chunks; ++c) m = std::max(m, partial[c * stride_c]);
  const float offset = m == -INFINITE ? 0.f : m;
  if (sink != -INFINITE) l = std::exp2((sink - offset) * LOG2E);
  for (int64_t c = 0; c < chunks; ++c) {
    float& weight = partial[c * stride_c];  // 1 where it is the largest, as always with one chunk
    weight = weight == m ? 1.f : std::exp2((weight - offset) * LOG2E);
    l += partial[c * stride_c + 1] * weight;
  }
  for (int64_t d = 0; d < Dv; d += VL) {
    vfloat sum{};
    for (int64_t c = 0; c < chunks; ++c)
      sum += load(partial + c * stride_c + 2 + d) * partial[c * stride_c];
    const vfloat x = sum * (l == 0 ? 0.f : scale / l);
    if (Dv - d >= VL)
      store(out + d, x);
    else
      store(out + d, x, int(Dv - d));
  }
  *lse = l > 0 || l != l ? m + std::log(l) : -INFINITE;
}

constexpr int64_t ON_STACK = 48 << 10;  // bytes per thread: enough up to D, Dv = 256

// A set is up to MAX_ROWS rows of one sequence and key head, a task one chunk of its keys.
struct ChunkSizes {
  int64_t chunks, groups, sets, partial, thread;  // partial: floats of a task; thread: bytes

  ChunkSizes(const AttentionShape& s, const SequenceLengths& lengths)
      : chunks(std::max<int64_t>(1, (lengths.max_k + CHUNK - 1) / CHUNK)),
        groups((s.H / s.Hkv * lengths.max_q + MAX_ROWS - 1) / MAX_ROWS),
        sets(s.B * s.Hkv * groups),
        partial(MAX_ROWS * (2 + round_up(s.Dv, VL))),
        thread(Buffer::size_of<float>(MAX_ROWS * round_up(s.D, VL)) +
               Buffer::size_of<float>(MAX_ROWS * CHUNK) +
               Buffer::size_of<float>(MAX_ROWS * round_up(s.Dv, VL)) +
               Buffer::size_of<float>(partial)) {}
  bool on_stack() const { return thread <= ON_STACK; }
  // Of the workspace: with several chunks the partials, then each thread's arrays, where they do
  // not fit on the stack.
  int64_t bytes() const {
    return (chunks > 1 ? round_up(sets * chunks * partial * int64_t(sizeof(float)), 64) : 0) +
           (on_stack() ? 0 : omp_get_max_threads() * thread);
  }
};

template <class T, class C>
void forward_by_chunks(const AttentionShape& s, const ScoreOptions& o,
                       const AttentionSequence<T, C>* sequences, const ChunkSizes& sizes,
                       const float* k_scale, const float* v_scale, T* out, float* lse,
                       Workspace workspace) {
  // sequence b, key head g, its rows from row0 on; their partials are `chunks` x `stride_c` floats
  const int64_t chunks = sizes.chunks, groups = sizes.groups, sets = sizes.sets, G = s.H / s.Hkv,
                stride_c = sizes.partial, ldp = stride_c / MAX_ROWS, tasks = sets * chunks;
  int64_t total = 0;
  for (int64_t b = 0; b < s.B; ++b) total += sequences[b].keys;
  float* all = chunks > 1 ? workspace.take<float>(tasks * stride_c) : nullptr;
  const bool on_stack = sizes.on_stack();
  workspace.divide(on_stack ? 0 : sizes.thread);
  const auto combine = [&](int64_t set, float* partials) {
    const int64_t b = set / groups / s.Hkv, g = set / groups % s.Hkv,
                  row0 = set % groups * MAX_ROWS;
    const AttentionSequence<T, C>& p = sequences[b];
    for (int64_t r = 0; r < std::min(MAX_ROWS, G * p.queries - row0); ++r) {
      const int64_t h = g * G + (row0 + r) / p.queries, i = (row0 + r) % p.queries;
      combine_chunks(partials + r * ldp, chunks, stride_c, o.sinks ? o.sinks[h] : -INFINITE,
                     v_scale ? v_scale[g] : 1.f, s.Dv, out + s.out.at(b, h, p.q0 + i),
                     lse + s.lse.at(b, h, p.q0 + i));
    }
  };
  const auto attend = [&](int64_t t, Buffer& memory) {
    const int64_t set = t / chunks, b = set / groups / s.Hkv, g = set / groups % s.Hkv;
    memory.clear();
    float* partial = chunks == 1 ? memory.take<float>(stride_c) : all + t * stride_c;
    decode_chunk(sequences[b], s, o, b, g, set % groups * MAX_ROWS, t % chunks,
                 k_scale ? k_scale[g] : 1.f, partial, memory);
    if (chunks == 1) combine(set, partial);
  };
  // 131072 elements take one thread 10 us; below that a parallel region does not pay
  if (total * s.Hkv * groups * (s.D + s.Dv) <= 131072) {
    alignas(64) char local[ON_STACK];
    Buffer memory(on_stack ? local : workspace.p);
    FlushDenormals flush;
    for (int64_t t = 0; t < tasks; ++t) attend(t, memory);
    for (int64_t set = 0; chunks > 1 && set < sets; ++set)
      combine(set, all + set * chunks * stride_c);
    return;
  }
#pragma omp parallel num_threads(workspace.threads)
  {
    alignas(64) char local[ON_STACK];
    Buffer memory(on_stack ? local : workspace.thread_part());
    FlushDenormals flush;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < tasks; ++t) attend(t, memory);
    if (chunks > 1) {
#pragma omp for
      for (int64_t set = 0; set < sets; ++set) combine(set, all + set * chunks * stride_c);
    }
  }
}
