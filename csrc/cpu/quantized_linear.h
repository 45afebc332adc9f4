// y = x . W^T + bias with an int4 or int8 W. Body of quantized_linear.cpp, compiled per instruction
// set. Two forms, chosen by the number of rows of x:
//
//   dot    few rows. A row of W is multiplied where it lies, chunk by chunk, by x arranged alike:
//          W is read once, x (M x K) comes from the L1 or L2. A row of W x up to MX rows of x:
//
//            chunk of W row n          x of row m, arranged       f[m], VL partial sums
//            [16 lanes x 8 nibbles] -> 8 vectors of 16 floats  ->  += scale(n, lane) * sum
//                                   or 4 of 32 bf16, 2 of 64 int8
//
//   panel  more rows. VL rows of W are transposed and become panels of the matrix core: dequantized
//          (gemm.h) for 16-bit activations, as integers (gemm_int8.h) for 8-bit ones.
//
// Every output is computed by one thread in one order: bit-equal on any number of threads.
#include "cpu/gemm.h"
#include "cpu/quantized_weight.h"
#include "cpu/rows.h"
//
#include "cpu/gemm_int8.h"

struct Workspace {  // one allocation a call; 64-byte lines
  void* p;
  explicit Workspace(size_t bytes) : p(::operator new(bytes, std::align_val_t(64))) {}
  ~Workspace() { ::operator delete(p, std::align_val_t(64)); }
  Workspace(const Workspace&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(p);
  }
};

// ---- dot form ----------------------------------------------------------------------------------
// Operand X: what x becomes. VECS vectors of 4 * VL bytes per chunk.
template <int BITS, class X>
constexpr int VECS = PER_LANE<BITS> * int(sizeof(X)) / 4;
// int8 activations carry more vectors per chunk: where q is stored with an offset, minus the offset
// times the sum of each lane's x, where the integer sum starts; and the scale of each lane's x.
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

// A row of x (k elements) arranged; int8 is rounded before, `scales` are those of its lanes.
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

// A row of x rounded: q (k), the scale of each lane, the sum over each group. Lanes beyond k have
// some finite scale.
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

// The sum of products of one chunk: lane l gets the columns of W's lane l.
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
    // bf16 of -8 .. 7, twice: the permutation looks at 5 bits of each word, the nibble is 4
    const __m512i table = _mm512_set_epi16(
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, short(0xbf80), short(0xc000),
        short(0xc040), short(0xc080), short(0xc0a0), short(0xc0c0), short(0xc0e0), short(0xc100),
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, short(0xbf80), short(0xc000),
        short(0xc040), short(0xc080), short(0xc0a0), short(0xc0c0), short(0xc0e0), short(0xc100));
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

