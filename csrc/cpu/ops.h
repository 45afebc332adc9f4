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

// cross_entropy.h; first_bad_target: row of the first class out of range, or -1
int64_t first_bad_target(TensorView target, int64_t classes, int64_t ignore_index);
void cross_entropy_forward(TensorView logits, TensorView target, OptionalTensor class_weight,
                           int64_t ignore_index, float softcap, float scale, TensorView shift,
                           TensorView log_sum, TensorView nll, TensorView smoothed);
void cross_entropy_backward(TensorView on_p, TensorView on_target, OptionalTensor on_all,
                            TensorView logits, TensorView target, OptionalTensor class_weight,
                            TensorView shift, TensorView log_sum, int64_t ignore_index,
                            float softcap, float scale, TensorView dlogits);

// linear_cross_entropy.h
int64_t matrix_element_bytes(TensorView x);
void linear_cross_entropy_scores(TensorView x, TensorView w, OptionalTensor bias, TensorView target,
                                 OptionalTensor class_weight, int64_t ignore_index, float softcap,
                                 float scale, OptionalTensor exponentials, TensorView stats,
                                 TensorView at_target, TensorView shift, TensorView log_sum,
                                 TensorView nll, TensorView smoothed);
void linear_cross_entropy_gradients(TensorView on_p, TensorView on_target, OptionalTensor on_all,
                                    TensorView x, TensorView w, OptionalTensor bias,
                                    TensorView target, OptionalTensor class_weight,
                                    TensorView shift, TensorView log_sum, int64_t ignore_index,
                                    float softcap, float scale, bool have_exponentials,
                                    TensorView exponentials, TensorView stats, TensorView at_target,
                                    OptionalTensor dx, OptionalTensor dw, OptionalTensor dbias,
                                    bool accumulate);
void scale_to(TensorView source, float factor, TensorView out);

// probe.cpp
void matmul(TensorView a, TensorView b, TensorView c);
double multiply_in_l1(bool bf16_operands, int64_t repeats);
double read_all(TensorView buffer);
int64_t count_elements(TensorView a, TensorView b, TensorView c, TensorView d);
int thread_count();

}  // namespace fastlm
