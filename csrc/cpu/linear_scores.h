// Scores z^T = score(w . x^T + bias) of one chunk of rows of x, in blocks of classes, and the
// statistics of a block. The bodies of linear_cross_entropy and linear_distillation include it;
// their callers loop over chunks.
//
//                 R columns (rows of x), i
//                +--------------+--------------+      A tile is `count` classes x n columns. One
//   VB classes   |  ScoreTile   |  the next     |     thread computes all tiles of a block, and
//   (rows of w)  |  (count, n)  |  RC columns   |     z of a tile stays in its L2 until `f` of
//   v0 + c       +--------------+--------------+      each_block has read it.
//                |  block b + 1 ...             |
//
// Index legend, also of linear_cross_entropy.h:
//
//   i   row of x: a column of z^T and a lane of a vector. R (`rows`) of them, padded to a multiple
//       of RP with zero rows of x; [i0, i0 + n) in a tile; j counts in a tile: i = i0 + j
//   v   class: a row of w. V (`classes`) of them; c counts in a block: v = v0 + c, c < count
//   b   block of VB classes: the unit of work of a thread
//   d   feature: D (`width`) of them, the summed index of z^T
//   p   vector of VL columns, or a micro-panel of gemm.h
//   T   type of x and w; E type of gemm.h's operands: bf16 or float
//
// Scores are transposed. So w's rows are the A operand in place, x is packed once per chunk, and
// the statistics of the rows of x are in lanes (no horizontal reduction).
//
//   w   read once per chunk from the memory; by every tile of its block after the first from the L2
//   x   packed once per chunk; the packed columns of a tile are read once per block, from the L2 or
//       (all threads read them) the L3
//   z   written once and read by the statistics, in the L2
//
// With up to FEW rows the cost is reading w: scores are dot products with w's rows in place.
#include "cpu/base/gemm.h"
#include "cpu/scores.h"
#include "cpu/base/workspace.h"

constexpr int64_t VB = 256;  // classes per block: 256 x 512 fp32 of dw are half of an L2
constexpr int64_t RC = 256;  // columns of z^T at a time: 256 KiB of fp32 in the L2
constexpr int64_t RP = 32;   // a tile row of bf16: E is used in place
constexpr int64_t FEW = 8;   // rows of x up to which reading w takes longer than the products

inline int64_t padded_rows(int64_t r) { return (r + RP - 1) / RP * RP; }
inline int64_t vocabulary_blocks(int64_t v) { return (v + VB - 1) / VB; }

// z (count, n): dot products of `count` rows of w with R rows of x, which have the stride `ldx` and
// are padded with zeros. GROUP rows of w fill a vector of sums; W of them are multiplied at once:
//
//   lane of `sums`   0      1     ..  R - 1    |  R      R + 1  ..           | .. VL - 1
//                    w0.x0  w0.x1 ..  w0.xR-1  |  w1.x0  w1.x1  ..           |
//                    `parts[lane]` is that lane's sum, still in VL parts: sums_of reduces all
template <int R, class E, class T>
void few_products(int64_t count, int64_t width, const T* w, int64_t w_stride, const E* x,
                  int64_t ldx, float* z, int64_t n) {
  constexpr int STEP = KP<E> * VL, GROUP = VL / R, W = std::min(GROUP, VL == 16 ? 4 : 2);
  for (int64_t c = 0; c < count; c += GROUP) {
    alignas(64) float sums[VL];
    vfloat parts[VL] = {};
    for (int64_t g = 0; g < GROUP; g += W) {
      const T* rows[W];  // beyond the last row: the last row again
      for (int k = 0; k < W; ++k) rows[k] = w + std::min(c + g + k, count - 1) * w_stride;
      vfloat acc[W][R] = {};
      for (int64_t d = 0; d < width; d += STEP) {
#pragma GCC unroll 4
        for (int k = 0; k < W; ++k) {
          __builtin_prefetch(rows[k] + W * w_stride + d);
          const vfloat row = as_float(row_words<E>(rows[k] + d, width - d));
#pragma GCC unroll 4
          for (int i = 0; i < R; ++i)
            acc[k][i] = multiply_add(acc[k][i], row,
                                     load(reinterpret_cast<const float*>(x + i * ldx + d)), E{});
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < W; ++k)
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) parts[(g + k) * R + i] = acc[k][i];
    }
    store(sums, sums_of(parts));
    for (int64_t k = 0; k < std::min<int64_t>(GROUP, count - c); ++k)
      memcpy(z + (c + k) * n, sums + k * R, R * sizeof(float));
  }
}

