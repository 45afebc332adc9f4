// Cross-entropy of x (R, D) . w (V, D)^T + bias for one chunk of R rows; the caller loops over
// chunks. Body of linear_cross_entropy.cpp, compiled per instruction set.
//
//            R columns (rows of x)            scores     z^T block = w block . x^T, softmax
//            statistics
//          +------------------------+                    per column; optionally e^(z - block's max)
//   VB rows|  block of z^T, one     |                    is kept
//   of w   |  thread's work         |         gradients  G^T = dloss/dz^T, from the exponentials or
//   from
//          +------------------------+                    z^T again;  dw block (+)= G^T . x
//          |  ...                   |                    then, all blocks done, dx = G . w
//
// Transposed scores: w's rows are then the A operand where they lie, x is packed once per chunk,
// the rows' statistics sit in lanes (no horizontal reduction), and G^T is already the A operand of
// dw. G^T is turned in place once (region [R][VB]) to be the A operand of dx.
//
// R is padded to a multiple of RP with zero rows of x. E is what gemm.h multiplies (bf16 or float).
#include "cpu/gemm.h"
#include "cpu/scores.h"

constexpr int64_t VB = 256;  // rows of w per block: 256 x 512 fp32 of dw or z^T are half of an L2
constexpr int64_t DB = 128;  // columns of dx per task: 512 x 128 fp32 = 256 KiB in the L2
constexpr int64_t RC = 256;  // columns of z^T at a time: 256 KiB of fp32 in the L2
constexpr int64_t RP = 32;   // a tile row of bf16: G^T is used as it lies

// Memory of one thread for one call.
template <class X>
struct Scratch {
  X* data;
  explicit Scratch(int64_t n)
      : data(static_cast<X*>(aligned_alloc(64, (size_t(n) * sizeof(X) + 63) / 64 * 64))) {}
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  operator X*() const { return data; }
};

inline int64_t padded_rows(int64_t r) { return (r + RP - 1) / RP * RP; }
inline int64_t vocabulary_blocks(int64_t v) { return (v + VB - 1) / VB; }

// What both functions know of the chunk.
template <class T>
struct LinearScores {
  using E = Elem<T>;
  const T *x, *w;
  int64_t rows, width, classes, x_stride, w_stride;
  const float* bias;
  Scores score;

  int64_t padded() const { return padded_rows(rows); }

  // x as B operand of z^T = w . x^T: (K = D) x (N = R)
  void pack_x(E* packed) const {
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
  // `rows_of_w` holds the rows of w where they cannot be used as they lie.
  void block(int64_t v0, int64_t count, int64_t j0, int64_t n, const E* packed, E* rows_of_w,
             float* z) const {
    const E* a = rows_of_w;
    int64_t lda = padded_k<E>(width);
    if constexpr (std::is_same_v<E, T>)
      if (width == lda) a = w + v0 * w_stride, lda = w_stride;
    if (a == rows_of_w && j0 == 0)
      pack_a<E>(w + v0 * w_stride, w_stride, 1, count, width, rows_of_w);
    gemm<E>(count, n, width, a, lda, packed + j0 * padded_k<E>(width), z, n, false);
    if (!bias && score.scale == 1 && !score.cap) return;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < n; j += VL)
        store(z + r * n + j, score(load(z + r * n + j) + (bias ? bias[v0 + r] : 0.f)));
  }
};

// Statistics of a block: maximum, sum of exponentials and weighted sum of z - maximum per column,
// each (blocks, R padded).
struct BlockStats {
  float *most, *sum, *weighted;
  int64_t padded;
  BlockStats(const TensorView& stats, int64_t blocks, int64_t padded)
      : most(stats.data<float>("stats")),
        sum(most + blocks * padded),
        weighted(sum + blocks * padded),
        padded(padded) {}
};

