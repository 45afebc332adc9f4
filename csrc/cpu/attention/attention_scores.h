// The options applied to one row of scores (scale, softcap, ALiBi, bias), dropout, and 2^x.

constexpr float LOG2E = 1.44269504088896341f;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

typedef uint32_t vuint __attribute__((vector_size(4 * VL)));

FASTLM_INLINE vint iota() {
  vint v{};
  for (int i = 0; i < VL; ++i) v[i] = i;
  return v;
}

// Scores, maxima and lse are natural logarithms, and the exponential is vexp2((s - m) * LOG2E). The
// difference comes first: s and m multiplied by log2(e) would each be rounded, and P and lse would
// be off by |s| units in the last place. The price is one multiplication per score.
//
// 2^x for x <= 127; 0 below -126 (-inf too), NaN stays. Degree 6 on [-1/2, 1/2] through 2^0 = 1:
// 2e-9 relative before rounding; a lone visible key has P = 1 exactly.
FASTLM_INLINE vfloat vexp2(vfloat x) {
  x = vmax(splat(-200.f), x);  // max returns its second argument when one is NaN
  const vfloat n = vround(x), r = x - n;
  vfloat p = splat(0.00015353361959569156f);
  p = p * r + 0.0013398875016719103f;
  p = p * r + 0.00961843691766262f;
  p = p * r + 0.055503323674201965f;
  p = p * r + 0.24022647738456726f;
  p = p * r + 0.6931471824645996f;
  p = p * r + 1.f;
#if FASTLM_VL == 16
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return x < -126.f ? vfloat{} : p * as_float((to_int(n) + 127) << 23);
#endif
}

struct ScoreBias {
  const char* p = nullptr;
  DType dtype = DType::f32;
  int64_t batch = 0, head = 0, row = 0, key = 0;  // strides, 0 where the size is 1

  FASTLM_INLINE vfloat load_at(int64_t offset, int n) const {
    switch (dtype) {
      case DType::bf16:
        return load_at(reinterpret_cast<const bf16*>(p) + offset, n);
      case DType::f16:
        return load_at(reinterpret_cast<const f16*>(p) + offset, n);
      default:
        return load_at(reinterpret_cast<const float*>(p) + offset, n);
    }
  }

 private:
  template <class B>
  FASTLM_INLINE vfloat load_at(const B* q, int n) const {
    if (key == 1) return n >= VL ? load(q) : load(q, n);
    vfloat v{};
    for (int l = 0; l < std::min(n, VL); ++l) v[l] = to_float(q[l * key]);
    return v;
  }
};

struct ScoreOptions : AttentionOptions {
  const float* alibi_slopes = nullptr;
  const float* sinks = nullptr;
  ScoreBias bias{};
  bool dropout = false;
  uint64_t seed = 0;
  uint32_t threshold = 0;  // a word below it drops
  float keep_scale = 1;    // 1 / (1 - p)

  // No option but scale > 0: the row maximum can be taken before scaling.
  bool plain() const { return scale > 0 && softcap == 0 && !alibi_slopes && !bias.p; }
};

inline ScoreOptions score_options(const AttentionInputs& in) {
  ScoreOptions o{in.options};
  const AttentionExtras& extras = in.extras;
  if (extras.alibi_slopes) o.alibi_slopes = extras.alibi_slopes->data<float>("alibi_slopes");
  if (extras.sinks) o.sinks = extras.sinks->data<float>("sinks");
  if (const auto& t = extras.bias) {
    with_float(t->dtype(), "bias", [&](auto tag) {
      o.bias.p = reinterpret_cast<const char*>(t->data<decltype(tag)>("bias"));
    });
    o.bias.dtype = t->dtype();
    const auto stride = [&](int i) { return t->size(i) == 1 ? 0 : t->stride(i); };
    o.bias.batch = stride(0), o.bias.head = stride(1);
    o.bias.row = stride(2), o.bias.key = stride(3);
  }
  if (extras.seed) {
    o.dropout = true;
    o.seed = uint64_t(*extras.seed->data<int64_t>("seed"));
    // p = 1 drops everything: the factor is 0 for every word
    o.threshold = uint32_t(std::min(o.dropout_p * 4294967296.0, 4294967295.0));
    o.keep_scale = o.dropout_p < 1 ? float(1 / (1 - o.dropout_p)) : 0.f;
  }
  return o;
}

