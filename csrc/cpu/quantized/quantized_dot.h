// The dot form of quantized_linear.h, for few rows of x.
//
// A row of W is multiplied in place, chunk by chunk, by x in the same order: W is read once, x
// (M x K) comes from the L1 or L2. A row of W times up to MX rows of x:
//
//   chunk of W row n          x of row m, arranged       f[m], VL partial sums
//   [16 lanes x 8 nibbles] -> 8 vectors of 16 floats  ->  += scale(n, lane) * sum
//                          or 4 of 32 bf16, 2 of 64 int8
//
// X is the type that x is converted to: VECS vectors of 4 * VL bytes per chunk.
template <int BITS, class X>
constexpr int VECS = PER_LANE<BITS> * int(sizeof(X)) / 4;
// int8 activations have more vectors per chunk. Where q is stored with an offset, one is the start
// of the integer sums: minus the offset times the sum of each lane's x. The last one is the scale
// of each lane's x.
template <int BITS>
constexpr int START_VECS = OFFSET<BITS> != 0;
template <int BITS, class X>
constexpr int X_VECS = VECS<BITS, X> + (sizeof(X) == 1 ? START_VECS<BITS> + 1 : 0);

// Element e of vector j of a chunk is column ORDER of the chunk.
template <int BITS, class X>
FASTLM_INLINE int order(int j, int e) {
  if constexpr (sizeof(X) == 4) return e * PER_LANE<BITS> + j;
  if constexpr (sizeof(X) == 2)  // int4: word w holds k = 4w + j; int8: pairs along k
    return BITS == 4 ? 4 * e + j : e / 2 * 4 + 2 * j + e % 2;
  return BITS == 4 ? 2 * e + j : e;
}

// Arranges a row of x (k elements) for the products. An int8 row is rounded already, and has a
// scale per lane, `scales`.
template <int BITS, class X, class T>
void arrange(const T* x, int64_t k, const float* scales, X* out) {
  constexpr int elements = 4 * VL / int(sizeof(X));
  for (int64_t k0 = 0; k0 < k; k0 += CHUNK<BITS>) {
    const int64_t count = std::min<int64_t>(CHUNK<BITS>, k - k0);
    X values[CHUNK<BITS>] = {};
    if constexpr (sizeof(X) == sizeof(T))
      memcpy(values, x + k0, size_t(count) * sizeof(X));
    else
      for (int64_t i = 0; i < count; i += VL)
        store(values + i, load(x + k0 + i, int(std::min<int64_t>(VL, count - i))));
    for (int j = 0; j < VECS<BITS, X>; ++j)
      for (int e = 0; e < elements; ++e) *out++ = values[order<BITS, X>(j, e)];
    if constexpr (sizeof(X) == 1 && START_VECS<BITS>) {
      int32_t start[VL];
      for (int lane = 0; lane < VL; ++lane) {
        int32_t sum = 0;
        for (int i = 0; i < PER_LANE<BITS>; ++i) sum += values[lane * PER_LANE<BITS> + i];
        start[lane] = -OFFSET<BITS> * sum;
      }
      memcpy(out, start, sizeof start);
      out += sizeof start;
    }
    if constexpr (sizeof(X) == 1) {
      memcpy(out, scales + k0 / PER_LANE<BITS>, 4 * VL);
      out += 4 * VL;
    }
  }
}

// Rounds a row of x: q (k), the scale of each lane, the sum over each group. Lanes beyond k get a
// finite scale.
template <int BITS, class T>
void round_lanes(const T* x, const Weight& w, int8_t* q, float* scales, float* sums) {
  const int64_t lanes = (w.k + CHUNK<BITS> - 1) / CHUNK<BITS> * VL;
  int64_t lane = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t end = std::min(w.k, (g + 1) * w.size);
    float sum = 0;
    for (int64_t k0 = g * w.size; k0 < end; k0 += RUN_MAX) {
      const int64_t length = std::min(RUN_MAX, end - k0);
      float inverse;
      const float scale = int8_scale(x + k0, length, &inverse);
      sum += scale * float(to_int8(x + k0, length, length, inverse, q + k0));
      const int64_t lane_end = (k0 + length + PER_LANE<BITS> - 1) / PER_LANE<BITS>;
      for (; lane < lane_end; ++lane) scales[lane] = scale;
    }
    sums[g] = sum;
  }
  for (; lane < lanes; ++lane) scales[lane] = 0;
}

