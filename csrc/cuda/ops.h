// Every function that the CUDA extension exports, as C++. Outputs and workspaces are allocated by
// the caller (fastlm/cuda/<op>.py); `stream` is a cudaStream_t of the current device.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "tensor.h"

namespace fastlm {

using OptionalTensor = std::optional<TensorView>;
using Stream = uintptr_t;

// rms_norm.cu
void rms_norm_forward(TensorView x, OptionalTensor residual, TensorView weight, float eps,
                      float offset, TensorView y, OptionalTensor h, TensorView rstd, Stream stream);

// quantized_vector.cu, quantized_matrix.cu, quantized_round.cu, dequantize.cu
void quantized_linear_vector(TensorView x, OptionalTensor x_scale, TensorView qdata,
                             TensorView scales, OptionalTensor zeros, OptionalTensor bias, int bits,
                             int64_t group_size, int64_t k, TensorView y, Stream stream);
// In how many parts the matrix kernel should cut K; y's workspace has one matrix for each.
int quantized_linear_parts(int64_t rows, int64_t n, int64_t k, int bits, int multiprocessors);
void quantized_linear_matrix(TensorView x, OptionalTensor x_scale, OptionalTensor x_sums,
                             TensorView qdata, TensorView scales, OptionalTensor zeros,
                             OptionalTensor bias, int bits, int64_t group_size, int64_t k,
                             TensorView y, OptionalTensor parts, Stream stream);
void quantized_linear_round(TensorView x, TensorView qdata, TensorView scales, int bits,
                            int64_t group_size, TensorView q, TensorView x_scale, TensorView x_sums,
                            Stream stream);
void dequantize(TensorView qdata, TensorView scales, OptionalTensor zeros, int bits,
                int64_t group_size, TensorView out, Stream stream);

}  // namespace fastlm
