// The products of decode_step.h: a tile of 16 rows of W (quantized or dense) with M rows of x.

constexpr int64_t PANEL_LANES =
    256;  // transposed W at a time: 16 KiB of 64-byte vectors, in the L1
constexpr int64_t PANEL_BYTES = (PANEL_LANES + VL) * 4 * VL;  // whole vectors are written
constexpr int64_t AHEAD = 16;               // rows of W that are prefetched: the next tile
constexpr int MAX_ROWS = VL == 16 ? 8 : 4;  // of x in one pass: two accumulators each in registers
constexpr int PANELS = VL == 8 ? 2 : 1;     // of VL rows of W at once: a load of x serves them all

struct Activations {  // M rows of x
  float* x;           // (M, stride), zero from K to the next multiple of 16
  int64_t stride, rows;
  struct Format {        // x as one kind of weight needs it; a run: columns under one scale
    int8_t* q;           // (M, stride), of int4 weights: even k of 8 and then odd
    float *scale, *sum;  // (runs, M): x ~ scale * q; the sum of x, or of scale * q
    int32_t* start;      // (runs, M): where an integer sum begins, for an offset of 8 or 128 in W
  } formats[3];
};

// Which of `formats` linear i reads: that of the first linear that needs the same one.
inline int format_of(const DecodeLinear* const* linears, int i) {
  for (int j = 0; j < i; ++j)
    if (linears[j]->bits == linears[i]->bits && linears[j]->group_size == linears[i]->group_size &&
        linears[j]->int8_activations == linears[i]->int8_activations)
      return j;
  return i;
}

// Iterates over the runs of K columns: those of `Runs` in gemm_int8.h, without its divisions.
struct RunAt {
  int64_t k, size, index, group, begin, length;
  RunAt(int64_t k, int64_t size) : k(k), size(size), index(0), group(0), begin(0) { cut(); }
  explicit operator bool() const { return begin < k; }
  FASTLM_INLINE void next() {
    begin += length, ++index, group += begin == (group + 1) * size;
    cut();
  }

 private:
  FASTLM_INLINE void cut() { length = std::min({RUN_MAX, (group + 1) * size - begin, k - begin}); }
};

// a * b + c rounded once. The compiler fuses too, but not in every loop, and a row's result must
// not depend on how many rows share its pass.
FASTLM_INLINE vfloat fused(vfloat a, vfloat b, vfloat c) {
#if FASTLM_VL == 16
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTLM_VL == 8
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;  // the baseline has no fused instruction
#endif
}

// Converts row m of x to the format that `l` needs.
inline void round_row(const DecodeLinear& l, const Activations& a, const Activations::Format& f,
                      int64_t m) {
  if (l.bits == 16) return;
  const float* x = a.x + m * a.stride;
  int8_t* q = f.q + m * a.stride;
  float *scale = f.scale + m, *sum = f.sum + m;
  int32_t* start = f.start + m;
  for (RunAt run(l.k, l.group_size); run; run.next()) {
    const int64_t r = run.index * a.rows, begin = run.begin, length = run.length;
    if (!l.int8_activations) {
      vfloat total{};
      for (int64_t i = 0; i < length; i += VL)
        total += load(x + begin + i, int(std::min<int64_t>(VL, length - i)));
      sum[r] = hsum(total);
      continue;
    }
    float inverse;
    scale[r] = int8_scale(x + begin, length, &inverse);
    const int64_t padded = (length + 7) / 8 * 8;  // only the last run has less
    const int32_t exact = l.bits == 4
                              ? to_int8<true>(x + begin, length, padded, inverse, q + begin)
                              : to_int8<false>(x + begin, length, padded, inverse, q + begin);
    sum[r] = scale[r] * float(exact);
    start[r] = start_of(l.bits == 4 ? 8 : OFFSET<8>, exact);
  }
}

// Runs [first, last) of PANELS x VL rows of W, transposed.
struct TilePart {
  const uint8_t* panel;
  int64_t panel_stride;  // bytes from a panel to the next one
  RunAt first;
  int64_t end;        // column
  const char* table;  // of this tile, at its first of these rows
  DType dtype;
  int64_t next;       // entries of DECODE_TILE from this tile's table to the next one's
  int64_t ahead = 0;  // bytes from this tile to the next one, where W is packed