// The products of one chunk; lane l is the sum over the columns of W's lane l.
template <int BITS>
FASTLM_INLINE void unpack(vint v, vfloat (&u)[VECS<BITS, float>], float) {
  u[0] = column<BITS, 0>(v), u[1] = column<BITS, 1>(v);
  u[2] = column<BITS, 2>(v), u[3] = column<BITS, 3>(v);
  if constexpr (BITS == 4) {
    u[4] = column<BITS, 4>(v), u[5] = column<BITS, 5>(v);
    u[6] = column<BITS, 6>(v), u[7] = column<BITS, 7>(v);
  }
}
template <int CHAINS, int V>
FASTLM_INLINE void dot(vfloat (&sum)[CHAINS], const vfloat (&u)[V], const float* x) {
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) sum[j % CHAINS] += u[j] * load(x + j * VL);
}
FASTLM_INLINE vfloat sum_to_float(vfloat s) { return s; }

#ifdef FASTLM_BF16_DOT
template <int BITS>
FASTLM_INLINE void unpack(vint v, vfloat (&u)[VECS<BITS, bf16>], bf16) {
  const __m512i w = (__m512i)v;
  if constexpr (BITS == 4) {
    const __m512i table = nibble_table();
    u[0] = (vfloat)_mm512_permutexvar_epi16(w, table);
    u[1] = (vfloat)_mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), table);
    u[2] = (vfloat)_mm512_permutexvar_epi16(_mm512_srli_epi16(w, 8), table);
    u[3] = (vfloat)_mm512_permutexvar_epi16(_mm512_srli_epi16(w, 12), table);
  } else {  // 8 bits fit bf16: the upper half of the float is exact
    u[0] = (vfloat)_mm512_mask_blend_epi16(
        0xaaaaaaaa, _mm512_srli_epi32((__m512i)column<8, 0>(v), 16), (__m512i)column<8, 1>(v));
    u[1] = (vfloat)_mm512_mask_blend_epi16(
        0xaaaaaaaa, _mm512_srli_epi32((__m512i)column<8, 2>(v), 16), (__m512i)column<8, 3>(v));
  }
}
template <int CHAINS, int V>
FASTLM_INLINE void dot(vfloat (&sum)[CHAINS], const vfloat (&u)[V], const bf16* x) {
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j)
    sum[j % CHAINS] = multiply_add(sum[j % CHAINS], u[j],
                                   load(reinterpret_cast<const float*>(x + j * 2 * VL)), bf16{});
}
#endif

template <int BITS>
FASTLM_INLINE void unpack(vint v, vint (&u)[VECS<BITS, int8_t>], int8_t) {
  if constexpr (BITS == 4) {
    u[0] = v & 0x0f0f0f0f, u[1] = (v >> 4) & 0x0f0f0f0f;
    if constexpr (OFFSET<4> == 0)
      for (vint& w : u) w = signed_nibbles(w);
  } else {
    u[0] = OFFSET<8> ? v ^ int32_t(0x80808080) : v;
  }
}
template <int CHAINS, int V>
FASTLM_INLINE void dot(vint (&sum)[CHAINS], const vint (&u)[V], const int8_t* x) {
  constexpr int BITS = V == 2 ? 4 : 8;
  if constexpr (OFFSET<BITS> != 0)
    sum[CHAINS - 1] += load_lanes(reinterpret_cast<const uint8_t*>(x + V * 4 * VL));
  for (int j = 0; j < V; ++j)
    sum[j % CHAINS] = dot4<OFFSET<BITS> == 0>(
        sum[j % CHAINS], u[j], load_lanes(reinterpret_cast<const uint8_t*>(x + j * 4 * VL)));
}
FASTLM_INLINE vfloat sum_to_float(vint s) { return __builtin_convertvector(s, vfloat); }

// How the lanes of a chunk share scales. It is the same for all chunks of a weight.
template <int BITS>
struct LaneGroups {
  int64_t size, groups;
  bool single_group;  // a chunk is within one group
  int shift;          // log2(lanes per group) where a chunk holds whole groups, else -1
  LaneGroups(int64_t size, int64_t groups)
      : size(size),
        groups(groups),
        single_group(groups == 1 || size % CHUNK<BITS> == 0),
        shift(-1) {
    const int64_t lanes = size / PER_LANE<BITS>;
    if (!single_group && lanes > 0 && VL % lanes == 0) shift = __builtin_ctz(unsigned(lanes));
  }
  // Scales of the lanes of the chunk that begins at column k in group g of a row.
  FASTLM_INLINE vfloat scales(const Scales& all, int64_t row, int64_t k, int64_t g) const {
    if (single_group) return all.everywhere(row + g);
    vfloat s;
    if (shift >= 0) {
      s = all.lanes(row + g, int(std::min<int64_t>(VL >> shift, groups - g)));
      vint lane;
      for (int i = 0; i < VL; ++i) lane[i] = i;
      return __builtin_shuffle(s, lane >> shift);
    }
    for (int i = 0; i < VL; ++i)
      s[i] = all[row + std::min((k + i * PER_LANE<BITS>) / size, groups - 1)];
    return s;
  }
};

