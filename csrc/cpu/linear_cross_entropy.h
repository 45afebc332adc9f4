// Cross-entropy of x (R, D) . w (V, D)^T + bias, and the entropy of its softmax, for one chunk of R
// rows; the caller loops over chunks. Body of linear_cross_entropy.cpp, compiled per instruction
// set.
//
//            R columns (rows of x)            scores     z^T block = w block . x^T, with its
//          +------------------------+                    E = e^(z - base) and their sum per column;
//   VB rows|  block of z^T, one     |                    E may be kept
//   of w   |  thread's work         |         gradients  dw block (+)= E . (f x), f turning E into
//          +------------------------+                    dloss/dz^T; E is transposed; then, all
//          |  ...                   |                    blocks done, dx = f (E^T . w)
//
// Scores are transposed. So w's rows are the A operand in place, x is packed once per chunk, the
// statistics of the rows of x sit in lanes (no horizontal reduction), and E is already the A
// operand of dw. dloss/dz is f E but for one element per target, which is added to dw and dx in
// float32. With label smoothing dloss/dz is computed in E's place: its terms may cancel, so they
// are added before they are rounded.
//
// `base` is one number per row, not the block's maximum, so that f is one number per row too. It is
// the largest of a few scores, which equals the row's maximum to within a window in which nothing
// over- or underflows. Outside that window the chunk is recomputed with the maximum itself.
//
// R is padded to a multiple of RP with zero rows of x. E's elements have the type of gemm.h's
// operands (bf16 or float). With up to FEW rows the cost is reading w: scores are dot products with
// w's rows in place.
#include "cpu/base/gemm.h"
#include "cpu/scores.h"
#include "cpu/base/workspace.h"

constexpr int64_t VB = 256;     // rows of w per block: 256 x 512 fp32 of dw are half of an L2
constexpr int64_t DB = 256;     // most columns of dx per task: 512 x 256 fp32 in the L2
constexpr int64_t RC = 256;     // columns of z^T at a time: 256 KiB of fp32 in the L2
constexpr int64_t RP = 32;      // a tile row of bf16: E is used in place
constexpr int64_t SAMPLE = 64;  // scores whose maximum is the first `base`: one micro-panel
constexpr int64_t FEW = 8;      // rows of x up to which reading w takes longer than the products
constexpr double WINDOW = 50;   // e^50 squared is a float, e^-50 and 16 digits below it are too
constexpr float LEAST = -128;   // e^-128 is 0 in float, and 0 * -128 is 0 where 0 * -inf is NaN

inline int64_t padded_rows(int64_t r) { return (r + RP - 1) / RP * RP; }
inline int64_t vocabulary_blocks(int64_t v) { return (v + VB - 1) / VB; }

