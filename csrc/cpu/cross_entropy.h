// Cross-entropy of rows of logits. Body of cross_entropy.cpp, compiled per instruction set.
//
//   z = softcap(scale * logits);  shift = max z;  log_sum = log sum e^(z - shift)
//   nll = log_sum - (z[target] - shift), 0 without a target
//   smoothed = sum over v of class_weight[v] * (log_sum - (z[v] - shift))
//   backward  dz[v] = on_p * e^(z - shift - log_sum) - on_target * (v == target) - on_all *
//   class_weight[v]
//
// Forward reads the logits once: BLOCK of them are loaded into the L1, where their maximum and then
// their exponentials are computed; the sum so far is rescaled when the maximum grows. Backward
// reads once and writes once. A row is a sequence of spans, which are summed separately and added
// in order. So a few rows of a large vocabulary keep all threads busy, and the result does not
// depend on which thread computed which span.
#include "cpu/base/parallel.h"
#include "cpu/scores.h"

constexpr int64_t BLOCK = 1024;  // 4 KiB of scores: they stay in the L1 between the two loops
constexpr int64_t SPAN = 16384;  // classes: 5 us, the smallest task that pays
// Independent sums of a block: more terms in a row would lose digits. Class weights have more sums,
// because the roundings of equal weights all have one sign.
constexpr int SUMS = VL < 8 ? 32 : 32 / VL, WEIGHT_SUMS = VL < 8 ? 64 : 128 / VL;
constexpr int64_t FEW_ROWS = 8;    // fewer rows are shared among the threads span by span
constexpr int64_t MAX_SPANS = 32;  // per row in that case: 512 thousand classes

template <class T, class W>
struct CrossEntropyRow {
  const T* logits;
  int64_t classes, target;  // target -1: none
  const W* class_weight;
  ScoreFunction score;
};

// Statistics of a span of a row's classes: maximum m, sum of e^(z - m), sums of
// class_weight * (z - m) and of class_weight.
struct SpanSums {
  float m = -INFINITE, sum = 0, weighted = 0, weights = 0;

  // Adds two spans relative to the larger maximum. Spans are added in the order of the classes.
  void add(const SpanSums& other) {
    const float top = std::max(m, other.m), now = finite_max(top);
    const float up = finite_max(m) - now, up_other = finite_max(other.m) - now;
    // a sum of 0 stays 0 where the factor is infinite (a maximum of -inf counts as 0 here)
    sum = (sum != 0 ? sum * std::exp(up) : 0.f) +
          (other.sum != 0 ? other.sum * std::exp(up_other) : 0.f);
    weighted += up * weights + other.weighted + up_other * other.weights;
    weights += other.weights;
    m = top;
  }
};

template <int N>
FASTLM_INLINE vfloat total(vfloat (&sums)[N]) {
  for (int n = N / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) sums[i] += sums[i + n];
  return sums[0];
}