// How the lanes of a chunk share scales; one for a whole weight.
template <int BITS>
struct LaneGroups {
  int64_t size, groups;
  bool one;   // a chunk lies in one group
  int shift;  // log2 of the lanes of a group where a chunk holds whole groups, else -1
  LaneGroups(int64_t size, int64_t groups)
      : size(size), groups(groups), one(groups == 1 || size % CHUNK<BITS> == 0), shift(-1) {
    const int64_t lanes = size / PER_LANE<BITS>;
    if (!one && lanes > 0 && VL % lanes == 0) shift = __builtin_ctz(unsigned(lanes));
  }
  // Scales of the lanes of the chunk that begins at column k in group g of a row.
  FASTLM_INLINE vfloat scales(const Scales& all, int64_t row, int64_t k, int64_t g) const {
    if (one) return all.everywhere(row + g);
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
constexpr int64_t SCALES_AHEAD = 16;  // rows; two short streams that the hardware finds too late
constexpr int64_t DOT_ROWS = 64;      // rows of W per task: 128 KiB of int4 at K = 4096

// out[m] = W row n . x row m, without offsets. One row of W at a time: rows follow each other in
// memory, so W is one stream; four rows side by side were slower (docs/log.md).
template <int BITS, class X, int MX>
void dot_row(const Weight& w, int64_t n, const X* x, int64_t x_stride, float* out) {
  using Sum = std::conditional_t<sizeof(X) == 1, vint, vfloat>;
  constexpr int CHAINS = MX <= 2 ? 2 : 1;  // of dependent products: few rows need more in flight
  constexpr int64_t x_step = X_VECS<BITS, X> * 4 * VL / int64_t(sizeof(X));
  const int64_t chunks = (w.k + CHUNK<BITS> - 1) / CHUNK<BITS>, whole = w.row_bytes / (4 * VL);
  const LaneGroups<BITS> lanes(w.size, w.groups);
  // chunks under one scale, of W and of x
  const int64_t group = w.groups == 1 ? chunks : lanes.one ? w.size / CHUNK<BITS> : 1;
  const int64_t run = sizeof(X) == 1 ? std::min(group, RUN_MAX / CHUNK<BITS>) : group;
  const int64_t groups_a_run = lanes.shift >= 0 ? VL >> lanes.shift : 1;
  const uint8_t* row = w.row(n);
  vfloat f[MX] = {};
  const auto add_chunk = [&](int64_t c, Sum(&sum)[MX][CHAINS]) __attribute__((always_inline)) {
    const uint8_t* p = row + c * 4 * VL;
    __builtin_prefetch(p + DOT_AHEAD);
    const vint v = c < whole ? load_lanes(p) : load_lanes(p, w.row_bytes - c * 4 * VL);
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
      1) {  // its own loop: an inner one of a single round costs a third (int4, groups of 128)
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

template <int BITS, class X, class T>
void dot_form(const T* x, int64_t m, int64_t x_stride, const Weight& w, const float* bias, T* y) {
  const int64_t chunks = (w.k + CHUNK<BITS> - 1) / CHUNK<BITS>,
                stride = chunks * X_VECS<BITS, X> * 4 * VL / int64_t(sizeof(X));
  const int64_t x_bytes = m * stride * int64_t(sizeof(X)),
                row_bytes = sizeof(X) == 1 ? chunks * (4 * VL + CHUNK<BITS>) : 0;
  Workspace work(size_t(x_bytes + m * (row_bytes + w.groups * 4)));
  X* arranged = work.as<X>();
  char* rounded = work.as<char>() + x_bytes;  // a row of x: scales of lanes, then int8
  float* sums = reinterpret_cast<float*>(rounded + m * row_bytes);
  const int64_t tasks = (w.n + DOT_ROWS - 1) / DOT_ROWS;
  const auto prepare = [&](int64_t i) {
    const T* row = x + i * x_stride;
    X* to = arranged + i * stride;
    if constexpr (sizeof(X) == 1) {
      float* scales = reinterpret_cast<float*>(rounded + i * row_bytes);
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
    for (int64_t m0 = 0; m0 < m; m0 += 4) {  // the task's W comes from the L2 after the first time
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
  // 131072 products are 6 us of one thread; for less a parallel region does not pay
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
    if (m > 1) {  // else it is done, and the threads need not meet
#pragma omp for schedule(static)
      for (int64_t i = 0; i < m; ++i) prepare(i);
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t t = 0; t < tasks; ++t) multiply(t);
  }
}

// ---- panel form --------------------------------------------------------------------------------
constexpr int64_t PANEL_N = NR;   // columns of a task
constexpr int64_t PANEL_K = 512;  // k of one block: 64 KiB of bf16 B, stays in the L2
constexpr int64_t PANEL_M = 512;  // rows of a task: 512 KiB of A per block, mostly in the L2 too; W
                                  // is dequantized once per task (256 rows: 2 to 4 % slower)
constexpr int64_t PANEL_M8 = 512;  // the same of int8

// Scales (or zeros) of rows [n, n + rows) as [groups][VL]; rows that do not exist are zero.
inline void transpose_scales(const Scales& source, int64_t n, int64_t groups, int rows,
                             float* out) {
  for (int64_t g = 0; g < groups; g += VL) {
    const int count = int(std::min<int64_t>(VL, groups - g));
    vint t[VL];
    for (int i = 0; i < VL; ++i)
      t[i] = i < rows ? as_int(source.lanes((n + i) * groups + g, count)) : vint{};
    transpose(t);
    for (int i = 0; i < count; ++i) store(out + (g + i) * VL, as_float(t[i]));
  }
}

template <int BITS, int J, class E>
FASTLM_INLINE void dequantize_columns(vint v, vfloat s, vfloat z, E* out) {
  if constexpr (J < PER_LANE<BITS>) {
    if constexpr (sizeof(E) == 4) {
      store(out + J * VL, column<BITS, J>(v) * s + z);
      dequantize_columns<BITS, J + 1>(v, s, z, out);
    } else {
#ifdef FASTLM_BF16_DOT
      const vfloat low = column<BITS, J>(v) * s + z, high = column<BITS, J + 1>(v) * s + z;
      const __m512i interleave =
          _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                           6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      const __m512i pair = _mm512_permutexvar_epi16(
          interleave, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
      _mm512_storeu_si512(out + J * VL, pair);
      dequantize_columns<BITS, J + 2>(v, s, z, out);
#endif
    }
  }
}

// Panel of rows [n, n + rows) of W, columns [k0, k0 + kb), k0 a multiple of CHUNK: what pack_b
// would make of the dequantized weight. scales, zeros as [groups][VL].
template <int BITS, class E>
void dequantize_panel(const Weight& w, int64_t n, int rows, int64_t k0, int64_t kb,
                      const float* scales, const float* zeros, E* out) {
  const int64_t kp = padded_k<E>(kb);
  int64_t g = k0 / w.size;
  for (int64_t k = 0; k < kp; k += CHUNK<BITS>) {
    vint t[VL];
    load_transposed(w, n, rows, (k0 + k) / PER_LANE<BITS>, PANEL_K * BITS / 8, t);
    for (int j = 0; j < VL && k + j * PER_LANE<BITS> < kp; ++j) {
      const int64_t at = k + j * PER_LANE<BITS>;
      while (k0 + at >= (g + 1) * w.size && g + 1 < w.groups) ++g;
      const vfloat s = load(scales + g * VL), z = zeros ? load(zeros + g * VL) : vfloat{};
      if (at + PER_LANE<BITS> <= kp) {
        dequantize_columns<BITS, 0>(t[j], s, z, out + at * VL);
      } else {
        alignas(64) E whole[PER_LANE<BITS> * VL];
        dequantize_columns<BITS, 0>(t[j], s, z, whole);
        memcpy(out + at * VL, whole, size_t(kp - at) * VL * sizeof(E));
      }
    }
  }
}

template <class T>
void store_rows(const float* c, int64_t ldc, int64_t m, int64_t n, const float* bias, T* y,
                int64_t ldy) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; j += VL) {
      const int count = int(std::min<int64_t>(VL, n - j));
      const vfloat v = load(c + i * ldc + j) + (bias ? load(bias + j, count) : vfloat{});
      if (count == VL)
        store(y + i * ldy + j, v);
      else
        store(y + i * ldy + j, v, count);
    }
  }
}

template <int BITS, class T>
void panel_form(const T* x, int64_t m, int64_t x_stride, const Weight& w, const float* bias, T* y) {
  using E = Elem<T>;
  const int64_t kp = padded_k<E>(w.k);
  const bool in_place = sizeof(E) == sizeof(T) && kp == w.k;
  Workspace a_work(in_place ? 0 : size_t(m * kp) * sizeof(E));
  const E* a = in_place ? reinterpret_cast<const E*>(x) : a_work.as<E>();
  const int64_t lda = in_place ? x_stride : kp;
  // equal blocks of k near PANEL_K, not a rest of a few columns: 576 is one block
  const int64_t blocks_k = std::max<int64_t>(1, (w.k + PANEL_K / 2) / PANEL_K),
                block_k = (w.k + blocks_k * 128 - 1) / (blocks_k * 128) * 128;
  const int64_t blocks_m = (m + PANEL_M - 1) / PANEL_M, blocks_n = (w.n + PANEL_N - 1) / PANEL_N,
                panels = PANEL_N / VL;
#pragma omp parallel
  {
    if (!in_place) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < m; ++i)
        pack_a<E>(x + i * x_stride, x_stride, 1, 1, w.k, a_work.as<E>() + i * kp);
    }
    const int64_t table = panels * w.groups * VL;
    Workspace work(size_t(PANEL_N * block_k) * sizeof(E) +
                   size_t(PANEL_M * PANEL_N + 2 * table) * 4);
    E* b = work.as<E>();
    float* c = reinterpret_cast<float*>(b + PANEL_N * block_k);
    float *scales = c + PANEL_M * PANEL_N, *zeros = w.zeros ? scales + table : nullptr;
    TileScope tiles;
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < blocks_m * blocks_n; ++t) {
      const int64_t m0 = t / blocks_n * PANEL_M, n0 = t % blocks_n * PANEL_N;
      const int64_t mb = std::min(PANEL_M, m - m0), nb = std::min(PANEL_N, w.n - n0);
      for (int64_t p = 0; p * VL < nb; ++p) {
        const int64_t first = n0 + p * VL;
        const int rows = int(std::min<int64_t>(VL, nb - p * VL));
        transpose_scales(w.scales, first, w.groups, rows, scales + p * w.groups * VL);
        if (zeros) transpose_scales(w.zeros, first, w.groups, rows, zeros + p * w.groups * VL);
      }
      for (int64_t k0 = 0; k0 < w.k; k0 += block_k) {
        const int64_t kb = std::min(block_k, w.k - k0);
        for (int64_t p = 0; p * VL < nb; ++p)
          dequantize_panel<BITS>(w, n0 + p * VL, int(std::min<int64_t>(VL, nb - p * VL)), k0, kb,
                                 scales + p * w.groups * VL,
                                 zeros ? zeros + p * w.groups * VL : nullptr,
                                 b + p * VL * padded_k<E>(kb));
        gemm<E>(mb, nb, kb, a + m0 * lda + k0, lda, b, c, PANEL_N, k0 > 0);
      }
      store_rows(c, PANEL_N, mb, nb, bias ? bias + n0 : nullptr, y + m0 * w.n + n0, w.n);
    }
  }
}

constexpr int64_t ROWS_A_THREAD = 128;  // from here on unpacking W for them is under 4 %

// Runs whose B of NR8 columns stays in the L1 (32 to 48 KiB everywhere; the rest is for A and C).
constexpr int64_t B_BLOCK_BYTES = 32 << 10;
inline int64_t runs_per_block(const Runs& runs) {
  return std::max<int64_t>(1, B_BLOCK_BYTES / NR8 / runs.stride);
}

template <int BITS, class T>
void panel_form_int8(const T* x, int64_t m, int64_t x_stride, const Weight& w, const float* bias,
                     T* y) {
  const Runs runs(w.k, w.size);
  const int64_t numbers = Rounded::size(m, runs.count), a_bytes = (m * runs.row() + 63) / 64 * 64;
  Workspace a_work(size_t(a_bytes + numbers * 4) + size_t(runs.count) * sizeof(Run));
  const Rounded a{a_work.as<int8_t>(), reinterpret_cast<float*>(a_work.as<int8_t>() + a_bytes),
                  runs.row(), runs.count};
  Run* list = reinterpret_cast<Run*>(a.numbers + numbers);
  runs.list(list);
  const int64_t blocks_n = (w.n + NR8 - 1) / NR8, block = runs_per_block(runs),
                panel = std::min(block, runs.count) * runs.stride * VL, table = w.groups * VL;
  // Many rows: a thread rounds and multiplies the same ones, which lie in its L2, and unpacks all
  // of W for them. Few: W is unpacked once, and threads share its columns.
  const int64_t threads = omp_get_max_threads();
  const bool by_rows = m >= ROWS_A_THREAD * threads;
  const int64_t parts = by_rows ? threads : 1,
                blocks_m = (m + PANEL_M8 * parts - 1) / (PANEL_M8 * parts) * parts,
                block_m = ((m + blocks_m - 1) / blocks_m + MR - 1) / MR * MR;
#pragma omp parallel
  {
    Workspace work(size_t(NP8 * panel) + size_t(block_m * NR8 + 2 * NP8 * table) * 4);
    int8_t* b = work.as<int8_t>();
    float* c = reinterpret_cast<float*>(b + NP8 * panel);
    float *scales = c + block_m * NR8, *zeros = w.zeros ? scales + NP8 * table : nullptr;
    TileScope tiles;
    const auto multiply = [&](int64_t m0, int64_t n0) {
      const int64_t mb = std::min(block_m, m - m0), nb = std::min<int64_t>(NR8, w.n - n0);
      const auto rows = [&](int64_t p) { return int(std::min<int64_t>(VL, nb - p * VL)); };
      w.scales.prefetch((n0 + NR8) * w.groups, NR8 * w.groups);
      w.zeros.prefetch((n0 + NR8) * w.groups, NR8 * w.groups);
      for (int64_t p = 0; p * VL < nb; ++p) {
        transpose_scales(w.scales, n0 + p * VL, w.groups, rows(p), scales + p * table);
        if (zeros) transpose_scales(w.zeros, n0 + p * VL, w.groups, rows(p), zeros + p * table);
      }
      for (int64_t first = 0; first < runs.count; first += block) {
        const int64_t last = std::min(first + block, runs.count), width = runs.stride * VL;
        // bytes to the same place of the next block, or of the next columns' first: they follow
        const int64_t ahead = last < runs.count
                                  ? runs.begin(last) * BITS / 8 - runs.begin(first) * BITS / 8
                                  : NR8 * w.row_bytes - runs.begin(first) * BITS / 8;
        for (int64_t p = 0; p * VL < nb; ++p) {
          int8_t* to = b + p * (last - first) * width;
          const int64_t n = n0 + p * VL;
          if (runs.contiguous())
            integer_panel<BITS>(w, n, rows(p), runs.begin(first),
                                (last - first - 1) * runs.stride + list[last - 1].length, ahead,
                                to);
          else
            for (int64_t r = first; r < last; ++r)
              integer_panel<BITS>(w, n, rows(p), runs.begin(r), list[r].length, ahead,
                                  to + (r - first) * width);
        }
        const auto finish = [&](int64_t i, int64_t count) {
          if (last == runs.count)
            store_rows(c + i * NR8, NR8, count, nb, bias ? bias + n0 : nullptr,
                       y + (m0 + i) * w.n + n0, w.n);
        };
        gemm_int8<BITS>(mb, nb, Block8{list, first, last, runs.stride, b, scales, zeros, table}, a,
                        m0, c, first > 0, finish);
      }
    };
    const auto round = [&](int64_t i) { round_row<BITS>(x + i * x_stride, i, runs, a); };
    if (by_rows) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < blocks_m; ++t) {
        const int64_t m0 = t * block_m, end = std::min(m, m0 + block_m);
        for (int64_t i = m0; i < end; ++i) round(i);
        for (int64_t n0 = 0; n0 < w.n && m0 < m; n0 += NR8) multiply(m0, n0);
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < m; ++i) round(i);
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < blocks_m * blocks_n; ++t)
        multiply(t / blocks_n * block_m, t % blocks_n * NR8);
    }
  }
}