// z (count, n): dot products of `count` rows of w with R rows of x, which are `ldx` apart and
// padded with zeros. W rows of w are multiplied side by side, VL sums are reduced together.
template <int R, class E, class T>
void few_products(int64_t count, int64_t k, const T* w, int64_t w_stride, const E* x, int64_t ldx,
                  float* z, int64_t n) {
  constexpr int STEP = KP<E> * VL, GROUP = VL / R, W = std::min(GROUP, VL == 16 ? 4 : 2);
  for (int64_t v = 0; v < count; v += GROUP) {
    alignas(64) float sums[VL];
    vfloat parts[VL] = {};
    for (int64_t c = 0; c < GROUP; c += W) {
      const T* rows[W];  // beyond the last row: the last row again
      for (int i = 0; i < W; ++i) rows[i] = w + std::min(v + c + i, count - 1) * w_stride;
      vfloat acc[W][R] = {};
      for (int64_t j = 0; j < k; j += STEP) {
#pragma GCC unroll 4
        for (int i = 0; i < W; ++i) {
          __builtin_prefetch(rows[i] + W * w_stride + j);
          const vfloat row = as_float(row_words<E>(rows[i] + j, k - j));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            acc[i][r] = multiply_add(acc[i][r], row,
                                     load(reinterpret_cast<const float*>(x + r * ldx + j)), E{});
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < W; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) parts[(c + i) * R + r] = acc[i][r];
    }
    store(sums, sums_of(parts));
    for (int64_t i = 0; i < std::min<int64_t>(GROUP, count - v); ++i)
      memcpy(z + (v + i) * n, sums + i * R, R * sizeof(float));
  }
}

// The shapes of a chunk and its operands, for both functions.
template <class T>
struct LinearScores {
  using E = Elem<T>;
  const T *x, *w;
  int64_t rows, width, classes, x_stride, w_stride;
  const float* bias;
  Scores score;

  int64_t padded() const { return padded_rows(rows); }
  bool few() const { return rows <= FEW; }
  int64_t row_of_few() const { return (width + KP<E> * VL - 1) / (KP<E> * VL) * KP<E> * VL; }
  int64_t packed_elements() const {
    return few() ? FEW * row_of_few() : padded() * padded_k<E>(width);
  }

  // x as B operand of z^T = w . x^T: (K = D) x (N = R); FEW rows in their own order, padded with
  // zeros
  void pack_x(E* packed) const {
    if (few()) {
      const int64_t ldx = row_of_few();
      memset(packed, 0, size_t(FEW * ldx) * sizeof(E));
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < width; j += KP<E> * VL)
          store_words(packed + i * ldx + j, row_words<E>(x + i * x_stride + j, width - j));
      return;
    }
    const int64_t panel = padded_k<E>(width) * VL, panels = padded() / VL;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; ++p)
      if (p * VL < rows)
        pack_b<E>(x + p * VL * x_stride, 1, x_stride, width, std::min<int64_t>(VL, rows - p * VL),
                  packed + p * panel);
      else
        memset(packed + p * panel, 0, size_t(panel) * sizeof(E));
  }

  // Scores of `count` rows of w from v0 on against columns [j0, j0 + n) of x^T, to z (count, n).
  // `rows_of_w` holds the rows of w where they cannot be used in place.
  void block(int64_t v0, int64_t count, int64_t j0, int64_t n, const E* packed, E* rows_of_w,
             float* z, bool pack) const {
    if (few()) {
      memset(z, 0, size_t(count * n) * sizeof(float));
      const int64_t ldx = row_of_few();
      const T* from = w + v0 * w_stride;
      for (int64_t i = 0; i < rows;) {
        const auto some = [&](auto R) {
          constexpr int r = decltype(R)::value;
          few_products<r>(count, width, from, w_stride, packed + i * ldx, ldx, z + i, n);
          i += r;
        };
        if (rows - i > 2)
          some(std::integral_constant<int, 4>{});
        else if (rows - i == 2)
          some(std::integral_constant<int, 2>{});
        else
          some(std::integral_constant<int, 1>{});
      }
    } else
      many(v0, count, j0, n, packed, rows_of_w, z, pack);
    if (!bias && score.scale == 1 && !score.cap) return;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < n; j += VL)
        store(z + r * n + j, score(load(z + r * n + j) + (bias ? bias[v0 + r] : 0.f)));
  }

  void many(int64_t v0, int64_t count, int64_t j0, int64_t n, const E* packed, E* rows_of_w,
            float* z, bool pack) const {
    const E* a = rows_of_w;
    int64_t lda = padded_k<E>(width);
    if constexpr (std::is_same_v<E, T>)
      if (width == lda) a = w + v0 * w_stride, lda = w_stride;
    if (a == rows_of_w && pack) pack_a<E>(w + v0 * w_stride, w_stride, 1, count, width, rows_of_w);
    gemm<E>(count, n, width, a, lda, packed + j0 * padded_k<E>(width), z, n, false);
  }

  // Calls f(b, v0, count, j0, n, z) for every block of scores of `columns`, on all threads.
  template <class F>
  void each_block(const Workspace& room, const E* packed, int64_t columns, F f) const {
    const int64_t blocks = vocabulary_blocks(classes);
#pragma omp parallel num_threads(room.threads)
    {
      Buffer memory(room.mine());
      E* rows_of_w = memory.take<E>(VB * padded_k<E>(width));
      float* z = memory.take<float>(VB * RC);
      TileScope tiles;
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t v0 = b * VB, count = std::min(VB, classes - v0);
        for (int64_t j0 = 0; j0 < columns; j0 += RC) {
          const int64_t n = std::min(RC, columns - j0);
          block(v0, count, j0, n, packed, rows_of_w, z, j0 == 0);
          f(b, v0, count, j0, n, static_cast<const float*>(z));
        }
      }
    }
  }
};

