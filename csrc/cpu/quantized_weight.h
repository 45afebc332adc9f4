// How kernels read a QuantizedWeight (fastlm/quant/weight.py). Included by the bodies that do.
//
//   A lane is 4 bytes of a row: PER_LANE consecutive k (8 of int4, 4 of int8), all in one group.
//   A chunk is VL lanes, one vector.
//
//     row n   [ lane 0 | lane 1 | ... ]      int4 lane: byte b holds k = 2b (low), 2b + 1 (high)
//
// Column order of products with a row is free as long as x is arranged alike, so the dot form
// (quantized_linear.h) multiplies a chunk where it lies; the panel form transposes VL x VL lanes.
template <int BITS>
constexpr int PER_LANE = 32 / BITS;
template <int BITS>
constexpr int CHUNK = VL * PER_LANE<BITS>;

template <class S>
struct Weight {
  const uint8_t* q;
  const S *scales, *zeros;  // (n, groups); zeros may be null
  int64_t n, k, row_bytes, groups, size;

  const uint8_t* row(int64_t i) const { return q + i * row_bytes; }
};

template <class S>
Weight<S> weight_of(const TensorView& qdata, const TensorView& scales, const TensorView* zeros,
                    int64_t k, int bits, int64_t size) {
  check_contiguous("qdata", qdata), check_contiguous("scales", scales);
  if (zeros) check_contiguous("zeros", *zeros);
  const int64_t row_bytes = bits == 8 ? k : (k + 1) / 2;
  check_size("qdata", "bytes a row:", row_bytes, qdata.size(1));
  const int64_t groups = scales.size(1);
  check_size("scales", "groups a row:", (k + size - 1) / size, groups);
  const void* q = bits == 8 ? static_cast<const void*>(qdata.data<int8_t>("qdata"))
                            : qdata.data<uint8_t>("qdata");
  return {static_cast<const uint8_t*>(q), scales.data<S>("scales"),
          zeros ? zeros->data<S>("zeros") : nullptr, qdata.size(0), k, row_bytes, groups, size};
}

FASTLM_INLINE vint load_lanes(const uint8_t* p) {
  vint v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTLM_INLINE vint load_lanes(const uint8_t* p, int64_t bytes) {  // what is beyond reads as zero
  vint v{};
  if (bytes > 0) memcpy(&v, p, size_t(std::min<int64_t>(bytes, sizeof v)));
  return v;
}

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
template <int BITS, class S>
void dequantize_row(const Weight<S>& w, int64_t i, int64_t k0, int64_t k1, float* out) {
  const S* scales = w.scales + i * w.groups;
  const S* zeros = w.zeros ? w.zeros + i * w.groups : nullptr;
  for (int64_t k = k0; k < k1;) {
    const int64_t g = k / w.size, end = std::min((g + 1) * w.size, k1);
    const float s = to_float(scales[g]), z = zeros ? to_float(zeros[g]) : 0.f;
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

// t[j] lane i = lane j of row i: VL rows of VL lanes transposed.
FASTLM_INLINE void transpose(vint (&t)[VL]) {
#if FASTLM_VL == 16
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)t[i], (__m512i)t[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)t[i], (__m512i)t[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  for (int i = 0; i < 8; ++i) {  // rows i and i + 4 of each half
    const int r = i / 4 * 8 + i % 4;
    a[r] = _mm512_shuffle_i32x4(b[r], b[r + 4], 0x88);
    a[r + 4] = _mm512_shuffle_i32x4(b[r], b[r + 4], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    const int column = i % 4 + (i / 4) * 4;
    t[column] = (vint)_mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    t[column + 8] = (vint)_mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
  }
#elif FASTLM_VL == 8
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32((__m256i)t[i], (__m256i)t[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32((__m256i)t[i], (__m256i)t[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = (vint)_mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    t[i + 4] = (vint)_mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
#else
  for (int i = 0; i < VL; ++i)
    for (int j = 0; j < i; ++j) {
      const int32_t x = t[i][j];
      t[i][j] = t[j][i];
      t[j][i] = x;
    }
#endif
}

// Lanes [lane0, lane0 + VL) of rows [i, i + rows), transposed; what does not exist is zero bytes.
template <class S>
FASTLM_INLINE void load_transposed(const Weight<S>& w, int64_t i, int rows, int64_t lane0,
                                   vint (&t)[VL]) {
  const int64_t left = w.row_bytes - lane0 * 4;
  for (int r = 0; r < VL; ++r) {
    const uint8_t* p = w.row(i + r) + lane0 * 4;
    t[r] = r >= rows ? vint{} : left >= 4 * VL ? load_lanes(p) : load_lanes(p, left);
  }
  transpose(t);
}