// ---- choice ------------------------------------------------------------------------------------
// Rows of x up to which the dot form is faster, measured. It unpacks W for every 4 rows; the panel
// form unpacks once, and pays for the transposition. From 2048 x 2048 on more passes over products
// hide behind the reading of W; int8 products are too quick for that.
template <int BITS, class X>
FASTLM_INLINE int64_t dot_max_rows(const Weight& w) {
  const bool large = w.n * w.k >= 2048 * 2048;
  if (sizeof(X) == 1) return large ? 3 : 1;
  if (sizeof(X) == 2) return !large ? 4 : BITS == 4 ? 8 : 5;
  return large ? 4 : 3;
}

// x (..., K) as rows.h says; bias (N) float32 or absent; y (..., N) contiguous; form 0 chooses, 1
// is dot, 2 is panel (tests and measurements).
inline void quantized_linear(const TensorView& x, const TensorView& qdata, const TensorView& scales,
                             const TensorView* zeros, const TensorView* bias, int bits,
                             int64_t group_size, int act_bits, int form, const TensorView& y) {
  const Rows rows = rows_of("x", x);
  const int64_t m = rows.count, k = rows.width, x_stride = rows.stride;
  check_size("y", "columns:", qdata.size(0), y.size(-1));
  check_size("y", "elements:", m * qdata.size(0), y.numel());
  if (m == 0 || qdata.size(0) == 0) return;
  check_contiguous("y", y);
  const float* pb = bias ? bias->data<float>("bias") : nullptr;
  with_float(x.dtype(), "x", [&](auto tag) {
    using T = decltype(tag);
    const T* px = x.data<T>("x");
    T* py = y.data<T>("y");
    const Weight w = weight_of(qdata, scales, zeros, k, bits, group_size);
    const auto run = [&](auto b) {
      constexpr int BITS = decltype(b)::value;
      if (act_bits == 8) {
        const bool dot = form ? form == 1 : m <= dot_max_rows<BITS, int8_t>(w);
        dot ? dot_form<BITS, int8_t>(px, m, x_stride, w, pb, py)
            : panel_form_int8<BITS>(px, m, x_stride, w, pb, py);
      } else {
        const bool dot = form ? form == 1 : m <= dot_max_rows<BITS, Elem<T>>(w);
        dot ? dot_form<BITS, Elem<T>>(px, m, x_stride, w, pb, py)
            : panel_form<BITS>(px, m, x_stride, w, pb, py);
      }
    };
    if (bits == 4)
      run(std::integral_constant<int, 4>{});
    else
      run(std::integral_constant<int, 8>{});
  });
}