// Applies scale, softcap, ALiBi and bias to the scores s of row i of head h of sequence b, keys
// j0 .. j0 + n, and multiplies by `unit`. `slope`, unless null, receives the softcap's derivative.
// `position` is the key at the query's position.
inline void finish_scores(const ScoreOptions& o, float scale, int64_t b, int64_t h, int64_t i,
                          int64_t position, int64_t j0, int64_t n, float* s, float* slope) {
  const float alibi = o.alibi_slopes ? o.alibi_slopes[h] : 0.f;
  const int64_t bias = b * o.bias.batch + h * o.bias.head + i * o.bias.row + j0 * o.bias.key;
  vfloat distance = splat(float(position - j0)) - __builtin_convertvector(iota(), vfloat);
  for (int64_t j = 0; j < n; j += VL, distance -= float(VL)) {
    vfloat x = load(s + j) * scale;
    if (o.softcap > 0) {
      const vfloat t = vtanh(x * (1.f / o.softcap));
      x = t * o.softcap;
      if (slope) store(slope + j, 1.f - t * t);
    }
    if (alibi != 0) x -= vabs(distance) * alibi;
    if (o.bias.p) x += o.bias.load_at(bias + j * o.bias.key, int(std::min<int64_t>(VL, n - j)));
    store(s + j, x);
  }
}

FASTLM_INLINE vuint multiply_high(vuint a, uint32_t b) {
#if FASTLM_VL == 16
  const __m512i m = _mm512_set1_epi32(int(b));
  const __m512i even = _mm512_mul_epu32((__m512i)a, m),
                odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), m);
  return (vuint)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
#elif FASTLM_VL == 8
  const __m256i m = _mm256_set1_epi32(int(b));
  const __m256i even = _mm256_mul_epu32((__m256i)a, m),
                odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), m);
  return (vuint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  vuint r{};
  for (int i = 0; i < VL; ++i) r[i] = uint32_t(uint64_t(a[i]) * b >> 32);
  return r;
#endif
}

// Philox4x32-10: the four words of each counter replace it (reference.philox).
FASTLM_INLINE void philox(vuint c[4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const vuint low_a = c[0] * 0xD2511F53u, high_a = multiply_high(c[0], 0xD2511F53u),
                low_b = c[2] * 0xCD9E8D57u, high_b = multiply_high(c[2], 0xCD9E8D57u);
    c[0] = high_b ^ c[1] ^ k0, c[1] = low_b, c[2] = high_a ^ c[3] ^ k1, c[3] = low_a;
  }
}

// factor[j - j0] = 0 or 1 / (1 - p) for keys j0 .. j0 + n, j0 a multiple of 64; room for n rounded
// up to 64. Key j takes word (j / 16) % 4 of counter (j / 64 * 16 + j % 16, i, h, b).
inline void dropout_row(const ScoreOptions& o, int64_t b, int64_t h, int64_t i, int64_t j0,
                        int64_t n, float* factor) {
  for (int64_t j = 0; j < n; j += 64)
    for (int lane = 0; lane < 16; lane += VL) {
      vuint c[4] = {(vuint)(iota() + int32_t((j0 + j) / 4 + lane)), vuint{} + uint32_t(i),
                    vuint{} + uint32_t(h), vuint{} + uint32_t(b)};
      philox(c, o.seed);
      for (int word = 0; word < 4; ++word)
        store(factor + j + word * 16 + lane,
              c[word] >= o.threshold ? splat(o.keep_scale) : vfloat{});
    }
}
