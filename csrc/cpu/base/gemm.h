// The matrix product that all ops share. It runs on one thread: an op divides its work and calls
// this on blocks, inside a region that holds a `TileScope` (tiles on AMX, no denormals).
//
//     C (M, N) float32  =  A (M, K) . B (K, N)      or  +=
//
//   E  type of the operands: bf16 where the machine has a bf16 dot product and the tensor is bf16,
//      otherwise float (`Elem<T>` says which). Sums are float32 everywhere.
//   A  row-major, row stride `lda`, K padded to `padded_k<E>(K)` with zeros (finite is not enough:
//      NaN * 0). A bf16 tensor with a K that is a multiple of K_STEP is used in place; any other
//      operand is packed by pack_a.
//   B  packed by pack_b into panels of VL columns: [N/VL][K/KP][VL][KP]; KP = 2 for bf16 (one
//      32-bit lane holds two consecutive k), 1 for float. Columns beyond N are zero.
//
//            VL columns           VL columns
//          +-------------+      +-------------+      a panel is contiguous: one vector per KP rows,
//     K/KP | pair,pair.. |      |             |      streamed once per block of MR rows of A;
//          +-------------+      +-------------+      KC rows of NP panels stay in the L2
//
// Register block: MR rows x NP panels, accumulators in registers over KC.
#ifdef FASTLM_BF16_DOT
template <class T>
struct ElemOf {
  using type = float;
};
template <>
struct ElemOf<bf16> {
  using type = bf16;
};
#else
template <class T>
struct ElemOf {
  using type = float;
};
#endif
template <class T>
using Elem = typename ElemOf<T>::type;

#ifdef FASTLM_AMX
#include "cpu/base/amx.h"
#else
struct TileScope {
  FlushDenormals flush;
};
#endif

template <class E>
constexpr int KP = 4 / int(sizeof(E));  // k per 32-bit lane
#ifdef FASTLM_AMX
template <class E>
constexpr int K_STEP = sizeof(E) == 2 ? 32 : 1;  // a tile row is 32 bf16
#else
template <class E>
constexpr int K_STEP = KP<E>;
#endif
template <class E>
FASTLM_INLINE int64_t padded_k(int64_t k) {
  return (k + K_STEP<E> - 1) / K_STEP<E> * K_STEP<E>;
}

#if FASTLM_VL == 16
constexpr int NP = 4, MR = 6;  // 24 accumulators + 4 of B + 1 of A of 32 registers
#elif FASTLM_VL == 8
constexpr int NP = 2, MR = 6;  // 12 + 2 + 1 of 16
#else
constexpr int NP = 2, MR = 4;  // 8 + 2 + 1 of 16
#endif
constexpr int NR = NP * VL;
// Rows of A per step of gemm: two tiles, or a register block.
#ifdef FASTLM_AMX
constexpr int64_t ROWS_AT_A_TIME = 32;
#else
constexpr int64_t ROWS_AT_A_TIME = MR;
#endif
// k summed in registers before C is touched: 2 KiB of each column of B. A block of 64 columns stays
// in the L2; blocks of 32 KiB, which stay in the L1, lost 3 % to reloads of C.
template <class E>
constexpr int KC = 2048 / int(sizeof(E));

template <class E>
FASTLM_INLINE int64_t packed_b_elements(int64_t k, int64_t n) {
  return (n + VL - 1) / VL * VL * padded_k<E>(k);
}

template <class E>
FASTLM_INLINE E to_elem(float x) {
  return from_float<E>(x);
}

// ---- packing
// A vector here is VL words of 32 bits; a word is KP consecutive elements along k.

