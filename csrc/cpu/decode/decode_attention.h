// Attention of decode_step.h: one query per head against a cache, cut into chunks of DECODE_KEYS
// keys. A task is one chunk for all heads that share a key head. Keys are stored in pages; a run is
// the part of a chunk that one page holds, and where a chunk is cut into runs changes no sum:
//
//   key j of row m    0              128            256            384
//   chunk c           |      0       |      1       |      2       |  ..
//   page              |     7     |     2     |     9     |     4     |  ..
//   run               |           |  |        |     |     |        |  |
//
// Index legend:
//
//   m   row of the step, a token          h   query head
//   g   key head                          r   query head among the `ratio` of key head g
//   c   chunk of a row's keys             j   key of a row's sequence
//   d   feature of a head; D (`head_dim`) of them; a multiple of 16 floats in partials
//   C   type of the cache
//
// Keys and values are read from the memory once, by the first four heads of a key head, and from
// the L1 by its other heads: a chunk has 16 KiB of each. Queries, scores and partials stay in the
// L2.
//
// int8 keys and values have a scale each, absmax / 127 over their features. Queries are rounded in
// the same way, so a score is a sum of integers times two scales. Values become floats in
// registers; their scales multiply the weights. A key that is not finite has such a scale, so the result is
// NaN.
//
//   partial of a head and chunk: max, sum, O (D)    combined in the chunks' order by `combine`

inline int64_t partial_size(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
// A query as floats, and in front of them its int8.
inline int64_t query_size(int64_t head_dim) { return 3 * partial_size(head_dim); }

template <class C>
struct DecodeAttention {
  int64_t heads, kv_heads, head_dim, width;
  const float* qkv;                  // (M, width): q heads, k heads, v heads
  C *keys, *values;                  // (pages, kv_heads, page_size, head_dim)
  float *key_scales, *value_scales;  // of int8: (pages, kv_heads, page_size)
  const int32_t* table;              // (M, max_pages): the pages of a row, in order
  int64_t max_pages, page_size;
  const int64_t* lengths;     // (M): cached tokens, without the new one
  int64_t shortest, longest;  // of all rows, with the new token
  int64_t window;             // 0: none
  int64_t chunks;
  float *partials, *max, *sum;  // (M, heads, chunks, partial_size); (M, heads, chunks)
  float* q;                     // (M, heads, query_size): where `begin_row` has run, else null
  const float *q_norm, *k_norm;
  bool norm_all_heads;
  float eps, scale, softcap;
  const float *cos, *sin;
  int64_t rotary_width;

  int64_t ratio() const { return heads / kv_heads; }
  int64_t length(int64_t m) const { return lengths[m] + 1; }
  int64_t first_key(int64_t m) const {
    return window ? std::max(length(m) - window, int64_t(0)) : 0;
  }
  int64_t first_chunk() const {  // that any row sees
    return (window ? std::max<int64_t>(0, shortest - window) : 0) / DECODE_KEYS;
  }
  int64_t last_chunk() const { return (longest - 1) / DECODE_KEYS; }
  // Index of key j of row m and key head g in `key_scales`, and of its value in `value_scales`.
  int64_t slot(int64_t m, int64_t g, int64_t j) const {
    const int64_t page = table[m * max_pages + j / page_size];
    return (page * kv_heads + g) * page_size + j % page_size;
  }
  // Index of its first element in `keys` and `values`.
  int64_t offset(int64_t m, int64_t g, int64_t j) const { return slot(m, g, j) * head_dim; }
  int64_t run_end(int64_t j, int64_t end) const {
    return std::min(end, (j / page_size + 1) * page_size);
  }
  float* partial(int64_t m, int64_t h, int64_t c) const {
    return partials + ((m * heads + h) * chunks + c) * partial_size(head_dim);
  }
};

FASTLM_INLINE float rms_factor(const float* x, int64_t n, float eps) {
  vfloat sum{};
  for (int64_t i = 0; i < n; i += VL) {
    const int count = int(std::min<int64_t>(VL, n - i));
    const vfloat v = count == VL ? load(x + i) : load(x + i, count);
    sum += v * v;
  }
  return 1.f / std::sqrt(hsum(sum) / float(n) + eps);
}
FASTLM_INLINE void scale_by(const float* x, const float* weight, float factor, int64_t n,
                            float* y) {
  for (int64_t i = 0; i < n; i += VL) {
    const int count = int(std::min<int64_t>(VL, n - i));
    if (count == VL)
      store(y + i, load(x + i) * factor * load(weight + i));
    else
      store(y + i, load(x + i, count) * factor * load(weight + i, count), count);
  }
}
inline void rms_norm_into(const float* x, const float* weight, float eps, int64_t n, float* y) {
  scale_by(x, weight, rms_factor(x, n, eps), n, y);
}
inline void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) {
    const int count = int(std::min<int64_t>(VL, n - i));
    if (count == VL)
      store(x + i, load(x + i) + load(y + i));
    else
      store(x + i, load(x + i, count) + load(y + i, count), count);
  }
}