template <class T, class W>
SpanSums cross_entropy_span(const CrossEntropyRow<T, W>& row, int64_t from) {
  alignas(64) float z[BLOCK];
  vfloat weighted{};  // class_weight * (z - m)
  float m = -INFINITE, sum = 0, weight_so_far = 0;
  const int64_t end = std::min(row.classes, from + SPAN);
  for (int64_t v0 = from; v0 < end; v0 += BLOCK) {
    const int64_t n = std::min(BLOCK, end - v0), full_end = n / VL * VL;
    const T* x = row.logits + v0;
    vfloat maxima[2] = {splat(-INFINITE), splat(-INFINITE)};
    for (int64_t j = 0; j < full_end; j += VL) {
      const vfloat s = row.score(load(x + j));
      store(z + j, s);
      maxima[j / VL & 1] = vmax(maxima[j / VL & 1], s);
    }
    if (full_end < n) {
      store(z + full_end, splat(-INFINITE));
      store(z + full_end, row.score(load(x + full_end, int(n - full_end))), int(n - full_end));
      maxima[0] = vmax(maxima[0], load(z + full_end));
    }
    const float before = finite_max(m), block_max = hmax(vmax(maxima[0], maxima[1]));
    if (block_max > m) m = block_max;
    const float now = finite_max(m);
    if (now != before) {
      if (sum != 0) sum *= std::exp(before - now);
      if (row.class_weight) weighted[0] += (before - now) * weight_so_far;
    }
    vfloat sums[SUMS] = {};
    for (int64_t j = 0; j < n; j += VL) sums[j / VL & (SUMS - 1)] += vexp(load(z + j) - now);
    sum += hsum(total(sums));
    if (row.class_weight) {
      vfloat weights[WEIGHT_SUMS] = {}, of_block[WEIGHT_SUMS] = {};
      for (int64_t j = 0; j < n; j += VL) {
        const int k = int(std::min<int64_t>(VL, n - j)), u = j / VL & (WEIGHT_SUMS - 1);
        const vfloat w = load(row.class_weight + v0 + j, k), d = load(z + j, k) - now;
        weights[u] += w, of_block[u] += w * d;
      }
      weight_so_far += hsum(total(weights));
      weighted += total(of_block);
    }
  }
  return {m, sum, hsum(weighted), weight_so_far};
}

template <class T, class W>
void cross_entropy_finish(const CrossEntropyRow<T, W>& row, const SpanSums& s, float* shift,
                          float* log_sum, float* nll, float* smoothed) {
  const float log_of_sum =
      s.m == -INFINITE ? std::numeric_limits<float>::quiet_NaN() : std::log(s.sum);
  *shift = s.m, *log_sum = log_of_sum;
  *nll = row.target < 0 ? 0.f : log_of_sum - (row.score(to_float(row.logits[row.target])) - s.m);
  if (row.class_weight) *smoothed = s.weights * log_of_sum - s.weighted;
}

// Weights of a row's classes, null: none. `stride` 0: the same for all rows.
template <class W>
struct ClassWeights {
  const W* first = nullptr;
  int64_t stride = 0;
  const W* of_row(int64_t i) const { return first ? first + i * stride : nullptr; }
};
// Calls f(ClassWeights) of the tensor's type, which is float or T.
template <class T, class F>
void with_class_weights(const TensorView* t, F&& f) {
  if (!t) return f(ClassWeights<float>{});
  const int64_t stride = t->ndim() == 2 ? t->stride(0) : 0;
  if (t->dtype() == DType::f32)
    f(ClassWeights<float>{t->data<float>("class_weight"), stride});
  else
    f(ClassWeights<T>{t->data<T>("class_weight"), stride});
}

// out: shift, log_sum, nll and, with class weights w, smoothed of N rows
inline void cross_entropy_rows(const TensorView& logits, const int64_t* t,
                               const TensorView* class_weight, int64_t ignore_index, float softcap,
                               float scale, float* const (&out)[4]) {
  const int64_t rows = logits.size(0), classes = logits.size(1), stride = logits.stride(0);
  const int64_t spans = (classes + SPAN - 1) / SPAN;
  with_float(logits.dtype(), "logits", [&](auto tag) {
    using T = decltype(tag);
    const T* x = logits.data<T>("logits");
    with_class_weights<T>(class_weight, [&](auto w) {
      using Row = CrossEntropyRow<T, std::remove_const_t<std::remove_pointer_t<decltype(w.first)>>>;
      const auto row_at = [=](int64_t i) {
        return Row{x + i * stride,
                   classes,
                   t[i] == ignore_index ? -1 : t[i],
                   w.of_row(i),
                   {scale, softcap}};
      };
      const auto finish = [=](const Row& row, int64_t i, const SpanSums& s) {
        cross_entropy_finish(row, s, out[0] + i, out[1] + i, out[2] + i, out[3] + i);
      };
      if (rows < FEW_ROWS && spans > 1 && spans <= MAX_SPANS) {
        SpanSums sums[FEW_ROWS * MAX_SPANS];
#pragma omp parallel
        {
          FlushDenormals flush;
#pragma omp for schedule(static)
          for (int64_t task = 0; task < rows * spans; ++task)
            sums[task] = cross_entropy_span(row_at(task / spans), task % spans * SPAN);
        }
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t k = 1; k < spans; ++k) sums[i * spans].add(sums[i * spans + k]);
          finish(row_at(i), i, sums[i * spans]);
        }
        return;
      }
      // below 32768 elements a parallel region costs more than it saves
      parallel_for(rows, rows * classes > 32768, [=](int64_t i) {
        const Row row = row_at(i);
        SpanSums s = cross_entropy_span(row, 0);
        for (int64_t k = 1; k < spans; ++k) s.add(cross_entropy_span(row, k * SPAN));
        finish(row, i, s);
      });
    });
  });
}

