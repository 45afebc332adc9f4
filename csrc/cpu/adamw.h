// AdamW over many tensors: body of adamw.cpp, compiled per instruction set.
//
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
//   p = p - (lr wd p + lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps))
//
// p changes by one subtraction: multiplying by 1 - lr wd first would round that factor, the same
// way in each step.
//
// There are two passes at most: the sum of squared gradients (only to clip), then one pass that
// reads g, p, m, v once and writes p, m, v once (a master of bfloat16 is p and 16 more bits).
// Chunks are independent, so any thread may process any of them. Stores are plain, since the lines
// have just been read (non-temporal stores were 18 % slower).
//
// 8-bit states: blocks of 256 values over one float32 scale, the block's largest magnitude; a code
// is the top bits of the scaled float, so neither a table nor a search is needed:
//
//   m          sign, 7 bits: 3 of mantissa, 16 binades below the scale; the nearest code
//   sqrt(v)    8 bits: 4 of mantissa, 16 binades (32 of v); never rounds to zero, which would turn
//              a small denominator into eps

typedef uint32_t vuint __attribute__((vector_size(4 * VL)));
typedef uint8_t vbyte __attribute__((vector_size(VL)));

using fastlm::mix32;
FASTLM_INLINE vuint mix32(vuint x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
FASTLM_INLINE vuint lanes() {
  vuint v;
  for (int i = 0; i < VL; ++i) v[i] = uint32_t(i);
  return v;
}
// Rounds to one of the two neighbouring bfloat16, with a probability proportional to nearness; `h`
// is 32 random bits. Infinities and NaN do not change.
FASTLM_INLINE vfloat round_stochastic(vfloat x, vuint h) {
  const vuint u = ((vuint)x + (h >> 16)) & 0xffff0000u;
  return vabs(x) <= splat(std::numeric_limits<float>::max()) ? (vfloat)u : x;
}

FASTLM_INLINE vint load_codes(const uint8_t* p, int n) {
  vbyte b{};
  if (n == VL)
    memcpy(&b, p, VL);
  else
    memcpy(&b, p, size_t(n));
#if FASTLM_VL == 8  // GCC 12 converts lane by lane
  int64_t word;
  memcpy(&word, &b, 8);
  return (vint)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(word));
#else
  return __builtin_convertvector(b, vint);
#endif
}
FASTLM_INLINE void store_codes(uint8_t* p, vint c, int n) {
#if FASTLM_VL == 8
  const __m256i words = _mm256_packus_epi32((__m256i)c, (__m256i)c);
  const __m128i low =
      _mm_unpacklo_epi64(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  const int64_t b = _mm_cvtsi128_si64(_mm_packus_epi16(low, low));
#else
  const vbyte b = __builtin_convertvector(c, vbyte);
#endif
  if (n == VL)
    memcpy(p, &b, VL);
  else
    memcpy(p, &b, size_t(n));
}
// The code of a magnitude in (0, 1], with MANTISSA bits of mantissa; 1.0 <-> MAX.
template <int MANTISSA, int MAX>
struct Code {
  static constexpr int SHIFT = 23 - MANTISSA, OFFSET = (0x3f800000 >> SHIFT) - MAX;
  static FASTLM_INLINE vfloat decode(vint c) {
    return c > 0 ? as_float((c + OFFSET) << SHIFT) : vfloat{};
  }
  static FASTLM_INLINE vint encode(vfloat x) {  // nearest, ties up; under 1 where x is too small
    return ((as_int(x) + (1 << (SHIFT - 1))) >> SHIFT) - OFFSET;
  }
};
using Moment = Code<3, 127>;
using Root = Code<4, 255>;

FASTLM_INLINE vfloat decode_moment(vint c) {
  return as_float(as_int(Moment::decode(c & 127)) | (c & 128) << 24);
}
FASTLM_INLINE vint encode_moment(vfloat x) {  // x in [-1, 1]
  const vfloat a = vabs(x);
  const vint c = Moment::encode(a);
  const vint low = a >= splat(0x1.4p-17f) ? splat_int(1) : splat_int(0);  // half of code 1
  return (c > 0 ? c : low) | ((as_int(x) >> 24) & 128);
}
FASTLM_INLINE vint encode_root(vfloat x) {  // x in [0, 1]
  const vint c = Root::encode(x), min_code = x > splat(0.f) ? splat_int(1) : splat_int(0);
  return c > min_code ? c : min_code;
}

template <class T>
FASTLM_INLINE vfloat load_lanes(const T* p, int n) {
  return n == VL ? load(p) : load(p, n);
}
template <class T>
FASTLM_INLINE void store_lanes(T* p, vfloat v, int n) {
  if (n == VL)
    store(p, v);
  else
    store(p, v, n);
}

template <class G>
double square_sum(const G* g, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n;) {  // at most 4096 / VL fp32 additions a lane before fp64 takes over
    const int64_t end = std::min(n, i + 4096);
    vfloat a{}, b{};
    for (; i + 2 * VL <= end; i += 2 * VL) {
      const vfloat x = load(g + i), y = load(g + i + VL);
      a += x * x, b += y * y;
    }
    for (; i < end; i += VL) {
      const vfloat x = load_lanes(g + i, int(std::min<int64_t>(VL, end - i)));
      a += x * x;
    }
    sum += hsum(a + b);
  }
  return sum;
}

