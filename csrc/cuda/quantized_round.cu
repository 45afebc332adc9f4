// Rounds activations to int8 for quantized_linear (quantized_round.cuh): x is read once, a warp
// takes one run of a row.
#include "cuda/quantized_round.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 128;

template <class X>
__global__ void __launch_bounds__(kThreads)
    round_kernel(const X* x, int64_t x_stride, bool vectorized, int rows, DeviceWeight w,
                 RoundedRows to) {
  const int64_t task = blockIdx.x * static_cast<int64_t>(kThreads / 32) + threadIdx.x / 32;
  const int64_t row = task / w.runs;
  if (row >= rows) return;
  round_run(w, to, row, static_cast<int>(task % w.runs),
            [&](int column, int end, float (&value)[8]) {
              load_octet(x + row * x_stride + column, vectorized, end - column, value);
            });
}

}  // namespace

void quantized_linear_round(TensorView x, TensorView qdata, TensorView scales, int bits,
                            int64_t group_size, TensorView q, TensorView x_scale, TensorView x_sums,
                            Stream stream) {
  const int64_t k = x.size(1), x_stride = x.stride(0);
  const int rows = static_cast<int>(x.size(0));
  const DeviceWeight w = weight_of(qdata, scales, std::nullopt, bits, group_size, k);
  const RoundedRows to = rounded_rows(w, bits, rows, q, x_scale, x_sums);
  const Launch config{"quantized_linear round",
                      dim3(ceil_div(static_cast<int64_t>(rows) * w.runs, kThreads / 32)),
                      dim3(kThreads), 0, reinterpret_cast<cudaStream_t>(stream)};
  with_device_float(x.dtype(), "x", [&](auto element) {
    using X = decltype(element);
    const X* from = input<X>(x, "x");
    const bool vectorized = aligned(16, from) && x_stride * sizeof(X) % 16 == 0 && k % 8 == 0;
    launch(config, round_kernel<X>, from, x_stride, vectorized, rows, w, to);
  });
}

}  // namespace fastlm
