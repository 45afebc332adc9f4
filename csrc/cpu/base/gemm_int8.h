// The int8 matrix product of quantized_linear.h, on one thread:
//
//     C (M, N) float32  (+)=  sum over runs r of
//         scale(m, r) * (scale(n, r) * A_r (M, K_r) int8 . B_r (K_r, N)  +  zero(n, r) * sum(A_r))
//
// A run is part of one group of the weight (`Runs`): integer sums within a run, float32 between
// runs.
//
//   A  rows of int8, run after run, each run padded with zeros to K_STEP8: `Rounded`
//   B  panels of VL columns; in a panel, run after run, [K_r/4][VL][4]. VNNI multiplies unsigned by
//      signed, so there B holds the weight's nibbles, or its bytes with the sign bit flipped.
//      vpmaddubsw does so with nibbles; elsewhere B is signed. int4 keeps the order of its nibbles,
//      the even k of 8 and then the odd ones; A has the same order.
//
// Register block: MR rows x NP8 panels of integer sums and as many of float32. With the sums of a
// run in memory instead (NP panels, C read and written once per run), groups of 32 were a third
// slower.

// Added to q where it is stored unsigned.
#ifdef FASTLM_VNNI
template <int BITS>
constexpr int OFFSET = BITS == 4 ? 8 : 128;
#elif FASTLM_VL >= 8
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

typedef int8_t lane_bytes __attribute__((vector_size(4 * VL)));
typedef int8_t narrow __attribute__((vector_size(VL)));

// Nibbles in bytes, 0 .. 15, to -8 .. 7.
FASTLM_INLINE vint signed_nibbles(vint v) { return (vint)((lane_bytes)v - int8_t(8)); }

// sum + w . x over the four bytes of each lane; w is unsigned, or signed where SIGNED.
template <bool SIGNED>
FASTLM_INLINE vint dot4(vint sum, vint w, vint x) {
#ifdef FASTLM_VNNI
  static_assert(!SIGNED);
  return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif FASTLM_VL == 16
  __m512i a = (__m512i)w, b = (__m512i)x;
  if constexpr (SIGNED) {
    b = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), _mm512_setzero_si512(), b);
    a = _mm512_abs_epi8(a);
  }
  return sum + (vint)_mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1));
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

#if FASTLM_VL >= 8 && !defined(FASTLM_VNNI)
// Nibbles times bytes: vpmaddubsw adds two products, at most 2 * 15 * 127, and 16 bits hold eight
// such sums. So a product takes two instructions instead of three, and 32 columns one more.
constexpr int64_t PAIRS_COLUMNS = 32;
// The barrier keeps GCC from moving all products before all sums, for which there are not enough
// registers.
FASTLM_INLINE vint add_pairs(vint pairs, vint w, vint x) {
#if FASTLM_VL == 16
  __m512i sum = _mm512_add_epi16((__m512i)pairs, _mm512_maddubs_epi16((__m512i)w, (__m512i)x));
  asm("" : "+v"(sum));
#else
  __m256i sum = _mm256_add_epi16((__m256i)pairs, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
  asm("" : "+x"(sum));
#endif
  return (vint)sum;
}
FASTLM_INLINE vint widened_pairs(vint pairs) {
#if FASTLM_VL == 16
  return (vint)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1));
#else
  return (vint)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1));
#endif
}
#endif

FASTLM_INLINE int32_t hmax(vint v) {
#if FASTLM_VL == 16
  return _mm512_reduce_max_epi32((__m512i)v);
#elif FASTLM_VL == 8
  __m128i top =
      _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0b01001110));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0b10110001));
  return _mm_cvtsi128_si32(top);
#else
  int32_t top = v[0];
  for (int i = 1; i < VL; ++i) top = std::max(top, v[i]);
  return top;
#endif
}
FASTLM_INLINE int32_t hsum(vint v) {
#if FASTLM_VL == 16
  return _mm512_reduce_add_epi32((__m512i)v);
#elif FASTLM_VL == 8
  __m128i sum =
      _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b01001110));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b10110001));
  return _mm_cvtsi128_si32(sum);