// x (R, D), w (V, D), bias (V) float32 or absent, target (R) int64, class_weight (V) float32 or
// absent; exponentials: V rounded up to VB times R padded elements of E, or absent; stats (3,
// blocks, R padded) float32; at_target, shift, log_sum, nll, smoothed (R) float32
template <class T>
void linear_cross_entropy_scores_of(const LinearScores<T>& chunk, const int64_t* target,
                                    const float* class_weight, int64_t ignore_index,
                                    Elem<T>* exponentials, BlockStats stats, float* at_target,
                                    float* shift, float* log_sum, float* nll, float* smoothed) {
  using E = Elem<T>;
  const int64_t rp = chunk.padded(), blocks = vocabulary_blocks(chunk.classes);
  Scratch<E> packed(rp * padded_k<E>(chunk.width));
  chunk.pack_x(packed);
#pragma omp parallel
  {
    Scratch<E> rows_of_w(VB * padded_k<E>(chunk.width));
    Scratch<float> z(VB * RC);
    TileScope tiles;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t v0 = b * VB, count = std::min(VB, chunk.classes - v0);
      for (int64_t j0 = 0; j0 < rp; j0 += RC) {
        const int64_t n = std::min(RC, rp - j0);
        chunk.block(v0, count, j0, n, packed, rows_of_w, z);
        for (int64_t i = j0; i < std::min(j0 + n, chunk.rows); ++i)
          if (target[i] != ignore_index && target[i] >= v0 && target[i] < v0 + count)
            at_target[i] = z[(target[i] - v0) * n + i - j0];
        for (int64_t j = 0; j < n; j += 2 * VL) {  // two vectors: a whole cache line or two per row
          const float* column = z + j;
          vfloat most[2] = {load(column), load(column + VL)};
          for (int64_t r = 1; r < count; ++r)
            for (int p = 0; p < 2; ++p) most[p] = vmax(most[p], load(column + r * n + p * VL));
          for (int p = 0; p < 2; ++p) {
            const vfloat least = splat(NEGATIVE_INFINITY);
            const vfloat m = most[p] == least ? vfloat{} : most[p];
            vfloat sum{}, weighted{};
            for (int64_t r = 0; r < count; ++r) {
              const vfloat s = load(column + r * n + p * VL), e = vexp(s - m);
              sum += e;
              if (class_weight) weighted += class_weight[v0 + r] * (s - m);
              if (exponentials)
                store(exponentials + (v0 + r) * rp + j0 + j + p * VL,
                      chunk.score.cap ? e * chunk.score.slope(s) : e);
            }
            const int64_t at = b * rp + j0 + j + p * VL;
            store(stats.most + at, most[p]), store(stats.sum + at, sum);
            store(stats.weighted + at, weighted);
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < chunk.rows; ++i) {
    float m = NEGATIVE_INFINITY, sum = 0, weighted = 0, weights = 0;
    for (int64_t b = 0; b < blocks; ++b) m = std::max(m, stats.most[b * rp + i]);
    for (int64_t b = 0; b < blocks; ++b) {
      const float below = finite_max(stats.most[b * rp + i]) - m;
      sum += stats.sum[b * rp + i] * std::exp(below);
      if (class_weight) {
        float w = 0;
        for (int64_t v = b * VB; v < std::min((b + 1) * VB, chunk.classes); ++v)
          w += class_weight[v];
        weights += w, weighted += stats.weighted[b * rp + i] + w * below;
      }
    }
    shift[i] = m, log_sum[i] = std::log(sum);
    nll[i] = target[i] == ignore_index ? 0.f : log_sum[i] - (at_target[i] - m);
    if (class_weight) smoothed[i] = weights * log_sum[i] - weighted;
  }
}

// Coefficients of the rows, padded with zeros: on_p e^(block's max - lse) and so on.
struct Coefficients {
  const float *on_p, *on_target, *on_all, *shift, *log_sum;
};

// dx (R, D) like x, dw (V, D) float32, dbias (V) float32: each may be absent. `have_exponentials`:
// `exponentials`, `stats` and `at_target` are as linear_cross_entropy_scores left them; without,
// they are workspace. dw and dbias are added to when `accumulate`.
template <class T>
void linear_cross_entropy_gradients_of(const LinearScores<T>& chunk, const Coefficients& of,
                                       const int64_t* target, const float* class_weight,
                                       int64_t ignore_index, bool have_exponentials,
                                       Elem<T>* exponentials, BlockStats stats,
                                       const float* at_target, T* dx, float* dw, float* dbias,
                                       bool accumulate) {
  using E = Elem<T>;
  const int64_t rp = chunk.padded(), d = chunk.width, blocks = vocabulary_blocks(chunk.classes);
  const Scores score = chunk.score;
  Scratch<E> packed(have_exponentials ? 0 : rp * padded_k<E>(d));  // for z^T = w . x^T
  Scratch<E> packed_rows(packed_b_elements<E>(chunk.rows, d));     // for dw = G^T . x
  Scratch<float> coefficients(5 * rp);
  float *on_p = coefficients, *on_target = on_p + rp, *on_all = on_target + rp,
        *shift = on_all + rp, *log_sum = shift + rp;
  for (int64_t i = 0; i < rp; ++i) {
    const bool real = i < chunk.rows;
    on_p[i] = real ? of.on_p[i] * score.scale : 0.f;
    on_target[i] = real ? of.on_target[i] * score.scale : 0.f;
    on_all[i] = real && of.on_all ? of.on_all[i] * score.scale : 0.f;
    // a padded column's scores are the bias: whatever it is, e^(bias - inf) is 0
    shift[i] = real ? of.shift[i] : -NEGATIVE_INFINITY, log_sum[i] = real ? of.log_sum[i] : 0.f;
  }
  if (!have_exponentials) chunk.pack_x(packed);
  const int64_t panel = padded_k<E>(chunk.rows) * VL;
#pragma omp parallel
  {
    if (dw) {
#pragma omp for schedule(static)
      for (int64_t p = 0; p < (d + VL - 1) / VL; ++p)
        pack_b<E>(chunk.x + p * VL, chunk.x_stride, 1, chunk.rows,
                  std::min<int64_t>(VL, d - p * VL), packed_rows + p * panel);
    }
    Scratch<E> rows_of_w(have_exponentials ? 0 : VB * padded_k<E>(d)), g(VB * rp);
    Scratch<float> z(have_exponentials ? 0 : VB * RC), factor(rp);
    // double: the terms of all rows less those of the targets may cancel to nothing
    Scratch<double> bias_sum(VB);
    TileScope tiles;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t v0 = b * VB, count = std::min(VB, chunk.classes - v0);
      E* region = exponentials + v0 * rp;
      memset(bias_sum, 0, VB * sizeof(double));
      // G^T, one element to be corrected per target
      const auto put = [&](int64_t r, int64_t i, vfloat gradient, vfloat& sum) {
        sum += gradient;
        store(g + r * rp + i, gradient);
      };
      const auto add_lanes = [&](vfloat sum, double& total) {
        if (dbias)
          for (int lane = 0; lane < VL; ++lane) total += sum[lane];
      };
      const auto correct = [&](int64_t i, float gradient, float slope) {
        const int64_t r = target[i] - v0;
        bias_sum[r] -= double(on_target[i]) * slope;
        g[r * rp + i] = from_float<E>(gradient - on_target[i] * slope);
      };
      const auto here = [&](int64_t i) {
        return target[i] != ignore_index && target[i] >= v0 && target[i] < v0 + count;
      };
      if (have_exponentials) {
        for (int64_t i = 0; i < rp; i += VL) {
          const vfloat m = load(stats.most + b * rp + i), p = load(on_p + i);
          const vfloat f = vexp(m - load(shift + i) - load(log_sum + i)) * p;
          store(factor + i, f);
        }
        for (int64_t r = 0; r < count; ++r) {
          const float w = class_weight ? class_weight[v0 + r] : 0.f;
          vfloat sum{};
          if (of.on_all)
            for (int64_t i = 0; i < rp; i += VL)
              put(r, i, load(region + r * rp + i) * load(factor + i) - load(on_all + i) * w, sum);
          else
            for (int64_t i = 0; i < rp; i += VL)
              put(r, i, load(region + r * rp + i) * load(factor + i), sum);
          add_lanes(sum, bias_sum[r]);
        }
        for (int64_t i = 0; i < chunk.rows; ++i)
          if (here(i)) {
            const int64_t r = target[i] - v0;
            const float gradient = to_float(region[r * rp + i]) * factor[i] -
                                   (of.on_all ? on_all[i] * class_weight[v0 + r] : 0.f);
            correct(i, gradient, score.cap ? score.slope(splat(at_target[i]))[0] : 1.f);
          }
      } else {
        for (int64_t j0 = 0; j0 < rp; j0 += RC) {
          const int64_t n = std::min(RC, rp - j0);
          chunk.block(v0, count, j0, n, packed, rows_of_w, z);
          const auto gradient = [&](vfloat s, int64_t i, float w) {
            vfloat e = vexp(s - load(shift + i) - load(log_sum + i)) * load(on_p + i);
            if (of.on_all) e -= load(on_all + i) * w;
            return score.cap ? e * score.slope(s) : e;
          };
          for (int64_t r = 0; r < count; ++r) {
            const float w = class_weight ? class_weight[v0 + r] : 0.f;
            vfloat sum{};
            for (int64_t j = 0; j < n; j += VL)
              put(r, j0 + j, gradient(load(z + r * n + j), j0 + j, w), sum);
            add_lanes(sum, bias_sum[r]);
          }
          for (int64_t i = j0; i < std::min(j0 + n, chunk.rows); ++i)
            if (here(i)) {
              const int64_t r = target[i] - v0, j = (i - j0) / VL * VL;
              const float w = class_weight ? class_weight[v0 + r] : 0.f;
              const vfloat s = load(z + r * n + j);
              const int lane = int(i - j0 - j);
              correct(i, gradient(s, j0 + j, w)[lane], score.cap ? score.slope(s)[lane] : 1.f);
            }
        }
      }
      if (dbias)
        for (int64_t r = 0; r < count; ++r)
          dbias[v0 + r] = float(bias_sum[r] + (accumulate ? dbias[v0 + r] : 0.f));
      if (dw) gemm<E>(count, d, chunk.rows, g, rp, packed_rows, dw + v0 * d, d, accumulate);
      if (dx) pack_a<E>(static_cast<const E*>(g), 1, rp, rp, count, region);
    }
    if (dx) {
      const int64_t across = (d + DB - 1) / DB;
      // rows are split only where there are more threads than column blocks: each task packs w
      const int64_t wanted = (omp_get_num_threads() + across - 1) / across;
      const int64_t rows = std::max(RP, padded_rows((chunk.rows + wanted - 1) / wanted)),
                    down = (chunk.rows + rows - 1) / rows;
      Scratch<float> c(rows * DB);
      Scratch<E> panels(packed_b_elements<E>(VB, DB));
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < across * down; ++task) {
        const int64_t i0 = task / across * rows, d0 = task % across * DB;
        const int64_t m = std::min(rows, chunk.rows - i0), n = std::min(DB, d - d0);
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t v0 = b * VB, count = std::min(VB, chunk.classes - v0),
                        lda = padded_k<E>(count);
          pack_b<E>(chunk.w + v0 * chunk.w_stride + d0, chunk.w_stride, 1, count, n, panels);
          gemm<E>(m, n, count, exponentials + v0 * rp + i0 * lda, lda, panels, c, DB, b > 0);
        }
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; j += VL)
            store(dx + (i0 + i) * d + d0 + j, load(c + i * DB + j),
                  int(std::min<int64_t>(VL, n - j)));
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

// The workspace holds elements of E whatever its own dtype says.
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
                                        const TensorView& nll, const TensorView& smoothed) {
  with_float(x.dtype(), "x", [&](auto tag) {
    using T = decltype(tag);
    const auto chunk = linear_scores<T>(x, w, bias, softcap, scale);
    const int64_t rp = chunk.padded(), blocks = vocabulary_blocks(chunk.classes);
    check_size("stats", "elements:", 3 * blocks * rp, stats.numel());
    linear_cross_entropy_scores_of<T>(
        chunk, target.data<int64_t>("target"), data_or_null<float>(class_weight, "class_weight"),
        ignore_index, workspace<Elem<T>>(exponentials, "exponentials", blocks * VB * rp),
        BlockStats(stats, blocks, rp), at_target.data<float>("at_target"),
        shift.data<float>("shift"), log_sum.data<float>("log_sum"), nll.data<float>("nll"),
        smoothed.data<float>("smoothed"));
  });
}

inline void linear_cross_entropy_gradients(
    const TensorView& on_p, const TensorView& on_target, const TensorView* on_all,
    const TensorView& x, const TensorView& w, const TensorView* bias, const TensorView& target,
    const TensorView* class_weight, const TensorView& shift, const TensorView& log_sum,
    int64_t ignore_index, float softcap, float scale, bool have_exponentials,
    const TensorView& exponentials, const TensorView& stats, const TensorView& at_target,
    const TensorView* dx, const TensorView* dw, const TensorView* dbias, bool accumulate) {
  with_float(x.dtype(), "x", [&](auto tag) {
    using T = decltype(tag);
    const auto chunk = linear_scores<T>(x, w, bias, softcap, scale);
    const int64_t rp = chunk.padded(), blocks = vocabulary_blocks(chunk.classes);
    check_size("stats", "elements:", 3 * blocks * rp, stats.numel());
    linear_cross_entropy_gradients_of<T>(
        chunk,
        {on_p.data<float>("on_p"), on_target.data<float>("on_target"),
         data_or_null<float>(on_all, "on_all"), shift.data<float>("shift"),
         log_sum.data<float>("log_sum")},
        target.data<int64_t>("target"), data_or_null<float>(class_weight, "class_weight"),
        ignore_index, have_exponentials,
        workspace<Elem<T>>(&exponentials, "exponentials", blocks * VB * rp),
        BlockStats(stats, blocks, rp), at_target.data<float>("at_target"),
        data_or_null<T>(dx, "dx"), data_or_null<float>(dw, "dw"),
        data_or_null<float>(dbias, "dbias"), accumulate);
  });
}

// out = source * factor, in out's dtype: a float32 gradient becomes the parameter's.
inline void scale_to(const TensorView& source, float factor, const TensorView& out) {
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