// Head `h` of a row's `all` heads: norm, rotation, times `factor`.
template <class C>
void prepare_head(const DecodeAttention<C>& a, const float* all, int64_t heads, int64_t h,
                  const float* norm, int64_t position, float factor, float* out) {
  const int64_t D = a.head_dim;
  const float* x = all + h * D;
  if (norm && a.norm_all_heads)
    scale_by(x, norm + h * D, rms_factor(all, heads * D, a.eps), D, out);
  else if (norm)
    rms_norm_into(x, norm, a.eps, D, out);
  else
    memcpy(out, x, size_t(D) * sizeof(float));
  if (a.cos) {
    const float *cos = a.cos + position * a.rotary_width, *sin = a.sin + position * a.rotary_width;
    const int64_t half = a.rotary_width / 2;
    for (int64_t j = 0; j < half; j += VL) {
      const int n = int(std::min<int64_t>(VL, half - j));
      const vfloat lo = load(out + j, n), hi = load(out + half + j, n);
      store(out + j, lo * load(cos + j, n) - hi * load(sin + j, n), n);
      store(out + half + j, hi * load(cos + half + j, n) + lo * load(sin + half + j, n), n);
    }
  }
  for (int64_t i = 0; i < D; ++i) out[i] *= factor;
  for (int64_t i = D; i < (D + 15) / 16 * 16; ++i) out[i] = 0;  // products read whole vectors
}

template <class C>
FASTLM_INLINE void prefetch_row(const C* row, int64_t n) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < n * int64_t(sizeof(C)); i += 64) __builtin_prefetch(p + i);
}

template <class C>
constexpr bool SCALED = std::is_same_v<C, int8_t>;