inline void adamw_square_sums(const AdamwTensor* tensors, const AdamwChunk* chunks, int64_t count,
                              double* sums) {
#pragma omp parallel
  {
    FlushDenormals flush;
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < count; ++c) {
      const AdamwTensor& t = tensors[chunks[c].tensor];
      with_float(t.grad_type, "grad", [&](auto tag) {
        using G = decltype(tag);
        sums[c] = square_sum(static_cast<const G*>(t.grad) + chunks[c].start, chunks[c].n);
      });
    }
  }
}

// A float32 master in two halves. The parameter is its upper 16 bits, rounded to nearest (ties away
// from zero). The lower 16 bits, read as a signed number and added to the parameter's bits, give
// the master back. Integer moves: a conversion to bfloat16 would flush denormals and quiet NaN.
typedef int16_t vshort __attribute__((vector_size(2 * VL)));
FASTLM_INLINE vint load_halves(const void* p, int n) {
  vshort h{};
  if (n == VL)
    memcpy(&h, p, sizeof h);
  else
    memcpy(&h, p, size_t(n) * 2);
  return __builtin_convertvector(h, vint);
}
FASTLM_INLINE void store_halves(void* p, vint v, int n) {
  const vshort h = __builtin_convertvector(v, vshort);
  if (n == VL)
    memcpy(p, &h, sizeof h);
  else
    memcpy(p, &h, size_t(n) * 2);
}
FASTLM_INLINE vfloat join_master(const bf16* high, const int16_t* low, int n) {
  // zero has no lower half: where the user set a parameter to zero, the last step's half is stale
  const vuint h = (vuint)load_halves(high, n) << 16, l = (vuint)load_halves(low, n);
  return (vfloat)(h << 1 ? h + l : h);
}
FASTLM_INLINE void split_master(vfloat w, bf16* high, int16_t* low, int n) {
  const vuint bits = (vuint)(w == w ? as_int(w) : splat_int(0x7fc00000));  // NaN must not round up
  store_halves(high, (vint)((bits + 0x8000u) >> 16), n);
  store_halves(low, (vint)bits, n);
}

// Prefetch sixteen cache lines ahead: with seven streams, the hardware's prefetchers alone were 5 %
// slower (two threads, Zen 5; 64 lines ahead was slower than no prefetch).
template <class X>
FASTLM_INLINE void ahead(const X* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 1024);
}

// Writes one vector of parameters, w minus the step, to the master and the parameter.
template <class P>
struct Weights {
  P* param;
  float* master;
  int16_t* low;
  bool stochastic;
  uint32_t key;

  FASTLM_INLINE vfloat get(int64_t j, int n) const {
    if constexpr (std::is_same_v<P, bf16>)
      if (low) return join_master(param + j, low + j, n);
    return master ? load_lanes(master + j, n) : load_lanes(param + j, n);
  }
  FASTLM_INLINE void fetch(int64_t j) const {
    if (master) ahead(master + j);
    if (low) ahead(low + j);
    ahead(param + j);
  }
  FASTLM_INLINE void put(int64_t j, vfloat w, int n) const {
    if constexpr (std::is_same_v<P, bf16>)
      if (low) return split_master(w, param + j, low + j, n);
    if (master) store_lanes(master + j, w, n);
    if (stochastic) w = round_stochastic(w, mix32((lanes() + uint32_t(j)) * 0x9e3779b9u + key));
    store_lanes(param + j, w, n);
  }
};

