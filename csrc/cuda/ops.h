// Every function that the CUDA extension exports, as C++. Outputs and workspaces are allocated by
// the caller (fastlm/cuda/<op>.py); `stream` is a cudaStream_t of the current device.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

namespace fastlm {

using OptionalTensor = std::optional<TensorView>;
using Stream = uintptr_t;

// adamw.cu; sums, grad_norm and clip: to clip gradients (no sums: grad_norm is given); read and
// written: the tensors that the table points at, for the emulator alone
void adamw(TensorView tensors, TensorView settings, TensorView chunks, int chunk_size,
           TensorView scalars, TensorView keys, OptionalTensor sums, OptionalTensor grad_norm,
           OptionalTensor clip, float max_grad_norm, const std::vector<TensorView>& read,
           const std::vector<TensorView>& written, Stream stream);

// cross_entropy.cu; softcap 0: none; partial (rows, parts, 4) where rows are split
void cross_entropy_forward(TensorView logits, TensorView target, OptionalTensor class_weight,
                           bool smooth, int64_t ignore_index, float softcap, float scale,
                           OptionalTensor partial, TensorView shift, TensorView log_sum,
                           TensorView nll, OptionalTensor smoothed, Stream stream);
void cross_entropy_sum(TensorView nll, TensorView target, int64_t ignore_index, bool mean,
                       TensorView loss, Stream stream);
void cross_entropy_backward(TensorView on_p, TensorView on_target, OptionalTensor on_all,
                            TensorView logits, TensorView target, OptionalTensor class_weight,
                            TensorView shift, TensorView log_sum, int64_t ignore_index,
                            float softcap, float scale, TensorView d_logits, Stream stream);
void cross_entropy_loss_backward(TensorView d_loss, TensorView logits, TensorView target,
                                 TensorView shift, TensorView log_sum, int64_t ignore_index,
                                 bool mean, float softcap, float scale, TensorView share,
                                 TensorView d_logits, Stream stream);

// glu.cu; act: 0 silu, 1 gelu_tanh, 2 gelu. glu_round: matrices whose rows may be apart; q,
// x_scale, x_sums as quantized_linear_round
void glu_forward(TensorView gate, TensorView up, int act, TensorView y, Stream stream);
void glu_round(TensorView gate, TensorView up, int act, TensorView qdata, TensorView scales,
               int bits, int64_t group_size, TensorView q, TensorView x_scale, TensorView x_sums,
               Stream stream);
// paged_append.cu
void paged_append(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache,
                  TensorView block_table, TensorView positions, OptionalTensor k_scale,
                  OptionalTensor v_scale, Stream stream);

// paged_attention_mma.cu: bytes of shared memory per block, for a cache of `bytes` per element
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
// y in int8: q, x_scale, x_sums as quantized_linear_round. A row must fit in shared memory.
void rms_norm_round(TensorView x, OptionalTensor residual, TensorView weight, float eps,
                    float offset, OptionalTensor h, TensorView qdata, TensorView scales, int bits,
                    int64_t group_size, TensorView q, TensorView x_scale, TensorView x_sums,
                    Stream stream);

// rope.cu
void rope(TensorView q, TensorView k, TensorView cos, TensorView sin, bool interleaved,
          bool inverse, int heads_of_group, TensorView q_out, TensorView k_out, Stream stream);
// rope_append.cu
void rope_append(TensorView q, TensorView k, TensorView v, TensorView cos, TensorView sin,
                 TensorView q_out, TensorView k_cache, TensorView v_cache, TensorView block_table,
                 TensorView positions, Stream stream);

// quantized_vector.cu, quantized_matrix.cu, quantized_round.cu, dequantize.cu
void quantized_linear_vector(TensorView x, OptionalTensor x_scale, TensorView qdata,
                             TensorView scales, OptionalTensor zeros, OptionalTensor bias, int bits,
                             int64_t group_size, int64_t k, TensorView y, Stream stream);
// How the matrix kernel should divide W: tiles of K per block, counted row of tiles by row of
// tiles, and the largest number of parts that are summed to an element of y.
std::pair<int, int> quantized_linear_stripe(TensorView x, TensorView qdata, int bits, int64_t k,
                                            int multiprocessors);
void quantized_linear_matrix(TensorView x, OptionalTensor x_scale, OptionalTensor x_sums,
                             TensorView qdata, TensorView scales, OptionalTensor zeros,
                             OptionalTensor bias, int bits, int64_t group_size, int64_t k,
                             TensorView y, int stripe, OptionalTensor parts, Stream stream);
void quantized_linear_round(TensorView x, TensorView qdata, TensorView scales, int bits,
                            int64_t group_size, TensorView q, TensorView x_scale, TensorView x_sums,
                            Stream stream);
void dequantize(TensorView qdata, TensorView scales, OptionalTensor zeros, int bits,
                int64_t group_size, TensorView out, Stream stream);

}  // namespace fastlm
