// y = x . W^T + bias with an int4 or int8 W. Body of quantized_linear.cpp, compiled per instruction
// set. Forms, chosen by the number of rows of x:
//
//   quantized_dot.h         few rows of x: a row of W is multiplied in place
//   quantized_panel.h       more rows: VL rows of W are transposed and dequantized, and become
//                           panels of the matrix core (gemm.h)
//   quantized_scaled.h      bf16 and int4 up to 63 rows: panels of q, and the sums are scaled
//   quantized_panel_int8.h  8-bit activations: panels of integers (gemm_int8.h)
//
// On AMX, 8-bit activations of many rows and small groups are rounded to bf16 instead, and take the
// second form: the tiles' int8 products need groups of 128 (quantized_linear.cpp).
//
// One thread computes an output, in one order: results are bit-equal on any number of threads.
#include "cpu/base/gemm.h"
#include "cpu/quantized/quantized_weight.h"
#include "cpu/base/rows.h"
#include "cpu/base/workspace.h"
//
#include "cpu/base/gemm_int8.h"
//
#include "cpu/quantized/quantized_dot.h"
#include "cpu/quantized/quantized_scaled.h"
//
#include "cpu/quantized/quantized_panel.h"
//
#include "cpu/quantized/quantized_panel_int8.h"

// Rows of x up to which the dot form is faster, as measured. The dot form unpacks W for every 4
// rows; the panel form unpacks once, and pays for the transposition. From 2048 x 2048 on, reading W
// from memory hides more passes of products; int8 products are too fast for that.
template <int BITS, class X>
FASTLM_INLINE int64_t dot_max_rows(const Weight& w) {
  const bool large = w.n * w.k >= 2048 * 2048;
  if (sizeof(X) == 1) return large ? 3 : 1;
  if (sizeof(X) == 2) return !large ? 4 : BITS == 4 ? 8 : 5;
  return large ? 4 : 3;
}

// Calls f(form) with the form for m rows of T. `form`: 0 chooses, 1 is dot, 2 is panel (for tests
// and measurements).
template <int BITS, class T, class F>
void with_form(int64_t m, const Weight& w, int act_bits, int form, F f) {
  const auto dot = [&](int64_t max_rows) { return form ? form == 1 : m <= max_rows; };
  if (act_bits == 8) {
    if (dot(dot_max_rows<BITS, int8_t>(w))) f(DotForm<BITS, int8_t, T>{m, w});
#ifdef FASTLM_AMX
    else if (!form && w.size < TILE_GROUP && m >= BF16_TILE_ROWS)
      f(PanelForm<BITS, T, bf16>{m, w});
#endif
    else
      f(PanelForm8<BITS, T>{m, w});
  } else {
    if (dot(dot_max_rows<BITS, Elem<T>>(w)))
      f(DotForm<BITS, Elem<T>, T>{m, w});
    else
      f(PanelForm<BITS, T>{m, w});
  }
}
template <class T, class F>
void with_form(int64_t m, const Weight& w, int bits, int act_bits, int form, F f) {
  if (bits == 4)
    with_form<4, T>(m, w, act_bits, form, f);
  else
    with_form<8, T>(m, w, act_bits, form, f);
}

inline int64_t floats_of(int64_t shared, int64_t bytes_per_thread) {
  const int64_t bytes = shared + bytes_per_thread * omp_get_max_threads();
  return bytes ? bytes / 4 + 16 : 0;  // one more cache line, to align the first array
}

// Floats of quantized_linear's workspace with the current number of threads; 0: it needs none.
inline int64_t quantized_linear_workspace(const TensorView& x, int64_t n, int bits,
                                          int64_t group_size, int act_bits, int form) {
  const Rows rows = rows_of("x", x);
  if (rows.count == 0 || n == 0) return 0;
  const Weight w = weight_of_size(n, rows.width, bits, group_size);
  int64_t floats = 0;
  with_float(x.dtype(), "x", [&](auto tag) {
    with_form<decltype(tag)>(rows.count, w, bits, act_bits, form, [&](const auto& form) {
      floats = floats_of(form.shared(), form.bytes_per_thread());
    });
  });
  return floats;
}

