// Reads a QuantizedWeight (fastlm/ops/quantized_weight.py) in kernels. The bodies that need it
// include it.
//
//   A lane is 4 bytes of a row: PER_LANE consecutive k (8 of int4, 4 of int8), all in one group.
//   A chunk is VL lanes, one vector.
//
//     row n   [ lane 0 | lane 1 | ... ]      int4 lane: byte b holds k = 2b (low), 2b + 1 (high)
//
// A product with a row may process its columns in any order if x has the same order. So the dot
// form (quantized_linear.h) multiplies a chunk in place; the panel form transposes VL x VL lanes.
template <int BITS>
constexpr int PER_LANE = 32 / BITS;
template <int BITS>
constexpr int CHUNK = VL * PER_LANE<BITS>;

// Scales or offsets of any float dtype. Each read branches on the dtype, which predicts well; a
// template parameter would multiply every kernel by three.
struct Scales {
  const void* p = nullptr;
  DType dtype = DType::f32;
  explicit operator bool() const { return p; }
  FASTLM_INLINE void prefetch(int64_t i, int64_t n) const {  // may be beyond the end
    if (!p) return;
    const int64_t bytes = dtype == DType::f32 ? 4 : 2;
    for (int64_t at = i * bytes; at < (i + n) * bytes; at += 64)
      __builtin_prefetch(static_cast<const char*>(p) + at);
  }
  FASTLM_INLINE float operator[](int64_t i) const {
    if (dtype == DType::bf16) return to_float(static_cast<const bf16*>(p)[i]);
    if (dtype == DType::f32) return static_cast<const float*>(p)[i];
    const f16 x = static_cast<const f16*>(p)[i];
#if FASTLM_VL > 4
    return _cvtsh_ss(x.bits);
#else
    return to_float(x);
#endif
  }
  FASTLM_INLINE vfloat everywhere(int64_t i) const {  // element i in all lanes
#if FASTLM_VL == 16
    if (dtype == DType::bf16)
      return (vfloat)_mm512_slli_epi32(
          _mm512_set1_epi16(short(static_cast<const bf16*>(p)[i].bits)), 16);
#endif
    return splat((*this)[i]);
  }
  FASTLM_INLINE vfloat lanes(int64_t i, int n) const {
    if (dtype == DType::bf16) return load(static_cast<const bf16*>(p) + i, n);
    if (dtype == DType::f32) return load(static_cast<const float*>(p) + i, n);
    return load(static_cast<const f16*>(p) + i, n);
  }
};

struct Weight {
  const uint8_t* q;
  Scales scales, zeros;  // (n, groups)
  int64_t n, k, row_bytes, groups, size;

  const uint8_t* row(int64_t i) const { return q + i * row_bytes; }
};

inline Weight weight_of_size(int64_t n, int64_t k, int bits, int64_t size) {  // no pointers yet
  Weight w{};
  w.n = n, w.k = k, w.row_bytes = bits == 8 ? k : (k + 1) / 2;
  w.groups = (k + size - 1) / size, w.size = size;
  return w;
}

inline Scales scales_of(const TensorView& t, const char* argument) {
  Scales scales;
  with_float(t.dtype(), argument,
             [&](auto tag) { scales = {t.data<decltype(tag)>(argument), t.dtype()}; });
  return scales;
}

inline Weight weight_of(const TensorView& qdata, const TensorView& scales, const TensorView* zeros,
                        int64_t k, int bits, int64_t size) {
  check_contiguous("qdata", qdata), check_contiguous("scales", scales);
  Weight w = weight_of_size(qdata.size(0), k, bits, size);
  check_size("qdata", "bytes a row:", w.row_bytes, qdata.size(1));
  check_size("scales", "groups a row:", w.groups, scales.size(1));
  w.q = bits == 8 ? reinterpret_cast<const uint8_t*>(qdata.data<int8_t>("qdata"))
                  : qdata.data<uint8_t>("qdata");
  w.scales = scales_of(scales, "scales");
  if (zeros) {
    check_contiguous("zeros", *zeros);
    check_size("zeros", "elements, as scales:", scales.numel(), zeros->numel());
    w.zeros = scales_of(*zeros, "zeros");
  }
  return w;
}

