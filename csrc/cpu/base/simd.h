// Vectors of VL floats for one instruction set. each_isa.h includes this file inside a namespace
// and a target region, so it has no include guard and no headers. GCC's vector extensions give the
// arithmetic (+ - * / and fused a * b + c); this file adds conversion, partial load and store,
// reductions and exp.
constexpr int VL = FASTLM_VL;
typedef float vfloat __attribute__((vector_size(4 * VL)));
typedef int32_t vint __attribute__((vector_size(4 * VL)));
#undef FASTLM_INLINE
#define FASTLM_INLINE inline __attribute__((always_inline))

// While an object of this class exists, its thread reads and writes denormal numbers as zero: with
// a value below 2^-126 an instruction takes 10 to 150 cycles instead of one (docs/log.md). Every
// loop that computes is inside its scope, in every thread of a parallel region. It is constructed
// inside the region: threads that OpenMP starts inherit the mode and would keep it.
struct FlushDenormals {
  const unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040); }  // FTZ and DAZ
  ~FlushDenormals() { _mm_setcsr(before); }
  FlushDenormals(const FlushDenormals&) = delete;
};

FASTLM_INLINE vfloat splat(float x) { return x - vfloat{}; }  // 0 + x would turn -0 into 0
FASTLM_INLINE vint splat_int(int32_t x) { return vint{} + x; }
FASTLM_INLINE vfloat as_float(vint v) { return (vfloat)v; }
FASTLM_INLINE vint as_int(vfloat v) { return (vint)v; }

