// y = x w^T + b of float32 matrices on tiles of bf16. Part of linear.cpp's body.
//
// A number is split into two of bf16, a = hi + lo with |a - hi - lo| <= 2^-18 |a|, and
//
//   x w  =  x_lo w_hi + x_hi w_hi + x_hi w_lo     (x_lo w_lo, as small as the error, is left out)
//
// in float32 sums (Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 artificial intelligence
// datatype for higher-precision computations"). A sum's error is some 2^-18 of its largest terms:
// fourteen times float32's, a six-hundredth of bf16's. A tile that is loaded serves two blocks of
// sums and up to two of the three products: eight loads for twelve multiplications, where the
// product of bf16 needs twelve.
//
// Both operands are packed as tiles of 1 KiB, hi and lo one after the other:
//   A  [M/16][K/32][hi, lo][16 rows][32 k]                     rows beyond M, k beyond K: zero
//   B  [N/16][K/32][hi, lo][16 pairs of k][16 columns][2]      columns beyond N: zero
#ifdef FASTLM_AMX
constexpr int64_t TILE = 512;               // bf16 of a tile
constexpr int64_t SPLIT_IN_L2 = 256 << 10;  // numbers of A per block: half of an L2 of 2 MiB
constexpr int64_t SPLIT_K = 10;             // pairs of tiles summed at once: B's are 40 KiB of L1

inline int64_t split_rows(int64_t m, int64_t k) {
  const int64_t threads = omp_get_max_threads(),
                max_rows = std::max<int64_t>(32, std::min(MAX_ROWS, SPLIT_IN_L2 / k) / 32 * 32),
                blocks = (m + max_rows * threads - 1) / (max_rows * threads) * threads;
  return round_up((m + blocks - 1) / blocks, 32);
}

inline int64_t linear_split_workspace(int64_t m, int64_t n, int64_t k) {
  const int64_t kp = round_up(k, 32), rows = split_rows(m, kp);
  return round_up(n, 32) * kp * 4 +
         (Buffer::size_of<float>(rows * 32) + Buffer::size_of<bf16>(rows * kp * 2)) *
             omp_get_max_threads() +
         64;
}

// The first n of 32 floats, rest zero, as hi and lo.
FASTLM_INLINE void split_words(const float* p, int64_t n, vint& hi, vint& lo) {
  const auto part = [&](int64_t at) __attribute__((always_inline)) {
    return n >= at + VL ? load(p + at) : n > at ? load(p + at, int(n - at)) : vfloat{};
  };
  const vfloat a = part(0), b = part(VL);
  const __m512i h = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  const auto widened = [](__m256i v) __attribute__((always_inline)) {
    return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
  };
  hi = (vint)h;
  lo = (vint)_mm512_cvtne2ps_pbh((__m512)(b - widened(_mm512_extracti64x4_epi64(h, 1))),
                                 (__m512)(a - widened(_mm512_castsi512_si256(h))));
}

// Packs `count` rows of A into `rows` of them, a multiple of 16.
inline void pack_split_a(const float* a, int64_t stride, int64_t count, int64_t rows, int64_t k,
                         int64_t kp, bf16* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kp; j += 32) {
      bf16* tile = to + ((i / 16) * (kp / 32) + j / 32) * 2 * TILE + i % 16 * 32;
      vint hi{}, lo{};
      if (i < count) split_words(a + i * stride + j, k - j, hi, lo);
      store_words(tile, hi);
      store_words(tile + TILE, lo);
    }
}

// Packs 16 columns of B, which are rows of w; `width` of them exist.
inline void pack_split_b(const float* w, int64_t stride, int64_t width, int64_t k, int64_t kp,
                         bf16* to) {
  for (int64_t j = 0; j < kp; j += 32, to += 2 * TILE) {
    vint hi[16] = {}, lo[16] = {};
    for (int c = 0; c < 16; ++c)
      if (c < width) split_words(w + c * stride + j, k - j, hi[c], lo[c]);
    transpose(hi);
    transpose(lo);
    for (int r = 0; r < 16; ++r) {
      store_words(to + r * 32, hi[r]);
      store_words(to + TILE + r * 32, lo[r]);
    }
  }
}

