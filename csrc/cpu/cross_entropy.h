// Cross-entropy of rows of logits. Body of cross_entropy.cpp, compiled per instruction set.
//
//   z = softcap(scale * logits);  shift = max z;  log_sum = log sum e^(z - shift)
//   nll = log_sum - (z[target] - shift), 0 without a target
//   smoothed = sum over v of class_weight[v] * (log_sum - (z[v] - shift))
//   backward  dz[v] = on_p * e^(z - shift - log_sum) - on_target * (v == target) - on_all *
//   class_weight[v]
//
// Forward reads the logits once: a block of BLOCK goes from memory to the L1, where maximum, then
// exponentials are taken; the sum so far is rescaled when the maximum grows. Backward reads once
// and writes once.
#include "cpu/scores.h"

constexpr int64_t BLOCK = 1024;  // 4 KiB of scores: they stay in the L1 between the two loops

template <class T>
struct CrossEntropyRow {
  const T* logits;
  int64_t classes, target;  // target -1: none
  const float* class_weight;
  Scores score;
};

template <class T>
void cross_entropy_row(const CrossEntropyRow<T>& row, float* shift, float* log_sum, float* nll,
                       float* smoothed) {
  alignas(64) float z[BLOCK];
  vfloat weighted{};  // class_weight * (z - m)
  float m = NEGATIVE_INFINITY, sum = 0, weight_so_far = 0;
  for (int64_t v0 = 0; v0 < row.classes; v0 += BLOCK) {
    const int64_t n = std::min(BLOCK, row.classes - v0), whole = n / VL * VL;
    const T* x = row.logits + v0;
    vfloat most[2] = {splat(NEGATIVE_INFINITY), splat(NEGATIVE_INFINITY)};
    for (int64_t j = 0; j < whole; j += VL) {
      const vfloat s = row.score(load(x + j));
      store(z + j, s);
      most[j / VL & 1] = vmax(most[j / VL & 1], s);
    }
    if (whole < n) {
      store(z + whole, splat(NEGATIVE_INFINITY));
      store(z + whole, row.score(load(x + whole, int(n - whole))), int(n - whole));
      most[0] = vmax(most[0], load(z + whole));
    }
    const float before = finite_max(m), block_max = hmax(vmax(most[0], most[1]));
    if (block_max > m) m = block_max;
    const float now = finite_max(m);
    if (now != before) {
      sum *= std::exp(before - now);
      if (row.class_weight) weighted[0] += (before - now) * weight_so_far;
    }
    vfloat block_sum[2] = {};  // summed per block: 50 thousand additions in a row would lose digits
    for (int64_t j = 0; j < n; j += VL) block_sum[j / VL & 1] += vexp(load(z + j) - now);
    sum += hsum(block_sum[0] + block_sum[1]);
    if (row.class_weight) {
      vfloat weights{};
      for (int64_t j = 0; j < n; j += VL) {
        const int k = int(std::min<int64_t>(VL, n - j));
        const vfloat w = load(row.class_weight + v0 + j, k), d = load(z + j, k) - now;
        weights += w, weighted += w * d;
      }
      weight_so_far += hsum(weights);
    }
  }
  const float log_of_sum =
      m == NEGATIVE_INFINITY ? std::numeric_limits<float>::quiet_NaN() : std::log(sum);
  *shift = m, *log_sum = log_of_sum;
  *nll = row.target < 0 ? 0.f : log_of_sum - (row.score(to_float(row.logits[row.target])) - m);
  if (row.class_weight) *smoothed = weight_so_far * log_of_sum - hsum(weighted);
}

