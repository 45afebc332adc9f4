// The int8 matrix core of quantized_linear.h, one thread:
//
//     C (M, N) float32  =  scale(n) * A (M, K) int8 . B (K, N)      or  +=
//
// with int32 sums over one run of k, which lies in one group of the weight.
//
//   A  rows of int8, run after run, each padded with zeros to K_STEP8 (`Runs` says where)
//   B  panels of VL columns [K/4][VL][4], as the weight stores it: nibbles, or bytes with the sign
//      bit flipped, on VNNI, which multiplies unsigned by signed; signed elsewhere. int4 keeps
//      the order of its nibbles, even k of 8 and then odd; quantize_row arranges A alike.
//   start  minus the offset of B times the sum of A's run: where the int32 sums begin

// What is added to q where it is stored unsigned.
#if FASTLM_VL == 16
template <int BITS>
constexpr int OFFSET = BITS == 4 ? 8 : 128;
#elif FASTLM_VL == 8
template <int BITS>
constexpr int OFFSET = BITS == 4 ? 8 : 0;  // int8: 255 * 127 * 2 would saturate vpmaddubsw
#else
template <int BITS>
constexpr int OFFSET = 0;
#endif
#ifdef FASTLM_AMX
constexpr int K_STEP8 = 64;  // a tile row is 64 int8
template <int BITS>
constexpr int PANEL_OFFSET = 0;  // tiles multiply signed by signed
#else
constexpr int K_STEP8 = 8;  // a lane of int4
template <int BITS>
constexpr int PANEL_OFFSET = OFFSET<BITS>;
#endif
constexpr int64_t RUN_MAX = 512;  // k of a run: 32 KiB of B per 64 columns, in the L1

typedef int8_t bytes16 __attribute__((vector_size(16)));
typedef int8_t lane_bytes __attribute__((vector_size(4 * VL)));
typedef int8_t narrow __attribute__((vector_size(VL)));

// Nibbles in bytes, 0 .. 15, to -8 .. 7.
FASTLM_INLINE vint signed_nibbles(vint v) { return (vint)((lane_bytes)v - int8_t(8)); }

// sum + w . x over the four bytes of each lane; w unsigned, or signed where SIGNED.
template <bool SIGNED>
FASTLM_INLINE vint dot4(vint sum, vint w, vint x) {
#if FASTLM_VL == 16
  static_assert(!SIGNED);
  return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif FASTLM_VL == 8
  const __m256i a = (__m256i)w, b = (__m256i)x;
  const __m256i pairs = SIGNED ? _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a))
                               : _mm256_maddubs_epi16(a, b);
  return sum + (vint)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  static_assert(SIGNED);
  for (int i = 0; i < VL; ++i)
    for (int b = 0; b < 32; b += 8) sum[i] += int32_t(int8_t(w[i] >> b)) * int8_t(x[i] >> b);
  return sum;
#endif
}

