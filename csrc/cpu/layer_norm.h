// LayerNorm over the last dimension, optionally of x + residual. Body of layer_norm.cpp, compiled
// per instruction set.
//
//   forward   h = x + residual (rounded to x's dtype, as the unfused addition would be)
//             z = (h - mean) * rstd, rstd = 1 / sqrt(mean((h - mean)^2) + eps)
//             y = z * weight + bias
//   backward  g = dy * weight
//             dh = rstd * (g - mean(g) - z * mean(g * z)) [+ dh from above]
//             dweight = sum over rows of dy * z, dbias = sum over rows of dy
//
// The weight and the bias are optional. The forward reads a row three times, the backward twice:
// once from memory, then from the L1 (a row is at most a few tens of KiB).
//
// The second pass of the forward sums the deviations from the rounded mean as well as their
// squares. The sum of the deviations corrects the mean (Chan, Golub and LeVeque 1983). The
// backward corrects it in the same way. Rejected:
// mean(h^2) - mean^2 in one pass, which loses every digit of the variance where the mean is large.
//
// dweight and dbias are summed per block of LAYER_NORM_BLOCK_ROWS rows and then over blocks in
// order, so they do not depend on the number of threads.
//
// j: element of a row; k: lanes from there on, VL but in a row's tail; u: sum.
#include "cpu/base/parallel.h"
#include "cpu/base/rows.h"

constexpr int SUMS = 4;  // independent sums per row: one would wait for each addition's latency

template <class T>
FASTLM_INLINE vfloat load_lanes(const T* p, int k) {
  return k == VL ? load(p) : load(p, k);
}
template <class T>
FASTLM_INLINE void store_lanes(T* p, vfloat v, int k) {
  if (k == VL)
    store(p, v);
  else
    store(p, v, k);
}
// v with zeros from lane k on
FASTLM_INLINE vfloat keep_lanes(vfloat v, int k) {
  if (k == VL) return v;
  alignas(64) float lanes[VL];
  store(lanes, v);
  return load(lanes, k);
}

// Calls f(j, k, u) for the vectors of a row of n elements.
template <class F>
FASTLM_INLINE void each_vector(int64_t n, F f) {
  int64_t j = 0;
  for (; j + SUMS * VL <= n; j += SUMS * VL) {
#pragma GCC unroll 4
    for (int u = 0; u < SUMS; ++u) f(j + u * VL, VL, u);
  }
  for (; j + VL <= n; j += VL) f(j, VL, 0);
  if (j < n) f(j, int(n - j), 0);
}

FASTLM_INLINE float total(const vfloat (&sums)[SUMS]) {
  return hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T, class W>
void layer_norm_row(const T* x, const T* residual, const W* weight, const W* bias, float eps,
                    int64_t n, T* h, T* y, float* mean, float* rstd) {
  vfloat sums[SUMS] = {};
  each_vector(n, [&](int64_t j, int k, int u) __attribute__((always_inline)) {
    vfloat v = load_lanes(x + j, k);
    if (residual) {
      store_lanes(h + j, v + load_lanes(residual + j, k), k);
      v = load_lanes(h + j, k);
    }
    sums[u] += v;
  });
  const T* row = residual ? h : x;
  const float center = total(sums) / float(n);
  vfloat deviations[SUMS] = {}, squares[SUMS] = {};
  each_vector(n, [&](int64_t j, int k, int u) __attribute__((always_inline)) {
    const vfloat d = keep_lanes(load_lanes(row + j, k) - center, k);
    deviations[u] += d;
    squares[u] += d * d;
  });
  const float correction = total(deviations) / float(n);
  const float variance = std::max(total(squares) / float(n) - correction * correction, 0.f);
  const float r = 1.f / std::sqrt(variance + eps);
  *mean = center + correction;
  *rstd = r;
  each_vector(n, [&](int64_t j, int k, int) __attribute__((always_inline)) {
    vfloat v = (load_lanes(row + j, k) - center) * r - correction * r;
    if (weight) v *= load_lanes(weight + j, k);
    if (bias) v += load_lanes(bias + j, k);
    store_lanes(y + j, v, k);
  });
}

// Calls f(weight, bias): pointers to float or to T, null where there is none.
template <class T, class F>
void with_parameters(const TensorView* weight, const TensorView* bias, F&& f) {
  with_weight<T>(weight ? weight : bias, [&](const auto* first) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(first)>>;
    const W* b = bias ? bias->data<W>("bias") : nullptr;
    f(weight ? first : nullptr, b);
  });
}

// x (..., H) as rows.h says; residual the same or null; weight, bias (H) or null, both float32 or
// x's dtype; y, h like x, contiguous; mean, rstd (N) float32
inline void layer_norm_forward(const TensorView& x, const TensorView* residual,
                               const TensorView* weight, const TensorView* bias, float eps,
                               const TensorView& y, const TensorView* h, const TensorView& mean,
                               const TensorView& rstd) {
  prefer_huge_pages(y);
  if (h) prefer_huge_pages(*h);
  const Rows r = rows_of("x", x);
  const int64_t rows = r.count, n = r.width, x_stride = r.stride;
  const int64_t r_stride = residual ? rows_of("residual", *residual).stride : 0;
  with_float(x.dtype(), "x", [&](auto tag) {
    using T = decltype(tag);
    const T* px = x.data<T>("x");
    const T* pr = residual ? residual->data<T>("residual") : nullptr;
    T* py = y.data<T>("y");
    T* ph = h ? h->data<T>("h") : nullptr;
    float *pm = mean.data<float>("mean"), *ps = rstd.data<float>("rstd");
    with_parameters<T>(weight, bias, [&](const auto* pw, const auto* pb) {
      // below 32768 elements a parallel region costs more than it saves
      parallel_for(rows, rows * n > 32768, [=](int64_t i) {
        layer_norm_row(px + i * x_stride, pr ? pr + i * r_stride : nullptr, pw, pb, eps, n,
                       ph ? ph + i * n : nullptr, py + i * n, pm + i, ps + i);
      });
    });
  });
}