FASTLM_INLINE vint load_words(const void* p) {
  vint v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTLM_INLINE void store_words(void* p, vint v) { memcpy(p, &v, sizeof v); }

// Transposes: lane j of r[i] moves to lane i of r[j]. log2(VL) rounds; each exchanges halves of
// blocks twice as wide.
FASTLM_INLINE void transpose(vint* r) {
#if FASTLM_VL == 16
  __m512i t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32((__m512i)r[i], (__m512i)r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32((__m512i)r[i], (__m512i)r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // u[i + c]: column c of each 4 x 4 block, rows i .. i + 3
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x88),
                  b = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xdd),
                  d = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x88),
                  e = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xdd);
    r[c] = (vint)_mm512_shuffle_i32x4(a, d, 0x88);
    r[4 + c] = (vint)_mm512_shuffle_i32x4(b, e, 0x88);
    r[8 + c] = (vint)_mm512_shuffle_i32x4(a, d, 0xdd);
    r[12 + c] = (vint)_mm512_shuffle_i32x4(b, e, 0xdd);
  }
#elif FASTLM_VL == 8
  __m256i t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32((__m256i)r[i], (__m256i)r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32((__m256i)r[i], (__m256i)r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    r[c] = (vint)_mm256_permute2x128_si256(u[c], u[4 + c], 0x20);
    r[4 + c] = (vint)_mm256_permute2x128_si256(u[c], u[4 + c], 0x31);
  }
#else
  const vint a = __builtin_shuffle(r[0], r[1], vint{0, 4, 1, 5}),
             b = __builtin_shuffle(r[0], r[1], vint{2, 6, 3, 7}),
             c = __builtin_shuffle(r[2], r[3], vint{0, 4, 1, 5}),
             d = __builtin_shuffle(r[2], r[3], vint{2, 6, 3, 7});
  r[0] = __builtin_shuffle(a, c, vint{0, 1, 4, 5});
  r[1] = __builtin_shuffle(a, c, vint{2, 3, 6, 7});
  r[2] = __builtin_shuffle(b, d, vint{0, 1, 4, 5});
  r[3] = __builtin_shuffle(b, d, vint{2, 3, 6, 7});
#endif
}

// Lane i of the result is the sum of r[i]'s lanes. A transposition that adds halves in each round
// needs half the shuffles.
FASTLM_INLINE vfloat sums_of(vfloat* r) {
#if FASTLM_VL == 4
  vint t[4] = {as_int(r[0]), as_int(r[1]), as_int(r[2]), as_int(r[3])};
  transpose(t);
  return (as_float(t[0]) + as_float(t[1])) + (as_float(t[2]) + as_float(t[3]));
#else
#pragma GCC unroll 8
  for (int i = 0; i < VL / 2; ++i) {
#if FASTLM_VL == 16
    const __m512 a = (__m512)r[2 * i], b = (__m512)r[2 * i + 1];
    r[i] = (vfloat)_mm512_unpacklo_ps(a, b) + (vfloat)_mm512_unpackhi_ps(a, b);
#else
    const __m256 a = (__m256)r[2 * i], b = (__m256)r[2 * i + 1];
    r[i] = (vfloat)_mm256_unpacklo_ps(a, b) + (vfloat)_mm256_unpackhi_ps(a, b);
#endif
  }
#pragma GCC unroll 4
  for (int i = 0; i < VL / 4; ++i) {  // each 128 bits hold partial sums of the same four vectors
#if FASTLM_VL == 16
    const __m512d a = (__m512d)r[2 * i], b = (__m512d)r[2 * i + 1];
    r[i] = (vfloat)_mm512_unpacklo_pd(a, b) + (vfloat)_mm512_unpackhi_pd(a, b);
#else
    const __m256d a = (__m256d)r[2 * i], b = (__m256d)r[2 * i + 1];
    r[i] = (vfloat)_mm256_unpacklo_pd(a, b) + (vfloat)_mm256_unpackhi_pd(a, b);
#endif
  }
#if FASTLM_VL == 16
  const auto halves = [](vfloat a, vfloat b) __attribute__((always_inline)) {
    return (vfloat)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) +
           (vfloat)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd);
  };
  return halves(halves(r[0], r[1]), halves(r[2], r[3]));
#else
  return (vfloat)_mm256_permute2f128_ps((__m256)r[0], (__m256)r[1], 0x20) +
         (vfloat)_mm256_permute2f128_ps((__m256)r[0], (__m256)r[1], 0x31);