// Statistics of a chunk: `base` per column, then per block and column the sum of E and the sum of
// z - base weighted by class_weight or, for the entropy, its mean weighted by E.
struct ChunkStats {
  float *base, *sum, *weighted;
  int64_t padded;
  static int64_t elements(int64_t blocks, int64_t padded) { return (1 + 2 * blocks) * padded; }
  ChunkStats(float* stats, int64_t blocks, int64_t padded)
      : base(stats), sum(base + padded), weighted(sum + blocks * padded), padded(padded) {}
};

// y += a x
template <class X>
FASTLM_INLINE void add_scaled(float* y, float a, const X* x, int64_t n) {
  for (int64_t j = 0; j < n; j += VL) {
    const int k = int(std::min<int64_t>(VL, n - j));
    if (k == VL)
      store(y + j, load(y + j) + a * load(x + j));
    else
      store(y + j, load(y + j, k) + a * load(x + j, k), k);
  }
}

// The largest of `count` scores per column of z (count, n).
inline void largest(const float* z, int64_t count, int64_t n, float* most) {
  for (int64_t j = 0; j < n; j += VL) store(most + j, load(z + j));
  for (int64_t r = 1; r < count; ++r)
    for (int64_t j = 0; j < n; j += VL) store(most + j, vmax(load(most + j), load(z + r * n + j)));
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

// E and its sum for P vectors of columns of z (count, n); E of a single vector is not stored.
template <int P, class E>
void exponentials_of(const Scores& score, const float* z, int64_t count, int64_t n,
                     const float* base, float* sums, E* kept, int64_t kept_stride) {
  vfloat sum[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sum[p] = vfloat{};
  for (int64_t r = 0; r < count; ++r) {
    vfloat e[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      e[p] = vexp(load(z + r * n + p * VL) - load(base + p * VL));
      sum[p] += e[p];
    }
    if constexpr (P % 2 == 0) {
      if (!kept) continue;
      if (score.cap)
        for (int p = 0; p < P; ++p) e[p] *= score.slope(load(z + r * n + p * VL));
#pragma GCC unroll 8
      for (int p = 0; p < P; p += 2) store_pair(kept + r * kept_stride + p * VL, e[p], e[p + 1]);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) store(sums + p * VL, sum[p]);
}

// For P vectors of columns of z (count, n): the sum of E, and the mean of z - base weighted by E.
// Both are summed relative to the block's largest score: a sum of E (z - base) would be rounded to
// the precision of z - base, which is far from 0 where `base` is far below the largest scores.
template <int P>
void means_of(const float* z, int64_t count, int64_t n, const float* base, float* sums,
              float* means) {
  vfloat most[P], sum[P], weighted[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)  // finite where every score is -inf
    most[p] = splat(std::numeric_limits<float>::lowest()), sum[p] = weighted[p] = vfloat{};
  for (int64_t r = 0; r < count; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) most[p] = vmax(most[p], load(z + r * n + p * VL));
  for (int64_t r = 0; r < count; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const vfloat below = load(z + r * n + p * VL) - most[p], e = vexp(below);
      sum[p] += e;
      weighted[p] += e * vmax(below, splat(LEAST));
    }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const vfloat above = most[p] - load(base + p * VL);
    store(sums + p * VL, sum[p] * vexp(above));
    store(means + p * VL, weighted[p] / sum[p] + above);
  }
}

// x (R, D), w (V, D), bias (V) float32 or absent, target (R) int64, class_weight (V) float32 or
// absent; exponentials: (V rounded up to VB) x (R padded) elements of E, or absent; stats: float32,
// (1 + 2 blocks, R padded), followed by workspace (fastlm/cpu/linear_cross_entropy.py computes the
// size); at_target, shift, log_sum, nll, smoothed, entropy (R) float32. shift + log_sum is the log
// of the sum of e^z, shift its nearest float. entropy, that of softmax(z), may be absent; with it
// exponentials and class_weight are.
template <class T>
void linear_cross_entropy_scores_of(const LinearScores<T>& chunk, const int64_t* target,
                                    const float* class_weight, int64_t ignore_index,
                                    Elem<T>* exponentials, ChunkStats stats, float* at_target,
                                    float* shift, float* log_sum, float* nll, float* smoothed,
                                    float* entropy, Workspace room) {
  using E = Elem<T>;
  const int64_t rp = chunk.padded(), rows = chunk.rows, blocks = vocabulary_blocks(chunk.classes);
  // only exponentials that are kept need columns of padding
  const int64_t columns = chunk.few() && !exponentials ? (rows + VL - 1) / VL * VL : chunk.padded();
  E* packed = room.take<E>(chunk.packed_elements());
  chunk.pack_x(packed);
  double* total = room.take<double>(rows);
  float* most = room.take<float>(rp);
  room.divide(Buffer::size_of<E>(VB * padded_k<E>(chunk.width)) + Buffer::size_of<float>(VB * RC));
  const auto set_base = [&](const float* most) {
    for (int64_t i = 0; i < rp; ++i)  // a padded column's E is 0, whatever the bias is
      stats.base[i] = i >= rows ? -NEGATIVE_INFINITY : finite_max(most[i]);
  };
  const auto sweep = [&] {
    chunk.each_block(
        room, packed, columns,
        [&](int64_t b, int64_t v0, int64_t count, int64_t j0, int64_t n, const float* z) {
          for (int64_t i = j0; i < std::min(j0 + n, rows); ++i)
            if (target[i] != ignore_index && target[i] >= v0 && target[i] < v0 + count)
              at_target[i] = z[(target[i] - v0) * n + i - j0];
          constexpr int P = VL == 16 ? 8 : RP / VL;  // 128 columns with 32 registers
          for (int64_t j = 0; j < n;) {
            const auto part = [&](auto vectors) {
              constexpr int p = decltype(vectors)::value;
              const int64_t at = b * rp + j0 + j;
              if (entropy)
                means_of<p>(z + j, count, n, stats.base + j0 + j, stats.sum + at,
                            stats.weighted + at);
              else
                exponentials_of<p, E>(chunk.score, z + j, count, n, stats.base + j0 + j,
                                      stats.sum + at,
                                      exponentials ? exponentials + v0 * rp + j0 + j : nullptr, rp);
              j += p * VL;
            };
            if (n - j >= P * VL)
              part(std::integral_constant<int, P>{});
            else if (n - j >= RP)
              part(std::integral_constant<int, RP / VL>{});
            else
              part(std::integral_constant<int, 1>{});
          }
          if (class_weight)
            for (int64_t j = 0; j < n; j += VL) {
              vfloat weighted{};
              for (int64_t r = 0; r < count; ++r)
                weighted +=
                    class_weight[v0 + r] * (load(z + r * n + j) - load(stats.base + j0 + j));
              store(stats.weighted + b * rp + j0 + j, weighted);
            }
        });
    for (int64_t i = 0; i < rows; ++i) total[i] = 0;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < rows; ++i) total[i] += stats.sum[b * rp + i];
  };
  {
#pragma omp parallel num_threads(room.threads)
    {
      const int64_t count = std::min(SAMPLE, chunk.classes),
                    width = std::min<int64_t>(columns, 2 * RP);
      Buffer memory(room.mine());
      E* rows_of_w = memory.take<E>(SAMPLE * padded_k<E>(chunk.width));
      float* z = memory.take<float>(SAMPLE * width);
      TileScope tiles;
#pragma omp for schedule(static)
      for (int64_t j0 = 0; j0 < columns; j0 += width) {
        const int64_t n = std::min(width, columns - j0);
        chunk.block(0, count, j0, n, packed, rows_of_w, z, true);
        largest(z, count, n, most + j0);
      }
    }
    set_base(most);
    for (int64_t i = 0; i < rows; ++i)
      if (!std::isfinite(stats.base[i])) stats.base[i] = 0;
  }
  sweep();
  bool in_window = true;  // not where a total is NaN
  for (int64_t i = 0; i < rows; ++i) in_window &= std::abs(std::log(total[i])) < WINDOW;
  if (!in_window) {
    chunk.each_block(room, packed, columns,
                     [&](int64_t b, int64_t, int64_t count, int64_t j0, int64_t n, const float* z) {
                       largest(z, count, n, stats.sum + b * rp + j0);
                     });
    for (int64_t b = 1; b < blocks; ++b)
      for (int64_t i = 0; i < rows; ++i)
        stats.sum[i] = std::max(stats.sum[i], stats.sum[b * rp + i]);
    set_base(stats.sum);
    sweep();
  }
  double weights = 0;
  if (class_weight)
    for (int64_t v = 0; v < chunk.classes; ++v) weights += class_weight[v];
  for (int64_t i = 0; i < rows; ++i) {
    const double above = std::log(total[i]), lse = stats.base[i] + above;
    shift[i] = float(lse);
    log_sum[i] = std::isfinite(lse) ? float(lse - shift[i]) : 0.f;
    nll[i] = target[i] == ignore_index ? 0.f : float(lse - at_target[i]);
    if (class_weight) {
      double weighted = 0;
      for (int64_t b = 0; b < blocks; ++b) weighted += stats.weighted[b * rp + i];
      smoothed[i] = float(weights * above - weighted);
    }
    if (entropy) {
      double weighted = 0;
      for (int64_t b = 0; b < blocks; ++b)
        if (const double sum = stats.sum[b * rp + i]; sum != 0)  // the mean of nothing is NaN
          weighted += sum * stats.weighted[b * rp + i];
      entropy[i] = float(std::max(above - weighted / total[i], 0.0));
    }
  }
}

// Coefficients of the rows: dloss/dz = on_p p - on_target [v is the target] - on_all class_weight
// - on_entropy p (log p + entropy). on_all may be absent; on_entropy and entropy too.
struct Coefficients {
  const float *on_p, *on_target, *on_all, *on_entropy, *shift, *log_sum, *entropy;
};

// dx (R, D) like x; dw (V, D) float32, or like x where nothing is added to it (`dw_narrow`);
// dbias (V) float32: each may be absent. With `have_exponentials`, `exponentials`, `stats` and
// `at_target` are those that linear_cross_entropy_scores wrote; without, `exponentials` is
// workspace, and dloss/dz^T is computed there from recomputed scores; only so is the entropy
// differentiated. `accumulate` adds to dw and dbias.
template <class T>
void linear_cross_entropy_gradients_of(const LinearScores<T>& chunk, const Coefficients& of,
                                       const int64_t* target, const float* class_weight,
                                       int64_t ignore_index, bool have_exponentials,
                                       Elem<T>* exponentials, ChunkStats stats,
                                       const float* at_target, T* dx, float* dw, T* dw_narrow,
                                       float* dbias, bool accumulate, Workspace room) {
  using E = Elem<T>;
  const int64_t rows = chunk.rows, rp = chunk.padded(), d = chunk.width,
                blocks = vocabulary_blocks(chunk.classes);
  const Scores score = chunk.score;
  // E is multiplied as stored; otherwise dloss/dz^T is computed in its place first
  const bool direct = have_exponentials && !of.on_all;
  E* packed = room.take<E>(have_exponentials ? 0 : chunk.packed_elements());  // for z^T = w . x^T
  E* scaled = room.take<E>(rows * d);                                         // f x
  E* packed_rows = room.take<E>(packed_b_elements<E>(rows, d));  // the same for dw = E . (f x)
  // Per column: the coefficients, padded with zeros; `factor`, which turns E into on_p p; f, the
  // part of it that scales x and dx; at the target, on_p p - on_target and E.
  float *on_p = room.take<float>(11 * rp), *on_target = on_p + rp, *on_all = on_target + rp,
        *on_entropy = on_all + rp, *shift = on_entropy + rp, *log_sum = shift + rp,
        *entropy = log_sum + rp, *factor = entropy + rp, *f = factor + rp, *whole = f + rp,
        *e_target = whole + rp;
  for (int64_t i = 0; i < rp; ++i) {
    const bool real = i < rows;
    on_p[i] = real ? of.on_p[i] * score.scale : 0.f;
    on_target[i] = real ? of.on_target[i] * score.scale : 0.f;
    on_all[i] = real && of.on_all ? of.on_all[i] * score.scale : 0.f;
    on_entropy[i] = real && of.on_entropy ? of.on_entropy[i] * score.scale : 0.f;
    entropy[i] = real && of.on_entropy ? of.entropy[i] : 0.f;
    // a padded column's scores are the bias: whatever it is, e^(bias - inf) is 0
    shift[i] = real ? of.shift[i] : -NEGATIVE_INFINITY, log_sum[i] = real ? of.log_sum[i] : 0.f;
    f[i] = real ? 1.f : 0.f;
    factor[i] = whole[i] = e_target[i] = 0.f;
    if (!real || !have_exponentials) continue;
    const double lse = double(shift[i]) + log_sum[i];
    factor[i] = float(on_p[i] * std::exp(stats.base[i] - lse));
    if (direct) f[i] = factor[i];
    const float slope = score.cap ? score.slope(splat(at_target[i]))[0] : 1.f;
    whole[i] = float(on_p[i] * std::exp(at_target[i] - lse) - on_target[i]) * slope;
  }
  if (!have_exponentials) chunk.pack_x(packed);
  const int64_t panel = padded_k<E>(rows) * VL;
  E** turned = room.take<E*>(blocks);  // where a block's E^T is: in the block transposed before it
  const int64_t sizes_e[] = {have_exponentials ? 0 : VB * padded_k<E>(d), VB * rp,
                             packed_b_elements<E>(VB, DB)},
                sizes_f[] = {have_exponentials ? 0 : VB * RC, dw_narrow ? VB * d : 0, rp * DB};
  int64_t each = Buffer::size_of<double>(VB);
  for (int64_t n : sizes_e) each += Buffer::size_of<E>(n);
  for (int64_t n : sizes_f) each += Buffer::size_of<float>(n);
  room.divide(each);
#pragma omp parallel num_threads(room.threads)
  {
    Buffer memory(room.mine());
    TileScope tiles;
    if (dw || dw_narrow) {
#pragma omp for schedule(static)
      for (int64_t p = 0; p < (d + VL - 1) / VL; ++p) {
        const int64_t j = p * VL;
        const int n = int(std::min<int64_t>(VL, d - j));
        for (int64_t i = 0; i < rows; ++i) {
          const T* from = chunk.x + i * chunk.x_stride + j;
          const vfloat x = n == VL ? load(from) : load(from, n);
          store(scaled + i * d + j, x * f[i], n);
        }
        pack_b<E>(scaled + j, d, 1, rows, n, packed_rows + p * panel);
      }
    }
    E *rows_of_w = memory.take<E>(sizes_e[0]), *spare = memory.take<E>(sizes_e[1]);
    float *z = memory.take<float>(sizes_f[0]), *wide = memory.take<float>(sizes_f[1]);
    // double: the terms of all rows and those of the targets may cancel
    double* bias_sum = memory.take<double>(VB);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t v0 = b * VB, count = std::min(VB, chunk.classes - v0);
      E* region = exponentials + v0 * rp;
      const auto here = [&](int64_t i) {
        return target[i] != ignore_index && target[i] >= v0 && target[i] < v0 + count;
      };
      const auto weight_of = [&](int64_t r) { return class_weight ? class_weight[v0 + r] : 0.f; };
      if (dbias) memset(bias_sum, 0, VB * sizeof(double));
      if (have_exponentials && !direct) {
        for (int64_t r = 0; r < count; ++r) {
          E* g = region + r * rp;
          const float w = weight_of(r);
          for (int64_t i = 0; i < rp; i += VL)
            store(g + i, load(g + i) * load(factor + i) - load(on_all + i) * w);
        }
        for (int64_t i = 0; i < rows; ++i)
          if (here(i)) {
            const int64_t r = target[i] - v0;
            region[r * rp + i] = from_float<E>(whole[i] - on_all[i] * weight_of(r));
          }
      }
      if (!have_exponentials)
        for (int64_t j0 = 0; j0 < rp; j0 += RC) {
          const int64_t n = std::min(RC, rp - j0);
          chunk.block(v0, count, j0, n, packed, rows_of_w, z, j0 == 0);
          const auto gradient = [&](vfloat s, int64_t i, float w) {
            const vfloat logp = s - load(shift + i) - load(log_sum + i);
            vfloat on = load(on_p + i);
            if (of.on_entropy)
              on -= load(on_entropy + i) * (vmax(logp, splat(LEAST)) + load(entropy + i));
            vfloat e = vexp(logp) * on;
            if (of.on_all) e -= load(on_all + i) * w;
            return score.cap ? e * score.slope(s) : e;
          };
          for (int64_t r = 0; r < count; ++r) {
            const float w = weight_of(r);
            for (int64_t j = 0; j < n; j += VL)
              store(region + r * rp + j0 + j, gradient(load(z + r * n + j), j0 + j, w));
          }
          for (int64_t i = j0; i < std::min(j0 + n, rows); ++i)
            if (here(i)) {
              const int64_t r = target[i] - v0, j = (i - j0) / VL * VL;
              const vfloat s = load(z + r * n + j);
              const int lane = int(i - j0 - j);
              const float slope = score.cap ? score.slope(s)[lane] : 1.f;
              const float g = gradient(s, j0 + j, weight_of(r))[lane] - on_target[i] * slope;
              region[r * rp + i] = from_float<E>(g);
              if (dbias) bias_sum[r] += double(g) - to_float(region[r * rp + i]);
            }
        }
      if (dbias)
        for (int64_t r = 0; r < count; ++r) {
          vfloat sum{};
          for (int64_t i = 0; i < rp; i += VL) sum += load(region + r * rp + i) * load(f + i);
          for (int lane = 0; lane < VL; ++lane) bias_sum[r] += sum[lane];
        }
      float* dw_block = dw ? dw + v0 * d : dw_narrow ? wide : nullptr;
      if (dw_block) gemm<E>(count, d, rows, region, rp, packed_rows, dw_block, d, accumulate);
      if (direct)
        for (int64_t i = 0; i < rows; ++i)
          if (here(i)) {
            const int64_t r = target[i] - v0;
            e_target[i] = to_float(region[r * rp + i]);
            if (dbias) bias_sum[r] += double(whole[i]) - double(f[i]) * e_target[i];
            if (!dw_block) continue;
            add_scaled(dw_block + r * d, whole[i], chunk.x + i * chunk.x_stride, d);
            add_scaled(dw_block + r * d, -e_target[i], static_cast<const E*>(scaled) + i * d, d);
          }
      if (dw_narrow)
        for (int64_t j = 0; j < count * d; j += VL) {
          const int n = int(std::min<int64_t>(VL, count * d - j));
          if (n == VL)
            store(dw_narrow + v0 * d + j, load(wide + j));
          else
            store(dw_narrow + v0 * d + j, load(wide + j, n), n);
        }
      if (dbias)
        for (int64_t r = 0; r < count; ++r)
          dbias[v0 + r] = float(bias_sum[r] + (accumulate ? dbias[v0 + r] : 0.f));
      if (dx) {
        pack_a<E>(static_cast<const E*>(region), 1, rp, rp, count, spare);
        turned[b] = spare, spare = region;
      }
    }
    if (dx) {
      // columns are split among the threads, rows only where there are more threads than column
      // blocks: each task packs its columns of w
      const int64_t threads = omp_get_num_threads(),
                    least = (((d + DB - 1) / DB + threads - 1) / threads) * threads,
                    width = std::min(
                        DB, std::max<int64_t>(((d + least - 1) / least + 63) / 64 * 64, 64)),
                    across = (d + width - 1) / width, wanted = (threads + across - 1) / across,
                    height = std::max(RP, padded_rows((rows + wanted - 1) / wanted)),
                    down = (rows + height - 1) / height;
      float* c = memory.take<float>(height * width);
      E* panels = memory.take<E>(packed_b_elements<E>(VB, width));
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < across * down; ++task) {
        const int64_t i0 = task / across * height, d0 = task % across * width;
        const int64_t m = std::min(height, rows - i0), n = std::min(width, d - d0);
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t v0 = b * VB, count = std::min(VB, chunk.classes - v0),
                        lda = padded_k<E>(count);
          pack_b<E>(chunk.w + v0 * chunk.w_stride + d0, chunk.w_stride, 1, count, n, panels);
          gemm<E>(m, n, count, turned[b] + i0 * lda, lda, panels, c, width, b > 0);
        }
        for (int64_t i = i0; i < i0 + m; ++i) {
          float* sum = c + (i - i0) * width;
          for (int64_t j = 0; j < n; j += VL) store(sum + j, load(sum + j) * f[i]);
          if (direct && target[i] != ignore_index)
            add_scaled(sum, whole[i] - f[i] * e_target[i],
                       chunk.w + target[i] * chunk.w_stride + d0, n);
          for (int64_t j = 0; j < n; j += VL)
            store(dx + i * d + d0 + j, load(sum + j), int(std::min<int64_t>(VL, n - j)));
        }
      }
    }
  }
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

