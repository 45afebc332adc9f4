// Every function the CPU extension exports, as C++. Outputs and workspaces are allocated by the
// caller (ops/<op>.py).
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace fastlm {

using OptionalTensor = std::optional<TensorView>;

// rms_norm.h
void rms_norm_forward(TensorView x, OptionalTensor residual, TensorView weight, float eps,
                      float offset, TensorView y, OptionalTensor h, TensorView rstd);
void rms_norm_backward(TensorView dy, OptionalTensor dh_above, TensorView h, TensorView weight,
                       TensorView rstd, float offset, TensorView dx, TensorView dw);

// rope.h
void rope(TensorView q, TensorView k, TensorView cos, TensorView sin, bool interleaved,
          bool inverse, TensorView q_out, TensorView k_out);

// glu.h
void glu_forward(TensorView gate, TensorView up, const std::string& act, TensorView y);
void glu_backward(TensorView dy, TensorView gate, TensorView up, const std::string& act,
                  TensorView dgate, TensorView dup);

// adamw.h: one step of every tensor. States are float32, or uint8 codes where the scales are given
using AdamwOptions = std::tuple<double, double, double, double, double, bool, bool>;
// lr, beta1, beta2, eps, weight_decay, maximize, stochastic rounding
void adamw(const std::vector<TensorView>& params, const std::vector<TensorView>& grads,
           const std::vector<TensorView>& steps, const std::vector<TensorView>& exp_avgs,
           const std::vector<TensorView>& exp_avg_sqs,
           const std::vector<OptionalTensor>& exp_avg_scales,
           const std::vector<OptionalTensor>& exp_avg_sq_scales,
           const std::vector<OptionalTensor>& masters, const std::vector<AdamwOptions>& options,
           const std::vector<uint32_t>& keys, double max_grad_norm, OptionalTensor grad_norm);

// probe.cpp
void matmul(TensorView a, TensorView b, TensorView c);
double multiply_in_l1(bool bf16_operands, int64_t repeats);
double read_all(TensorView buffer);
int64_t count_elements(TensorView a, TensorView b, TensorView c, TensorView d);
int thread_count();

}  // namespace fastlm