// Adds to dweight and dbias, which may be null.
template <class T, class W>
void layer_norm_backward_row(const T* dy, const T* dh_above, const T* h, const W* weight,
                             float mean, float r, int64_t n, T* dx, float* dweight, float* dbias) {
  vfloat gs[SUMS] = {}, products[SUMS] = {}, deviations[SUMS] = {};
  each_vector(n, [&](int64_t j, int k, int u) __attribute__((always_inline)) {
    vfloat g = load_lanes(dy + j, k);
    if (weight) g *= load_lanes(weight + j, k);
    const vfloat deviation = keep_lanes(load_lanes(h + j, k) - mean, k);
    gs[u] += g;
    products[u] += g * deviation;
    deviations[u] += deviation;
  });
  // of the mean, which was rounded; what is computed once per row is rounded once
  const double share = 1 / double(n), correction = total(deviations) * share, g_sum = total(gs);
  const double product = (total(products) - g_sum * correction) * share * r * r;
  const float c = float(product), on_all = float(g_sum * share - correction * product),
              z_offset = float(-correction * r);
  each_vector(n, [&](int64_t j, int k, int) __attribute__((always_inline)) {
    const vfloat d = load_lanes(dy + j, k), deviation = load_lanes(h + j, k) - mean;
    const vfloat g = weight ? d * load_lanes(weight + j, k) : d;
    vfloat out = (g - on_all - deviation * c) * r;
    if (dh_above) out += load_lanes(dh_above + j, k);
    store_lanes(dx + j, out, k);
    if (dweight) {
      const vfloat z = deviation * r + z_offset;
      store_lanes(dweight + j, load_lanes(dweight + j, k) + d * z, k);
    }
    if (dbias) store_lanes(dbias + j, load_lanes(dbias + j, k) + d, k);
  });
}

// sum (n) = the rows of partial (blocks, n), added in order
inline void sum_blocks(const float* partial, int64_t blocks, int64_t n, float* sum) {
  constexpr int64_t COLUMNS = 256;  // of one task: 1 KiB of each row, from one page
  parallel_for((n + COLUMNS - 1) / COLUMNS, blocks * n > 32768, [=](int64_t task) {
    for (int64_t j = task * COLUMNS; j < std::min(n, (task + 1) * COLUMNS); j += VL) {
      const int k = int(std::min<int64_t>(VL, n - j));
      vfloat s{};
      for (int64_t b = 0; b < blocks; ++b) s += load_lanes(partial + b * n + j, k);
      store_lanes(sum + j, s, k);
    }
  });
}

// dy, dh_above (may be null), h (..., H) as rows.h says; mean, rstd (N); dx like h, contiguous;
// dweight, dbias (H) float32 or null; partial: float32, ceil(N / 64) * H for each that is not null
inline void layer_norm_backward(const TensorView& dy, const TensorView* dh_above,
                                const TensorView& h, const TensorView* weight,
                                const TensorView& mean, const TensorView& rstd,
                                const TensorView& dx, const TensorView* dweight,
                                const TensorView* dbias, const TensorView& partial) {
  prefer_huge_pages(dx);
  const Rows r = rows_of("h", h);
  const int64_t rows = r.count, n = r.width, s_h = r.stride;
  const int64_t s_dy = rows_of("dy", dy).stride,
                s_a = dh_above ? rows_of("dh_above", *dh_above).stride : 0;
  const int64_t blocks = (rows + LAYER_NORM_BLOCK_ROWS - 1) / LAYER_NORM_BLOCK_ROWS;
  check_size("partial", "elements", (int(!!dweight) + int(!!dbias)) * blocks * n, partial.numel());
  float* const weights = dweight ? partial.data<float>("partial") : nullptr;
  float* const biases =
      dbias ? partial.data<float>("partial") + (dweight ? blocks * n : 0) : nullptr;
  with_float(h.dtype(), "h", [&](auto tag) {
    using T = decltype(tag);
    const T *pdy = dy.data<T>("dy"), *pa = dh_above ? dh_above->data<T>("dh_above") : nullptr,
            *ph = h.data<T>("h");
    const float *pm = mean.data<float>("mean"), *pr = rstd.data<float>("rstd");
    T* pdx = dx.data<T>("dx");
    with_weight<T>(weight, [&](const auto* pw) {
      parallel_for(blocks, rows * n > 32768, [=](int64_t b) {
        float *w = weights ? weights + b * n : nullptr, *bias = biases ? biases + b * n : nullptr;
        if (w) memset(w, 0, size_t(n) * sizeof(float));
        if (bias) memset(bias, 0, size_t(n) * sizeof(float));
        const int64_t first = b * LAYER_NORM_BLOCK_ROWS;
        for (int64_t i = first; i < std::min(rows, first + LAYER_NORM_BLOCK_ROWS); ++i)
          layer_norm_backward_row(pdy + i * s_dy, pa ? pa + i * s_a : nullptr, ph + i * s_h, pw,
                                  pm[i], pr[i], n, pdx + i * n, w, bias);
      });
    });
  });
  if (dweight) sum_blocks(weights, blocks, n, dweight->data<float>("dweight"));
  if (dbias) sum_blocks(biases, blocks, n, dbias->data<float>("dbias"));
}