// logits (N, V), rows of any stride; target (N) int64; class_weight (V) or (N, V), float32 or as
// logits, or absent; shift, log_sum, nll, smoothed (N) float32, smoothed only with class_weight
inline void cross_entropy_forward(const TensorView& logits, const TensorView& target,
                                  const TensorView* class_weight, int64_t ignore_index,
                                  float softcap, float scale, const TensorView& shift,
                                  const TensorView& log_sum, const TensorView& nll,
                                  const TensorView& smoothed) {
  cross_entropy_rows(logits, target.data<int64_t>("target"), class_weight, ignore_index, softcap,
                     scale,
                     {shift.data<float>("shift"), log_sum.data<float>("log_sum"),
                      nll.data<float>("nll"), smoothed.data<float>("smoothed")});
}

// The factor of the sum of the rows' losses. NaN where a mean is over no row, as in torch.
inline float share_of_row(const TensorView& target, int64_t ignore_index, bool mean) {
  if (!mean) return 1;
  const int64_t* t = target.data<int64_t>("target");
  return float(1. / double(target.numel() - std::count(t, t + target.numel(), ignore_index)));
}

// loss () float32; stats (3, N) float32: shift, log_sum, nll; optional up to
// CROSS_ENTROPY_FEW_ROWS rows
inline void cross_entropy_loss(const TensorView& logits, const TensorView& target,
                               int64_t ignore_index, bool mean, float softcap, float scale,
                               const TensorView& loss, const TensorView* stats) {
  const int64_t rows = logits.size(0);
  float local[3 * CROSS_ENTROPY_FEW_ROWS];
  check_size("stats", "elements:", 3 * rows,
             stats ? stats->numel() : 3 * std::min(rows, CROSS_ENTROPY_FEW_ROWS));
  float *s = stats ? stats->data<float>("stats") : local, *nll = s + 2 * rows;
  cross_entropy_rows(logits, target.data<int64_t>("target"), nullptr, ignore_index, softcap, scale,
                     {s, s + rows, nll, nullptr});
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) sum += nll[i];
  *loss.data<float>("loss") = float(sum) * share_of_row(target, ignore_index, mean);
}

template <class T, class W>
void cross_entropy_backward_span(const CrossEntropyRow<T, W>& row, int64_t from, float shift,
                                 float log_sum, float on_p, float on_target, float on_all, T* out) {
  const ScoreFunction score = row.score;
  const auto gradient = [&](vfloat x, vfloat w) __attribute__((always_inline)) {
    const vfloat z = score(x);
    vfloat g = vexp(z - shift - log_sum) * on_p - w * on_all;
    if (score.cap) g *= score.slope(z);
    return g * score.scale;
  };
  const int64_t end = std::min(row.classes, from + SPAN), full_end = from + (end - from) / VL * VL;
  const W* w = row.class_weight;
  for (int64_t j = from; j < full_end; j += VL)
    store(out + j, gradient(load(row.logits + j), w ? load(w + j) : vfloat{}));
  if (const int k = int(end - full_end))
    store(out + full_end,
          gradient(load(row.logits + full_end, k), w ? load(w + full_end, k) : vfloat{}), k);
  if (const int64_t t = row.target; t >= from && t < end) {
    const vfloat x = splat(to_float(row.logits[t]));
    float g = gradient(x, splat(w ? to_float(w[t]) : 0.f))[0];
    g -= on_target * score.scale * (score.cap ? score.slope(score(x))[0] : 1.f);
    out[t] = from_float<T>(g);
  }
}