FASTLM_INLINE vint load_lanes(const uint8_t* p) {
  vint v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTLM_INLINE vint load_lanes(const uint8_t* p, int64_t bytes) {  // what is beyond reads as zero
#if FASTLM_VL == 16
  const uint64_t mask = bytes >= 64 ? ~0ull : bytes > 0 ? (1ull << bytes) - 1 : 0;
  FASTLM_READS(p, std::clamp<int64_t>(bytes, 0, 64));
  return (vint)_mm512_maskz_loadu_epi8(mask, p);
#else
  vint v{};
  if (bytes > 0) memcpy(&v, p, size_t(std::min<int64_t>(bytes, sizeof v)));
  return v;
#endif
}

#ifdef FASTLM_BF16_DOT
// bf16 of -8 .. 7 for nibbles 0 .. 15, twice: the permutation of words uses 5 bits of each index.
FASTLM_INLINE __m512i nibble_table() {
  return _mm512_broadcast_i64x4(_mm256_setr_epi16(
      short(0xc100), short(0xc0e0), short(0xc0c0), short(0xc0a0), short(0xc080), short(0xc040),
      short(0xc000), short(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
}
#endif

// q of the J-th column of every lane, as float.
template <int BITS, int J>
FASTLM_INLINE vfloat column(vint v) {
#if FASTLM_VL == 16
  if constexpr (BITS == 4) {  // a 16-entry table: one permutation instead of four operations
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vfloat)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)v, 4 * J), table);
  }
#endif
  if constexpr (BITS == 4) v ^= int32_t(0x88888888);  // nibble - 8 in two's complement
  return __builtin_convertvector((v << (32 - BITS - BITS * J)) >> (32 - BITS), vfloat);
}

// VL consecutive q of a row from column k on (k even), as float.
template <int BITS>
FASTLM_INLINE vfloat consecutive(const uint8_t* row, int64_t k, int count) {
  typedef int8_t bytes __attribute__((vector_size(VL)));
  typedef uint8_t half_bytes __attribute__((vector_size(VL / 2)));
  typedef uint16_t half_words __attribute__((vector_size(VL)));
  bytes b{};
  if constexpr (BITS == 8) {
    memcpy(&b, row + k, size_t(count));
  } else {
    half_bytes h{};
    memcpy(&h, row + k / 2, size_t(count + 1) / 2);
    const half_words w = __builtin_convertvector(h, half_words);
    b = (bytes)((w | w << 4) & 0x0f0f) - 8;
  }
  return __builtin_convertvector(__builtin_convertvector(b, vint), vfloat);
}

// Row i, columns [k0, k1) dequantized to out; k0 is a multiple of VL.
template <int BITS>
void dequantize_row(const Weight& w, int64_t i, int64_t k0, int64_t k1, float* out) {
  for (int64_t k = k0; k < k1;) {
    const int64_t g = k / w.size, end = std::min((g + 1) * w.size, k1);
    const float s = w.scales[i * w.groups + g], z = w.zeros ? w.zeros[i * w.groups + g] : 0.f;
    for (; k < end; k += VL) {
      const int count = int(std::min<int64_t>(VL, end - k));
      const vfloat v = consecutive<BITS>(w.row(i), k, count) * s + z;
      if (count == VL)
        store(out + k - k0, v);
      else
        store(out + k - k0, v, count);
    }
    k = end;
  }
}

// Lanes [lane0, lane0 + VL) of rows [i, i + rows), transposed; lanes beyond W are zero bytes.
// Prefetches `ahead` bytes further in each row, where the caller reads after its next product.
FASTLM_INLINE void load_transposed(const Weight& w, int64_t i, int rows, int64_t lane0,
                                   int64_t ahead, vint (&t)[VL]) {
  const int64_t left = w.row_bytes - lane0 * 4;
  for (int r = 0; r < VL; ++r) {
    const uint8_t* p = w.row(i + r) + lane0 * 4;
    __builtin_prefetch(p + ahead, 0, 2);
    t[r] = r >= rows ? vint{} : left >= 4 * VL ? load_lanes(p) : load_lanes(p, left);
  }
  transpose(t);
}