// dx (..., K) = dy (..., N) . W: rows of W are dequantized in blocks and packed along n.
inline void quantized_linear_backward(const TensorView& dy, const TensorView& qdata,
                                      const TensorView& scales, const TensorView* zeros, int bits,
                                      int64_t group_size, const TensorView& dx) {
  const Rows rows = rows_of("dy", dy);
  const int64_t m = rows.count, k = dx.size(-1), dy_stride = rows.stride;
  check_size("dx", "elements:", m * k, dx.numel());
  check_size("dy", "columns:", qdata.size(0), rows.width);
  if (m == 0) return;
  check_contiguous("dx", dx);
  with_float(dy.dtype(), "dy", [&](auto tag) {
    using T = decltype(tag);
    using E = Elem<T>;
    const T* pdy = dy.data<T>("dy");
    T* pdx = dx.data<T>("dx");
    const Weight w = weight_of(qdata, scales, zeros, k, bits, group_size);
    const int64_t np = padded_k<E>(w.n);
    Workspace a_work(size_t(m * np) * sizeof(E));
    E* a = a_work.as<E>();
    const int64_t blocks_m = (m + PANEL_M - 1) / PANEL_M, blocks_k = (k + PANEL_N - 1) / PANEL_N,
                  part = 256;  // rows of W: 128 KiB of floats
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < m; ++i)
        pack_a<E>(pdy + i * dy_stride, dy_stride, 1, 1, w.n, a + i * np);
      Workspace work(size_t(part * PANEL_N + PANEL_M * PANEL_N) * 4 +
                     size_t(part * PANEL_N) * sizeof(E));
      float *wide = work.as<float>(), *c = wide + part * PANEL_N;
      E* b = reinterpret_cast<E*>(c + PANEL_M * PANEL_N);
      TileScope tiles;
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < blocks_m * blocks_k; ++t) {
        const int64_t m0 = t / blocks_k * PANEL_M, k0 = t % blocks_k * PANEL_N;
        const int64_t mb = std::min(PANEL_M, m - m0), kb = std::min(PANEL_N, k - k0);
        if (w.n == 0) memset(c, 0, size_t(PANEL_M * PANEL_N) * 4);
        for (int64_t n0 = 0; n0 < w.n; n0 += part) {
          const int64_t nb = std::min(part, w.n - n0);
          for (int64_t i = 0; i < nb; ++i) {
            if (bits == 4)
              dequantize_row<4>(w, n0 + i, k0, k0 + kb, wide + i * PANEL_N);
            else
              dequantize_row<8>(w, n0 + i, k0, k0 + kb, wide + i * PANEL_N);
          }
          pack_b<E>(wide, PANEL_N, 1, nb, kb, b);
          gemm<E>(mb, kb, nb, a + m0 * np + n0, np, b, c, PANEL_N, n0 > 0);
        }
        store_rows(c, PANEL_N, mb, kb, nullptr, pdx + m0 * k + k0, k);
      }
    }
  });
}

// out (N, K) float32, bfloat16 or float16, contiguous.
inline void dequantize(const TensorView& qdata, const TensorView& scales, const TensorView* zeros,
                       int bits, int64_t group_size, const TensorView& out) {
  const int64_t k = out.size(1);
  check_size("out", "rows:", qdata.size(0), out.size(0));
  if (out.size(0) == 0) return;
  check_contiguous("out", out);
  with_float(out.dtype(), "out", [&](auto tag) {
    using T = decltype(tag);
    T* po = out.data<T>("out");
    const Weight w = weight_of(qdata, scales, zeros, k, bits, group_size);
#pragma omp parallel if (w.n * w.k > 32768)
    {
      FlushDenormals flush;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < w.n; ++i)
        for (int64_t k0 = 0; k0 < k; k0 += 256) {
          float block[256];
          const int64_t k1 = std::min(k, k0 + 256);
          if (bits == 4)
            dequantize_row<4>(w, i, k0, k1, block);
          else
            dequantize_row<8>(w, i, k0, k1, block);
          store_rows(block, 256, 1, k1 - k0, nullptr, po + i * k + k0, k);
        }
    }
  });
}