// scale = absmax / 127 of a row; inverse = 127 / absmax. NaN in the row stays NaN in the scale.
template <class T>
float int8_scale(const T* x, int64_t k, float* inverse) {
  vint most{};  // magnitudes compare as integers, with NaN above all
  for (int64_t i = 0; i < k; i += VL) {
    const int count = int(std::min<int64_t>(VL, k - i));
    const vint bits = as_int(count == VL ? load(x + i) : load(x + i, count)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t top = 0;
  for (int i = 0; i < VL; ++i) top = std::max(top, most[i]);
  float absmax;
  memcpy(&absmax, &top, 4);
  if (absmax < 1e-30f) absmax = 1e-30f;  // keeps 127 / absmax finite for a row of zeros
  *inverse = 127.f / absmax;
  return absmax / 127.f;
}

// q = round(x * inverse) of k elements, then zeros up to `padded`.
template <class T>
void to_int8(const T* x, int64_t k, int64_t padded, float inverse, int8_t* out) {
  int64_t i = 0;
  for (; i + VL <= k; i += VL) {
    const narrow q = __builtin_convertvector(to_int(vround(load(x + i) * inverse)), narrow);
    memcpy(out + i, &q, sizeof q);
  }
  if (i < k) {
    const narrow q =
        __builtin_convertvector(to_int(vround(load(x + i, int(k - i)) * inverse)), narrow);
    memcpy(out + i, &q, size_t(k - i));
  }
  if (padded > k) memset(out + k, 0, size_t(padded - k));
}

// Groups cut into runs of at most RUN_MAX columns.
struct Runs {
  int64_t k, size, parts, count, stride;
  Runs(int64_t k, int64_t group_size) : k(k), size(std::min(group_size, k)) {
    parts = (size + RUN_MAX - 1) / RUN_MAX;
    const int64_t last = (k - 1) / size;  // group
    count = last * parts + (k - last * size + RUN_MAX - 1) / RUN_MAX;
    stride = round_up(std::min(size, RUN_MAX));
  }
  static int64_t round_up(int64_t n) { return (n + K_STEP8 - 1) / K_STEP8 * K_STEP8; }
  int64_t group(int64_t r) const { return r / parts; }
  int64_t begin(int64_t r) const { return r / parts * size + r % parts * RUN_MAX; }
  int64_t length(int64_t r) const {
    return std::min({begin(r) + RUN_MAX, (group(r) + 1) * size, k}) - begin(r);
  }
  int64_t padded(int64_t r) const { return round_up(length(r)); }
  int64_t row() const { return count * stride; }  // bytes of a row of A
};

template <int BITS, class T>
void quantize_row(const T* x, float inverse, const Runs& runs, int8_t* out, int32_t* start) {
  for (int64_t r = 0; r < runs.count; ++r) {
    int8_t* q = out + r * runs.stride;
    to_int8(x + runs.begin(r), runs.length(r), runs.stride, inverse, q);
    if constexpr (PANEL_OFFSET<BITS> != 0) {
      int32_t sum = 0;
      for (int64_t i = 0; i < runs.stride; ++i) sum += q[i];
      start[r] = -PANEL_OFFSET<BITS> * sum;
    } else {
      start[r] = 0;
    }
    if constexpr (BITS == 4)
      for (int64_t i = 0; i < runs.stride; i += 16) {
        bytes16 v{};
        const size_t bytes = size_t(std::min<int64_t>(16, runs.stride - i));
        memcpy(&v, q + i, bytes);
        v = __builtin_shuffle(v, bytes16{0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15});
        memcpy(q + i, &v, bytes);
      }
  }
}

// Panel of rows [n, n + rows) of W, `length` columns from k0.
template <int BITS>
void integer_panel(const Weight& w, int64_t n, int rows, int64_t k0, int64_t length, int8_t* out) {
  const int64_t lanes = length / PER_LANE<BITS>;
  for (int64_t l = 0; l < lanes; l += VL) {
    vint t[VL];
    load_transposed(w, n, rows, k0 / PER_LANE<BITS> + l, length * BITS / 8, t);
    const int count = int(std::min<int64_t>(VL, lanes - l));
    for (int j = 0; j < count; ++j) {
      if constexpr (BITS == 4) {
        vint even = t[j] & 0x0f0f0f0f, odd = (t[j] >> 4) & 0x0f0f0f0f;
        if constexpr (PANEL_OFFSET<4> == 0) even = signed_nibbles(even), odd = signed_nibbles(odd);
        memcpy(out, &even, sizeof even);
        memcpy(out + sizeof even, &odd, sizeof odd);
        out += 2 * sizeof even;
      } else {
        const vint v = PANEL_OFFSET<8> ? t[j] ^ int32_t(0x80808080) : t[j];
        memcpy(out, &v, sizeof v);
        out += sizeof v;
      }
    }
  }
}

// Registers and prefetch as `micro` of gemm.h.
template <int BITS, int ROWS, int PANELS>
void micro_int8(int64_t k, const int8_t* __restrict a, int64_t lda, const int32_t* start,
                int64_t start_stride, const int8_t* __restrict b, int64_t panel,
                const float* scales, int64_t scale_stride, float* __restrict c, int64_t ldc,
                bool accumulate) {
  vint acc[ROWS][PANELS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      acc[r][p] = splat_int(start[r * start_stride]);
      __builtin_prefetch(c + r * ldc + p * VL, 1);
    }
  for (int64_t line = 0; line < k; line += 64) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) __builtin_prefetch(a + (ROWS + r) * lda + line);
    const int64_t end = std::min<int64_t>(k, line + 64);
    for (int64_t i = line; i < end; i += 4) {
      vint column[PANELS];
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) column[p] = load_words(b + p * panel + i * VL);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        int32_t quad;
        memcpy(&quad, a + r * lda + i, 4);
        const vint row = splat_int(quad);
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p)
          acc[r][p] = dot4<OFFSET<BITS> == 0>(acc[r][p], column[p], row);
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p) {
    const vfloat s = load(scales + p * scale_stride);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      float* to = c + r * ldc + p * VL;
      const vfloat v = __builtin_convertvector(acc[r][p], vfloat) * s;
      store(to, accumulate ? load(to) + v : v);
    }
  }
}

template <int BITS, int PANELS, class... Args>
FASTLM_INLINE void micro_int8_rows(int rows, Args... args) {
  switch (rows) {
    case 1:
      return micro_int8<BITS, 1, PANELS>(args...);
    case 2:
      return micro_int8<BITS, 2, PANELS>(args...);
    case 3:
      return micro_int8<BITS, 3, PANELS>(args...);
    case 4:
      return micro_int8<BITS, 4, PANELS>(args...);
    case 5:
      return micro_int8 < BITS, MR<5 ? MR : 5, PANELS>(args...);
    default:
      return micro_int8<BITS, MR, PANELS>(args...);
  }
}

