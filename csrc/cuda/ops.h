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

// paged_append.cu
void paged_append(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache,
                  TensorView block_table, TensorView positions, TensorView k_scale,
                  TensorView v_scale, Stream stream);

// paged_attention_mma.cu: bytes of shared memory of a block, for a cache of so many bytes an
// element
int64_t paged_attention_shared(int rows, int d, int dv, int bytes);

// paged_attention.cu
void paged_attention_forward(TensorView q, TensorView k, TensorView v, TensorView block_table,
                             TensorView seq_lens, OptionalTensor k_scale, OptionalTensor v_scale,
                             OptionalTensor sinks, OptionalTensor slopes, OptionalTensor bias,
                             bool causal, float scale, int64_t window, float softcap, int rows,
                             int blocks, int least_tiles, TensorView out, TensorView lse,
                             TensorView workspace, Stream stream);

// rms_norm.cu
void rms_norm_forward(TensorView x, OptionalTensor residual, TensorView weight, float eps,
                      float offset, TensorView y, OptionalTensor h, TensorView rstd, Stream stream);

}  // namespace fastlm
