#include "cpu/adamw_table.h"

#include <new>
#include <vector>

#define FASTLM_BODY "cpu/adamw.h"
#include "cpu/base/each_isa.h"
#include "tuple_caster.h"

namespace fastlm {

// fastlm.reference.AdamWOptions
struct AdamwOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize, stochastic;
};

// fastlm.reference.AdamWTensor
struct AdamwArguments {
  TensorView param, grad, step, exp_avg, exp_avg_sq;
  OptionalTensor exp_avg_scale, exp_avg_sq_scale, master;
  AdamwOptions options;
  uint32_t seed, ordinal;
};

}  // namespace fastlm

FASTLM_TUPLE_CASTER(fastlm::AdamwOptions, lr, beta1, beta2, eps, weight_decay, maximize, stochastic)
FASTLM_TUPLE_CASTER(fastlm::AdamwArguments, param, grad, step, exp_avg, exp_avg_sq, exp_avg_scale,
                    exp_avg_sq_scale, master, options, seed, ordinal)

namespace fastlm {
namespace {

void square_sums(const AdamwTensor* t, const AdamwChunk* c, int64_t count, double* sums) {
  FASTLM_RUN(adamw_square_sums, t, c, count, sums);
}
void update(const AdamwTensor* t, const AdamwChunk* c, int64_t count, float clip) {
  FASTLM_RUN(adamw_update, t, c, count, clip);
}

int64_t chunk_count(int64_t n) { return (n + ADAMW_CHUNK - 1) / ADAMW_CHUNK; }

// The parts of the workspace
struct AdamwTables {
  AdamwTensor* tensors;
  AdamwChunk* chunks;
  double* sums;  // of squares, one per chunk