// Scores of one block of classes against some columns.
struct ScoreTile {
  int64_t b;          // the block
  int64_t v0, count;  // its classes: [v0, v0 + count)
  int64_t i0, n;      // the columns: [i0, i0 + n), n a multiple of VL
  float* z;           // (count, n)
};

// A chunk of rows of x, and w.
template <class T>
struct LinearScores {
  using E = Elem<T>;
  const T *x, *w;
  int64_t rows, width, classes, x_stride, w_stride;
  const float* bias;
  ScoreFunction score;

  int64_t padded() const { return padded_rows(rows); }
  int64_t blocks() const { return vocabulary_blocks(classes); }
  bool has_few_rows() const { return rows <= FEW; }
  int64_t few_stride() const { return round_up(width, KP<E> * VL); }
  int64_t packed_elements() const {
    return has_few_rows() ? FEW * few_stride() : padded() * padded_k<E>(width);
  }
  // of a thread: rows of w that cannot be used in place
  int64_t block_elements() const { return VB * padded_k<E>(width); }

  // x as B operand of z^T = w . x^T: (K = D) x (N = R); few rows are not transposed, only padded
  // with zeros
  void pack_x(E* packed) const {
    if (has_few_rows()) return pack_few_rows(packed);
    const int64_t panel = padded_k<E>(width) * VL, panels = padded() / VL;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; ++p)
      if (p * VL < rows)
        pack_b<E>(x + p * VL * x_stride, 1, x_stride, width, std::min<int64_t>(VL, rows - p * VL),
                  packed + p * panel);
      else
        memset(packed + p * panel, 0, size_t(panel) * sizeof(E));
  }

  void pack_few_rows(E* packed) const {
    const int64_t ldx = few_stride();
    memset(packed, 0, size_t(FEW * ldx) * sizeof(E));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < width; d += KP<E> * VL)
        store_words(packed + i * ldx + d, row_words<E>(x + i * x_stride + d, width - d));
  }

  // Writes t.z. `rows_of_w` (block_elements) holds the rows of w where they cannot be used in
  // place: `pack` writes it, and later tiles of the block find it there.
  void compute(const ScoreTile& t, const E* packed, E* rows_of_w, bool pack) const {
    if (has_few_rows())
      multiply_few_rows(t, packed);
    else
      multiply_panels(t, packed, rows_of_w, pack);
    if (!bias && score.scale == 1 && !score.cap) return;
    for (int64_t c = 0; c < t.count; ++c)
      for (int64_t j = 0; j < t.n; j += VL) {
        float* z = t.z + c * t.n + j;
        store(z, score(load(z) + (bias ? bias[t.v0 + c] : 0.f)));
      }
  }

  // Up to 4 rows of x per pass over w's block; columns beyond the last row are 0.
  void multiply_few_rows(const ScoreTile& t, const E* packed) const {
    memset(t.z, 0, size_t(t.count * t.n) * sizeof(float));
    const int64_t ldx = few_stride();
    for (int64_t i = 0; i < rows;) {
      const auto pass = [&](auto R) {
        constexpr int r = decltype(R)::value;
        few_products<r>(t.count, width, w + t.v0 * w_stride, w_stride, packed + i * ldx, ldx,
                        t.z + i, t.n);
        i += r;
      };
      if (rows - i > 2)
        pass(std::integral_constant<int, 4>{});
      else if (rows - i == 2)
        pass(std::integral_constant<int, 2>{});
      else
        pass(std::integral_constant<int, 1>{});
    }
  }

  void multiply_panels(const ScoreTile& t, const E* packed, E* rows_of_w, bool pack) const {
    const E* a = rows_of_w;
    int64_t lda = padded_k<E>(width);
    if constexpr (std::is_same_v<E, T>)
      if (width == lda) a = w + t.v0 * w_stride, lda = w_stride;
    if (a == rows_of_w && pack)
      pack_a<E>(w + t.v0 * w_stride, w_stride, 1, t.count, width, rows_of_w);
    gemm<E>(t.count, t.n, width, a, lda, packed + t.i0 * padded_k<E>(width), t.z, t.n, false);
  }

  // Calls f(tile) for every tile of scores of `columns`, on all threads.
  template <class F>
  void each_tile(const Workspace& workspace, const E* packed, int64_t columns, F f) const {
    const int64_t last = blocks();
#pragma omp parallel num_threads(workspace.threads)
    {
      Buffer memory(workspace.thread_part());
      E* rows_of_w = memory.take<E>(block_elements());
      float* z = memory.take<float>(VB * RC);
      TileScope tiles;
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < last; ++b)
        for (int64_t i0 = 0; i0 < columns; i0 += RC) {
          const int64_t v0 = b * VB;
          const ScoreTile t{b, v0, std::min(VB, classes - v0), i0, std::min(RC, columns - i0), z};
          compute(t, packed, rows_of_w, i0 == 0);
          f(t);
        }
    }
  }
};