// scores[r][j] = q[r] . k[j], VL keys at a time. `ahead`: the values, which are read next; they are
// prefetched at the same offsets.
template <int R, int FIXED, class C>
void dot_keys(const float* q, int64_t ldq, const C* k, const C* ahead, int64_t count, int64_t width,
              float* scores) {
  const int64_t D = FIXED ? FIXED : width;
  for (int64_t j = 0; j < count; j += VL) {
    vfloat sums[R][VL];
    const int group = int(std::min<int64_t>(VL, count - j));
    const auto dot = [&](auto K, int t) {  // K keys share a load of q
      const C* row = k + (j + t) * D;
      vfloat acc[R][K.value] = {};
      for (int i = 0; i < K.value; ++i) prefetch_row(ahead + (j + t + i) * D, D);
#pragma GCC unroll 4
      for (int64_t d = 0; d < D; d += VL) {
        vfloat x[K.value];
#pragma GCC unroll 4
        for (int i = 0; i < K.value; ++i) {
          const C* at = row + i * D + d;
          x[i] = D - d >= VL ? load(at) : load(at, int(D - d));
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const vfloat y = load(q + r * ldq + d);
#pragma GCC unroll 4
          for (int i = 0; i < K.value; ++i) acc[r][i] = fused(x[i], y, acc[r][i]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < K.value; ++i) sums[r][t + i] = acc[r][i];
    };
    constexpr int KEYS = R == 1 ? 4 : 2;
    int t = 0;
    for (; t + KEYS <= group; t += KEYS) dot(std::integral_constant<int, KEYS>{}, t);
    for (; t < group; ++t) dot(std::integral_constant<int, 1>{}, t);
    for (; t < VL; ++t)
      for (int r = 0; r < R; ++r) sums[r][t] = vfloat{};
    for (int r = 0; r < R; ++r)  // a row of scores is whole vectors
      store(scores + r * DECODE_KEYS + j, sums_of(sums[r]));
  }
}

// A query of int8 is stored in the memory of one of floats: `int8_floats` of integers, zeros from D
// on, its scale, and the start of its sums (int32): -OFFSET<8> times its sum.
inline int64_t int8_floats(int64_t head_dim) { return (head_dim + 4 * VL - 1) / (4 * VL) * VL; }

FASTLM_INLINE vint lanes_of(const int8_t* p, int64_t n) {  // zeros beyond n bytes
  int8_t t[4 * VL] = {};
  memcpy(t, p, size_t(n));
  return load_lanes(reinterpret_cast<const uint8_t*>(t));
}

// dot_keys of int8. Sums stay below 2^24, so they are exact as floats, in any order.
template <int R, int FIXED>
void dot_int8_keys(const float* q, int64_t ldq, const int8_t* k, const int8_t* ahead,
                   const float* scales, int64_t count, int64_t width, float* scores) {
  const int64_t D = FIXED ? FIXED : width;
  float q_scale[R], start[R];
  for (int r = 0; r < R; ++r) {
    const float* after = q + r * ldq + int8_floats(D);
    int32_t sum;
    memcpy(&sum, after + 1, sizeof sum);
    q_scale[r] = after[0], start[r] = float(sum);
  }
  for (int64_t j = 0; j < count; j += VL) {
    vfloat sums[R][VL];
    const int group = int(std::min<int64_t>(VL, count - j));
    for (int t = 0; t < group; ++t) {
      const int8_t* row = k + (j + t) * D;
      prefetch_row(ahead + (j + t) * D, D);
      vint acc[R] = {};
#pragma GCC unroll 4
      for (int64_t d = 0; d < D; d += 4 * VL) {
        vint x = D - d >= 4 * VL ? load_lanes(reinterpret_cast<const uint8_t*>(row + d))
                                 : lanes_of(row + d, D - d);
        if constexpr (OFFSET<8> != 0) x ^= int32_t(0x80808080);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const vint y = load_lanes(reinterpret_cast<const uint8_t*>(q + r * ldq) + d);
          if constexpr (OFFSET<8> != 0)
            acc[r] = dot4<false>(acc[r], x, y);
          else
            acc[r] = dot4<true>(acc[r], y, x);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][t] = __builtin_convertvector(acc[r], vfloat);
    }
    for (int t = group; t < VL; ++t)
      for (int r = 0; r < R; ++r) sums[r][t] = vfloat{};
    const vfloat scale = group == VL ? load(scales + j) : load(scales + j, group);
    for (int r = 0; r < R; ++r)
      store(scores + r * DECODE_KEYS + j, (sums_of(sums[r]) + start[r]) * (scale * q_scale[r]));
  }
}

// O[r] += sum over j of P[r][j] v[j], from 0 in the `first` run. `ahead`: the keys of the next
// chunk, prefetched.
template <int R, int FIXED, class C>
void weigh_values(const float* P, const C* v, const C* ahead, int64_t count, int64_t width,
                  bool first, float* O, int64_t ldo) {
  const int64_t D = FIXED ? FIXED : width;
  // R x W accumulators, R weights and one vector of values in the registers: a spilled accumulator
  // is a chain through memory
  constexpr int W = R == 4 && VL < 16 ? 2 : 4;
  for (int64_t d = 0; d < D; d += W * VL) {
    vfloat acc[R][W] = {};
    if (!first)
      for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w)
          if (d + w * VL < D) acc[r][w] = load(O + r * ldo + d + w * VL);
    const bool full = FIXED % (W * VL) == 0 && FIXED ? true : d + W * VL <= D;
    for (int64_t j = 0; j < count; ++j) {
      if (d == 0) prefetch_row(ahead + j * D, D);
      vfloat p[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) p[r] = splat(P[r * DECODE_KEYS + j]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        const C* at = v + j * D + d + w * VL;
        const int64_t left = D - d - w * VL;
        const vfloat x = full       ? load(at)
                         : left > 0 ? load(at, int(std::min<int64_t>(VL, left)))
                                    : vfloat{};
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][w] = fused(p[r], x, acc[r][w]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w)
        if (d + w * VL < D) store(O + r * ldo + d + w * VL, acc[r][w]);
  }
}

// P[r][j] *= scales[j] for `rows` rows
inline void scale_weights(float* P, const float* scales, int64_t rows, int64_t count) {
  int64_t j = 0;
  for (; j + VL <= count; j += VL)
    for (int64_t r = 0; r < rows; ++r) {
      float* p = P + r * DECODE_KEYS + j;
      store(p, load(p) * load(scales + j));
    }
  for (; j < count; ++j)
    for (int64_t r = 0; r < rows; ++r) P[r * DECODE_KEYS + j] *= scales[j];
}

// Writes D features to the cache at `to`; returns the scale of int8.
template <class C>
float put(const float* x, int64_t D, C* to) {
  float inverse = 1.f, scale = 1.f;
  if constexpr (SCALED<C>) scale = int8_scale(x, D, &inverse);
  for (int64_t i = 0; i < D; i += VL) {
    const int n = int(std::min<int64_t>(VL, D - i));
    const vfloat v = load(x + i, n);
    if constexpr (SCALED<C>) {
      const narrow bytes = to_bytes(round_to_int(v * inverse));
      memcpy(to + i, &bytes, size_t(n));
    } else {
      store(to + i, v, n);
    }
  }
  return scale;
}

// Writes the new key and value of row m and key head g to the cache; `key`: scratch for one key.
template <class C>
void append(const DecodeAttention<C>& a, int64_t m, int64_t g, float* key) {
  const int64_t D = a.head_dim, position = a.lengths[m], slot = a.slot(m, g, position);
  const float *row = a.qkv + m * a.width, *value = row + (a.heads + a.kv_heads + g) * D;
  prepare_head(a, row + a.heads * D, a.kv_heads, g, a.k_norm, position, 1.f, key);
  const float of_key = put(key, D, a.keys + slot * D),
              of_value = put(value, D, a.values + slot * D);
  if constexpr (SCALED<C>) a.key_scales[slot] = of_key, a.value_scales[slot] = of_value;
}

// The queries of row m for key head g, ready for the products: q (ratio, query_size)
template <class C>
void prepare_queries(const DecodeAttention<C>& a, int64_t m, int64_t g, float* q) {
  const int64_t D = a.head_dim, ratio = a.ratio();
  for (int64_t r = 0; r < ratio; ++r, q += query_size(D)) {
    float* after = q + int8_floats(D);  // of int8
    float* turned = SCALED<C> ? after + 2 : q;
    prepare_head(a, a.qkv + m * a.width, a.heads, g * ratio + r, a.q_norm, a.lengths[m], a.scale,
                 turned);
    if constexpr (SCALED<C>) {
      float inverse;
      after[0] = int8_scale(turned, D, &inverse);
      const int32_t sum = -OFFSET<8> * to_int8(turned, D, int8_floats(D) * 4, inverse,
                                               reinterpret_cast<int8_t*>(q));
      memcpy(after + 1, &sum, sizeof sum);
    }
  }
}

// Prepares what the tasks of row m and key head g share; `key`: scratch for one key.
template <class C>
void begin_row(const DecodeAttention<C>& a, int64_t m, int64_t g, float* key) {
  append(a, m, g, key);
  prepare_queries(a, m, g, a.q + (m * a.heads + g * a.heads / a.kv_heads) * query_size(a.head_dim));
}

// f(std::integral_constant<int, R>, r) over the `ratio` heads of a key head, in fours
template <class F>
FASTLM_INLINE void in_fours(int64_t ratio, F f) {
  int64_t r = 0;
  for (; ratio - r >= 4; r += 4) f(std::integral_constant<int, 4>{}, r);
  if (ratio - r == 3) f(std::integral_constant<int, 3>{}, r);
  if (ratio - r == 2) f(std::integral_constant<int, 2>{}, r);
  if (ratio - r == 1) f(std::integral_constant<int, 1>{}, r);
}

// A task: chunk c of row m for the query heads of key head g. [low, high): the keys that the row
// sees of it.
struct DecodeChunk {
  int64_t m, g, c, ratio, low, high;
  template <class C>
  DecodeChunk(const DecodeAttention<C>& a, int64_t m, int64_t g, int64_t c)
      : m(m),
        g(g),
        c(c),
        ratio(a.ratio()),
        low(std::max(c * DECODE_KEYS, a.first_key(m))),
        high(std::min((c + 1) * DECODE_KEYS, a.length(m))) {}
};

// scores[r][j - low] = q[r] . k[j], run by run
template <class C>
FASTLM_INLINE void chunk_scores(const DecodeAttention<C>& a, const DecodeChunk& t, const float* q,
                                float* scores) {
  const int64_t D = a.head_dim, ldq = query_size(D);
  for (int64_t j = t.low, end; j < t.high; j = end) {
    end = a.run_end(j, t.high);
    const int64_t slot = a.slot(t.m, t.g, j);
    const C *k = a.keys + slot * D, *ahead = a.values + slot * D;
    in_fours(t.ratio, [&](auto R, int64_t r) {
      const float* query = q + r * ldq;
      float* S = scores + r * DECODE_KEYS + (j - t.low);
      const auto dot = [&](auto fixed) {
        if constexpr (SCALED<C>)
          dot_int8_keys<R.value, fixed.value>(query, ldq, k, ahead, a.key_scales + slot, end - j, D,
                                              S);
        else
          dot_keys<R.value, fixed.value>(query, ldq, k, ahead, end - j, D, S);
      };
      D == 64 ? dot(std::integral_constant<int, 64>{}) : dot(std::integral_constant<int, 0>{});
    });
  }
}

// The `count` scores s of one head become e^(s - max), in place; their maximum and sum.
FASTLM_INLINE void exponentials(float* s, int64_t count, float softcap, float* max, float* sum) {
  if (softcap > 0)
    for (int64_t j = 0; j < count; j += VL)
      store(s + j, vtanh(load(s + j) * (1.f / softcap)) * softcap);
  vfloat tops = splat(s[0]);
  for (int64_t j = 0; j + VL <= count; j += VL) tops = vmax(tops, load(s + j));
  float top = hmax(tops);
  for (int64_t j = count / VL * VL; j < count; ++j) top = std::max(top, s[j]);
  vfloat total{};
  for (int64_t j = 0; j < count; j += VL) {
    const int n = int(std::min<int64_t>(VL, count - j));
    vfloat e = vexp((n == VL ? load(s + j) : load(s + j, n)) - top);
    if (n < VL) {
      store(s + j, e, n);
      e = load(s + j, n);
    } else {
      store(s + j, e);
    }
    total += e;
  }
  *max = top, *sum = hsum(total);
}

// The partials' O: the values weighted by `scores`, run by run
template <class C>
FASTLM_INLINE void weigh_chunk(const DecodeAttention<C>& a, const DecodeChunk& t, float* scores) {
  const int64_t D = a.head_dim, head_stride = a.chunks * partial_size(D);  // between heads
  for (int64_t j = t.low, end; j < t.high; j = end) {
    end = a.run_end(j, t.high);
    const int64_t next = std::min(j + DECODE_KEYS, a.lengths[t.m]);
    const C *v = a.values + a.offset(t.m, t.g, j), *ahead = a.keys + a.offset(t.m, t.g, next);
    if constexpr (SCALED<C>)
      scale_weights(scores + (j - t.low), a.value_scales + a.slot(t.m, t.g, j), t.ratio, end - j);
    in_fours(t.ratio, [&](auto R, int64_t r) {
      const float* P = scores + r * DECODE_KEYS + (j - t.low);
      float* O = a.partial(t.m, t.g * t.ratio + r, t.c);
      if (D == 64)
        weigh_values<R.value, 64>(P, v, ahead, end - j, D, j == t.low, O, head_stride);
      else
        weigh_values<R.value, 0>(P, v, ahead, end - j, D, j == t.low, O, head_stride);
    });
  }
}

// The partials of a chunk. Without `begin_row`, the task with the newest key first writes that key
// and value to the cache; `thread_q`: scratch for the queries; `scores` (ratio, DECODE_KEYS).
template <class C>
void attend_chunk(const DecodeAttention<C>& a, int64_t m, int64_t g, int64_t c, float* thread_q,
                  float* scores) {
  const DecodeChunk t(a, m, g, c);
  if (t.high <= t.low) return;  // `combine` does not read the partial of an empty chunk
  const float* q = a.q ? a.q + (m * a.heads + g * t.ratio) * query_size(a.head_dim) : thread_q;
  if (!a.q) {
    if (t.high == a.length(m)) append(a, m, g, thread_q);
    prepare_queries(a, m, g, thread_q);
  }
  chunk_scores(a, t, q, scores);
  for (int64_t r = 0; r < t.ratio; ++r) {
    const int64_t head_chunk = (m * a.heads + g * t.ratio + r) * a.chunks + c;
    exponentials(scores + r * DECODE_KEYS, t.high - t.low, a.softcap, a.max + head_chunk,
                 a.sum + head_chunk);
  }
  weigh_chunk(a, t, scores);
}

// Combines the partials of row m to its attention: out (heads, D)
template <class C>
void combine(const DecodeAttention<C>& a, int64_t m, float* out) {
  const int64_t D = a.head_dim, first = a.first_key(m) / DECODE_KEYS,
                end = a.lengths[m] / DECODE_KEYS + 1;
  for (int64_t h = 0; h < a.heads; ++h, out += D) {
    const float *max = a.max + (m * a.heads + h) * a.chunks,
                *sum = a.sum + (m * a.heads + h) * a.chunks;
    float top = max[first];
    for (int64_t c = first + 1; c < end; ++c) top = std::max(top, max[c]);
    // <= 1 also in lanes without a chunk, where a `top` far below 0 would give infinity; NaN stays
    const auto weights_at = [&](int64_t c, int count) {
      return vexp(vmin(splat(0.f), load(max + c, count) - top));
    };
    vfloat total{};
    for (int64_t c = first; c < end; c += VL) {
      const int count = int(std::min<int64_t>(VL, end - c));
      total += load(sum + c, count) * weights_at(c, count);
    }
    const float inverse = 1.f / hsum(total);
    memset(out, 0, size_t(D) * sizeof(float));
    for (int64_t c = first; c < end; c += VL) {
      const int count = int(std::min<int64_t>(VL, end - c));
      const vfloat weights = weights_at(c, count) * inverse;
      for (int i = 0; i < count; ++i) {
        const float* partial = a.partial(m, h, c + i);
        for (int64_t d = 0; d < D; d += VL) {
          const int n = int(std::min<int64_t>(VL, D - d));
          store(out + d, load(out + d, n) + load(partial + d, n) * weights[i], n);
        }
      }
    }
  }
}
