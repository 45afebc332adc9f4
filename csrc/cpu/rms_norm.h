// RMSNorm over the last dimension, optionally of x + residual. Body of rms_norm.cpp, compiled per
// instruction set.
//
//   forward   h = x + residual (rounded to x's dtype, as the unfused addition would be)
//             rstd = 1 / sqrt(mean(h^2) + eps)
//             y = h * rstd * (offset + weight), without a weight y = h * rstd
//   backward  g = dy * (offset + weight), without a weight g = dy
//             dh = rstd * (g - h * rstd^2 * mean(g * h)) [+ dh from above]
//             dw = sum over rows of dy * h * rstd
//
// Each row is read twice: from memory, then from the L1 (a row is at most a few tens of KiB). dw is
// summed per block of RMS_NORM_BLOCK_ROWS rows and then over blocks in order, so it does not depend
// on the thread count. What is computed once per row is computed in double: rounded once, and free.
#include "cpu/base/parallel.h"
#include "cpu/base/rows.h"

constexpr int SUMS = 4;  // independent sums per row

// offset + weight, of the elements [j, j + k); 1 without a weight
template <class W>
FASTLM_INLINE vfloat rms_norm_factor(const W* weight, float offset, int64_t j, int k) {
  if (!weight) return splat(1.f);
  return (k == VL ? load(weight + j) : load(weight + j, k)) + offset;
}

template <class T, class W>
void rms_norm_row(const T* x, const T* residual, const W* weight, float eps, float offset,
                  int64_t n, T* h, T* y, float* rstd) {
  vfloat sums[SUMS] = {};  // a single sum would wait for the latency of each addition
  const auto square = [&](int64_t j, int k) __attribute__((always_inline)) {
    vfloat v = k == VL ? load(x + j) : load(x + j, k);
    if (residual) {
      v += k == VL ? load(residual + j) : load(residual + j, k);
      if (k == VL)
        store(h + j, v), v = load(h + j);
      else
        store(h + j, v, k), v = load(h + j, k);
    }
    return v * v;
  };
  int64_t j = 0;
  for (; j + SUMS * VL <= n; j += SUMS * VL) {
#pragma GCC unroll 4
    for (int u = 0; u < SUMS; ++u) sums[u] += square(j + u * VL, VL);
  }
  for (; j + VL <= n; j += VL) sums[0] += square(j, VL);
  if (j < n) sums[0] += square(j, int(n - j));
  const double square_sum = hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const float r = float(1 / std::sqrt(square_sum * (1 / double(n)) + eps));
  *rstd = r;
  const T* source = residual ? h : x;
  for (j = 0; j + VL <= n; j += VL)
    store(y + j, load(source + j) * r * rms_norm_factor(weight, offset, j, VL));
  if (const int k = int(n - j))
    store(y + j, load(source + j, k) * r * rms_norm_factor(weight, offset, j, k), k);
}

// x (..., H) as rows.h says; residual the same or null; weight (H) float32 or x's dtype, or null;
// y, h like x, contiguous; rstd (...) float32
inline void rms_norm_forward(const TensorView& x, const TensorView* residual,
                             const TensorView* weight, float eps, float offset, const TensorView& y,
                             const TensorView* h, const TensorView& rstd) {
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
    float* ps = rstd.data<float>("rstd");
    with_weight<T>(weight, [&](const auto* pw) {
      // below 32768 elements a parallel region costs more than it saves
      parallel_for(rows, rows * n > 32768, [=](int64_t i) {
        rms_norm_row(px + i * x_stride, pr ? pr + i * r_stride : nullptr, pw, eps, offset, n,
                     ph ? ph + i * n : nullptr, py + i * n, ps + i);
      });
    });
  });
}

template <class T, class W>
void rms_norm_backward_row(const T* dy, const T* dh_above, const T* h, const W* weight, float r,
                           float offset, int64_t n, T* dx, float* dw) {
  vfloat dots[SUMS] = {};
  const auto product = [&](int64_t j) __attribute__((always_inline)) {
    return load(dy + j) * rms_norm_factor(weight, offset, j, VL) * load(h + j);
  };
  int64_t i = 0;
  for (; i + SUMS * VL <= n; i += SUMS * VL) {
#pragma GCC unroll 4
    for (int u = 0; u < SUMS; ++u) dots[u] += product(i + u * VL);
  }
  for (; i + VL <= n; i += VL) dots[0] += product(i);
  if (const int k = int(n - i))
    dots[0] += load(dy + i, k) * rms_norm_factor(weight, offset, i, k) * load(h + i, k);
  const double dot = hsum((dots[0] + dots[1]) + (dots[2] + dots[3]));
  const float c = float(dot * r * r * (1 / double(n)));
  for (int64_t j = 0; j < n; j += VL) {
    const int k = int(std::min<int64_t>(VL, n - j));
    const vfloat g = k == VL ? load(dy + j) : load(dy + j, k),
                 v = k == VL ? load(h + j) : load(h + j, k);
    vfloat d = (g * rms_norm_factor(weight, offset, j, k) - v * c) * r;
    if (dh_above) d += k == VL ? load(dh_above + j) : load(dh_above + j, k);
    if (k == VL)
      store(dx + j, d);
    else
      store(dx + j, d, k);
    if (!weight) continue;
    const vfloat sum = (k == VL ? load(dw + j) : load(dw + j, k)) + g * v * r;
    if (k == VL)
      store(dw + j, sum);
    else
      store(dw + j, sum, k);
  }
}

// dy, dh_above (may be null), h (..., H) as rows.h says; rstd (...); dx like h, contiguous; dw
// (blocks, H) float32 with blocks = ceil(N / 64): partial sums, null like the weight
inline void rms_norm_backward(const TensorView& dy, const TensorView* dh_above, const TensorView& h,
                              const TensorView* weight, const TensorView& rstd, float offset,
                              const TensorView& dx, const TensorView* dw) {
  prefer_huge_pages(dx);
  const Rows r = rows_of("h", h);
  const int64_t rows = r.count, n = r.width, s_h = r.stride;
  const int64_t s_dy = rows_of("dy", dy).stride,
                s_a = dh_above ? rows_of("dh_above", *dh_above).stride : 0;
  const int64_t blocks = (rows + RMS_NORM_BLOCK_ROWS - 1) / RMS_NORM_BLOCK_ROWS;
  if (weight) check_size("dw", "ceil(N / 64) rows:", blocks, dw ? dw->size(0) : 0);
  with_float(h.dtype(), "h", [&](auto tag) {
    using T = decltype(tag);
    const T *pdy = dy.data<T>("dy"), *pa = dh_above ? dh_above->data<T>("dh_above") : nullptr,
            *ph = h.data<T>("h");
    const float* pr = rstd.data<float>("rstd");
    T* pdx = dx.data<T>("dx");
    float* pdw = weight ? dw->data<float>("dw") : nullptr;
    with_weight<T>(weight, [&](const auto* pw) {
      parallel_for(blocks, rows * n > 32768, [=](int64_t b) {
        float* partial = pdw ? pdw + b * n : nullptr;
        if (partial) memset(partial, 0, size_t(n) * sizeof(float));
        for (int64_t i = b * RMS_NORM_BLOCK_ROWS; i < std::min(rows, (b + 1) * RMS_NORM_BLOCK_ROWS);
             ++i)
          rms_norm_backward_row(pdy + i * s_dy, pa ? pa + i * s_a : nullptr, ph + i * s_h, pw,
                                pr[i], offset, n, pdx + i * n, partial);
      });
    });
  });
}
