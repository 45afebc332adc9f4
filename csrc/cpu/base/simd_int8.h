// int8 widened to vectors of floats.
#if FASTLM_VL == 16
FASTLM_INLINE vfloat widened(__m128i bytes) {
  return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
FASTLM_INLINE vfloat load(const int8_t* p) { return widened(_mm_loadu_si128((const __m128i*)p)); }
FASTLM_INLINE vfloat load(const int8_t* p, int n) {
  FASTLM_READS(p, n);
  return widened(_mm_maskz_loadu_epi8(first_lanes(n), p));
}
#else
FASTLM_INLINE vfloat load(const int8_t* p) {
#if FASTLM_VL == 8
  return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vfloat v{};
  for (int i = 0; i < VL; ++i) v[i] = float(p[i]);
  return v;
#endif
}
FASTLM_INLINE vfloat load(const int8_t* p, int n) {
  int8_t t[VL] = {};
  memcpy(t, p, size_t(n));
  return load(static_cast<const int8_t*>(t));
}
#endif