#endif
#endif
}

// One vector of a row: KP * VL elements from p as E, zero from element n on.
template <class E, class S>
FASTLM_INLINE vint row_words(const S* p, int64_t n) {
  constexpr int full = KP<E> * VL;
  if constexpr (sizeof(E) == 4)
    return as_int(n >= full ? load(p) : load(p, int(n)));
  else {
    alignas(64) E t[full] = {};
    if constexpr (std::is_same_v<S, E>) {
      if (n >= full) return load_words(p);
      memcpy(t, p, size_t(n) * sizeof(E));
    } else {
      for (int half = 0; half < full; half += VL)
        if (n > half)
          store(t + half, n - half >= VL ? load(p + half) : load(p + half, int(n - half)));
    }
    return load_words(t);
  }
}

// One vector across rows of B or columns of A: lane j holds KP elements along k of column j. `next`
// is the second row of a bf16 pair.
#ifdef FASTLM_BF16_DOT
FASTLM_INLINE vint pair(vfloat first, vfloat second) {
  alignas(64) static constexpr uint16_t interleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vint)_mm512_permutexvar_epi16(
      _mm512_load_si512(interleave), (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
#endif
template <class E, class S>
FASTLM_INLINE vint column_words(const S* p, [[maybe_unused]] int64_t next,
                                [[maybe_unused]] int64_t k_left, int width) {
  const vfloat a = width == VL ? load(p) : load(p, width);
  if constexpr (sizeof(E) == 4) {
    return as_int(a);
  } else {
#ifdef FASTLM_BF16_DOT
    return pair(a, k_left < 2 ? vfloat{} : width == VL ? load(p + next) : load(p + next, width));
#endif
  }
}

// Packs B[k][n] = source[k * k_stride + n * n_stride] into panels. Any strides work; where speed
// matters, one of them is 1.
template <class E, class S>
void pack_b(const S* source, int64_t k_stride, int64_t n_stride, int64_t k, int64_t n, E* packed) {
  const int64_t kp = padded_k<E>(k);
  constexpr int P = KP<E>;
  if (n_stride == 1) {
    for (; n >= 4 * VL; n -= 4 * VL, source += 4 * VL, packed += 4 * kp * VL) {
      for (int64_t i = 0; i + P <= k; i += P)
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p)  // whole cache lines of the source
          store_words(packed + (p * kp + i) * VL,
                      column_words<E>(source + i * k_stride + p * VL, k_stride, P, VL));
      for (int64_t i = k / P * P; i < kp; i += P)
        for (int p = 0; p < 4; ++p)
          store_words(packed + (p * kp + i) * VL,
                      i < k ? column_words<E>(source + i * k_stride + p * VL, k_stride, k - i, VL)
                            : vint{});
    }
    for (; n > 0; n -= VL, source += VL, packed += kp * VL)
      for (int64_t i = 0; i < kp; i += P)
        store_words(packed + i * VL, i < k ? column_words<E>(source + i * k_stride, k_stride, k - i,
                                                             int(std::min<int64_t>(VL, n)))
                                           : vint{});
    return;
  }
  for (int64_t n0 = 0; n0 < n; n0 += VL, packed += kp * VL) {
    const int width = int(std::min<int64_t>(VL, n - n0));
    const S* s = source + n0 * n_stride;
    if (k_stride == 1) {  // a column of B is contiguous: transposed VL words at a time
      for (int64_t i = 0; i < kp; i += P * VL) {
        vint r[VL];
        for (int j = 0; j < VL; ++j)
          r[j] = j < width && i < k ? row_words<E>(s + j * n_stride + i, k - i) : vint{};
        transpose(r);
        const int rows = int(std::min<int64_t>(VL, (kp - i) / P));
        for (int j = 0; j < rows; ++j) store_words(packed + (i + j * P) * VL, r[j]);
      }
    } else {
      memset(packed, 0, size_t(kp) * VL * sizeof(E));
      for (int64_t i = 0; i < k; ++i)
        for (int j = 0; j < width; ++j)
          packed[i / P * VL * P + j * P + i % P] =
              to_elem<E>(to_float(s[i * k_stride + j * n_stride]));
    }
  }
}

// Packs A[m][k] = source[m * m_stride + k * k_stride] into rows of padded_k(k) elements.
template <class E, class S>
void pack_a(const S* source, int64_t m_stride, int64_t k_stride, int64_t m, int64_t k, E* packed) {
  const int64_t kp = padded_k<E>(k);
  constexpr int P = KP<E>;
  if (k_stride == 1) {
    for (int64_t i = 0; i < m; ++i, packed += kp)
      for (int64_t j = 0; j < kp; j += P * VL) {
        const vint words = j < k ? row_words<E>(source + i * m_stride + j, k - j) : vint{};
        if (kp - j >= P * VL)
          store_words(packed + j, words);
        else
          memcpy(packed + j, &words, size_t(kp - j) * sizeof(E));
      }
  } else if (m_stride == 1) {  // a column of A is contiguous
    for (int64_t i = 0; i < m; i += VL) {
      const int height = int(std::min<int64_t>(VL, m - i));
      for (int64_t j = 0; j < kp; j += P * VL) {
        vint r[VL];
        for (int w = 0; w < VL; ++w) {
          const int64_t c = j + w * P;
          r[w] =
              c < k ? column_words<E>(source + i + c * k_stride, k_stride, k - c, height) : vint{};
        }
        transpose(r);
        const size_t bytes = size_t(std::min<int64_t>(P * VL, kp - j)) * sizeof(E);
        for (int h = 0; h < height; ++h) {
          if (bytes == sizeof(vint))
            store_words(packed + (i + h) * kp + j, r[h]);
          else
            memcpy(packed + (i + h) * kp + j, &r[h], bytes);
        }
      }
    }
  } else {
    for (int64_t i = 0; i < m; ++i, packed += kp) {
      const S* s = source + i * m_stride;
      for (int64_t j = 0; j < k; ++j) packed[j] = to_elem<E>(to_float(s[j * k_stride]));
      for (int64_t j = k; j < kp; ++j) packed[j] = to_elem<E>(0.f);
    }
  }
}

FASTLM_INLINE vfloat broadcast(const float* a) { return splat(*a); }
// c + a * b rounded once. Without this, GCC would fuse or not by the shape of the loop, and a row's
// sum would depend on the number of rows in its block.
FASTLM_INLINE vfloat multiply_add(vfloat c, vfloat a, vfloat b, float) {
#if FASTLM_VL == 16
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTLM_VL == 8
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return c + a * b;
#endif
}
#ifdef FASTLM_BF16_DOT
FASTLM_INLINE vfloat broadcast(const bf16* a) {
  int32_t pair;
  memcpy(&pair, a, 4);
  return as_float(splat_int(pair));
}
FASTLM_INLINE vfloat multiply_add(vfloat c, vfloat a, vfloat b, bf16) {
  return (vfloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
}
#endif

#if FASTLM_VL == 16 && !defined(FASTLM_BF16_DOT)
constexpr bool FETCH_A = false;  // A was just widened, so the L2 has it; a prefetch costs 4 %
#else
constexpr bool FETCH_A = true;
#endif

// acc += A . B of ROWS x (PANELS * VL) over k elements. The loops are unrolled by pragma so that
// `acc` stays in registers. Unless the L2 has them (`FETCH_A`), the loop prefetches the rows of A
// at `next`: those of the next block, or the same ones. They must be rows of A: another thread may
// be writing to the lines beyond, and a prefetch would take them from its cache (1.6x slower).
template <class E, int ROWS, int PANELS>
FASTLM_INLINE void products(int64_t k, const E* __restrict a, int64_t lda, const E* next,
                            const E* __restrict b, int64_t panel, vfloat (&acc)[ROWS][PANELS]) {
  constexpr int LINE = 64 / int(sizeof(E));  // elements of A per cache line
  for (int64_t line = 0; line < k; line += LINE) {
    if constexpr (FETCH_A) {
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) __builtin_prefetch(next + r * lda + line);
    }
    const int64_t end = std::min<int64_t>(k, line + LINE);
    for (int64_t i = line; i < end; i += KP<E>) {
      vfloat column[PANELS];
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p)
        column[p] = load(reinterpret_cast<const float*>(b + p * panel + i * VL));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const vfloat row = broadcast(a + r * lda + i);
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) acc[r][p] = multiply_add(acc[r][p], row, column[p], E{});
      }
    }
  }
}