// The largest of `count` scores per column of z (count, n).
inline void column_maxima(const float* z, int64_t count, int64_t n, float* maxima) {
  for (int64_t j = 0; j < n; j += VL) store(maxima + j, load(z + j));
  for (int64_t c = 1; c < count; ++c)
    for (int64_t j = 0; j < n; j += VL)
      store(maxima + j, vmax(load(maxima + j), load(z + c * n + j)));
}

// Two consecutive vectors.
template <class E>
FASTLM_INLINE void store_pair(E* p, vfloat a, vfloat b) {
#ifdef FASTLM_BF16_DOT
  if constexpr (sizeof(E) == 2) {
    const auto both = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    memcpy(p, &both, sizeof both);
    return;
  }
#endif
  store(p, a), store(p + VL, b);
}

// E = e^(z - base) (times the softcap's slope) and the sum of e^(z - base) for P vectors of columns
// of z (count, n); E of a single vector is not stored.
template <int P, class E>
void exponentials_of(const ScoreFunction& score, const float* z, int64_t count, int64_t n,
                     const float* base, float* sums, E* exponentials, int64_t stride) {
  vfloat sum[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sum[p] = vfloat{};
  for (int64_t c = 0; c < count; ++c) {
    vfloat e[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      e[p] = vexp(load(z + c * n + p * VL) - load(base + p * VL));
      sum[p] += e[p];
    }
    if constexpr (P % 2 == 0) {
      if (!exponentials) continue;
      if (score.cap)
        for (int p = 0; p < P; ++p) e[p] *= score.slope(load(z + c * n + p * VL));
#pragma GCC unroll 8
      for (int p = 0; p < P; p += 2) store_pair(exponentials + c * stride + p * VL, e[p], e[p + 1]);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) store(sums + p * VL, sum[p]);
}

template <class T>
LinearScores<T> linear_scores(const TensorView& x, const TensorView& w, const TensorView* bias,
                              float softcap, float scale) {
  check_size("w", "columns, as x:", x.size(1), w.size(1));
  return {x.data<T>("x"),  w.data<T>("w"), x.size(0),   x.size(1),
          w.size(0),       x.stride(0),    w.stride(0), bias ? bias->data<float>("bias") : nullptr,
          {scale, softcap}};
}

template <class T>
T* data_or_null(const TensorView* t, const char* argument) {
  return t ? t->data<T>(argument) : nullptr;
}