  FASTLM_INLINE void prefetch(const uint8_t* w, int64_t lanes) const {
    if (ahead)
      for (int64_t i = 0; i < lanes; ++i) __builtin_prefetch(w + ahead + i * 4 * VL, 0, 2);
  }

  FASTLM_INLINE vfloat from_table(int64_t i, int p) const {
    const int64_t at = i * DECODE_TILE + p * VL;
    __builtin_prefetch(table + (at + next * DECODE_TILE) * (dtype == DType::f32 ? 4 : 2), 0, 2);
    if (dtype == DType::f16) return load(reinterpret_cast<const f16*>(table) + at);
    if (dtype == DType::bf16) return load(reinterpret_cast<const bf16*>(table) + at);
    return load(reinterpret_cast<const float*>(table) + at);
  }
};

FASTLM_INLINE vint broadcast4(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return splat_int(four);
}

// sums[r][p] += panel p of W . x row r, over `lanes` lanes. Integer sums are exact in any order.
#if FASTLM_VL == 8
// Keeps GCC from moving all products before all sums, for which there are not enough registers.
FASTLM_INLINE void pin(__m256i& v) { asm("" : "+x"(v)); }

template <int BITS, int ROWS>
FASTLM_INLINE void add_dots(const uint8_t* w, int64_t panel_stride, int64_t lanes, const int8_t* x,
                            int64_t stride, vint (&sums)[ROWS][PANELS]) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (BITS == 4) {
    // Two products are at most 2 * 15 * 127, so 16 bits hold eight such sums, of four lanes: half
    // of the instructions of a dot4 each.
    for (int64_t l = 0; l < lanes; l += 4) {
      __m256i pairs[ROWS][PANELS] = {};
      const auto add = [&](int64_t i) __attribute__((always_inline)) {
        vint v[PANELS];
        for (int p = 0; p < PANELS; ++p) v[p] = load_lanes(w + p * panel_stride + i * 4 * VL);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd)
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) {
            const __m256i four = (__m256i)broadcast4(x + r * stride + i * 8 + odd * 4);
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p) {
              const __m256i nibbles = (__m256i)(v[p] >> (4 * odd) & 0x0f0f0f0f);
              pairs[r][p] = _mm256_add_epi16(pairs[r][p], _mm256_maddubs_epi16(nibbles, four));
              pin(pairs[r][p]);
            }
          }
      };
      if (lanes - l >= 4)
        add(l), add(l + 1), add(l + 2), add(l + 3);
      else
        for (int64_t i = l; i < lanes; ++i) add(i);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) sums[r][p] += (vint)_mm256_madd_epi16(pairs[r][p], ones);
    }
  } else {  // of signed bytes: |w| times x with the sign of w
    for (int64_t l = 0; l < lanes; ++l) {
      __m256i v[PANELS], size[PANELS];
      for (int p = 0; p < PANELS; ++p) {
        v[p] = (__m256i)load_lanes(w + p * panel_stride + l * 4 * VL);
        size[p] = _mm256_abs_epi8(v[p]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const __m256i four = (__m256i)broadcast4(x + r * stride + l * 4);
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) {
          const __m256i pairs = _mm256_maddubs_epi16(size[p], _mm256_sign_epi8(four, v[p]));
          __m256i sum = (__m256i)(sums[r][p] + (vint)_mm256_madd_epi16(pairs, ones));
          pin(sum);
          sums[r][p] = (vint)sum;
        }
      }
    }
  }
}
#else
template <int BITS, int ROWS>
FASTLM_INLINE void add_dots(const uint8_t* w, int64_t, int64_t lanes, const int8_t* x,
                            int64_t stride, vint (&sums)[ROWS][PANELS]) {
  constexpr int CHAINS = ROWS <= 2 ? 2 : 1;  // of dependent products
  vint acc[ROWS][CHAINS] = {};
#pragma GCC unroll 4
  for (int64_t l = 0; l < lanes; ++l, w += 4 * VL) {
    const vint v = load_lanes(w);
    if constexpr (BITS == 4) {
      const vint even = v & 0x0f0f0f0f, odd = (v >> 4) & 0x0f0f0f0f;
      const int8_t* at = x + l * 8;
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        acc[r][0] = dot4<OFFSET<4> == 0>(acc[r][0], even, broadcast4(at + r * stride));
        acc[r][CHAINS - 1] =
            dot4<OFFSET<4> == 0>(acc[r][CHAINS - 1], odd, broadcast4(at + r * stride + 4));
      }
    } else {
      const vint u = OFFSET<8> ? v ^ int32_t(0x80808080) : v;
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        vint& sum_of = acc[r][CHAINS == 2 ? l % 2 : 0];
        sum_of = dot4<OFFSET<8> == 0>(sum_of, u, broadcast4(x + l * 4 + r * stride));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHAINS; ++c) sums[r][0] += acc[r][c];
}
#endif

