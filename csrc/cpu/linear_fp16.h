// gemm.h's operands and product on fp16 FMA, for tensors of bf16. Part of linear.cpp's body on CPUs
// with AVX512-FP16, where fp16 FMA has 2.2 times the rate of float32 FMA (Emerald Rapids).
//
//     C  =  A . B  in runs:  RUN products in an fp16 sum, then the sum is added to C in float32
//
// bf16 has 8 bits of exponent, fp16 has 5. So each row of A and each column of B is multiplied by a
// power of two, which brings its largest number to [16, 32): 32 products stay below 2^15. A number
// is exact down to 2^-21 of its row's largest, and 0 below 2^-29 of it (so infinity times such a
// number is NaN). Each addition rounds a partial sum to 2^-11 of itself. With the rounding of the
// result to bf16, that is 1.1 to 1.5 times the error of that rounding alone (docs/log).
//
// Both operands are panels of 16 vectors, which are rows of A or columns of B:
//
//   panel   [16 exponents, float32][K/2][16 vectors][2 k]     2^exponent undoes the power of two
//
// A lane of 32 bits multiplies two consecutive k and keeps two sums, as bf16's dot product would
// add them: so panels look the same. Vectors beyond the last, and k beyond K, are zero.
//
// Source of the idea: GPU kernels that promote fp8 sums in registers (DeepSeek-V3, arXiv:2412.19437,
// section 3.3.2).
constexpr int RUN = 32;          // products of an fp16 sum
constexpr int FP16_ROWS = 4;     // rows x 4 panels of sums: 16 registers
constexpr int FP16_MAX_EXP = 4;  // of a vector's largest number
static_assert(VL == 16 && NP == 4);

// elements of a vector in a panel, with its exponent
template <>
FASTLM_INLINE int64_t padded_k<f16>(int64_t k) {
  return (k + 1) / 2 * 2 + 2;
}

// sum + a b, lane by lane, in fp16
FASTLM_INLINE __m512i fp16_multiply_add(__m512i sum, __m512i a, __m512i b) {
#ifdef FASTLM_FP16_EMULATED  // rounded to float32 first, which differs in one of some 10^4 results
  const auto half = [&](auto part) __attribute__((always_inline)) {
    constexpr int i = decltype(part)::value;
    const auto wide = [](__m512i v) __attribute__((always_inline)) {
      return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, i));
    };
    return _mm512_cvtps_ph(_mm512_fmadd_ps(wide(a), wide(b), wide(sum)), 0);
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(half(std::integral_constant<int, 0>{})),
                            half(std::integral_constant<int, 1>{}), 1);
#else
  return (__m512i)_mm512_fmadd_ph((__m512h)a, (__m512h)b, (__m512h)sum);
#endif
}
// the two sums of each 32-bit lane, added in float32
FASTLM_INLINE vfloat fp16_total(__m512i sums) {
  const __m512i even = _mm512_and_si512(sums, _mm512_set1_epi32(0xffff)),
                odd = _mm512_srli_epi32(sums, 16);
  return (vfloat)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(even)) +
         (vfloat)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(odd));
}

// The exponent that undoes the power of two of vectors with these largest magnitudes, and the power.
// Infinity stays infinity, and makes most of its vector 0.
FASTLM_INLINE vfloat fp16_exponent(vfloat largest) {
  const vint field = as_int(vabs(largest)) >> 23, least = splat_int(FP16_MAX_EXP + 1);
  return __builtin_convertvector((field > least ? field : least) - (127 + FP16_MAX_EXP), vfloat);
}
FASTLM_INLINE vfloat fp16_scale(vfloat exponent) {
  return as_float((127 - to_int(exponent)) << 23);
}

// The first n of 16 floats as 16 fp16; others are 0.
FASTLM_INLINE __m256i fp16_of(const bf16* p, int64_t n, vfloat scale) {
  const vfloat v = n >= VL ? load(p) : n > 0 ? load(p, int(n)) : vfloat{};
  return _mm512_cvtps_ph((__m512)(v * scale), 0);
}
FASTLM_INLINE vfloat largest_of(vfloat largest, vfloat v) {  // NaN in v is not in the result
  return vmax(vabs(v), largest);
}

