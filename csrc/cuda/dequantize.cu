// w = scale q (+ zero) for every element, in the dtype of the output. Codes are read once, the
// result is written once, 16 bytes per thread where rows are aligned (32 in float32).
//
//     block (row, part):   kThreads octets of one row
#include "cuda/quantized_weight.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 128;  // 1024 columns: rows of small models fill a block

template <int BITS, class T, bool VECTORIZED>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(DeviceWeight w, T* out) {
  const int64_t row = blockIdx.x;
  const int column = (blockIdx.y * kThreads + threadIdx.x) * 8;
  if (column >= w.k) return;
  uint32_t octet[BITS / 4] = {};
  const uint8_t* from = w.codes + row * w.row_bytes + column * BITS / 8;
  if constexpr (VECTORIZED) {
    const auto v = load(reinterpret_cast<const Vector<uint32_t, BITS / 4>*>(from));
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) octet[i] = v.at[i];
  } else {
    const int valid = w.row_bytes - column * BITS / 8;
#pragma unroll
    for (int i = 0; i < BITS; ++i)
      if (i < valid) octet[i / 4] |= static_cast<uint32_t>(load(from + i)) << i % 4 * 8;
  }
  float q[8];
  to_floats(octet, q);
  const int64_t at = row * w.groups + w.group_of(column);
  const float scale = load_float(w.scales, w.factors, at);
  const float zero = w.zeros ? load_float(w.zeros, w.factors, at) : 0.0f;
  T* to = out + row * w.k + column;
  constexpr int kVec = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < 8; i += kVec) {
    Vector<T, kVec> v;
#pragma unroll
    for (int j = 0; j < kVec; ++j) v.at[j] = from_float<T>(q[i + j] * scale + zero);
    if constexpr (VECTORIZED) {
      store(reinterpret_cast<Vector<T, kVec>*>(to + i), v);
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j)
        if (column + i + j < w.k) store(to + i + j, v.at[j]);
    }
  }
}

}  // namespace

void dequantize(TensorView qdata, TensorView scales, OptionalTensor zeros, int bits,
                int64_t group_size, TensorView out, Stream stream) {
  check_contiguous("out", out);
  check_size("out", "rows", qdata.size(0), out.size(0));
  const DeviceWeight w = weight_of(qdata, scales, zeros, bits, group_size, out.size(1));
  const Launch config{"dequantize", dim3(w.n, ceil_div(w.k, 8 * kThreads)), dim3(kThreads), 0,
                      reinterpret_cast<cudaStream_t>(stream)};
  with_device_float(out.dtype(), "out", [&](auto element) {
    using T = decltype(element);
    T* to = output<T>(out, "out");
    const bool vectorized = w.k % 8 == 0 && aligned(16, to) && aligned(bits, w.codes);
    const auto start = [&](auto kernel) { launch(config, kernel, w, to); };
    if (bits == 4)
      start(vectorized ? dequantize_kernel<4, T, true> : dequantize_kernel<4, T, false>);
    else
      start(vectorized ? dequantize_kernel<8, T, true> : dequantize_kernel<8, T, false>);
  });
}

}  // namespace fastlm