// out[r][0 .. PANELS * VL) (+)= W . x row r, over the part's runs, with x rounded to int8.
template <int BITS, bool OFFSETS, int ROWS>
void int8_product(const TilePart& part, const Activations& a, const Activations::Format& x,
                  int64_t m, float* out) {
  vfloat f[ROWS][PANELS];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p)
      f[r][p] = part.first.begin ? load(out + r * DECODE_TILE + p * VL) : vfloat{};
  const int8_t* q = x.q + m * a.stride;
  const float *scale = x.scale + m, *sum = x.sum + m;
  const int32_t* start = x.start + m;
  const uint8_t* w = part.panel;
  for (RunAt run = part.first; run.begin < part.end; run.next()) {
    const int64_t i = run.index * a.rows;
    const int64_t lanes = (run.length + PER_LANE<BITS> - 1) / PER_LANE<BITS>;
    for (int p = 0; p < PANELS; ++p) part.prefetch(w + p * part.panel_stride, lanes);
    vint sums[ROWS][PANELS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < PANELS; ++p)
        sums[r][p] = BITS == 4 && OFFSETS ? vint{} : splat_int(start[i + r]);
    add_dots<BITS, ROWS>(w, part.panel_stride, lanes, q + run.begin, a.stride, sums);
    w += lanes * 4 * VL;
    const int64_t g = run.group * (1 + OFFSETS);
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      const vfloat s = part.from_table(g, p);
      vfloat z{};
      if constexpr (OFFSETS) z = part.from_table(g + 1, p);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const vfloat total = __builtin_convertvector(sums[r][p], vfloat);
        f[r][p] = fused(total, s * splat(scale[i + r]), f[r][p]);
        if constexpr (OFFSETS) f[r][p] = fused(z, splat(sum[i + r]), f[r][p]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p) store(out + r * DECODE_TILE + p * VL, f[r][p]);
}

#if FASTLM_VL == 8
// int8_product of nibbles with a scale for every 32 columns, with the same bits. The end of such a
// group costs as much as half of its products, so it is written without a loop over lanes.
template <bool OFFSETS, int ROWS>
void nibbles_by_32(const TilePart& part, const Activations& a, const Activations::Format& x,
                   int64_t m, float* out) {
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
  const int64_t runs = (part.end - part.first.begin) / 32, stride = a.stride,
                panel_stride = part.panel_stride;
  const int64_t first = part.first.index * a.rows + m;
  const int8_t* q = x.q + m * stride + part.first.begin;
  const float *scale = x.scale + first, *sum = x.sum + first;
  const int32_t* start = x.start + first;
  const uint8_t* w = part.panel;
  vfloat f[ROWS][PANELS];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p)
      f[r][p] = part.first.begin ? load(out + r * DECODE_TILE + p * VL) : vfloat{};
  for (int64_t g = part.first.index * (1 + OFFSETS), i = 0; i < runs; ++i, g += 1 + OFFSETS) {
    for (int p = 0; p < PANELS; ++p) part.prefetch(w + p * panel_stride, 4);
    __m256i pairs[ROWS][PANELS];
#pragma GCC unroll 8
    for (int half = 0; half < 8; ++half) {  // even and odd columns of four lanes
      __m256i nibbles[PANELS];
      for (int p = 0; p < PANELS; ++p) {
        const __m256i v = (__m256i)load_lanes(w + p * panel_stride + half / 2 * 4 * VL);
        nibbles[p] = _mm256_and_si256(half % 2 ? _mm256_srli_epi16(v, 4) : v, low);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const __m256i four = (__m256i)broadcast4(q + r * stride + half * 4);
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) {
          const __m256i products = _mm256_maddubs_epi16(nibbles[p], four);
          pairs[r][p] = half ? _mm256_add_epi16(pairs[r][p], products) : products;
          pin(pairs[r][p]);
        }
      }
    }
    w += 4 * 4 * VL, q += 32;
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      const vfloat s = part.from_table(g, p);
      vfloat z{};
      if constexpr (OFFSETS) z = part.from_table(g + 1, p);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        vint sums = (vint)_mm256_madd_epi16(pairs[r][p], ones);
        if constexpr (!OFFSETS) sums += splat_int(start[r]);
        const vfloat total = __builtin_convertvector(sums, vfloat);
        f[r][p] = fused(total, s * splat(scale[r]), f[r][p]);
        if constexpr (OFFSETS) f[r][p] = fused(z, splat(sum[r]), f[r][p]);
      }
    }
    scale += a.rows, sum += a.rows, start += a.rows;
  }
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p) store(out + r * DECODE_TILE + p * VL, f[r][p]);
}
#endif