#else
  uint32_t sum = 0;  // unsigned: a row with NaN may overflow, and its sum is not read
  for (int i = 0; i < VL; ++i) sum += uint32_t(v[i]);
  return int32_t(sum);
#endif
}

// scale = absmax / 127 of a run; inverse = 127 / absmax. A run with NaN has the scale NaN.
template <class T>
FASTLM_INLINE float int8_scale(const T* x, int64_t k, float* inverse) {
  vint max_bits{};  // magnitudes compare as integers, with NaN above all
  for (int64_t i = 0; i < k; i += VL) {
    const int count = int(std::min<int64_t>(VL, k - i));
    const vint bits = as_int(count == VL ? load(x + i) : load(x + i, count)) & 0x7fffffff;
#if FASTLM_VL == 16
    max_bits = (vint)_mm512_max_epi32((__m512i)max_bits, (__m512i)bits);
#else
    max_bits = bits > max_bits ? bits : max_bits;
#endif
  }
  const int32_t top = hmax(max_bits);
  float absmax;
  memcpy(&absmax, &top, 4);
  if (absmax < 1e-30f) absmax = 1e-30f;  // keeps 127 / absmax finite for a run of zeros
  *inverse = 127.f / absmax;
  return absmax / 127.f;
}

FASTLM_INLINE vint round_to_int(vfloat v) {
#if FASTLM_VL > 4
  return to_int(v);  // the conversion rounds to nearest even
#else
  return to_int(vround(v));
#endif
}
// The low byte of each lane; EVEN_FIRST: of each 8, the even lanes before the odd ones.
template <bool EVEN_FIRST = false>
FASTLM_INLINE narrow to_bytes(vint v) {
#ifdef FASTLM_VBMI  // not vpmovdb, which is slow with a memory operand
  const __m512i order = EVEN_FIRST
                            ? _mm512_castsi128_si512(_mm_setr_epi8(0, 8, 16, 24, 4, 12, 20, 28, 32,
                                                                   40, 48, 56, 36, 44, 52, 60))
                            : _mm512_castsi128_si512(_mm_setr_epi8(0, 4, 8, 12, 16, 20, 24, 28, 32,
                                                                   36, 40, 44, 48, 52, 56, 60));
  return (narrow)_mm512_castsi512_si128(_mm512_permutexvar_epi8(order, (__m512i)v));
#elif FASTLM_VL == 16  // the bytes of each quarter, then its two words
  const __m128i bytes =
      EVEN_FIRST ? _mm_setr_epi8(0, 8, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1)
                 : _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m128i words = EVEN_FIRST ? _mm_setr_epi16(0, 8, 1, 9, 16, 24, 17, 25)
                                   : _mm_setr_epi16(0, 1, 8, 9, 16, 17, 24, 25);
  const __m512i quarters = _mm512_shuffle_epi8((__m512i)v, _mm512_broadcast_i32x4(bytes));
  return (narrow)_mm512_castsi512_si128(
      _mm512_permutexvar_epi16(_mm512_castsi128_si512(words), quarters));
#elif FASTLM_VL == 8   // each half puts its bytes where they belong, and zeros (-1) elsewhere
  const __m256i order =
      EVEN_FIRST ? _mm256_setr_epi8(0, 8, -1, -1, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                    -1, 0, 8, -1, -1, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1)
                 : _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                    -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_shuffle_epi8((__m256i)v, order);
  return (narrow)_mm_cvtsi128_si64(
      _mm_or_si128(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
#else
  static_assert(!EVEN_FIRST);
  return __builtin_convertvector(v, narrow);
#endif
}

// q = round(x * inverse) of k elements, then zeros up to `padded`; EVEN_FIRST: a multiple of 8.
// Returns the sum of q.
template <bool EVEN_FIRST = false, class T>
FASTLM_INLINE int32_t to_int8(const T* x, int64_t k, int64_t padded, float inverse, int8_t* out) {
  typedef uint32_t wrapping __attribute__((vector_size(4 * VL)));
  constexpr bool ORDERED = EVEN_FIRST && VL >= 8;
  wrapping sum{};  // a row with NaN may overflow; its scale is NaN
  int64_t i = 0;
  for (; i + VL <= k; i += VL) {
    const vint v = round_to_int(load(x + i) * inverse);
    const narrow q = to_bytes<ORDERED>(v);
    memcpy(out + i, &q, sizeof q);
    sum += (wrapping)v;
  }
  for (; i < padded; i += VL) {
    const vint v = i < k ? round_to_int(load(x + i, int(k - i)) * inverse) : vint{};
    const narrow q = to_bytes<ORDERED>(v);
    memcpy(out + i, &q, size_t(std::min<int64_t>(VL, padded - i)));
    sum += (wrapping)v;
  }
  if constexpr (EVEN_FIRST && !ORDERED)
    for (int64_t j = 0; j < padded; j += 8) {
      const int8_t v[8] = {out[j],     out[j + 2], out[j + 4], out[j + 6],
                           out[j + 1], out[j + 3], out[j + 5], out[j + 7]};
      memcpy(out + j, v, 8);
    }
  return hsum((vint)sum);
}

// Groups are divided into runs of at most RUN_MAX columns; x has one scale per run.
struct Run {
  int32_t length, group;  // padded columns
};
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
  int64_t row() const { return count * stride; }  // bytes of a row of A
  bool contiguous() const {                       // padding only after the last run
    return size >= k || size % stride == 0;
  }
  void list(Run* out) const {
    for (int64_t r = 0; r < count; ++r) out[r] = {int32_t(round_up(length(r))), int32_t(group(r))};
  }
};

// x rounded: rows of q, with a stride of `row` bytes, and three numbers per run and row, in the
// order in which the kernel reads them: (M / MR, count, [scale | sum | start], MR).
struct Rounded {
  int8_t* q;
  float* numbers;
  int64_t row, count;
  static int64_t size(int64_t m, int64_t count) { return (m + MR - 1) / MR * MR * count * 3; }
  FASTLM_INLINE float* scale(int64_t m, int64_t run) const {
    return numbers + (m / MR * count + run) * 3 * MR + m % MR;
  }
  // scale * the sum of q
  FASTLM_INLINE static float* sum(float* scale) { return scale + MR; }
  // int32: where the integer sums begin: minus the offset of B times the sum of q
  FASTLM_INLINE static float* start(float* scale) { return scale + 2 * MR; }
};

// Minus `offset` times the sum of a run; arbitrary where x is not finite, as the scale is NaN then.
FASTLM_INLINE int32_t start_of(int32_t offset, int32_t sum) {
  return int32_t(-uint32_t(offset) * uint32_t(sum));
}

template <int BITS, class T>
void round_row(const T* x, int64_t m, const Runs& runs, const Rounded& out) {
  int64_t r = 0;
  for (int64_t g0 = 0; g0 < runs.k; g0 += runs.size) {
    const int64_t end = std::min(runs.k, g0 + runs.size);
    for (int64_t k0 = g0; k0 < end; k0 += RUN_MAX, ++r) {
      const int64_t length = std::min(RUN_MAX, end - k0);
      int8_t* q = out.q + m * out.row + r * runs.stride;
      float inverse;
      const float scale = int8_scale(x + k0, length, &inverse);
      const int32_t sum = to_int8<BITS == 4>(x + k0, length, runs.stride, inverse, q);
      float* to = out.scale(m, r);
      const int32_t start = start_of(PANEL_OFFSET<BITS>, sum);
      *to = scale, *out.sum(to) = scale * float(sum);
      memcpy(out.start(to), &start, sizeof start);
    }
  }
}

// Panel of rows [n, n + rows) of W, `length` columns from k0. `ahead`: see load_transposed.
template <int BITS>
void integer_panel(const Weight& w, int64_t n, int rows, int64_t k0, int64_t length, int64_t ahead,
                   int8_t* out) {
  const int64_t lanes = length / PER_LANE<BITS>;
  for (int64_t l = 0; l < lanes; l += VL) {
    vint t[VL];
    load_transposed(w, n, rows, k0 / PER_LANE<BITS> + l, ahead, t);
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

#if FASTLM_VL == 16
constexpr int NP8 = 2;  // 12 + 12 sums, 2 of B, 1 of A of 32 registers
#else
constexpr int NP8 = NP;
#endif
constexpr int NR8 = NP8 * VL;

// The runs [first, last) of a block: B, scales and zeros of NP8 panels.
struct Block8 {
  const Run* runs;
  int64_t first, last, stride;  // columns from run to run
  const int8_t* b;
  const float *scales, *zeros;  // (panel, group, VL); zeros may be absent
  int64_t table;                // numbers from panel to panel
};

// Prefetch as `micro` of gemm.h.
template <int BITS, int ROWS, int PANELS>
void micro_int8(const Block8& block, const Rounded& x, int64_t m, float* __restrict c,
                bool accumulate) {
  const int64_t stride = block.stride, panel = (block.last - block.first) * stride * VL;
  const int8_t *a = x.q + m * x.row + block.first * stride, *b = block.b;
  float* scale = x.scale(m, block.first);
  vfloat f[ROWS][PANELS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) f[r][p] = accumulate ? load(c + r * NR8 + p * VL) : vfloat{};
  for (int64_t run = block.first; run < block.last;
       ++run, a += stride, b += stride * VL, scale += 3 * MR) {
    vint acc[ROWS][PANELS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vint start = as_int(splat(x.start(scale)[r]));
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) acc[r][p] = start;
    }
    const auto eight = [&](int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int64_t j = i; j < i + 8; j += 4) {
        vint column[PANELS];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) column[p] = load_words(b + p * panel + j * VL);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          int32_t quad;
          memcpy(&quad, a + r * x.row + j, 4);
          const vint row = splat_int(quad);
#pragma GCC unroll 4
          for (int p = 0; p < PANELS; ++p)
            acc[r][p] = dot4<OFFSET<BITS> == 0>(acc[r][p], column[p], row);
        }
      }
    };
    const int64_t length = block.runs[run].length;
#if FASTLM_VL >= 8 && !defined(FASTLM_VNNI)
    if constexpr (BITS == 4)
      for (int64_t i = 0; i < length; i += PAIRS_COLUMNS) {
        vint pairs[ROWS][PANELS] = {};
        const int64_t end = std::min(length, i + PAIRS_COLUMNS);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(a + (ROWS + r) * x.row + i);
#pragma GCC unroll 2
        for (int64_t j = i; j < end; j += 4) {
          vint column[PANELS];
#pragma GCC unroll 4
          for (int p = 0; p < PANELS; ++p) column[p] = load_words(b + p * panel + j * VL);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) {
            int32_t quad;
            memcpy(&quad, a + r * x.row + j, 4);
            const vint row = splat_int(quad);
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) pairs[r][p] = add_pairs(pairs[r][p], column[p], row);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
          for (int p = 0; p < PANELS; ++p) acc[r][p] += widened_pairs(pairs[r][p]);
      }
    else
#endif
      for (int64_t line = 0; line < length; line += 64) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(a + (ROWS + r) * x.row + line);
        if (length == 32) {  // the group of most formats: 4 rounds of a loop cost 2 %
          eight(0), eight(8), eight(16), eight(24);
          break;
        }
        const int64_t end = std::min<int64_t>(length, line + 64);
        for (int64_t i = line; i < end; i += 8) eight(i);
      }
    const int64_t group = int64_t(block.runs[run].group) * VL;
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      const vfloat s = load(block.scales + p * block.table + group);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
        f[r][p] += __builtin_convertvector(acc[r][p], vfloat) * (s * splat(scale[r]));
      if (block.zeros) {
        const vfloat z = load(block.zeros + p * block.table + group);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) f[r][p] += z * splat(x.sum(scale)[r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) store(c + r * NR8 + p * VL, f[r][p]);
}

