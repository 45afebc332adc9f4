// TensorView: a tensor as a kernel sees it (pointer, shape, strides, dtype, device). The caster in
// tensor_caster.h fills it from any DLPack producer.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "dlpack.h"

namespace fastlm {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DType { f32, f64, bf16, f16, i8, u8, i16, i32, i64, boolean, other };

inline const char* name(DType t) {
  static const char* names[] = {
      "float32", "float64", "bfloat16", "float16",          "int8", "uint8", "int16",
      "int32",   "int64",   "bool",     "unsupported dtype"};
  return names[static_cast<int>(t)];
}

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::f64;
}
template <>
constexpr DType dtype_of<bf16>() {
  return DType::bf16;
}
template <>
constexpr DType dtype_of<f16>() {
  return DType::f16;
}
template <>
constexpr DType dtype_of<int8_t>() {
  return DType::i8;
}
template <>
constexpr DType dtype_of<uint8_t>() {
  return DType::u8;
}
template <>
constexpr DType dtype_of<int16_t>() {
  return DType::i16;
}
template <>
constexpr DType dtype_of<int32_t>() {
  return DType::i32;
}
template <>
constexpr DType dtype_of<int64_t>() {
  return DType::i64;
}
template <>
constexpr DType dtype_of<bool>() {
  return DType::boolean;
}

struct TensorView {
  dlpack::Tensor dl;

  int ndim() const { return dl.ndim; }
  int64_t size(int i) const { return dl.shape[i < 0 ? i + dl.ndim : i]; }
  int64_t stride(int i) const {  // in elements
    if (i < 0) i += dl.ndim;
    if (dl.strides) return dl.strides[i];
    int64_t s = 1;
    for (int j = dl.ndim - 1; j > i; --j) s *= dl.shape[j];
    return s;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < dl.ndim; ++i) n *= dl.shape[i];
    return n;
  }
  bool contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int i = dl.ndim - 1; i >= 0; --i) {
      if (dl.shape[i] != 1 && stride(i) != expected) return false;
      expected *= dl.shape[i];
    }
    return true;
  }
  bool on_cpu() const { return dl.device.type == dlpack::kCPU; }

  DType dtype() const {
    const auto [code, bits, lanes] = dl.dtype;
    if (lanes != 1) return DType::other;
    if (code == dlpack::kFloat)
      return bits == 32   ? DType::f32
             : bits == 16 ? DType::f16
             : bits == 64 ? DType::f64
                          : DType::other;
    if (code == dlpack::kBfloat && bits == 16) return DType::bf16;
    if (code == dlpack::kInt)
      return bits == 8    ? DType::i8
             : bits == 16 ? DType::i16
             : bits == 32 ? DType::i32
             : bits == 64 ? DType::i64
                          : DType::other;
    if (code == dlpack::kUInt && bits == 8) return DType::u8;
    if (code == dlpack::kBool && bits == 8) return DType::boolean;
    return DType::other;
  }

  // The elements as T, on the CPU; `argument` names the tensor in the error.
  template <class T>
  T* data(const char* argument) const {
    if (!on_cpu()) throw std::invalid_argument(std::string(argument) + ": expected a CPU tensor");
    return elements<T>(argument);
  }
  // The elements as T, on any device.
  template <class T>
  T* elements(const char* argument) const {
    if (dtype() != dtype_of<T>())
      throw std::invalid_argument(std::string(argument) + ": expected dtype " +
                                  name(dtype_of<T>()) + ", got " + name(dtype()));
    return reinterpret_cast<T*>(static_cast<char*>(dl.data) + dl.byte_offset);
  }
};

using OptionalTensor = std::optional<TensorView>;

// Throws an error with the expected and the actual size: check_size("weight", "size", n, k).
inline void check_size(const char* argument, const char* property, int64_t expected,
                       int64_t actual) {
  if (expected != actual)
    throw std::invalid_argument(std::string(argument) + ": expected " + property + " " +
                                std::to_string(expected) + ", got " + std::to_string(actual));
}

inline void check_contiguous(const char* argument, const TensorView& t) {
  if (!t.contiguous())
    throw std::invalid_argument(std::string(argument) +
                                ": expected a contiguous tensor, got a strided one");
}

// Calls f with a value of the C++ type of a float dtype:
// with_float(x.dtype(), "x", [&](auto t) { using T = decltype(t); ... })
template <class F>
void with_float(DType dtype, const char* argument, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      throw std::invalid_argument(std::string(argument) +
                                  ": expected float32, bfloat16 or float16, got " + name(dtype));
  }
}

}  // namespace fastlm