template <class P, class G>
void adamw_chunk(const AdamwTensor& t, int64_t start, int64_t count, float clip) {
  const Weights<P> weights{static_cast<P*>(t.param) + start, t.master ? t.master + start : nullptr,
                           t.master_low ? t.master_low + start : nullptr, t.stochastic,
                           mix32(t.key + uint32_t(start / ADAMW_CHUNK) * 0x9e3779b9u)};
  const G* g = static_cast<const G*>(t.grad) + start;
  const float scale = clip * t.sign;
  const auto updated = [&](vfloat w, vfloat m, vfloat root) __attribute__((always_inline)) {
    return w - (w * t.decay + m / (root * t.root_scale + t.eps) * t.step_size);
  };
  if (!t.exp_avg_scale) {
    float *m = static_cast<float*>(t.exp_avg) + start,
          *v = static_cast<float*>(t.exp_avg_sq) + start;
    const auto step = [&](int64_t j, int n) __attribute__((always_inline)) {
      ahead(g + j), ahead(m + j), ahead(v + j), weights.fetch(j);
      const vfloat grad = load_lanes(g + j, n) * scale;
      const vfloat m1 = load_lanes(m + j, n) * t.beta1 + grad * t.rest1;
      const vfloat v1 = load_lanes(v + j, n) * t.beta2 + grad * grad * t.rest2;
      store_lanes(m + j, m1, n), store_lanes(v + j, v1, n);
      weights.put(j, updated(weights.get(j, n), m1, vsqrt(v1)), n);
    };
    int64_t j = 0;
    for (; j + 4 * VL <= count; j += 4 * VL) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) step(j + u * VL, VL);
    }
    for (; j + VL <= count; j += VL) step(j, VL);
    if (j < count) step(j, int(count - j));
    return;
  }
  alignas(64) float m1[ADAMW_BLOCK], r1[ADAMW_BLOCK];
  for (int64_t b = 0; b < count; b += ADAMW_BLOCK) {
    const int64_t block = (start + b) / ADAMW_BLOCK;
    const int size = int(std::min(ADAMW_BLOCK, count - b));
    uint8_t* m = static_cast<uint8_t*>(t.exp_avg) + start + b;
    uint8_t* r = static_cast<uint8_t*>(t.exp_avg_sq) + start + b;
    const float m_scale = t.exp_avg_scale[block], r_scale = t.exp_avg_sq_scale[block];
    vfloat m_max{}, r_max{}, poison{};  // poison: NaN where a state is not finite, else 0
    const auto step = [&](int j, int n) __attribute__((always_inline)) {
      const vfloat grad = load_lanes(g + b + j, n) * scale;
      const vfloat root = Root::decode(load_codes(r + j, n)) * r_scale;
      const vfloat mm = decode_moment(load_codes(m + j, n)) * (m_scale * t.beta1) + grad * t.rest1;
      const vfloat rr = vsqrt(root * root * t.beta2 + grad * grad * t.rest2);
      store(m1 + j, mm), store(r1 + j, rr);  // lanes beyond n: zeros, as gradients and codes are
      m_max = vmax(m_max, vabs(mm)), r_max = vmax(r_max, rr), poison += (mm + rr) * 0.f;
      weights.put(b + j, updated(weights.get(b + j, n), mm, rr), n);
    };
    int j = 0;
    for (; j + VL <= size; j += VL) step(j, VL);
    if (j < size) step(j, size - j);
    // one value that is not finite makes its whole block NaN, so that it is noticed
    const float bad = hsum(poison), mx = hmax(m_max) + bad, rx = hmax(r_max) + bad;
    t.exp_avg_scale[block] = mx, t.exp_avg_sq_scale[block] = rx;
    const float m_inv = mx > 1e-37f ? 1 / mx : 0, r_inv = rx > 1e-37f ? 1 / rx : 0;
    const auto pack = [&](int j, int n) __attribute__((always_inline)) {
      store_codes(m + j, encode_moment(load(m1 + j) * m_inv), n);
      store_codes(r + j, encode_root(load(r1 + j) * r_inv), n);
    };
    for (j = 0; j + VL <= size; j += VL) pack(j, VL);
    if (j < size) pack(j, size - j);
  }
}

// Eight consecutive chunks go to one thread: the hardware's prefetchers follow the seven streams of
// a tensor, and lose them when a thread jumps.
inline void adamw_update(const AdamwTensor* tensors, const AdamwChunk* chunks, int64_t count,
                         float clip) {
#pragma omp parallel
  {
    // the moments of a weight without gradients decay into denormals
    FlushDenormals flush;
#pragma omp for schedule(dynamic, 8)
    for (int64_t c = 0; c < count; ++c) {
      const AdamwTensor& t = tensors[chunks[c].tensor];
      with_float(t.param_type, "param", [&](auto p) {
        with_float(t.grad_type, "grad", [&](auto g) {
          adamw_chunk<decltype(p), decltype(g)>(t, chunks[c].start, chunks[c].n, clip);
        });
      });
    }
  }
}