  static int64_t bytes(int64_t tensors, int64_t chunks) {
    return tensors * int64_t(sizeof(AdamwTensor)) +
           chunks * int64_t(sizeof(AdamwChunk) + sizeof(double));
  }
  AdamwTables(const TensorView& workspace, int64_t tensor_count, int64_t chunks_of_all)
      : tensors(reinterpret_cast<AdamwTensor*>(workspace.data<int64_t>("workspace"))),
        chunks(reinterpret_cast<AdamwChunk*>(tensors + tensor_count)),
        sums(reinterpret_cast<double*>(chunks + chunks_of_all)) {
    check_size("workspace", "bytes:", bytes(tensor_count, chunks_of_all), workspace.numel() * 8);
  }
};

void* data_of(const TensorView& t, const char* argument) {
  void* p = nullptr;
  with_float(t.dtype(), argument, [&](auto tag) { p = t.data<decltype(tag)>(argument); });
  return p;
}

float* optional_floats(const OptionalTensor& t, const char* argument) {
  return t ? t->data<float>(argument) : nullptr;
}

// A row of the table of tensors, without the step's scalars
AdamwTensor make_tensor(const AdamwArguments& a) {
  AdamwTensor t{};
  t.n = a.param.numel();
  check_size("grad", "elements:", t.n, a.grad.numel());
  check_size("exp_avg", "elements:", t.n, a.exp_avg.numel());
  check_size("exp_avg_sq", "elements:", t.n, a.exp_avg_sq.numel());
  t.param = data_of(a.param, "param"), t.param_type = a.param.dtype();
  t.grad = data_of(a.grad, "grad"), t.grad_type = a.grad.dtype();
  if (a.master) {
    check_size("master", "elements:", t.n, a.master->numel());
    if (t.param_type == DType::bf16)
      t.master_low = a.master->data<int16_t>("master_low");
    else
      t.master = a.master->data<float>("master");
  }
  t.exp_avg_scale = optional_floats(a.exp_avg_scale, "exp_avg_scale");
  t.exp_avg_sq_scale = optional_floats(a.exp_avg_sq_scale, "exp_avg_sq_scale");
  if (a.exp_avg_scale) {  // its pointer is null where there are no elements
    t.exp_avg = a.exp_avg.data<uint8_t>("exp_avg");
    t.exp_avg_sq = a.exp_avg_sq.data<uint8_t>("exp_avg_sq");
    const int64_t blocks = (t.n + ADAMW_BLOCK - 1) / ADAMW_BLOCK;
    check_size("exp_avg_scale", "blocks:", blocks, a.exp_avg_scale->numel());
    check_size("exp_avg_sq_scale", "blocks:", blocks,
               a.exp_avg_sq_scale ? a.exp_avg_sq_scale->numel() : 0);
  } else {
    t.exp_avg = a.exp_avg.data<float>("exp_avg");
    t.exp_avg_sq = a.exp_avg_sq.data<float>("exp_avg_sq");
  }
  t.step = a.step.data<float>("step");
  return t;
}

// Increments the step, and sets its scalars and the key of its random numbers
// (`reference.step_key`)
void begin_step(AdamwTensor& t, const AdamwArguments& a) {
  const auto& [lr, beta1, beta2, eps, weight_decay, maximize, stochastic] = a.options;
  t.stochastic = stochastic;
  if (stochastic) t.key = mix32(mix32(mix32(a.seed ^ 0x9e3779b9u) ^ uint32_t(*t.step)) ^ a.ordinal);
  const float step = *t.step += 1;
  t.step_size = float(lr / (1 - std::pow(beta1, step)));
  t.decay = float(lr * weight_decay);
  t.beta1 = float(beta1), t.rest1 = float(1 - beta1);
  t.beta2 = float(beta2), t.rest2 = float(1 - beta2);
  t.eps = float(eps);
  t.root_scale = float(1 / std::sqrt(1 - std::pow(beta2, step)));
  t.sign = maximize ? -1.f : 1.f;
}

// Writes the chunks of tensor i. Returns a pointer past the last one.
AdamwChunk* write_chunks(AdamwChunk* next, int64_t i, int64_t n) {
  for (int64_t start = 0; start < n; start += ADAMW_CHUNK)
    new (next++) AdamwChunk{i, start, std::min(ADAMW_CHUNK, n - start)};
  return next;
}

// The norm of all gradients: sums in order, so the same bits on any number of threads
float norm_of(const AdamwTables& tables, int64_t chunks) {
  square_sums(tables.tensors, tables.chunks, chunks, tables.sums);
  double total = 0;
  for (int64_t c = 0; c < chunks; ++c) total += tables.sums[c];
  return float(std::sqrt(total));
}

}  // namespace

// Size of the workspace, in int64, for tensors of these sizes
int64_t adamw_workspace(const std::vector<int64_t>& sizes) {
  int64_t chunks = 0;
  for (int64_t n : sizes) chunks += chunk_count(n);
  return AdamwTables::bytes(int64_t(sizes.size()), chunks) / 8;
}

// One step of every tensor. have_norm: grad_norm is an input, else an output.
void adamw(const std::vector<AdamwArguments>& tensors, double max_grad_norm,
           OptionalTensor grad_norm, bool have_norm, TensorView workspace) {
  const int64_t count = int64_t(tensors.size());
  int64_t chunks = 0;
  for (const AdamwArguments& a : tensors) chunks += chunk_count(a.param.numel());
  const AdamwTables tables(workspace, count, chunks);
  // Everything is checked before anything is written: a refusal leaves the state unchanged, and a
  // parallel region must not throw.
  for (int64_t i = 0; i < count; ++i) new (tables.tensors + i) AdamwTensor(make_tensor(tensors[i]));
  float* norm = optional_floats(grad_norm, "grad_norm");
  AdamwChunk* next = tables.chunks;
  for (int64_t i = 0; i < count; ++i) {
    begin_step(tables.tensors[i], tensors[i]);
    next = write_chunks(next, i, tables.tensors[i].n);
  }
  float clip = 1;
  if (norm) {
    if (!have_norm) *norm = norm_of(tables, chunks);
    const float ratio = float(max_grad_norm) / (*norm + 1e-6f);  // as clip_grad_norm_; NaN stays
    clip = ratio > 1 ? 1 : ratio;
  }
  update(tables.tensors, tables.chunks, chunks, clip);
}

}  // namespace fastlm

FASTLM_BIND(adamw, "tensors max_grad_norm grad_norm have_norm workspace")
FASTLM_BIND(adamw_workspace, "sizes")
FASTLM_CONSTANT(ADAMW_CHUNK)
FASTLM_CONSTANT(ADAMW_BLOCK)