// ROWS x (PANELS * VL) of C over k elements: whole vectors, sums in registers. C is touched once,
// at the end, and prefetched while the block is multiplied.
template <class E, int ROWS, int PANELS>
void micro(int64_t k, const E* __restrict a, int64_t lda, const E* next, const E* __restrict b,
           int64_t panel, float* __restrict c, int64_t ldc, bool accumulate) {
  vfloat acc[ROWS][PANELS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      acc[r][p] = vfloat{};
      __builtin_prefetch(c + r * ldc + p * VL, 1);
    }
  products<E>(k, a, lda, next, b, panel, acc);
  if (accumulate) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) acc[r][p] += load(c + r * ldc + p * VL);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) store(c + r * ldc + p * VL, acc[r][p]);
}

// A last panel of fewer than VL columns is computed in `edge`.
template <class E, int PANELS>
void micro_rows(int rows, int64_t k, const E* a, int64_t lda, const E* next, const E* b,
                int64_t panel, float* c, int64_t ldc, int last, bool accumulate) {
  static_assert(MR <= 6);
  constexpr int W = PANELS * VL;
  alignas(64) float edge[MR * W];
  float* const to = c;
  const int64_t to_ldc = ldc, columns = W - VL + last;
  if (last < VL) {
    if (accumulate)
      for (int r = 0; r < rows; ++r) memcpy(edge + r * W, c + r * ldc, size_t(columns) * 4);
    c = edge, ldc = W;
  }
  switch (rows) {
    case 1:
      micro<E, 1, PANELS>(k, a, lda, next, b, panel, c, ldc, accumulate);
      break;
    case 2:
      micro<E, 2, PANELS>(k, a, lda, next, b, panel, c, ldc, accumulate);
      break;
    case 3:
      micro<E, 3, PANELS>(k, a, lda, next, b, panel, c, ldc, accumulate);
      break;
    case 4:
      micro<E, 4, PANELS>(k, a, lda, next, b, panel, c, ldc, accumulate);
      break;
    case 5:
      micro<E, std::min(MR, 5), PANELS>(k, a, lda, next, b, panel, c, ldc, accumulate);
      break;
    case 6:
      micro<E, std::min(MR, 6), PANELS>(k, a, lda, next, b, panel, c, ldc, accumulate);
      break;
  }
  if (last < VL)
    for (int r = 0; r < rows; ++r) memcpy(to + r * to_ldc, edge + r * W, size_t(columns) * 4);
}