constexpr int64_t DOT_AHEAD = 4096;   // bytes: hardware streams end with a 4 KiB page
constexpr int64_t SCALES_AHEAD = 16;  // rows; the hardware is too late for two short streams
constexpr int64_t DOT_ROWS = 64;      // rows of W per task: 128 KiB of int4 at K = 4096

// out[m] = W row n . x row m, without offsets. One row of W at a time: rows are contiguous, so W is
// one stream; four rows side by side were slower (docs/log.md).
template <int BITS, class X, int MX>
void dot_row(const Weight& w, int64_t n, const X* x, int64_t x_stride, float* out) {
  using Sum = std::conditional_t<sizeof(X) == 1, vint, vfloat>;
  constexpr int CHAINS = MX <= 2 ? 2 : 1;  // independent sums: few rows need more in flight
  constexpr int64_t x_step = X_VECS<BITS, X> * 4 * VL / int64_t(sizeof(X));
  const int64_t chunks = (w.k + CHUNK<BITS> - 1) / CHUNK<BITS>,
                full_chunks = w.row_bytes / (4 * VL);
  const LaneGroups<BITS> lanes(w.size, w.groups);
  // chunks under one scale, of W and of x
  const int64_t group = w.groups == 1 ? chunks : lanes.single_group ? w.size / CHUNK<BITS> : 1;
  const int64_t run = sizeof(X) == 1 ? std::min(group, RUN_MAX / CHUNK<BITS>) : group;
  const int64_t groups_a_run = lanes.shift >= 0 ? VL >> lanes.shift : 1;
  const uint8_t* row = w.row(n);
  vfloat f[MX] = {};
  const auto add_chunk = [&](int64_t c, Sum(&sum)[MX][CHAINS]) __attribute__((always_inline)) {
    const uint8_t* p = row + c * 4 * VL;
    __builtin_prefetch(p + DOT_AHEAD);
    const vint v = c < full_chunks ? load_lanes(p) : load_lanes(p, w.row_bytes - c * 4 * VL);
    Sum u[VECS<BITS, X>];
    unpack<BITS>(v, u, X{});
#pragma GCC unroll 4
    for (int m = 0; m < MX; ++m) dot(sum[m], u, x + m * x_stride + c * x_step);
  };
  const auto add_scaled = [&](int64_t c, int64_t g,
                              Sum(&sum)[MX][CHAINS]) __attribute__((always_inline)) {
    const vfloat s = lanes.scales(w.scales, n * w.groups, c * CHUNK<BITS>, g);
#pragma GCC unroll 4
    for (int m = 0; m < MX; ++m) {
      if constexpr (CHAINS == 2) sum[m][0] += sum[m][1];
      if constexpr (sizeof(X) == 1)
        f[m] +=
            sum_to_float(sum[m][0]) *
            (s * load(reinterpret_cast<const float*>(x + m * x_stride + (c + 1) * x_step) - VL));
      else
        f[m] += sum_to_float(sum[m][0]) * s;
    }
  };
  if (run ==
      1) {  // a separate loop: an inner loop of one round costs a third (int4, groups of 128)
    for (int64_t c = 0, g = 0; c < chunks; ++c, g += groups_a_run) {
      Sum sum[MX][CHAINS] = {};
      add_chunk(c, sum);
      add_scaled(c, g, sum);
    }
  } else {
    for (int64_t begin = 0, g = 0; begin < chunks; begin += group, ++g) {
      const int64_t end = std::min(chunks, begin + group);
      for (int64_t c0 = begin; c0 < end; c0 += run) {
        Sum sum[MX][CHAINS] = {};
        for (int64_t c = c0; c < std::min(end, c0 + run); ++c) add_chunk(c, sum);
        add_scaled(c0, g, sum);
      }
    }
  }
  for (int m = 0; m < MX; ++m) out[m] = hsum(f[m]);
}

// Sum over groups of zeros[n][g] * sums[g].
inline float offset_term(const Weight& w, int64_t n, const float* sums) {
  vfloat total{};
  for (int64_t g = 0; g < w.groups; g += VL) {
    const int count = int(std::min<int64_t>(VL, w.groups - g));
    total += w.zeros.lanes(n * w.groups + g, count) * load(sums + g, count);
  }
  return hsum(total);
}