// A panel of `count` vectors; element k of vector v is source[v * v_stride + k * k_stride], and one
// of the strides is 1.
inline void pack_fp16_panel(const bf16* source, int64_t v_stride, int64_t k_stride, int count,
                            int64_t k, f16* panel) {
  const int64_t kp = padded_k<f16>(k) - 2;
  f16* to = panel + 2 * VL;
  if (v_stride == 1) {  // lanes are vectors
    vfloat largest{};
    for (int64_t i = 0; i < k; ++i) {
      const bf16* p = source + i * k_stride;
      largest = largest_of(largest, count == VL ? load(p) : load(p, count));
    }
    const vfloat exponent = fp16_exponent(largest);
    store(reinterpret_cast<float*>(panel), exponent);
    const vfloat scale = fp16_scale(exponent);
    for (int64_t i = 0; i < kp; i += 2, to += 2 * VL) {
      const bf16* p = source + i * k_stride;
      const __m512i first = _mm512_cvtepu16_epi32(fp16_of(p, count, scale)),
                    second = _mm512_cvtepu16_epi32(i + 1 < k ? fp16_of(p + k_stride, count, scale)
                                                             : __m256i{});
      store_words(to, (vint)_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
    return;
  }
  alignas(64) float maxima[VL] = {}, scales[VL];
  for (int v = 0; v < count; ++v) {  // lanes are consecutive k
    const bf16* p = source + v * v_stride;
    vfloat largest{};
    for (int64_t i = 0; i < k; i += VL)
      largest = largest_of(largest, k - i >= VL ? load(p + i) : load(p + i, int(k - i)));
    maxima[v] = hmax(largest);
  }
  const vfloat exponent = fp16_exponent(load(maxima));
  store(reinterpret_cast<float*>(panel), exponent);
  store(scales, fp16_scale(exponent));
  for (int64_t i = 0; i < kp; i += 2 * VL, to += 2 * VL * VL) {
    vint words[VL] = {};
    for (int v = 0; v < count; ++v) {
      const bf16* p = source + v * v_stride + i;
      const vfloat scale = splat(scales[v]);
      words[v] = (vint)_mm512_inserti64x4(_mm512_castsi256_si512(fp16_of(p, k - i, scale)),
                                          fp16_of(p + VL, k - i - VL, scale), 1);
    }
    transpose(words);
    for (int64_t r = 0; r < std::min<int64_t>(VL, (kp - i) / 2); ++r)
      store_words(to + r * 2 * VL, words[r]);
  }
}

inline void pack_fp16(const bf16* source, int64_t v_stride, int64_t k_stride, int64_t count,
                      int64_t k, f16* packed) {
  for (int64_t v = 0; v < count; v += VL)
    pack_fp16_panel(source + v * v_stride, v_stride, k_stride,
                    int(std::min<int64_t>(VL, count - v)), k, packed + v * padded_k<f16>(k));
}
template <>
inline void pack_a<f16, bf16>(const bf16* source, int64_t m_stride, int64_t k_stride, int64_t m,
                              int64_t k, f16* packed) {
  pack_fp16(source, m_stride, k_stride, m, k, packed);
}
template <>
inline void pack_b<f16, bf16>(const bf16* source, int64_t k_stride, int64_t n_stride, int64_t k,
                              int64_t n, f16* packed) {
  pack_fp16(source, n_stride, k_stride, n, k, packed);
}

// One run: c (+)= a . b of FP16_ROWS rows and PANELS panels over `pairs` of k. `a`, `b`: the first
// word of the run in row 0 and in panel 0; exponents: of the rows, and of the columns in `b_panels`.
template <int PANELS>
FASTLM_INLINE void fp16_run(int64_t pairs, const f16* a, const f16* b, int64_t panel,
                            const float* row_exponents, const f16* b_panels, float* c, int64_t ldc,
                            int rows, int64_t columns, bool add) {
  __m512i sums[FP16_ROWS][PANELS];
#pragma GCC unroll 4
  for (int r = 0; r < FP16_ROWS; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) sums[r][p] = _mm512_setzero_si512();
  for (int64_t i = 0; i < pairs; ++i) {
    __m512i column[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) column[p] = _mm512_loadu_si512(b + p * panel + i * 2 * VL);
#pragma GCC unroll 4
    for (int r = 0; r < FP16_ROWS; ++r) {
      int32_t pair;
      memcpy(&pair, a + (i * VL + r) * 2, 4);
      const __m512i row = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) sums[r][p] = fp16_multiply_add(sums[r][p], row, column[p]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < FP16_ROWS; ++r) {
    if (r >= rows) break;
    const vfloat of_row = splat(row_exponents[r]);
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      const vfloat of_columns = load(reinterpret_cast<const float*>(b_panels + p * panel));
      const vfloat total =
          (vfloat)_mm512_scalef_ps((__m512)fp16_total(sums[r][p]), (__m512)(of_row + of_columns));
      float* to = c + r * ldc + p * VL;
      const int width = int(std::min<int64_t>(VL, columns - p * VL));
      if (width == VL)
        store(to, add ? load(to) + total : total);
      else
        store(to, add ? load(to, width) + total : total, width);
    }
  }
}

// The runs are the outer loop: a run of four panels of B is 8 KiB, which stays in the L1.
template <>
inline void gemm<f16>(int64_t m, int64_t n, int64_t k, const f16* a, int64_t, const f16* b,
                      float* c, int64_t ldc, bool accumulate, int64_t) {
  const int64_t kp = padded_k<f16>(k), pairs = kp / 2 - 1, panel = kp * VL;
  for (int64_t n0 = 0; n0 < n; n0 += NR) {
    const f16* b_panels = b + n0 * kp;
    for (int64_t i = 0; i < pairs; i += RUN)
      for (int64_t m0 = 0; m0 < m; m0 += FP16_ROWS) {
        const f16* a_panel = a + m0 / VL * panel;
        const auto run = [&](auto panels) __attribute__((always_inline)) {
          fp16_run<decltype(panels)::value>(
              std::min<int64_t>(RUN, pairs - i), a_panel + 2 * VL + (i * VL + m0 % VL) * 2,
              b_panels + 2 * VL + i * 2 * VL, panel,
              reinterpret_cast<const float*>(a_panel) + m0 % VL, b_panels, c + m0 * ldc + n0, ldc,
              int(std::min<int64_t>(FP16_ROWS, m - m0)), n - n0, accumulate || i);
        };
        if (n - n0 > 3 * VL)
          run(std::integral_constant<int, 4>{});
        else if (n - n0 > 2 * VL)
          run(std::integral_constant<int, 3>{});
        else if (n - n0 > VL)
          run(std::integral_constant<int, 2>{});
        else
          run(std::integral_constant<int, 1>{});
      }
  }
}
