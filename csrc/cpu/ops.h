// Every function the CPU extension exports, as C++. Outputs and workspaces are allocated by the
// caller (ops/<op>.py).
#pragma once

#include <optional>

#include "tensor.h"

namespace fastlm {

using OptionalTensor = std::optional<TensorView>;

// rms_norm.h
void rms_norm_forward(TensorView x, OptionalTensor residual, TensorView weight, float eps,
                      float offset, TensorView y, OptionalTensor h, TensorView rstd);
void rms_norm_backward(TensorView dy, OptionalTensor dh_above, TensorView h, TensorView weight,
                       TensorView rstd, float offset, TensorView dx, TensorView dw);

// attention.h; what is absent tells the ops apart (attention_inputs.h)
void attention_forward(TensorView q, TensorView k, TensorView v, OptionalTensor cu_seqlens_q,
                       OptionalTensor cu_seqlens_k, OptionalTensor block_table,
                       OptionalTensor seq_lens, OptionalTensor k_scale, OptionalTensor v_scale,
                       OptionalTensor sinks, OptionalTensor alibi_slopes, OptionalTensor bias,
                       OptionalTensor seed, bool causal, float scale, int64_t window, float softcap,
                       double dropout_p, TensorView out, TensorView lse, TensorView workspace);
void attention_backward(TensorView dout, OptionalTensor dlse, TensorView q, TensorView k,
                        TensorView v, TensorView out, TensorView lse, OptionalTensor cu_seqlens_q,
                        OptionalTensor cu_seqlens_k, OptionalTensor sinks,
                        OptionalTensor alibi_slopes, OptionalTensor bias, OptionalTensor seed,
                        bool causal, float scale, int64_t window, float softcap, double dropout_p,
                        TensorView dq, TensorView dk, TensorView dv, OptionalTensor dsinks,
                        OptionalTensor dbias, TensorView workspace);

// probe.cpp
void matmul(TensorView a, TensorView b, TensorView c);
double multiply_in_l1(bool bf16_operands, int64_t repeats);
double read_all(TensorView buffer);
int64_t count_elements(TensorView a, TensorView b, TensorView c, TensorView d);
int thread_count();

}  // namespace fastlm