#ifdef FASTLM_AMX
// 32 x 32 of C: two tiles of A and two of B per 64 k, each used twice.
inline void tile_block_int8(int64_t k, const int8_t* a, int64_t lda, const int8_t* b, int64_t panel,
                            const float* scales, int64_t scale_stride, float* c, int64_t ldc,
                            int rows, bool right, bool accumulate) {
  alignas(64) int8_t edge[32 * 64];
  alignas(64) int32_t sums[32 * 32];
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  if (rows < 32) memset(edge, 0, sizeof edge);
  for (int64_t i = 0; i < k; i += 64) {
    const int8_t *top = a + i, *bottom = a + 16 * lda + i;
    int64_t stride = lda;
    if (rows < 32) {
      for (int r = 0; r < rows; ++r) memcpy(edge + r * 64, a + r * lda + i, 64);
      top = edge, bottom = edge + 16 * 64, stride = 64;
    }
    tile_load<4>(top, stride);
    tile_load_once<6>(b + i * VL, 64);
    tile_int8<0, 4, 6>();
    if (rows > 16) {
      tile_load<5>(bottom, stride);
      tile_int8<2, 5, 6>();
    }
    if (right) {
      tile_load_once<7>(b + panel + i * VL, 64);
      tile_int8<1, 4, 7>();
      if (rows > 16) tile_int8<3, 5, 7>();
    }
  }
  tile_store<0>(sums, 128), tile_store<1>(sums + 16, 128);
  tile_store<2>(sums + 16 * 32, 128), tile_store<3>(sums + 16 * 32 + 16, 128);
  for (int p = 0; p < 1 + right; ++p) {
    const vfloat s = load(scales + p * scale_stride);
    for (int r = 0; r < rows; ++r) {
      vint q;
      memcpy(&q, sums + r * 32 + p * VL, sizeof q);
      float* to = c + r * ldc + p * VL;
      const vfloat v = __builtin_convertvector(q, vfloat) * s;
      store(to, accumulate ? load(to) + v : v);
    }
  }
}
#endif

// One run: C rows are `ldc` apart and hold whole panels. Panel p's scales are VL floats at
// scales + p * scale_stride.
template <int BITS>
void gemm_int8(int64_t m, int64_t n, int64_t k, const int8_t* a, int64_t lda, const int32_t* start,
               int64_t start_stride, const int8_t* b, const float* scales, int64_t scale_stride,
               float* c, int64_t ldc, bool accumulate) {
  const int64_t panel = k * VL;
#ifdef FASTLM_AMX
  (void)start, (void)start_stride;
  for (int64_t n0 = 0; n0 < n; n0 += 2 * VL)
    for (int64_t m0 = 0; m0 < m; m0 += 32)
      tile_block_int8(k, a + m0 * lda, lda, b + n0 / VL * panel, panel,
                      scales + n0 / VL * scale_stride, scale_stride, c + m0 * ldc + n0, ldc,
                      int(std::min<int64_t>(32, m - m0)), n - n0 > VL, accumulate);
#else
  for (int64_t n0 = 0; n0 < n; n0 += NR) {
    const int panels = int((std::min<int64_t>(NR, n - n0) + VL - 1) / VL);
    const int8_t* bb = b + n0 / VL * panel;
    const float* ss = scales + n0 / VL * scale_stride;
    for (int64_t m0 = 0; m0 < m; m0 += MR) {
      const int rows = int(std::min<int64_t>(MR, m - m0));
      const int8_t* aa = a + m0 * lda;
      const int32_t* st = start + m0 * start_stride;
      float* cc = c + m0 * ldc + n0;
      switch (panels) {
        case 1:
          micro_int8_rows<BITS, 1>(rows, k, aa, lda, st, start_stride, bb, panel, ss, scale_stride,
                                   cc, ldc, accumulate);
          break;
        case 2:
          micro_int8_rows<BITS, 2>(rows, k, aa, lda, st, start_stride, bb, panel, ss, scale_stride,
                                   cc, ldc, accumulate);
          break;
        case 3:
          micro_int8_rows < BITS, NP<3 ? NP : 3>(rows, k, aa, lda, st, start_stride, bb, panel, ss,
                                                 scale_stride, cc, ldc, accumulate);
          break;
        default:
          micro_int8_rows<BITS, NP>(rows, k, aa, lda, st, start_stride, bb, panel, ss, scale_stride,
                                    cc, ldc, accumulate);
      }
    }
  }
#endif
}