// coefficients(i): on_p, on_target, on_all of row i; shift, log_sum (N); dlogits (N, V) contiguous
template <class F>
void cross_entropy_rows_backward(F coefficients, const TensorView& logits, const int64_t* t,
                                 const TensorView* class_weight, const float* shift,
                                 const float* log_sum, int64_t ignore_index, float softcap,
                                 float scale, const TensorView& dlogits) {
  const int64_t rows = logits.size(0), classes = logits.size(1), stride = logits.stride(0);
  with_float(logits.dtype(), "logits", [&](auto tag) {
    using T = decltype(tag);
    const T* x = logits.data<T>("logits");
    T* out = dlogits.data<T>("dlogits");
    const int64_t spans = (classes + SPAN - 1) / SPAN;
    with_class_weights<T>(class_weight, [&](auto w) {
      using Row = CrossEntropyRow<T, std::remove_const_t<std::remove_pointer_t<decltype(w.first)>>>;
      parallel_for(rows * spans, rows * classes > 32768, [=](int64_t task) {
        const int64_t i = task / spans, from = task % spans * SPAN;
        const auto [on_p, on_target, on_all] = coefficients(i);
        if (on_p == 0 && on_target == 0 && on_all == 0)  // an ignored row is zero for any logits
          memset(out + i * classes + from, 0, size_t(std::min(SPAN, classes - from)) * sizeof(T));
        else
          cross_entropy_backward_span(Row{x + i * stride,
                                          classes,
                                          t[i] == ignore_index ? -1 : t[i],
                                          w.of_row(i),
                                          {scale, softcap}},
                                      from, shift[i], log_sum[i], on_p, on_target, on_all,
                                      out + i * classes);
      });
    });
  });
}

struct Coefficients {
  float on_p, on_target, on_all;
};

// on_p, on_target, shift, log_sum (N) float32, on_all the same or absent; dlogits (N, V) contiguous
inline void cross_entropy_backward(const TensorView& on_p, const TensorView& on_target,
                                   const TensorView* on_all, const TensorView& logits,
                                   const TensorView& target, const TensorView* class_weight,
                                   const TensorView& shift, const TensorView& log_sum,
                                   int64_t ignore_index, float softcap, float scale,
                                   const TensorView& dlogits) {
  prefer_huge_pages(dlogits);
  const float *all = on_all ? on_all->data<float>("on_all") : nullptr,
              *p = on_p.data<float>("on_p"), *at = on_target.data<float>("on_target");
  cross_entropy_rows_backward(
      [=](int64_t i) { return Coefficients{p[i], at[i], all ? all[i] : 0.f}; }, logits,
      target.data<int64_t>("target"), class_weight, shift.data<float>("shift"),
      log_sum.data<float>("log_sum"), ignore_index, softcap, scale, dlogits);
}

// dloss () and stats (3, N) float32, as the loss left them; dlogits (N, V) contiguous
inline void cross_entropy_loss_backward(const TensorView& dloss, const TensorView& logits,
                                        const TensorView& target, const TensorView& stats,
                                        int64_t ignore_index, bool mean, float softcap, float scale,
                                        const TensorView& dlogits) {
  prefer_huge_pages(dlogits);
  const int64_t* t = target.data<int64_t>("target");
  const float* s = stats.data<float>("stats");
  check_size("stats", "elements:", 3 * logits.size(0), stats.numel());
  const float on_row = *dloss.data<float>("dloss") * share_of_row(target, ignore_index, mean);
  cross_entropy_rows_backward(
      [=](int64_t i) {
        const float c = t[i] == ignore_index ? 0.f : on_row;
        return Coefficients{c, c, 0.f};
      },
      logits, t, nullptr, s, s + logits.size(0), ignore_index, softcap, scale, dlogits);
}
