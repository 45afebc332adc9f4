// Starts kernels from host code: pointers of tensors, sizes of the grid, the launch.
//
//     launch({"name", grid, block, shared_bytes, stream}, kernel<T>, input<T>(x, "x"), ...);
//
// Works on a GPU and under the emulator. There the tensors are on the CPU, and `input` and `output`
// record their bounds for its checks.
#pragma once

#include <optional>

#include "cuda/ptx.cuh"
#include "tensor.h"

namespace fastlm {

template <>
constexpr DType dtype_of<bfloat16>() {
  return DType::bf16;
}
template <>
constexpr DType dtype_of<float16>() {
  return DType::f16;
}

// Whether every pointer is a multiple of `bytes`; null is.
template <class... P>
bool aligned(size_t bytes, const P*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % bytes == 0) && ...);
}

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Calls f with a value of the device type behind a float dtype.
template <class F>
void with_device_float(DType dtype, const char* argument, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bfloat16{});
    case DType::f16:
      return f(float16{});
    default:
      throw std::invalid_argument(std::string(argument) +
                                  ": expected float32, bfloat16 or float16, got " + name(dtype));
  }
}

#ifdef __CUDACC__

struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared = 0;  // dynamic shared memory, bytes
  cudaStream_t stream = nullptr;
};

inline void check_cuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

// Launches on the current device; an empty grid launches nothing.
template <class... P, class... A>
void launch(const Launch& config, void (*kernel)(P...), A... arguments) {
  if (!config.grid.x || !config.grid.y || !config.grid.z) return;
  // A launch gets 48 KiB by default, static shared memory included: 16 remain for static
  if (config.shared > 32 * 1024)
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(config.shared)),
               config.name);
  kernel<<<config.grid, config.block, config.shared, config.stream>>>(static_cast<P>(arguments)...);
  check_cuda(cudaGetLastError(), config.name);
}

template <class T>
T* output(const TensorView& t, const char* argument) {
  if (t.dl.device.type != dlpack::kCUDA)
    throw std::invalid_argument(std::string(argument) + ": expected a CUDA tensor");
  return t.elements<T>(argument);
}
template <class T>
const T* input(const TensorView& t, const char* argument) {
  return output<T>(t, argument);
}

#else

using simt::launch;
using simt::Launch;

// Bytes from the first element to the end of the last.
inline size_t span(const TensorView& t) {
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int i = 0; i < t.ndim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return (last + 1) * t.dl.dtype.bits / 8;
}
template <class T>
T* output(const TensorView& t, const char* argument) {
  T* p = t.data<T>(argument);
  simt::register_tensor(p, span(t), argument, true);
  return p;
}
template <class T>
const T* input(const TensorView& t, const char* argument) {
  const T* p = t.data<T>(argument);
  simt::register_tensor(p, span(t), argument, false);
  return p;
}

#endif

// The same for a tensor that may be absent.
template <class T>
const T* input(const std::optional<TensorView>& t, const char* argument) {
  return t ? input<T>(*t, argument) : nullptr;
}
template <class T>
T* output(const std::optional<TensorView>& t, const char* argument) {
  return t ? output<T>(*t, argument) : nullptr;
}

}  // namespace fastlm