template <int BITS, int J, int ROWS>
FASTLM_INLINE void add_columns(vint v, const float* x, int64_t stride, vfloat (&acc)[ROWS][2]) {
  if constexpr (J < PER_LANE<BITS>) {
    const vfloat w = column<BITS, J>(v);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      acc[r][J % 2] = fused(w, splat(x[r * stride + J]), acc[r][J % 2]);
    add_columns<BITS, J + 1>(v, x, stride, acc);
  }
}

// The same with x in float32, for panel p.
template <int BITS, bool OFFSETS, int ROWS>
void float_product(const TilePart& part, int p, const Activations& a, const Activations::Format& x,
                   int64_t m, float* out) {
  vfloat f[ROWS];
  for (int r = 0; r < ROWS; ++r) f[r] = part.first.begin ? load(out + r * DECODE_TILE) : vfloat{};
  const float *row = a.x + m * a.stride, *sum = x.sum + m;
  const uint8_t* w = part.panel + p * part.panel_stride;
  for (RunAt run = part.first; run.begin < part.end; run.next()) {
    const int64_t begin = run.begin, i = run.index * a.rows;
    const int64_t lanes = (run.length + PER_LANE<BITS> - 1) / PER_LANE<BITS>;
    part.prefetch(w, lanes);
    vfloat acc[ROWS][2] = {};
    for (int64_t l = 0; l < lanes; ++l, w += 4 * VL)
      add_columns<BITS, 0>(load_lanes(w), row + begin + l * PER_LANE<BITS>, a.stride, acc);
    const int64_t g = run.group * (1 + OFFSETS);
    const vfloat s = part.from_table(g, p);
    vfloat z{};
    if constexpr (OFFSETS) {
      z = part.from_table(g + 1, p);
      if constexpr (BITS == 4) z = fused(s, splat(8.f), z);  // `column` gives nibble - 8
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      f[r] = fused(acc[r][0] + acc[r][1], s, f[r]);
      if constexpr (OFFSETS) f[r] = fused(z, splat(sum[i + r]), f[r]);
    }
  }
  for (int r = 0; r < ROWS; ++r) store(out + r * DECODE_TILE, f[r]);
}

// f(std::integral_constant<int, R>, m) over M rows in passes of 8, 4, 2 and 1
template <class F>
FASTLM_INLINE void in_passes(int64_t rows, F f) {
  int64_t m = 0;
  if constexpr (MAX_ROWS == 8)
    for (; rows - m >= 8; m += 8) f(std::integral_constant<int, 8>{}, m);
  for (; rows - m >= 4; m += 4) f(std::integral_constant<int, 4>{}, m);
  if (rows - m >= 2) f(std::integral_constant<int, 2>{}, m), m += 2;
  if (rows - m >= 1) f(std::integral_constant<int, 1>{}, m);
}