#ifdef FASTLM_AMX
// 32 x 32 of C with four accumulator tiles: two tiles of A and two of B per 32 k, each used twice.
// `rows`, `columns` below 32 are computed in `edge`, so that no row of A or C beyond the matrix is
// accessed.
inline void tile_block(int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t panel,
                       float* c, int64_t ldc, int rows, int columns, bool accumulate) {
  alignas(64) float edge[32 * 32];
  alignas(64) bf16 a_edge[32 * 32];
  const bool full = rows == 32 && columns == 32;
  float* d = full ? c : edge;
  const int64_t ldd = full ? ldc : 32;
  if (!full) {
    memset(edge, 0, sizeof edge);
    if (accumulate)
      for (int r = 0; r < rows; ++r) memcpy(edge + r * 32, c + r * ldc, size_t(columns) * 4);
  }
  const bool right = columns > 16;  // the second panel may not exist
  if (accumulate) {
    tile_load<0>(d, ldd * 4), tile_load<1>(d + 16, ldd * 4);
    tile_load<2>(d + 16 * ldd, ldd * 4), tile_load<3>(d + 16 * ldd + 16, ldd * 4);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  if (rows < 32) memset(a_edge, 0, sizeof a_edge);
  for (int64_t i = 0; i < k; i += 32) {
    const bf16 *top = a + i, *bottom = a + 16 * lda + i;
    int64_t stride = lda * 2;
    if (rows < 32) {
      for (int r = 0; r < rows; ++r) memcpy(a_edge + r * 32, a + r * lda + i, 64);
      top = a_edge, bottom = a_edge + 16 * 32, stride = 64;
    }
    tile_load<4>(top, stride);
    tile_load<6>(b + i * 16, 64);
    tile_bf16<0, 4, 6>();
    if (rows > 16) {
      tile_load<5>(bottom, stride);
      tile_bf16<2, 5, 6>();
    }
    if (right) {
      tile_load<7>(b + panel + i * 16, 64);
      tile_bf16<1, 4, 7>();
      if (rows > 16) tile_bf16<3, 5, 7>();
    }
  }
  tile_store<0>(d, ldd * 4), tile_store<1>(d + 16, ldd * 4);
  tile_store<2>(d + 16 * ldd, ldd * 4), tile_store<3>(d + 16 * ldd + 16, ldd * 4);
  if (!full)
    for (int r = 0; r < rows; ++r) memcpy(c + r * ldc, edge + r * 32, size_t(columns) * 4);
}
#endif

// C = A . B, or C += A . B when `accumulate`; layouts are in the head of the file. `packed_k` is
// the number of rows that B was packed with, if only its first k are multiplied.
template <class E>
void gemm(int64_t m, int64_t n, int64_t k, const E* a, int64_t lda, const E* b, float* c,
          int64_t ldc, bool accumulate, int64_t packed_k = 0) {
  const int64_t kp = padded_k<E>(k), panel = padded_k<E>(std::max(k, packed_k)) * VL;
#ifdef FASTLM_AMX
  if constexpr (sizeof(E) == 2) {
    for (int64_t n0 = 0; n0 < n; n0 += 32)
      for (int64_t k0 = 0; k0 < kp; k0 += 512)  // 512 x 32 bf16 of B: 32 KiB in the L1
        for (int64_t m0 = 0; m0 < m; m0 += 32)
          tile_block(std::min<int64_t>(512, kp - k0), a + m0 * lda + k0, lda,
                     b + n0 / VL * panel + k0 * VL, panel, c + m0 * ldc + n0, ldc,
                     int(std::min<int64_t>(32, m - m0)), int(std::min<int64_t>(32, n - n0)),
                     accumulate || k0);
    return;
  }
#endif
  for (int64_t n0 = 0; n0 < n; n0 += NR) {
    const int columns = int(std::min<int64_t>(NR, n - n0)), panels = (columns + VL - 1) / VL,
              last = columns - (panels - 1) * VL;
    for (int64_t k0 = 0; k0 < kp; k0 += KC<E>) {
      const int64_t kc = std::min<int64_t>(KC<E>, kp - k0);
      const E* bb = b + n0 / VL * panel + k0 * VL;
      for (int64_t m0 = 0; m0 < m; m0 += MR) {
        const int rows = int(std::min<int64_t>(MR, m - m0));
        const E *aa = a + m0 * lda + k0, *next = m - m0 >= 2 * MR ? aa + MR * lda : aa;
        float* cc = c + m0 * ldc + n0;
        const bool add = accumulate || k0;
        switch (panels) {
          case 1:
            micro_rows<E, 1>(rows, kc, aa, lda, next, bb, panel, cc, ldc, last, add);
            break;
          case 2:
            micro_rows<E, 2>(rows, kc, aa, lda, next, bb, panel, cc, ldc, last, add);
            break;
          case 3:
            micro_rows < E, NP<3 ? NP : 3>(rows, kc, aa, lda, next, bb, panel, cc, ldc, last, add);
            break;
          case 4:
            micro_rows < E, NP<4 ? NP : 4>(rows, kc, aa, lda, next, bb, panel, cc, ldc, last, add);
            break;
        }
      }
    }
  }
}