// The workspace holds elements of E, whatever its dtype is.
template <class E>
E* workspace(const TensorView* t, const char* argument, int64_t elements) {
  if (!t) return nullptr;
  check_size(argument, "bytes:", elements * int64_t(sizeof(E)), t->numel());
  return reinterpret_cast<E*>(t->data<uint8_t>(argument));
}

inline int64_t matrix_element_bytes(const TensorView& x) {
  int64_t bytes = 0;
  with_float(x.dtype(), "x", [&](auto tag) { bytes = sizeof(Elem<decltype(tag)>); });
  return bytes;
}

inline void linear_cross_entropy_scores(const TensorView& x, const TensorView& w,
                                        const TensorView* bias, const TensorView& target,
                                        const TensorView* class_weight, int64_t ignore_index,
                                        float softcap, float scale, const TensorView* exponentials,
                                        const TensorView& stats, const TensorView& at_target,
                                        const TensorView& shift, const TensorView& log_sum,
                                        const TensorView& nll, const TensorView& smoothed,
                                        const TensorView* entropy) {
  if (exponentials) prefer_huge_pages(*exponentials);
  with_float(x.dtype(), "x", [&](auto tag) {
    using T = decltype(tag);
    const auto chunk = linear_scores<T>(x, w, bias, softcap, scale);
    const int64_t rp = chunk.padded(), blocks = vocabulary_blocks(chunk.classes);
    Workspace room(stats);
    float* of_chunk = room.take<float>(ChunkStats::elements(blocks, rp));
    linear_cross_entropy_scores_of<T>(
        chunk, target.data<int64_t>("target"), data_or_null<float>(class_weight, "class_weight"),
        ignore_index, workspace<Elem<T>>(exponentials, "exponentials", blocks * VB * rp),
        ChunkStats(of_chunk, blocks, rp), at_target.data<float>("at_target"),
        shift.data<float>("shift"), log_sum.data<float>("log_sum"), nll.data<float>("nll"),
        smoothed.data<float>("smoothed"), data_or_null<float>(entropy, "entropy"), room);
  });
}