// Writes `lanes` lanes, from lane0 on, of VL rows of W from n on, to `panel`.
inline void transpose_lanes(const Weight& w, const DecodeLinear& l, int64_t n, int64_t lane0,
                            int64_t lanes, uint8_t* panel) {
  const int present = int(std::clamp<int64_t>(l.n - n, 0, VL));
  for (int64_t i = 0; i < lanes; i += VL) {
    const int64_t byte = (lane0 + i) * 4;
    vint t[VL];
    if (present == VL && byte + 4 * VL <= l.row_bytes) {
      const uint8_t* at = w.row(n) + byte;
#pragma GCC unroll 16
      for (int r = 0; r < VL; ++r) {
        __builtin_prefetch(at + (AHEAD + r) * l.row_bytes, 0, 2);
        t[r] = load_lanes(at + r * l.row_bytes);
      }
      transpose(t);
    } else {
      load_transposed(w, n, present, lane0 + i, AHEAD * l.row_bytes, t);
    }
#pragma GCC unroll 16
    for (int j = 0; j < VL; ++j) memcpy(panel + (i + j) * 4 * VL, &t[j], sizeof(vint));
  }
}

template <int BITS, bool OFFSETS>
void quantized_tile(const DecodeLinear& l, int64_t n, const Activations& a,
                    const Activations::Format& x, int64_t rows, uint8_t* panel, float* out) {
  Weight w{};
  w.q = reinterpret_cast<const uint8_t*>(l.weight), w.row_bytes = l.row_bytes;
  const int64_t entry = l.dtype == DType::f32 ? 4 : 2,
                table = n / DECODE_TILE * l.groups * (1 + OFFSETS) * DECODE_TILE + n % DECODE_TILE;
  const auto multiply = [&](TilePart part) {
    in_passes(rows, [&](auto r, int64_t m) {
      float* to = out + m * DECODE_TILE;
      if (m) part.ahead = 0;  // the first pass has prefetched
#if FASTLM_VL == 8
      if (BITS == 4 && l.int8_activations && l.group_size == 32 && l.k % 32 == 0)
        return nibbles_by_32<OFFSETS, r.value>(part, a, x, m, to);
#endif
      if (l.int8_activations)
        int8_product<BITS, OFFSETS, r.value>(part, a, x, m, to);
      else
        for (int p = 0; p < PANELS; ++p)
          float_product<BITS, OFFSETS, r.value>(part, p, a, x, m, to + p * VL);
    });
  };
  TilePart part{panel,
                PANEL_BYTES,
                RunAt(l.k, l.group_size),
                l.k,
                l.table + table * entry,
                l.dtype,
                l.groups * (1 + OFFSETS)};
  if (l.tile_lanes == VL) {
    part.panel = l.tiles + n * l.lanes() * 4;
    part.panel_stride = VL * l.lanes() * 4;
    part.ahead = PANELS * part.panel_stride;
    return multiply(part);
  }
  for (RunAt run = part.first; run; part.first = run) {
    const int64_t limit = run.begin + PANEL_LANES * PER_LANE<BITS>;
    for (; run && run.begin + run.length <= limit; run.next()) part.end = run.begin + run.length;
    const int64_t lane0 = part.first.begin / PER_LANE<BITS>,
                  lanes = (part.end + PER_LANE<BITS> - 1) / PER_LANE<BITS> - lane0;
    for (int p = 0; p < PANELS; ++p)
      transpose_lanes(w, l, n + p * VL, lane0, lanes, panel + p * PANEL_BYTES);
    multiply(part);
  }
}

// Stores each tile in the order into which `quantized_tile` would transpose it.
template <int BITS>
void pack_tiles(const DecodeLinear& l, uint8_t* out) {
  Weight w{};
  w.q = reinterpret_cast<const uint8_t*>(l.weight), w.row_bytes = l.row_bytes;
  const int64_t lanes = l.lanes();
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < (l.n + DECODE_TILE - 1) / DECODE_TILE * DECODE_TILE; n += VL)
    for (int64_t i = 0; i < lanes; i += VL) {
      vint t[VL];
      load_transposed(w, n, int(std::clamp<int64_t>(l.n - n, 0, VL)), i, 0, t);
      for (int64_t j = 0; j < std::min<int64_t>(VL, lanes - i); ++j)
        memcpy(out + n * lanes * 4 + (i + j) * 4 * VL, &t[j], sizeof(vint));
    }
}
inline void pack_tiles(DecodeLinear& l, uint8_t* out) {
  l.bits == 4 ? pack_tiles<4>(l, out) : pack_tiles<8>(l, out);
  l.tiles = out, l.tile_lanes = VL;
}