template <int BITS, int PANELS, class... Args>
FASTLM_INLINE void micro_int8_rows(int rows, const Args&... args) {
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
      return micro_int8<BITS, std::min(MR, 5), PANELS>(args...);
    default:
      return micro_int8<BITS, MR, PANELS>(args...);
  }
}

#ifdef FASTLM_AMX
// 32 x 32 of C: two tiles of A and two of B per 64 k, each used twice.
inline void tile_block_int8(const Block8& block, const Rounded& x, int64_t m, int rows, bool right,
                            float* c, bool accumulate) {
  alignas(64) int8_t edge[32 * 64];
  alignas(64) int32_t sums[32 * 32];
  const int64_t stride = block.stride, panel = (block.last - block.first) * stride * VL;
  const int8_t *a = x.q + m * x.row + block.first * stride, *b = block.b;
  if (rows < 32) memset(edge, 0, sizeof edge);
  if (!accumulate) memset(c, 0, size_t(rows * NR8) * 4);
  for (int64_t run = block.first; run < block.last; ++run, a += stride, b += stride * VL) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t i = 0; i < block.runs[run].length; i += 64) {
      const int8_t *top = a + i, *bottom = a + 16 * x.row + i;
      int64_t lda = x.row;
      if (rows < 32) {
        for (int r = 0; r < rows; ++r) memcpy(edge + r * 64, a + r * x.row + i, 64);
        top = edge, bottom = edge + 16 * 64, lda = 64;
      }
      tile_load<4>(top, lda);
      tile_load<6>(b + i * VL, 64);
      tile_int8<0, 4, 6>();
      if (rows > 16) {
        tile_load<5>(bottom, lda);
        tile_int8<2, 5, 6>();
      }
      if (right) {
        tile_load<7>(b + panel + i * VL, 64);
        tile_int8<1, 4, 7>();
        if (rows > 16) tile_int8<3, 5, 7>();
      }
    }
    tile_store<0>(sums, 128), tile_store<1>(sums + 16, 128);
    tile_store<2>(sums + 16 * 32, 128), tile_store<3>(sums + 16 * 32 + 16, 128);
    const int64_t group = int64_t(block.runs[run].group) * VL;
    for (int p = 0; p < 1 + right; ++p) {
      const vfloat s = load(block.scales + p * block.table + group),
                   z = block.zeros ? load(block.zeros + p * block.table + group) : vfloat{};
      for (int r = 0; r < rows; ++r) {
        float* scale = x.scale(m + r, run);
        const vfloat v = __builtin_convertvector(load_words(sums + r * 32 + p * VL), vfloat);
        float* to = c + r * NR8 + p * VL;
        store(to, load(to) + v * (s * *scale) + z * *x.sum(scale));
      }
    }
  }
}
#endif

// C (m, n), n <= NR8, row stride NR8, (+)= a block times the rows of x from `from` on (without
// tiles a multiple of MR). Calls epilogue(m0, rows) after each block of rows, while it is in the
// L1.
template <int BITS, class Epilogue>
void gemm_int8(int64_t m, int64_t n, const Block8& block, const Rounded& x, int64_t from, float* c,
               bool accumulate, const Epilogue& epilogue) {
#ifdef FASTLM_AMX
  for (int64_t m0 = 0; m0 < m; m0 += 32) {
    const int rows = int(std::min<int64_t>(32, m - m0));
    tile_block_int8(block, x, from + m0, rows, n > VL, c + m0 * NR8, accumulate);
    epilogue(m0, rows);
  }
#else
  for (int64_t m0 = 0; m0 < m; m0 += MR) {
    const int rows = int(std::min<int64_t>(MR, m - m0));
    if (n > VL)
      micro_int8_rows<BITS, NP8>(rows, block, x, from + m0, c + m0 * NR8, accumulate);
    else
      micro_int8_rows<BITS, 1>(rows, block, x, from + m0, c + m0 * NR8, accumulate);
    epilogue(m0, rows);
  }
#endif
}