// x (..., K) as rows.h says; bias (N) float32 or absent; y (..., N) contiguous; workspace of
// quantized_linear_workspace floats, absent where that is 0.
inline void quantized_linear(const TensorView& x, const TensorView& qdata, const TensorView& scales,
                             const TensorView* zeros, const TensorView* bias, int bits,
                             int64_t group_size, int act_bits, int form, const TensorView& y,
                             const TensorView* workspace) {
  const Rows rows = rows_of("x", x);
  const int64_t m = rows.count, n = qdata.size(0);
  check_size("y", "columns:", n, y.size(-1));
  check_size("y", "elements:", m * n, y.numel());
  if (m == 0 || n == 0) return;
  check_contiguous("y", y);
  const float* pb = bias ? bias->data<float>("bias") : nullptr;
  const Weight w = weight_of(qdata, scales, zeros, rows.width, bits, group_size);
  with_float(x.dtype(), "x", [&](auto tag) {
    using T = decltype(tag);
    const T* px = x.data<T>("x");
    T* py = y.data<T>("y");
    with_form<T>(m, w, bits, act_bits, form, [&](const auto& form) {
      form(px, rows.stride, pb, py, workspace ? Workspace(*workspace) : Workspace());
    });
  });
}

// Floats of quantized_linear_backward's workspace with the current number of threads.
inline int64_t quantized_linear_backward_workspace(const TensorView& dy) {
  const Rows rows = rows_of("dy", dy);
  int64_t floats = 0;
  with_float(dy.dtype(), "dy", [&](auto tag) {
    using Form = InputGradient<decltype(tag)>;
    floats = floats_of(Form::shared(rows.count, rows.width), Form::bytes_per_thread());
  });
  return floats;
}

// dx (..., K) = dy (..., N) . W; workspace of quantized_linear_backward_workspace floats.
inline void quantized_linear_backward(const TensorView& dy, const TensorView& qdata,
                                      const TensorView& scales, const TensorView* zeros, int bits,
                                      int64_t group_size, const TensorView& dx,
                                      const TensorView& workspace) {
  const Rows rows = rows_of("dy", dy);
  const int64_t m = rows.count, k = dx.size(-1);
  check_size("dx", "elements:", m * k, dx.numel());
  check_size("dy", "columns:", qdata.size(0), rows.width);
  if (m == 0) return;
  check_contiguous("dx", dx);
  const Weight w = weight_of(qdata, scales, zeros, k, bits, group_size);
  with_float(dy.dtype(), "dy", [&](auto tag) {
    using T = decltype(tag);
    InputGradient<T>{m, w, bits}(dy.data<T>("dy"), rows.stride, dx.data<T>("dx"),
                                 Workspace(workspace));
  });
}

// out (N, K) float32, bfloat16 or float16, contiguous.
inline void dequantize(const TensorView& qdata, const TensorView& scales, const TensorView* zeros,
                       int bits, int64_t group_size, const TensorView& out) {
  const int64_t k = out.size(1);
  check_size("out", "rows:", qdata.size(0), out.size(0));
  if (out.size(0) == 0) return;
  check_contiguous("out", out);
  with_float(out.dtype(), "out", [&](auto tag) {
    using T = decltype(tag);
    T* po = out.data<T>("out");
    const Weight w = weight_of(qdata, scales, zeros, k, bits, group_size);
#pragma omp parallel if (w.n * w.k > 32768)
    {
      FlushDenormals flush;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < w.n; ++i)
        for (int64_t k0 = 0; k0 < k; k0 += 256) {
          float block[256];
          const int64_t k1 = std::min(k, k0 + 256);
          if (bits == 4)
            dequantize_row<4>(w, i, k0, k1, block);
          else
            dequantize_row<8>(w, i, k0, k1, block);
          store_rows(block, 256, 1, k1 - k0, nullptr, po + i * k + k0, k);
        }
    }
  });
}