// A pass keeps its rows of x in the L1 and reads the tile's rows of W, from the L2 if it is not the
// first. The other way around, every row of W would fetch all rows of x.
template <class T>
void dense_tile(const DecodeLinear& l, int64_t n, const Activations& a, int64_t rows, float* out) {
  const int64_t present = std::min(DECODE_TILE, l.n - n);
  in_passes(rows, [&](auto r, int64_t m) {
    constexpr int ROWS = r.value, CHAINS = 2;
    const float* x = a.x + m * a.stride;
    for (int64_t i = 0; i < present; ++i) {
      const T* w = reinterpret_cast<const T*>(l.weight) + (n + i) * l.k;
      vfloat acc[ROWS][CHAINS] = {};
      int64_t k = 0;
      for (; k + CHAINS * VL <= l.k; k += CHAINS * VL)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; ++c) {
          const vfloat v = load(w + k + c * VL);
#pragma GCC unroll 8
          for (int j = 0; j < ROWS; ++j)
            acc[j][c] = fused(v, load(x + j * a.stride + k + c * VL), acc[j][c]);
        }
      for (; k < l.k; k += VL) {
        const int count = int(std::min<int64_t>(VL, l.k - k));
        const vfloat v = load(w + k, count);
        for (int j = 0; j < ROWS; ++j)
          acc[j][0] = fused(v, load(x + j * a.stride + k, count), acc[j][0]);
      }
      for (int j = 0; j < ROWS; ++j) out[(m + j) * DECODE_TILE + i] = hsum(acc[j][0] + acc[j][1]);
    }
  });
}

// out[m][i] = x row m . W row n + i, + bias; i < 16 (arbitrary for rows beyond W)
inline void tile_product(const DecodeLinear& l, int64_t n, const Activations& a, int format,
                         int64_t rows, uint8_t* panel, float* out) {
  const Activations::Format& x = a.formats[format];
  if (l.bits == 16) {
    with_float(l.dtype, "weight", [&](auto tag) { dense_tile<decltype(tag)>(l, n, a, rows, out); });
  } else {
    for (int64_t i = 0; i < DECODE_TILE; i += PANELS * VL) {
      if (l.bits == 4)
        l.offsets ? quantized_tile<4, true>(l, n + i, a, x, rows, panel, out + i)
                  : quantized_tile<4, false>(l, n + i, a, x, rows, panel, out + i);
      else
        l.offsets ? quantized_tile<8, true>(l, n + i, a, x, rows, panel, out + i)
                  : quantized_tile<8, false>(l, n + i, a, x, rows, panel, out + i);
    }
  }
  if (!l.bias) return;
  const int64_t present = std::min(DECODE_TILE, l.n - n);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t i = 0; i < present; ++i) out[m * DECODE_TILE + i] += l.bias[n + i];
}

// Row `token` of an embedding table, as float.
inline void embed(const DecodeLinear& l, int64_t token, float factor, float* out) {
  const char* row = l.weight + token * l.row_bytes;
  if (l.bits == 16) {
    with_float(l.dtype, "weight", [&](auto tag) {
      const auto* w = reinterpret_cast<const decltype(tag)*>(row);
      for (int64_t k = 0; k < l.k; ++k) out[k] = to_float(w[k]) * factor;
    });
    return;
  }
  for (int64_t g = 0; g < l.groups; ++g) {
    float scale = 0, offset = 0;
    with_float(l.dtype, "table", [&](auto tag) {
      const auto* t = reinterpret_cast<const decltype(tag)*>(l.table) +
                      (token / DECODE_TILE * l.groups + g) * (1 + l.offsets) * DECODE_TILE +
                      token % DECODE_TILE;
      scale = to_float(t[0]);
      offset = l.offsets ? to_float(t[DECODE_TILE]) : l.bits == 4 ? -8 * scale : 0.f;
    });
    for (int64_t k = g * l.group_size; k < std::min(l.k, (g + 1) * l.group_size); ++k) {
      const uint8_t byte = uint8_t(row[l.bits == 8 ? k : k / 2]);
      const int q = l.bits == 8 ? int8_t(byte) : k % 2 ? byte >> 4 : byte & 15;
      out[k] = (scale * float(q) + offset) * factor;
    }
  }
}
