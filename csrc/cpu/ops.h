// Every function the CPU extension exports, as C++. Outputs and workspaces are allocated by the
// caller (fastlm/cpu/<op>.py).
#pragma once

#include <optional>
#include <string>
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

// linear.h
int64_t linear_workspace(int64_t m, int64_t n, int64_t k, bool weight_gradient);
void linear_forward(TensorView x, TensorView w, OptionalTensor bias, TensorView y,
                    TensorView workspace);
void linear_input_gradient(TensorView dy, TensorView w, TensorView dx, TensorView workspace);
void linear_weight_gradient(TensorView dy, TensorView x, TensorView dw, TensorView workspace);
int64_t linear_split_workspace(int64_t m, int64_t n, int64_t k);
void linear_split(TensorView x, TensorView w, OptionalTensor bias, TensorView y,
                  TensorView workspace);

// adamw.h: one step of every tensor. States are float32, or uint8 codes where the scales are given
using AdamwOptions = std::tuple<double, double, double, double, double, bool, bool>;
// lr, beta1, beta2, eps, weight_decay, maximize, stochastic rounding
// have_norm: grad_norm is an input, else an output
void adamw(const std::vector<TensorView>& params, const std::vector<TensorView>& grads,
           const std::vector<TensorView>& steps, const std::vector<TensorView>& exp_avgs,
           const std::vector<TensorView>& exp_avg_sqs,
           const std::vector<OptionalTensor>& exp_avg_scales,
           const std::vector<OptionalTensor>& exp_avg_sq_scales,
           const std::vector<OptionalTensor>& masters, const std::vector<AdamwOptions>& options,
           const std::vector<uint32_t>& keys, double max_grad_norm, OptionalTensor grad_norm,
           bool have_norm, TensorView workspace);
// cross_entropy.h; first_bad_target: row of the first class out of range, or -1
int64_t first_bad_target(const TensorView& target, int64_t classes, int64_t ignore_index);
void cross_entropy_forward(TensorView logits, TensorView target, OptionalTensor class_weight,
                           int64_t ignore_index, float softcap, float scale, TensorView shift,
                           TensorView log_sum, TensorView nll, TensorView smoothed);
void cross_entropy_backward(TensorView on_p, TensorView on_target, OptionalTensor on_all,
                            TensorView logits, TensorView target, OptionalTensor class_weight,
                            TensorView shift, TensorView log_sum, int64_t ignore_index,
                            float softcap, float scale, TensorView dlogits);
// the loss of all rows; returns first_bad_target, and computes nothing unless that is -1
int64_t cross_entropy_loss(TensorView logits, TensorView target, int64_t ignore_index, bool mean,
                           float softcap, float scale, TensorView loss, OptionalTensor stats);
void cross_entropy_loss_backward(TensorView dloss, TensorView logits, TensorView target,
                                 TensorView stats, int64_t ignore_index, bool mean, float softcap,
                                 float scale, TensorView dlogits);

// linear_cross_entropy.h
int64_t matrix_element_bytes(TensorView x);
void linear_cross_entropy_scores(TensorView x, TensorView w, OptionalTensor bias, TensorView target,
                                 OptionalTensor class_weight, int64_t ignore_index, float softcap,
                                 float scale, OptionalTensor exponentials, TensorView stats,
                                 TensorView at_target, TensorView shift, TensorView log_sum,
                                 TensorView nll, TensorView smoothed, OptionalTensor entropy);
void linear_cross_entropy_gradients(TensorView on_p, TensorView on_target, OptionalTensor on_all,
                                    OptionalTensor on_entropy, TensorView x, TensorView w,
                                    OptionalTensor bias, TensorView target,
                                    OptionalTensor class_weight, TensorView shift,
                                    TensorView log_sum, OptionalTensor entropy,
                                    int64_t ignore_index, float softcap, float scale,
                                    bool have_exponentials, TensorView exponentials,
                                    TensorView stats, TensorView at_target, OptionalTensor dx,
                                    OptionalTensor dw, OptionalTensor dbias, bool accumulate);
void scale_to(TensorView source, float factor, TensorView out);

// linear_distillation.h; the gradients of a chunk are linear_cross_entropy_gradients of d_scores
void linear_distillation_scores(TensorView x, TensorView w, float softcap, float scale,
                                TensorView scores, TensorView lse, TensorView workspace);
void linear_distillation_rows(const std::string& kind, float beta, float softcap, int64_t classes,
                              TensorView student_scores, TensorView student_lse,
                              TensorView teacher_scores, TensorView teacher_lse, TensorView loss,
                              OptionalTensor d_scores, TensorView workspace);

// attention.h; which operands are absent tells the ops apart (attention_inputs.h)
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
int64_t attention_backward_workspace(TensorView q, int64_t sequences, int64_t heads,
                                     int64_t kv_heads, int64_t v_width, int64_t most_q,
                                     int64_t most_k, int64_t all_rows, bool bias_grad);
// quantized_linear.h
void quantized_linear(TensorView x, TensorView qdata, TensorView scales, OptionalTensor zeros,
                      OptionalTensor bias, int bits, int64_t group_size, int act_bits, int form,
                      TensorView y, OptionalTensor workspace);
int64_t quantized_linear_workspace(TensorView x, int64_t n, int bits, int64_t group_size,
                                   int act_bits, int form);
void quantized_linear_backward(TensorView dy, TensorView qdata, TensorView scales,
                               OptionalTensor zeros, int bits, int64_t group_size, TensorView dx,
                               TensorView workspace);
int64_t quantized_linear_backward_workspace(TensorView dy);
void dequantize(TensorView qdata, TensorView scales, OptionalTensor zeros, int bits,
                int64_t group_size, TensorView out);

// peak.cpp
std::vector<std::string> peak_instructions();
double run_peak(const std::string& instruction, int64_t steps);  // operations done

// probe.cpp
void matmul(TensorView a, TensorView b, TensorView c);
double multiply_in_l1(bool bf16_operands, int64_t repeats);
double read_all(TensorView buffer);
int64_t count_elements(TensorView a, TensorView b, TensorView c, TensorView d);
int thread_count();
int threads_that_flush();  // of all, those to which a denormal number is zero

}  // namespace fastlm
