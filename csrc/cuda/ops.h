// The exports of the CUDA extension. In a .cu file that includes this header, the table declares
// C++ functions and constants. bindings.cpp defines the three macros differently before it includes
// the header, and the table also binds them to Python.
//
//     FASTLM_OP(name, (parameters))            launches kernels; returns nothing
//     FASTLM_QUERY(result, name, (parameters)) computes a size; launches nothing
//     FASTLM_CONSTANT(name, value)             a constant of a kernel that the host code needs
//
// Outputs and workspaces are allocated by the caller (fastlm/cuda/<op>.py); `stream` is a
// cudaStream_t of the current device. Python passes arguments by position or by the names here.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

#ifndef FASTLM_OP
#define FASTLM_OP(name, parameters) void name parameters;
#define FASTLM_QUERY(result, name, parameters) result name parameters;
#define FASTLM_CONSTANT(name, value) constexpr int name = value;
#endif

namespace fastlm {

using OptionalTensor = std::optional<TensorView>;
using Tensors = const std::vector<TensorView>&;
using Stream = uintptr_t;
using StripeAndParts = std::pair<int, int>;

// adamw.cu; sums, grad_norm and clip: to clip gradients (no sums: grad_norm is an input); read and
// written: the tensors to which the table points, for the emulator alone
FASTLM_OP(adamw,
          (TensorView tensors, TensorView settings, TensorView chunks, int chunk_size,
           TensorView scalars, TensorView keys, OptionalTensor sums, OptionalTensor grad_norm,
           OptionalTensor clip, float max_grad_norm, Tensors read, Tensors written, Stream stream))
FASTLM_CONSTANT(ADAMW_SCALARS, 16)  // float32 per tensor and step; 9 are used

// cross_entropy.cu; softcap 0: none; partial (rows, parts, 4) where rows are split
FASTLM_OP(cross_entropy_forward, (TensorView logits, TensorView target, OptionalTensor class_weight,
                                  bool smooth, int64_t ignore_index, float softcap, float scale,
                                  OptionalTensor partial, TensorView shift, TensorView log_sum,
                                  TensorView nll, OptionalTensor smoothed, Stream stream))
FASTLM_OP(cross_entropy_sum, (TensorView nll, TensorView target, int64_t ignore_index, bool mean,
                              TensorView loss, Stream stream))
FASTLM_OP(cross_entropy_backward,
          (TensorView on_p, TensorView on_target, OptionalTensor on_all, TensorView logits,
           TensorView target, OptionalTensor class_weight, TensorView shift, TensorView log_sum,
           int64_t ignore_index, float softcap, float scale, TensorView d_logits, Stream stream))
FASTLM_OP(cross_entropy_loss_backward,
          (TensorView d_loss, TensorView logits, TensorView target, TensorView shift,
           TensorView log_sum, int64_t ignore_index, bool mean, float softcap, float scale,
           TensorView share, TensorView d_logits, Stream stream))
// of a row, in flight in a block: the smallest part to split off; 64 per thread of 256
FASTLM_CONSTANT(CROSS_ENTROPY_PART_BYTES, 16384)

// glu.cu; act: 0 silu, 1 gelu_tanh, 2 gelu. glu_round: matrices with any row stride; q, x_scale,
// x_sums as quantized_linear_round
FASTLM_OP(glu_forward, (TensorView gate, TensorView up, int act, TensorView y, Stream stream))
FASTLM_OP(glu_round,
          (TensorView gate, TensorView up, int act, TensorView qdata, TensorView scales, int bits,
           int64_t group_size, TensorView q, TensorView x_scale, TensorView x_sums, Stream stream))

// paged_append.cu
FASTLM_OP(paged_append, (TensorView k, TensorView v, TensorView k_cache, TensorView v_cache,
                         TensorView block_table, TensorView positions, OptionalTensor k_scale,
                         OptionalTensor v_scale, Stream stream))

// paged_attention.cu. `rows` of a unit at a time: up to PAGED_DOT_ROWS by dot products, 16 or
// PAGED_MMA_ROWS by matrix instructions (16-bit q).
FASTLM_OP(paged_attention_forward,
          (TensorView q, TensorView k, TensorView v, TensorView block_table, TensorView seq_lens,
           OptionalTensor k_scale, OptionalTensor v_scale, OptionalTensor sinks,
           OptionalTensor alibi_slopes, OptionalTensor bias, bool causal, float scale,
           int64_t window, float softcap, int rows, int blocks, int min_tiles, TensorView out,
           TensorView lse, TensorView workspace, Stream stream))
// float32 elements: two slots per block (largest score, sum and out of each row), and its record
FASTLM_QUERY(int64_t, paged_attention_workspace, (int rows, int blocks, int dv))
// bytes of shared memory per block of the matrix kernel, for a cache of `bytes` per element
FASTLM_QUERY(int64_t, paged_attention_shared, (int rows, int d, int dv, int bytes))
FASTLM_CONSTANT(PAGED_TILE, 64)        // keys: two stages of the widest rows fit in shared memory
FASTLM_CONSTANT(PAGED_MIN_TILES, 4)    // worth a block, as in kernels/attention_forward.py
FASTLM_CONSTANT(PAGED_MAX_WIDTH, 256)  // of a head
FASTLM_CONSTANT(PAGED_DOT_ROWS, 2)     // more need more registers than two blocks have
FASTLM_CONSTANT(PAGED_MMA_ROWS, 64)    // four warps of 16

// rms_norm.cu
FASTLM_OP(rms_norm_forward,
          (TensorView x, OptionalTensor residual, TensorView weight, float eps, float offset,
           TensorView y, OptionalTensor h, TensorView rstd, Stream stream))
// y in int8: q, x_scale, x_sums as quantized_linear_round
FASTLM_OP(rms_norm_round,
          (TensorView x, OptionalTensor residual, TensorView weight, float eps, float offset,
           OptionalTensor h, TensorView qdata, TensorView scales, int bits, int64_t group_size,
           TensorView q, TensorView x_scale, TensorView x_sums, Stream stream))
// longest row of rms_norm_round: it fits the shared memory of every card
FASTLM_CONSTANT(RMS_NORM_ROUND_BYTES, 48 << 10)

// rope.cu
FASTLM_OP(rope,
          (TensorView q, TensorView k, TensorView cos, TensorView sin, bool interleaved,
           bool inverse, int heads_of_group, TensorView q_out, TensorView k_out, Stream stream))
// rope_append.cu
FASTLM_OP(rope_append, (TensorView q, TensorView k, TensorView v, TensorView cos, TensorView sin,
                        TensorView q_out, TensorView k_cache, TensorView v_cache,
                        TensorView block_table, TensorView positions, Stream stream))

// quantized_vector.cu, quantized_matrix.cu, quantized_round.cu, dequantize.cu
FASTLM_OP(quantized_linear_vector,
          (TensorView x, OptionalTensor x_scale, TensorView qdata, TensorView scales,
           OptionalTensor zeros, OptionalTensor bias, int bits, int64_t group_size, int64_t k,
           TensorView y, Stream stream))
// How the matrix kernel should divide W: tiles of K per block, counted row of tiles by row of
// tiles, and the largest number of parts that are summed to an element of y.
FASTLM_QUERY(StripeAndParts, quantized_linear_stripe,
             (TensorView x, TensorView qdata, int bits, int64_t k, int multiprocessors))
FASTLM_OP(quantized_linear_matrix, (TensorView x, OptionalTensor x_scale, OptionalTensor x_sums,
                                    TensorView qdata, TensorView scales, OptionalTensor zeros,
                                    OptionalTensor bias, int bits, int64_t group_size, int64_t k,
                                    TensorView y, int stripe, OptionalTensor parts, Stream stream))
FASTLM_OP(quantized_linear_round,
          (TensorView x, TensorView qdata, TensorView scales, int bits, int64_t group_size,
           TensorView q, TensorView x_scale, TensorView x_sums, Stream stream))
FASTLM_OP(dequantize, (TensorView qdata, TensorView scales, OptionalTensor zeros, int bits,
                       int64_t group_size, TensorView out, Stream stream))
// Maximum rows of the vector kernel, by the bits of x. Each code of a 4096 x 4096 W costs a lane
// 4.3 instructions at 2 rows (2.4 us in all, as long as loading its bytes takes), 6.2 at 4 rows;
// the matrix kernel 2.4 at up to 8 rows. int8: 1.5 at 4 rows. float32: no matrix kernel.
FASTLM_CONSTANT(QUANTIZED_VECTOR_ROWS_16, 2)
FASTLM_CONSTANT(QUANTIZED_VECTOR_ROWS_8, 4)
FASTLM_CONSTANT(QUANTIZED_VECTOR_ROWS_32, 4)
// int8 rows are padded to multiples of these: q's columns, for 16-byte reads; the rows of x_scale
// and x_sums, for the matrix kernel's largest block of x.
FASTLM_CONSTANT(ROUNDED_COLUMNS, 16)
FASTLM_CONSTANT(ROUNDED_ROWS, 64)

}  // namespace fastlm
