// y = act(gate) * up: one read of each operand, one write of the result.
//
//     block = row * blocks + i:   gate[row, i * THREADS * VEC ..]  ->  y[row, i * THREADS * VEC ..]
//
// Rows may have a stride (gate and up as halves of one projection), elements of a row are
// contiguous; contiguous operands count as one row. A thread takes one vector of each operand, or
// one element where a row cannot be read in vectors. Activations are computed in float32; silu and
// the tanh form of gelu are both x times a sigmoid.
//
// `glu_round_kernel` returns y in int8, as quantized_linear reads it. That saves a decode step one
// launch, and y, which is as wide as the MLP, is neither written nor read. Not measured on a GPU.
#include "cuda/quantized_round.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 256;

enum Act { kSilu, kGeluTanh, kGelu, kRelu2 };  // in the order of fastlm.ops.glu.ACTIVATIONS

DEVICE float activation(float x, int act) {
  if (act == kRelu2) return x < 0.0f ? 0.0f : x * x;
  if (act == kGelu) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  constexpr float log2e = 1.4426950408889634f, c = 2 * 0.7978845608028654f;  // 2 sqrt(2 / pi)
  const float argument = act == kSilu ? x : c * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.0f + exp2_approximate(-log2e * argument));
}

template <int VEC, class T>
__global__ void __launch_bounds__(kThreads)
    glu_kernel(const T* gate, const T* up, T* y, int64_t width, int blocks, int64_t gate_stride,
               int64_t up_stride, int act) {
  const int64_t row = blockIdx.x / blocks;
  const int64_t at = (static_cast<int64_t>(blockIdx.x % blocks) * blockDim.x + threadIdx.x) * VEC;
  if (at >= width) return;
  using V = Vector<T, VEC>;
  const V x = load(reinterpret_cast<const V*>(gate + row * gate_stride + at));
  const V u = load(reinterpret_cast<const V*>(up + row * up_stride + at));
  V result;
#pragma unroll
  for (int j = 0; j < VEC; ++j)
    result.at[j] = from_float<T>(activation(to_float(x.at[j]), act) * to_float(u.at[j]));
  V* to = reinterpret_cast<V*>(y + row * width + at);
  if constexpr (VEC > 1)
    store_global(to, result);
  else
    store(to, result);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    glu_round_kernel(const T* gate, const T* up, int64_t gate_stride, int64_t up_stride,
                     bool vectorized, int act, int rows, DeviceWeight w, RoundedRows to) {
  const int64_t task = blockIdx.x * static_cast<int64_t>(kThreads / 32) + threadIdx.x / 32;
  const int64_t row = task / w.runs;
  if (row >= rows) return;
  round_run(w, to, row, static_cast<int>(task % w.runs),
            [&](int column, int end, float (&value)[8]) {
              float u[8] = {};
              load_octet(gate + row * gate_stride + column, vectorized, end - column, value);
              load_octet(up + row * up_stride + column, vectorized, end - column, u);
#pragma unroll
              for (int j = 0; j < 8; ++j)  // zero from `end` on
                value[j] = to_float(from_float<T>(activation(value[j], act) * u[j]));
            });
}

void check_operands(const TensorView& gate, const TensorView& up, int act) {
  check_size("up", "elements", gate.numel(), up.numel());
  if (act < kSilu || act > kRelu2)
    throw std::invalid_argument("act: expected 0 to 3, got " + std::to_string(act));
}

}  // namespace

void glu_forward(TensorView gate, TensorView up, int act, TensorView y, Stream stream) {
  check_contiguous("y", y);
  check_size("y", "elements", gate.numel(), y.numel());
  check_operands(gate, up, act);
  if (gate.numel() == 0) return;
  const bool all_contiguous = gate.contiguous() && up.contiguous();
  const auto fits = [](const TensorView& t) {
    return t.ndim() == 2 && (t.stride(1) == 1 || t.size(1) == 1);
  };
  if (!all_contiguous && !(fits(gate) && fits(up)))
    throw std::invalid_argument("gate, up: expected rows whose elements lie side by side");
  const int64_t rows = all_contiguous ? 1 : gate.size(0), width = gate.numel() / rows;
  const int64_t gate_stride = all_contiguous ? 0 : gate.stride(0),
                up_stride = all_contiguous ? 0 : up.stride(0);
  with_device_float(gate.dtype(), "gate", [&](auto element) {
    using T = decltype(element);
    const T *x = input<T>(gate, "gate"), *u = input<T>(up, "up");
    T* to = output<T>(y, "y");
    const auto start = [&](auto vec) {
      constexpr int VEC = decltype(vec)::value;
      const int64_t vectors = (width + VEC - 1) / VEC;
      // a narrow row does not fill a block of 256
      const int threads = vectors < kThreads ? ceil_div(vectors, 32) * 32 : kThreads;
      const int blocks = ceil_div(vectors, threads);
      if (rows * blocks > INT32_MAX)
        throw std::invalid_argument("gate: expected fewer rows, got " + std::to_string(rows));
      launch({"glu", dim3(static_cast<unsigned>(rows * blocks)), dim3(threads), 0,
              reinterpret_cast<cudaStream_t>(stream)},
             glu_kernel<VEC, T>, x, u, to, width, blocks, gate_stride, up_stride, act);
    };
    constexpr int VEC = 16 / sizeof(T);
    if (aligned(16, x, u, to) && width % VEC == 0 && gate_stride % VEC == 0 && up_stride % VEC == 0)
      start(std::integral_constant<int, VEC>{});
    else
      start(std::integral_constant<int, 1>{});
  });
}

void glu_round(TensorView gate, TensorView up, int act, TensorView qdata, TensorView scales,
               int bits, int64_t group_size, TensorView q, TensorView x_scale, TensorView x_sums,
               Stream stream) {
  check_operands(gate, up, act);
  const int rows = static_cast<int>(gate.size(0));
  const int64_t width = gate.size(1), gate_stride = gate.stride(0), up_stride = up.stride(0);
  const DeviceWeight w = weight_of(qdata, scales, std::nullopt, bits, group_size, width);
  const RoundedRows to = rounded_rows(w, bits, rows, q, x_scale, x_sums);
  with_device_float(gate.dtype(), "gate", [&](auto element) {
    using T = decltype(element);
    const T *x = input<T>(gate, "gate"), *u = input<T>(up, "up");
    constexpr int VEC = 16 / sizeof(T);
    const bool vectorized =
        aligned(16, x, u) && gate_stride % VEC == 0 && up_stride % VEC == 0 && width % 8 == 0;
    launch({"glu round", dim3(ceil_div(static_cast<int64_t>(rows) * w.runs, kThreads / 32)),
            dim3(kThreads), 0, reinterpret_cast<cudaStream_t>(stream)},
           glu_round_kernel<T>, x, u, gate_stride, up_stride, vectorized, act, rows, w, to);
  });
}

}  // namespace fastlm