// Sums of x over each group.
template <class T>
void group_sums(const T* x, int64_t k, int64_t size, int64_t groups, float* sums) {
  for (int64_t g = 0; g < groups; ++g) {
    vfloat sum{};
    const int64_t end = std::min(k, (g + 1) * size);
    for (int64_t i = g * size; i < end; i += VL)
      sum += load(x + i, int(std::min<int64_t>(VL, end - i)));
    sums[g] = hsum(sum);
  }
}

constexpr int64_t ON_STACK = 64 << 10;  // bytes: M = 1 up to K = 13000 needs no workspace

template <int BITS, class X, class T>
struct DotForm {
  int64_t m;
  const Weight& w;
  int64_t chunks = (w.k + CHUNK<BITS> - 1) / CHUNK<BITS>;
  int64_t stride = chunks * X_VECS<BITS, X> * 4 * VL / int64_t(sizeof(X));  // of arranged rows

  // bytes: x arranged; rounded (the scales of lanes, then int8); the sums of its groups
  int64_t rounded() const { return sizeof(X) == 1 ? m * chunks * (4 * VL + CHUNK<BITS>) : 0; }
  int64_t bytes() const {
    return round_up(m * stride * int64_t(sizeof(X)), 64) + round_up(rounded(), 64) +
           round_up(m * w.groups * 4, 64);
  }
  int64_t shared() const { return bytes() <= ON_STACK ? 0 : bytes(); }
  int64_t bytes_per_thread() const { return 0; }

  void operator()(const T* x, int64_t x_stride, const float* bias, T* y, Workspace arena) const {
    alignas(64) char local[ON_STACK];
    if (bytes() <= ON_STACK) arena = Workspace(local, ON_STACK);
    X* arranged = arena.take<X>(m * stride);
    char* rows = arena.take<char>(rounded());
    float* sums = arena.take<float>(m * w.groups);
    const int64_t tasks = (w.n + DOT_ROWS - 1) / DOT_ROWS;
    const auto prepare = [&](int64_t i) {
      const T* row = x + i * x_stride;
      X* to = arranged + i * stride;
      if constexpr (sizeof(X) == 1) {
        float* scales = reinterpret_cast<float*>(rows + rounded() / m * i);
        int8_t* q = reinterpret_cast<int8_t*>(scales + chunks * VL);
        round_lanes<BITS>(row, w, q, scales, sums + i * w.groups);
        arrange<BITS>(q, w.k, scales, to);
      } else {
        arrange<BITS>(row, w.k, nullptr, to);
        if (w.zeros) group_sums(row, w.k, w.size, w.groups, sums + i * w.groups);
      }
    };
    const auto multiply = [&](int64_t t) {
      const int64_t end = std::min(w.n, (t + 1) * DOT_ROWS);
      for (int64_t m0 = 0; m0 < m;
           m0 += 4) {  // the task's W comes from the L2 after the first time
        const int mx = int(std::min<int64_t>(4, m - m0));
        for (int64_t n = t * DOT_ROWS; n < end; ++n) {
          float out[4];
          const X* xm = arranged + m0 * stride;
          w.scales.prefetch((n + SCALES_AHEAD) * w.groups, w.groups);
          w.zeros.prefetch((n + SCALES_AHEAD) * w.groups, w.groups);
          switch (mx) {
            case 1:
              dot_row<BITS, X, 1>(w, n, xm, stride, out);
              break;
            case 2:
              dot_row<BITS, X, 2>(w, n, xm, stride, out);
              break;
            case 3:
              dot_row<BITS, X, 3>(w, n, xm, stride, out);
              break;
            default:
              dot_row<BITS, X, 4>(w, n, xm, stride, out);
          }
          for (int j = 0; j < mx; ++j) {
            float v = out[j];
            if (w.zeros) v += offset_term(w, n, sums + (m0 + j) * w.groups);
            if (bias) v += bias[n];
            y[(m0 + j) * w.n + n] = from_float<T>(v);
          }
        }
      }
    };
    // 131072 products take one thread 6 us; below that a parallel region does not pay
    const bool worthwhile = m * w.n * w.k > 131072;
    if (m == 1 || !worthwhile) {
      FlushDenormals flush;
      for (int64_t i = 0; i < m; ++i) prepare(i);
      for (int64_t t = 0; t < (worthwhile ? 0 : tasks); ++t) multiply(t);
    }
    if (!worthwhile) return;
#pragma omp parallel
    {
      FlushDenormals flush;
      if (m > 1) {  // for one row x was arranged before, and no barrier is needed
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; ++i) prepare(i);
      }
#pragma omp for schedule(dynamic) nowait
      for (int64_t t = 0; t < tasks; ++t) multiply(t);
    }
  }
};