// logits (N, V) rows apart, target (N) int64; class_weight (V) float32 or absent; shift, log_sum,
// nll, smoothed (N) float32, smoothed only with class_weight
inline void cross_entropy_forward(const TensorView& logits, const TensorView& target,
                                  const TensorView* class_weight, int64_t ignore_index,
                                  float softcap, float scale, const TensorView& shift,
                                  const TensorView& log_sum, const TensorView& nll,
                                  const TensorView& smoothed) {
  const int64_t rows = logits.size(0), classes = logits.size(1), stride = logits.stride(0);
  const int64_t* t = target.data<int64_t>("target");
  const float* w = class_weight ? class_weight->data<float>("class_weight") : nullptr;
  float* out[] = {shift.data<float>("shift"), log_sum.data<float>("log_sum"),
                  nll.data<float>("nll"), smoothed.data<float>("smoothed")};
  with_float(logits.dtype(), "logits", [&](auto tag) {
    using T = decltype(tag);
    const T* x = logits.data<T>("logits");
#pragma omp parallel if (rows * classes > 32768)
    {
      FlushDenormals flush;
#pragma omp for schedule(dynamic, 4)
      for (int64_t i = 0; i < rows; ++i)
        cross_entropy_row<T>(
            {x + i * stride, classes, t[i] == ignore_index ? -1 : t[i], w, {scale, softcap}},
            out[0] + i, out[1] + i, out[2] + i, out[3] + i);
    }
  });
}

template <class T>
void cross_entropy_backward_row(const CrossEntropyRow<T>& row, float shift, float log_sum,
                                float on_p, float on_target, float on_all, T* out) {
  const Scores score = row.score;
  const auto gradient = [&](vfloat x, vfloat w) {
    const vfloat z = score(x);
    vfloat g = vexp(z - shift - log_sum) * on_p - w * on_all;
    if (score.cap) g *= score.slope(z);
    return g * score.scale;
  };
  const int64_t whole = row.classes / VL * VL;
  const float* w = row.class_weight;
  for (int64_t j = 0; j < whole; j += VL)
    store(out + j, gradient(load(row.logits + j), w ? load(w + j) : vfloat{}));
  if (const int k = int(row.classes - whole))
    store(out + whole, gradient(load(row.logits + whole, k), w ? load(w + whole, k) : vfloat{}), k);
  if (row.target >= 0) {
    const int64_t t = row.target;
    const vfloat x = splat(to_float(row.logits[t]));
    float g = gradient(x, splat(w ? w[t] : 0.f))[0];
    g -= on_target * score.scale * (score.cap ? score.slope(score(x))[0] : 1.f);
    out[t] = from_float<T>(g);
  }
}

// on_p, on_target, shift, log_sum (N) float32, on_all the same or absent; dlogits (N, V) contiguous
inline void cross_entropy_backward(const TensorView& on_p, const TensorView& on_target,
                                   const TensorView* on_all, const TensorView& logits,
                                   const TensorView& target, const TensorView* class_weight,
                                   const TensorView& shift, const TensorView& log_sum,
                                   int64_t ignore_index, float softcap, float scale,
                                   const TensorView& dlogits) {
  const int64_t rows = logits.size(0), classes = logits.size(1), stride = logits.stride(0);
  const int64_t* t = target.data<int64_t>("target");
  const float *w = class_weight ? class_weight->data<float>("class_weight") : nullptr,
              *all = on_all ? on_all->data<float>("on_all") : nullptr,
              *p = on_p.data<float>("on_p"), *at = on_target.data<float>("on_target"),
              *m = shift.data<float>("shift"), *s = log_sum.data<float>("log_sum");
  with_float(logits.dtype(), "logits", [&](auto tag) {
    using T = decltype(tag);
    const T* x = logits.data<T>("logits");
    T* out = dlogits.data<T>("dlogits");
#pragma omp parallel if (rows * classes > 32768)
    {
      FlushDenormals flush;
#pragma omp for schedule(dynamic, 4)
      for (int64_t i = 0; i < rows; ++i) {
        const float a = all ? all[i] : 0.f;
        if (p[i] == 0 && at[i] == 0 && a == 0)  // ignored: zero whatever the logits are
          memset(out + i * classes, 0, size_t(classes) * sizeof(T));
        else
          cross_entropy_backward_row<T>(
              {x + i * stride, classes, t[i] == ignore_index ? -1 : t[i], w, {scale, softcap}},
              m[i], s[i], p[i], at[i], a, out + i * classes);
      }
    }
  });
}