// 32 x 32 of C over `steps` pairs of tiles; `next`: from 16 rows or columns to the next 16.
inline void split_block(int64_t steps, const bf16* a, const bf16* b, int64_t next, float* c,
                        bool accumulate) {
  float* const d = c + 16 * 32;
  if (accumulate) {
    tile_load<0>(c, 128), tile_load<1>(c + 16, 128);
    tile_load<2>(d, 128), tile_load<3>(d + 16, 128);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  const auto multiply = []() __attribute__((always_inline)) {
    tile_bf16<0, 4, 6>(), tile_bf16<1, 4, 7>();
    tile_bf16<2, 5, 6>(), tile_bf16<3, 5, 7>();
  };
  for (int64_t i = 0; i < steps; ++i, a += 2 * TILE, b += 2 * TILE) {
    tile_load<6>(b, 64), tile_load<7>(b + next, 64);
    tile_load<4>(a + TILE, 64), tile_load<5>(a + next + TILE, 64);
    multiply();
    tile_load<4>(a, 64), tile_load<5>(a + next, 64);
    multiply();
    tile_load<6>(b + TILE, 64), tile_load<7>(b + next + TILE, 64);
    multiply();
  }
  tile_store<0>(c, 128), tile_store<1>(c + 16, 128);
  tile_store<2>(d, 128), tile_store<3>(d + 16, 128);
}

inline void linear_split(const TensorView& x, const TensorView& w, const TensorView* bias,
                         const TensorView& y, const TensorView& workspace) {
  prefer_huge_pages(y);
  check_size("w", "columns, as x:", x.size(1), w.size(1));
  check_contiguous("y", y);
  const int64_t m = x.size(0), n = w.size(0), k = x.size(1), kp = round_up(k, 32),
                rows = split_rows(m, kp), pairs = kp / 32, next = pairs * 2 * TILE,
                parts = (pairs + SPLIT_K - 1) / SPLIT_K, step = (pairs + parts - 1) / parts;
  const float *xs = x.data<float>("x"), *ws = w.data<float>("w"),
              *add = bias ? bias->data<float>("bias") : nullptr;
  float* out = y.data<float>("y");
  Workspace arena(workspace);
  bf16* b = arena.take<bf16>(round_up(n, 32) * kp * 2);
  arena.divide(Buffer::size_of<float>(rows * 32) + Buffer::size_of<bf16>(rows * kp * 2));
#pragma omp parallel num_threads(arena.threads)
  {
    Buffer memory(arena.thread_part());
    float* c = memory.take<float>(rows * 32);
    bf16* a = memory.take<bf16>(rows * kp * 2);
    TileScope tiles;
#pragma omp for schedule(static)
    for (int64_t n0 = 0; n0 < round_up(n, 32); n0 += 16)
      pack_split_b(ws + n0 * w.stride(0), w.stride(0), n - n0, k, kp, b + n0 * kp * 2);
#pragma omp for schedule(dynamic)
    for (int64_t m0 = 0; m0 < m; m0 += rows) {
      const int64_t count = std::min(rows, m - m0), padded = round_up(count, 32);
      pack_split_a(xs + m0 * x.stride(0), x.stride(0), count, padded, k, kp, a);
      for (int64_t n0 = 0; n0 < n; n0 += 32) {
        for (int64_t t = 0; t < pairs; t += step)
          for (int64_t i = 0; i < padded; i += 32)
            split_block(std::min(step, pairs - t), a + i * kp * 2 + t * 2 * TILE,
                        b + n0 * kp * 2 + t * 2 * TILE, next, c + i * 32, t > 0);
        const int64_t width = std::min<int64_t>(32, n - n0);
        for (int64_t i = 0; i < count; ++i) {
          float* to = out + (m0 + i) * n + n0;
          for (int64_t j = 0; j < width; ++j) to[j] = c[i * 32 + j] + (add ? add[n0 + j] : 0.f);
        }
      }
    }
  }
}
#else
inline int64_t linear_split_workspace(int64_t, int64_t, int64_t) { return 0; }
inline void linear_split(const TensorView&, const TensorView&, const TensorView*, const TensorView&,
                         const TensorView&) {
  throw std::invalid_argument("linear_split: expected tiles (AMX), got another instruction set");
}
#endif
