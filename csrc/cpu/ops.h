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

// probe.cpp
void matmul(TensorView a, TensorView b, TensorView c);
double multiply_in_l1(bool bf16_operands, int64_t repeats);
double read_all(TensorView buffer);
int64_t count_elements(TensorView a, TensorView b, TensorView c, TensorView d);
int thread_count();

}  // namespace fastlm