inline void linear_cross_entropy_gradients(
    const TensorView& on_p, const TensorView& on_target, const TensorView* on_all,
    const TensorView* on_entropy, const TensorView& x, const TensorView& w, const TensorView* bias,
    const TensorView& target, const TensorView* class_weight, const TensorView& shift,
    const TensorView& log_sum, const TensorView* entropy, int64_t ignore_index, float softcap,
    float scale, bool have_exponentials, const TensorView& exponentials, const TensorView& stats,
    const TensorView& at_target, const TensorView* dx, const TensorView* dw,
    const TensorView* dbias, bool accumulate) {
  if (dw && !accumulate) prefer_huge_pages(*dw);
  if (!have_exponentials) prefer_huge_pages(exponentials);
  with_float(x.dtype(), "x", [&](auto tag) {
    using T = decltype(tag);
    const auto chunk = linear_scores<T>(x, w, bias, softcap, scale);
    const int64_t rp = chunk.padded(), blocks = vocabulary_blocks(chunk.classes);
    Workspace room(stats);
    float* of_chunk = room.take<float>(ChunkStats::elements(blocks, rp));
    const bool narrow = dw && dw->dtype() != DType::f32;
    if (narrow && accumulate) throw std::invalid_argument("dw: wanted float32 to add to");
    linear_cross_entropy_gradients_of<T>(
        chunk,
        {on_p.data<float>("on_p"), on_target.data<float>("on_target"),
         data_or_null<float>(on_all, "on_all"), data_or_null<float>(on_entropy, "on_entropy"),
         shift.data<float>("shift"), log_sum.data<float>("log_sum"),
         data_or_null<float>(entropy, "entropy")},
        target.data<int64_t>("target"), data_or_null<float>(class_weight, "class_weight"),
        ignore_index, have_exponentials,
        workspace<Elem<T>>(&exponentials, "exponentials", blocks * VB * rp),
        ChunkStats(of_chunk, blocks, rp), at_target.data<float>("at_target"),
        data_or_null<T>(dx, "dx"), narrow ? nullptr : data_or_null<float>(dw, "dw"),
        narrow ? dw->data<T>("dw") : nullptr, data_or_null<float>(dbias, "dbias"), accumulate,
        room);
  });
}

// out = source * factor, in out's dtype: a float32 gradient becomes the parameter's.
inline void scale_to(const TensorView& source, float factor, const TensorView& out) {
  prefer_huge_pages(out);
  const int64_t n = source.numel();
  const float* s = source.data<float>("source");
  with_float(out.dtype(), "out", [&](auto tag) {
    using T = decltype(tag);
    T* o = out.data<T>("out");
#pragma omp parallel if (n > 32768)
    {
      FlushDenormals flush;
#pragma omp for schedule(static)
      for (int64_t b = 0; b < n; b += VL) {
        const int k = int(std::min<int64_t>(VL, n - b));
        if (k == VL)
          store(o + b, load(s + b) * factor);
        else
          store(o + b, load(s + b, k) * factor, k);
      }
    }
  });
}