// ---- one element
FASTLM_INLINE float to_float(float x) { return x; }
FASTLM_INLINE float to_float(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
FASTLM_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31,
                 fraction = x.bits & 1023;
  uint32_t u;
  if (exponent == 31)
    u = sign | 0x7f800000 | fraction << 13;
  else if (exponent)
    u = sign | (exponent + 112) << 23 | fraction << 13;
  else {  // zero or subnormal: fraction * 2^-24 is exact in float
    const float f = float(fraction) * 0x1p-24f;
    memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}
template <class T>
FASTLM_INLINE T from_float(float);
template <>
FASTLM_INLINE float from_float<float>(float x) {
  return x;
}
template <>
FASTLM_INLINE bf16 from_float<bf16>(float x) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return bf16{uint16_t(u >> 16 | 0x40)};
  return bf16{uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
FASTLM_INLINE f16 from_float<f16>(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint16_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return f16{uint16_t(sign | 0x7e00)};
  if (u >= 0x477ff000) return f16{uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (u < 0x38800000) {  // subnormal half: adding 0.5 rounds at 2^-24
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;
    memcpy(&u, &a, 4);
    return f16{uint16_t(sign | (u - 0x3f000000))};
  }
  u += 0xfff + (u >> 13 & 1);
  return f16{uint16_t(sign | (u - 0x38000000) >> 13)};
}

// ---- load, store: whole vectors, or the first n lanes (others are read as zero and not written)
FASTLM_INLINE vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTLM_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }

#if FASTLM_VL == 16
FASTLM_INLINE __mmask16 first_lanes(int n) { return __mmask16(_bzhi_u32(0xffff, n)); }
FASTLM_INLINE vfloat load(const bf16* p) {
  return (vfloat)_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
FASTLM_INLINE vfloat load(const f16* p) {
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
FASTLM_INLINE vfloat load(const float* p, int n) {
  FASTLM_READS(p, 4 * n);
  return (vfloat)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
FASTLM_INLINE vfloat load(const bf16* p, int n) {
  FASTLM_READS(p, 2 * n);
  return (vfloat)_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16));
}
FASTLM_INLINE vfloat load(const f16* p, int n) {
  FASTLM_READS(p, 2 * n);
  return (vfloat)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
#ifdef FASTLM_BF16_DOT
FASTLM_INLINE __m256i rounded_to_bf16(vfloat v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
#else
FASTLM_INLINE __m256i rounded_to_bf16(vfloat v) {  // to nearest even; NaN keeps its upper bits
  alignas(64) static constexpr uint16_t upper_words[32] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                           17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i u = (__m512i)v,
                odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_load_si512(upper_words), all));
}
#endif
FASTLM_INLINE void store(bf16* p, vfloat v) {
  _mm256_storeu_si256((__m256i*)p, rounded_to_bf16(v));
}
FASTLM_INLINE void store(f16* p, vfloat v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0));
}
FASTLM_INLINE void store(float* p, vfloat v, int n) {
  FASTLM_WRITES(p, 4 * n);
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
FASTLM_INLINE void store(bf16* p, vfloat v, int n) {
  FASTLM_WRITES(p, 2 * n);
  _mm256_mask_storeu_epi16(p, first_lanes(n), rounded_to_bf16(v));
}
FASTLM_INLINE void store(f16* p, vfloat v, int n) {
  FASTLM_WRITES(p, 2 * n);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph((__m512)v, 0));
}
FASTLM_INLINE vfloat vmax(vfloat a, vfloat b) {
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
}
FASTLM_INLINE vfloat vmin(vfloat a, vfloat b) {
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
}
FASTLM_INLINE vfloat vsqrt(vfloat a) { return (vfloat)_mm512_sqrt_ps((__m512)a); }
FASTLM_INLINE vfloat vround(vfloat a) { return (vfloat)_mm512_roundscale_ps((__m512)a, 0); }
FASTLM_INLINE float hsum(vfloat a) { return _mm512_reduce_add_ps((__m512)a); }
FASTLM_INLINE float hmax(vfloat a) { return _mm512_reduce_max_ps((__m512)a); }
FASTLM_INLINE vint to_int(vfloat a) { return (vint)_mm512_cvtps_epi32((__m512)a); }
#else
#if FASTLM_VL == 8
FASTLM_INLINE vfloat load(const bf16* p) {
  return (vfloat)_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
FASTLM_INLINE vfloat load(const f16* p) {
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
FASTLM_INLINE void store(bf16* p,
                         vfloat v) {  // round to nearest even; NaN keeps its top bits and stays NaN
  const __m256i u = (__m256i)v;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i r = _mm256_blendv_epi8(rounded, quiet,
                                       (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
FASTLM_INLINE void store(f16* p, vfloat v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0));
}
FASTLM_INLINE vfloat vmax(vfloat a, vfloat b) {
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
}
FASTLM_INLINE vfloat vmin(vfloat a, vfloat b) {
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
}
FASTLM_INLINE vfloat vsqrt(vfloat a) { return (vfloat)_mm256_sqrt_ps((__m256)a); }
FASTLM_INLINE vfloat vround(vfloat a) { return (vfloat)_mm256_round_ps((__m256)a, 0); }
FASTLM_INLINE vint to_int(vfloat a) { return (vint)_mm256_cvtps_epi32((__m256)a); }
#else
template <class T>
FASTLM_INLINE vfloat load(const T* p) {
  vfloat v{};
  for (int i = 0; i < VL; ++i) v[i] = to_float(p[i]);
  return v;
}
template <class T>
FASTLM_INLINE void store(T* p, vfloat v) {
  for (int i = 0; i < VL; ++i) p[i] = from_float<T>(v[i]);
}
FASTLM_INLINE vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }
FASTLM_INLINE vfloat vmin(vfloat a, vfloat b) { return a < b ? a : b; }
FASTLM_INLINE vfloat vsqrt(vfloat a) {
  for (int i = 0; i < VL; ++i) a[i] = std::sqrt(a[i]);
  return a;
}
FASTLM_INLINE vfloat
vround(vfloat a) {  // 1.5 * 2^23 pushes the fraction out; |a| < 2^22 wherever it is used
  const vfloat magic = splat(12582912.f);
  return (a + magic) - magic;
}
FASTLM_INLINE vint to_int(vfloat a) { return __builtin_convertvector(a, vint); }
#endif
template <class T>
FASTLM_INLINE vfloat load(const T* p, int n) {
  alignas(32) T t[VL] = {};
  memcpy(t, p, size_t(n) * sizeof(T));
  return load(static_cast<const T*>(t));
}
template <class T>
FASTLM_INLINE void store(T* p, vfloat v, int n) {
  alignas(32) T t[VL];
  store(static_cast<T*>(t), v);
  memcpy(p, t, size_t(n) * sizeof(T));
}
FASTLM_INLINE float hsum(vfloat a) {
  float s = 0;
  for (int i = 0; i < VL; ++i) s += a[i];
  return s;
}
FASTLM_INLINE float hmax(vfloat a) {
  float m = a[0];
  for (int i = 1; i < VL; ++i) m = std::max(m, a[i]);
  return m;
}
#endif

FASTLM_INLINE vfloat vabs(vfloat a) { return as_float(as_int(a) & 0x7fffffff); }

// ---- exp and functions of it
// e^x = 2^n e^r, |r| <= ln2/2; degree-6 polynomial of e^r, 2^n by exponent bits in two factors so
// that results below 2^-126 come out as denormals. 2 ulp on [-104, 88.7]; 0 below, inf above, NaN
// stays.
FASTLM_INLINE vfloat vexp(vfloat x) {
  // min/max return their second argument when one is NaN
  const vfloat c = vmax(splat(-104.f), vmin(splat(89.f), x));
  const vfloat n = vround(c * 1.44269504088896341f);
  vfloat r = c - n * 0.693145751953125f;  // ln2 in two parts: the first has 8 trailing zero bits, n
                                          // * it is exact
  r = r - n * 1.42860682030941723212e-6f;
  vfloat p = splat(1.f / 720);
  p = p * r + splat(1.f / 120);
  p = p * r + splat(1.f / 24);
  p = p * r + splat(1.f / 6);
  p = p * r + splat(.5f);
  p = p * r + splat(1.f);
  p = p * r + splat(1.f);
#if FASTLM_VL == 16
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);  // one instruction instead of seven
#else
  const vint e = to_int(n), half = e >> 1;
  return p * as_float((half + 127) << 23) * as_float((e - half + 127) << 23);
#endif
}
FASTLM_INLINE vfloat vsigmoid(vfloat x) { return 1.f / (1.f + vexp(-x)); }
// tanh x = 1 - 2 / (e^2x + 1); near 0 that cancels, so |x| < 0.25 takes the odd series to x^9
// (error 3e-8 x)
FASTLM_INLINE vfloat vtanh(vfloat x) {
  const vfloat big = 1.f - 2.f / (vexp(x * 2.f) + 1.f), s = x * x;
  vfloat p = splat(62.f / 2835);
  p = p * s + splat(-17.f / 315);
  p = p * s + splat(2.f / 15);
  p = p * s + splat(-1.f / 3);
  const vfloat small = x + x * s * p;
  return vabs(x) < splat(0.25f) ? small : big;
}
// erf x: below 7/8 odd, x p(x^2); above 1 - exp(-q(|x|)), q of degree 8, and 1 from 3.95 on.
// Absolute error under 1.2e-7 (1 ulp of a result near 1), relative under 2e-7 below 7/8; NaN stays.
// Coefficients: interpolation at Chebyshev nodes of erf(sqrt s) / sqrt s and of -log(erfc a).
FASTLM_INLINE vfloat verf(vfloat x) {
  const vfloat a = vmin(splat(3.95f), vabs(x)), s = x * x;
  vfloat p = splat(8.690368907390262e-05f);
  p = p * s + splat(-0.0008214570887454587f);
  p = p * s + splat(0.0052070489106000265f);
  p = p * s + splat(-0.026861705831181606f);
  p = p * s + splat(0.11283735210155595f);
  p = p * s + splat(-0.3761263621367055f);
  p = p * s + splat(1.1283791668855805f);
  vfloat q = splat(-1.6553748848748112e-06f);
  q = q * a + splat(4.637904577756166e-05f);
  q = q * a + splat(-0.0005991568655794824f);
  q = q * a + splat(0.00476882734297201f);
  q = q * a + splat(-0.02644192162020555f);
  q = q * a + splat(0.11010640863466041f);
  q = q * a + splat(0.631809715544236f);
  q = q * a + splat(1.1302357735395205f);
  q = q * a + splat(-0.0003188438167062844f);
  const vint sign = as_int(x) & splat_int(int32_t(0x80000000));
  const vfloat big = as_float(as_int(1.f - vexp(-q)) | sign);
  return vabs(x) < splat(0.875f) ? x * p : big;
}
// erf to 4e-7, absolute and relative, at half the cost: one rational function of degree 11 / 10 and
// no exp. For results that are rounded to 16 bits (2^-12 at best).
FASTLM_INLINE vfloat verf_coarse(vfloat x) {
  const vfloat c = vmax(splat(-4.f), vmin(splat(4.f), x)), s = c * c;
  vfloat n = splat(1.986937604669947e-06f);
  n = n * s + splat(0.00028453560662455857f);
  n = n * s + splat(0.0038821750786155462f);
  n = n * s + splat(0.05309814214706421f);
  n = n * s + splat(0.19351835548877716f);
  n = n * s + splat(1.1283791065216064f);
  vfloat d = splat(3.7420191802084446e-05f);
  d = d * s + splat(0.001185279805213213f);
  d = d * s + splat(0.01520492136478424f);
  d = d * s + splat(0.11533889174461365f);
  d = d * s + splat(0.5048337578773499f);
  d = d * s + splat(1.f);
  return c * n / d;
}
