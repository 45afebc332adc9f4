#include "cpu/adamw_table.h"

#include <new>
#include <tuple>
#include <vector>

#define FASTLM_BODY "cpu/adamw.h"
#include "cpu/base/each_isa.h"

namespace fastlm {
namespace {

void square_sums(const AdamwTensor* t, const AdamwChunk* c, int64_t count, double* sums) {
  FASTLM_RUN(adamw_square_sums, t, c, count, sums);
}
void update(const AdamwTensor* t, const AdamwChunk* c, int64_t count, float clip) {
  FASTLM_RUN(adamw_update, t, c, count, clip);
}

void* data_of(const TensorView& t, const char* argument) {
  void* p = nullptr;
  with_float(t.dtype(), argument, [&](auto tag) { p = t.data<decltype(tag)>(argument); });
  return p;
}

float* optional_floats(const OptionalTensor& t, const char* argument) {
  return t ? t->data<float>(argument) : nullptr;
}

}  // namespace

// lr, beta1, beta2, eps, weight_decay, maximize, stochastic rounding
using AdamwOptions = std::tuple<double, double, double, double, double, bool, bool>;

// One step of every tensor. States are float32, or uint8 codes where the scales are given.
// have_norm: grad_norm is an input, else an output.
void adamw(const std::vector<TensorView>& params, const std::vector<TensorView>& grads,
           const std::vector<TensorView>& steps, const std::vector<TensorView>& exp_avgs,
           const std::vector<TensorView>& exp_avg_sqs,
           const std::vector<OptionalTensor>& exp_avg_scales,
           const std::vector<OptionalTensor>& exp_avg_sq_scales,
           const std::vector<OptionalTensor>& masters, const std::vector<AdamwOptions>& options,
           const std::vector<uint32_t>& keys, double max_grad_norm, OptionalTensor grad_norm,
           bool have_norm, TensorView workspace) {
  const int64_t count = int64_t(params.size());
  int64_t chunk_count = 0;
  for (const TensorView& p : params) chunk_count += (p.numel() + ADAMW_CHUNK - 1) / ADAMW_CHUNK;
  // Parts of the workspace: the table of tensors, the table of chunks, one sum of squares per chunk
  check_size("workspace", "elements:", count * ADAMW_TENSOR_INTS + chunk_count * ADAMW_CHUNK_INTS,
             workspace.numel());
  auto* tensors = reinterpret_cast<AdamwTensor*>(workspace.data<int64_t>("workspace"));
  auto* chunks = reinterpret_cast<AdamwChunk*>(workspace.data<int64_t>("workspace") +
                                               count * ADAMW_TENSOR_INTS);
  auto* sums = reinterpret_cast<double*>(chunks + chunk_count);
  // Everything is checked before anything is written: a refusal leaves the state unchanged, and a
  // parallel region must not throw.
  for (int64_t i = 0; i < count; ++i) {
    AdamwTensor& t = *new (tensors + i) AdamwTensor{};
    t.n = params[i].numel();
    check_size("grad", "elements:", t.n, grads[i].numel());
    check_size("exp_avg", "elements:", t.n, exp_avgs[i].numel());
    check_size("exp_avg_sq", "elements:", t.n, exp_avg_sqs[i].numel());
    t.param = data_of(params[i], "param"), t.param_type = params[i].dtype();
    t.grad = data_of(grads[i], "grad"), t.grad_type = grads[i].dtype();
    t.master = nullptr, t.master_low = nullptr;
    if (masters[i]) {
      check_size("master", "elements:", t.n, masters[i]->numel());
      if (t.param_type == DType::bf16)
        t.master_low = masters[i]->data<int16_t>("master_low");
      else
        t.master = masters[i]->data<float>("master");
    }
    t.exp_avg_scale = optional_floats(exp_avg_scales[i], "exp_avg_scale");
    t.exp_avg_sq_scale = optional_floats(exp_avg_sq_scales[i], "exp_avg_sq_scale");
    if (t.exp_avg_scale) {
      t.exp_avg = exp_avgs[i].data<uint8_t>("exp_avg");
      t.exp_avg_sq = exp_avg_sqs[i].data<uint8_t>("exp_avg_sq");
      const int64_t blocks = (t.n + ADAMW_BLOCK - 1) / ADAMW_BLOCK;
      check_size("exp_avg_scale", "blocks:", blocks, exp_avg_scales[i]->numel());
      check_size("exp_avg_sq_scale", "blocks:", blocks, exp_avg_sq_scales[i]->numel());
    } else {
      t.exp_avg = exp_avgs[i].data<float>("exp_avg");
      t.exp_avg_sq = exp_avg_sqs[i].data<float>("exp_avg_sq");
    }
    t.step = steps[i].data<float>("step");
  }
  float* norm = optional_floats(grad_norm, "grad_norm");
  AdamwChunk* next = chunks;
  for (int64_t i = 0; i < count; ++i) {
    const auto [lr, beta1, beta2, eps, weight_decay, maximize, stochastic] = options[i];
    AdamwTensor& t = tensors[i];
    const float step = *t.step += 1;
    t.step_size = float(lr / (1 - std::pow(beta1, step)));
    t.decay = float(lr * weight_decay);
    t.beta1 = float(beta1), t.rest1 = float(1 - beta1);
    t.beta2 = float(beta2), t.rest2 = float(1 - beta2);
    t.eps = float(eps);
    t.root_scale = float(1 / std::sqrt(1 - std::pow(beta2, step)));
    t.sign = maximize ? -1.f : 1.f;
    t.stochastic = stochastic, t.key = keys[i];
    for (int64_t start = 0; start < t.n; start += ADAMW_CHUNK)
      new (next++) AdamwChunk{i, start, std::min(ADAMW_CHUNK, t.n - start)};
  }
  float clip = 1;
  if (norm && !have_norm) {
    square_sums(tensors, chunks, chunk_count, sums);
    double total = 0;
    for (int64_t c = 0; c < chunk_count; ++c)
      total += sums[c];  // in order: the same bits on any number of threads
    *norm = float(std::sqrt(total));
  }
  if (norm) {
    const float wanted = float(max_grad_norm) / (*norm + 1e-6f);  // as clip_grad_norm_; NaN stays
    clip = wanted > 1 ? 1 : wanted;
  }
  update(tensors, chunks, chunk_count, clip);
}

}  // namespace fastlm

FASTLM_BIND(adamw,
            "params grads steps exp_avgs exp_avg_sqs exp_avg_scales exp_avg_sq_scales masters"
            " options keys max_grad_norm grad_norm have_norm workspace")
