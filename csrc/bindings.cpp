// The Python module fastlm._cpu: one m.def per function, named arguments, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/base/huge_pages.h"
#include "cpu/decode/decode_plan.h"
#include "cpu/base/isa.h"
#include "cpu/ops.h"
#include "cpu/probes/product_rate.h"
#include "cpu/decode/token_sampler.h"
#include "cpu/weights.h"
#include "tensor_caster.h"

namespace py = pybind11;
using namespace py::literals;
using namespace fastlm;

PYBIND11_MODULE(_cpu, m) {
  m.doc() =
      "fastlm's CPU kernels. Outputs are allocated by the caller; the public functions are in "
      "fastlm.ops.";
  const auto no_gil = py::call_guard<py::gil_scoped_release>();

  m.def("isa", [] { return name(isa()); });
  m.def("set_isa", &set_isa, "isa"_a);
  m.def("supported_isas", &supported_isas);
  m.def("why_not", &why_not, "isa"_a);
  m.def(
      "choice_on",
      [](bool avx2, bool avx512, bool avx512_bf16, bool amx_cpu, bool amx_permission, bool widen) {
        return choice_on({avx2, avx512, avx512_bf16, amx_cpu, amx_permission, widen});
      },
      "avx2"_a, "avx512"_a, "avx512_bf16"_a, "amx_cpu"_a, "amx_permission"_a, "widen"_a);
  m.def(
      "choose_product",
      [](const std::string& vendor, int family, int model, double dot, double fma) {
        const ProductChoice c =
            choose_product(vendor, family, model, [=] { return ProductRates{dot, fma}; });
        return std::pair(c.widen, c.because);
      },
      "vendor"_a, "family"_a, "model"_a, "dot_gflops"_a, "fma_gflops"_a);
  m.def("products_of_bf16", [] {
    const ProductsOfBf16 p = products_of_bf16();
    return std::tuple(p.by, p.because, p.dot_gflops, p.fma_gflops);
  });
  m.def("prefer_huge_pages", &prefer_huge_pages, "output"_a);
  m.def("want_huge_pages", [](bool wanted) { huge_pages_wanted = wanted; }, "wanted"_a);

  m.def("rms_norm_forward", &rms_norm_forward, "x"_a, "residual"_a, "weight"_a, "eps"_a, "offset"_a,
        "y"_a, "h"_a, "rstd"_a, no_gil);
  m.def("rms_norm_backward", &rms_norm_backward, "dy"_a, "dh_above"_a, "h"_a, "weight"_a, "rstd"_a,
        "offset"_a, "dx"_a, "dw"_a, no_gil);

  m.def("rope", &rope, "q"_a, "k"_a, "cos"_a, "sin"_a, "interleaved"_a, "inverse"_a, "q_out"_a,
        "k_out"_a, no_gil);

  m.def("glu_forward", &glu_forward, "gate"_a, "up"_a, "act"_a, "y"_a, no_gil);
  m.def("glu_backward", &glu_backward, "dy"_a, "gate"_a, "up"_a, "act"_a, "dgate"_a, "dup"_a,
        no_gil);

  m.def("linear_workspace", &linear_workspace, "m"_a, "n"_a, "k"_a, "weight_gradient"_a);
  m.def("linear_forward", &linear_forward, "x"_a, "w"_a, "bias"_a, "y"_a, "workspace"_a, no_gil);
  m.def("linear_input_gradient", &linear_input_gradient, "dy"_a, "w"_a, "dx"_a, "workspace"_a,
        no_gil);
  m.def("linear_weight_gradient", &linear_weight_gradient, "dy"_a, "x"_a, "dw"_a, "workspace"_a,
        no_gil);
  m.def("linear_split_workspace", &linear_split_workspace, "m"_a, "n"_a, "k"_a);
  m.def("linear_split", &linear_split, "x"_a, "w"_a, "bias"_a, "y"_a, "workspace"_a, no_gil);

  m.def("adamw", &adamw, "params"_a, "grads"_a, "steps"_a, "exp_avgs"_a, "exp_avg_sqs"_a,
        "exp_avg_scales"_a, "exp_avg_sq_scales"_a, "masters"_a, "options"_a, "keys"_a,
        "max_grad_norm"_a, "grad_norm"_a, "have_norm"_a, "workspace"_a, no_gil);
  m.def("first_bad_target", &first_bad_target, "target"_a, "classes"_a, "ignore_index"_a);
  m.def("cross_entropy_forward", &cross_entropy_forward, "logits"_a, "target"_a, "class_weight"_a,
        "ignore_index"_a, "softcap"_a, "scale"_a, "shift"_a, "log_sum"_a, "nll"_a, "smoothed"_a,
        no_gil);
  m.def("cross_entropy_backward", &cross_entropy_backward, "on_p"_a, "on_target"_a, "on_all"_a,
        "logits"_a, "target"_a, "class_weight"_a, "shift"_a, "log_sum"_a, "ignore_index"_a,
        "softcap"_a, "scale"_a, "dlogits"_a, no_gil);
  m.def("cross_entropy_loss", &cross_entropy_loss, "logits"_a, "target"_a, "ignore_index"_a,
        "mean"_a, "softcap"_a, "scale"_a, "loss"_a, "stats"_a, no_gil);
  m.def("cross_entropy_loss_backward", &cross_entropy_loss_backward, "dloss"_a, "logits"_a,
        "target"_a, "stats"_a, "ignore_index"_a, "mean"_a, "softcap"_a, "scale"_a, "dlogits"_a,
        no_gil);

  m.def("matrix_element_bytes", &matrix_element_bytes, "x"_a);
  m.def("linear_cross_entropy_scores", &linear_cross_entropy_scores, "x"_a, "w"_a, "bias"_a,
        "target"_a, "class_weight"_a, "ignore_index"_a, "softcap"_a, "scale"_a, "exponentials"_a,
        "stats"_a, "at_target"_a, "shift"_a, "log_sum"_a, "nll"_a, "smoothed"_a, "entropy"_a,
        no_gil);
  m.def("linear_cross_entropy_gradients", &linear_cross_entropy_gradients, "on_p"_a, "on_target"_a,
        "on_all"_a, "on_entropy"_a, "x"_a, "w"_a, "bias"_a, "target"_a, "class_weight"_a, "shift"_a,
        "log_sum"_a, "entropy"_a, "ignore_index"_a, "softcap"_a, "scale"_a, "have_exponentials"_a,
        "exponentials"_a, "stats"_a, "at_target"_a, "dx"_a, "dw"_a, "dbias"_a, "accumulate"_a,
        no_gil);
  m.def("scale_to", &scale_to, "source"_a, "factor"_a, "out"_a, no_gil);
  m.def("linear_distillation_scores", &linear_distillation_scores, "x"_a, "w"_a, "softcap"_a,
        "scale"_a, "scores"_a, "lse"_a, "workspace"_a, no_gil);
  m.def("linear_distillation_rows", &linear_distillation_rows, "kind"_a, "beta"_a, "softcap"_a,
        "classes"_a, "student_scores"_a, "student_lse"_a, "teacher_scores"_a, "teacher_lse"_a,
        "loss"_a, "d_scores"_a, "workspace"_a, no_gil);
  m.def("attention_forward", &attention_forward, "q"_a, "k"_a, "v"_a, "cu_seqlens_q"_a,
        "cu_seqlens_k"_a, "block_table"_a, "seq_lens"_a, "k_scale"_a, "v_scale"_a, "sinks"_a,
        "alibi_slopes"_a, "bias"_a, "seed"_a, "causal"_a, "scale"_a, "window"_a, "softcap"_a,
        "dropout_p"_a, "out"_a, "lse"_a, "workspace"_a, no_gil);
  m.def("attention_backward", &attention_backward, "dout"_a, "dlse"_a, "q"_a, "k"_a, "v"_a, "out"_a,
        "lse"_a, "cu_seqlens_q"_a, "cu_seqlens_k"_a, "sinks"_a, "alibi_slopes"_a, "bias"_a,
        "seed"_a, "causal"_a, "scale"_a, "window"_a, "softcap"_a, "dropout_p"_a, "dq"_a, "dk"_a,
        "dv"_a, "dsinks"_a, "dbias"_a, "workspace"_a, no_gil);
  m.def("attention_backward_workspace", &attention_backward_workspace, "q"_a, "sequences"_a,
        "heads"_a, "kv_heads"_a, "v_width"_a, "most_q"_a, "most_k"_a, "all_rows"_a, "bias_grad"_a);
  m.def("quantized_linear", &quantized_linear, "x"_a, "qdata"_a, "scales"_a, "zeros"_a, "bias"_a,
        "bits"_a, "group_size"_a, "act_bits"_a, "form"_a, "y"_a, "workspace"_a, no_gil);
  m.def("quantized_linear_workspace", &quantized_linear_workspace, "x"_a, "n"_a, "bits"_a,
        "group_size"_a, "act_bits"_a, "form"_a);
  m.def("quantized_linear_backward", &quantized_linear_backward, "dy"_a, "qdata"_a, "scales"_a,
        "zeros"_a, "bits"_a, "group_size"_a, "dx"_a, "workspace"_a, no_gil);
  m.def("quantized_linear_backward_workspace", &quantized_linear_backward_workspace, "dy"_a);
  m.def("dequantize", &dequantize, "qdata"_a, "scales"_a, "zeros"_a, "bits"_a, "group_size"_a,
        "out"_a, no_gil);

  m.def("unpack_blocks", &unpack_blocks, "raw"_a, "kind"_a, "qdata"_a, "scales"_a, "zeros"_a,
        no_gil);
  m.def("scale_table", &scale_table, "scales"_a, "zeros"_a, "bits"_a, "table"_a, no_gil);

  py::class_<DecodeLinear>(m, "DecodeLinear")
      .def(py::init<TensorView, OptionalTensor, OptionalTensor, int, int64_t, int64_t, int>(),
           "weight"_a, "table"_a, "bias"_a, "bits"_a, "k"_a, "group_size"_a, "act_bits"_a)
      .def_property_readonly("tile_bytes", &DecodeLinear::tile_bytes)
      .def("pack", &DecodeLinear::pack, "tiles"_a);
  py::class_<DecodePlan>(m, "DecodePlan")
      .def(py::init<const DecodeLinear&, const DecodeLinear&, TensorView, int64_t, int64_t, int64_t,
                    const std::string&, float, float, float, float, float>(),
           "embedding"_a, "head"_a, "norm"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "act"_a,
           "eps"_a, "scale"_a, "softcap"_a, "embedding_scale"_a, "logit_softcap"_a)
      .def("add_layer", &DecodePlan::add_layer, "norms"_a, "qkv"_a, "out"_a, "gate"_a, "up"_a,
           "down"_a, "q_norm"_a, "k_norm"_a, "window"_a, "rotary"_a)
      .def("workspace_bytes", &DecodePlan::workspace_bytes, "rows"_a, "longest"_a);
  m.def("decode_step", &decode_step, "plan"_a, "tokens"_a, "lengths"_a, "table"_a, "cache"_a,
        "scales"_a, "rotary"_a, "workspace"_a, "wanted"_a, "logits"_a, no_gil);

  py::class_<TokenSampler>(m, "TokenSampler")
      .def(py::init<int64_t, double, int64_t, double, double, double, double, double,
                    std::vector<int64_t>, OptionalTensor, OptionalTensor, OptionalTensor>(),
           "vocab"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a,
           "presence_penalty"_a, "frequency_penalty"_a, "ends"_a, "seen"_a, "counts"_a, "bias"_a);
  m.def("sample_workspace", &sample_workspace, "vocab"_a);
  m.def("sample", &sample, "logits"_a, "rows"_a, "workspace"_a, no_gil);

  m.def("matmul", &matmul, "a"_a, "b"_a, "c"_a, no_gil);
  m.def("multiply_in_l1", &multiply_in_l1, "bf16_operands"_a, "repeats"_a, no_gil);
  m.def("peak_instructions", &peak_instructions);
  m.def("run_peak", &run_peak, "instruction"_a, "steps"_a, no_gil);
  m.def("read_all", &read_all, "buffer"_a, no_gil);
  m.def("count_elements", &count_elements, "a"_a, "b"_a, "c"_a, "d"_a, no_gil);
  m.def("thread_count", &thread_count, no_gil);
  m.def("threads_that_flush", &threads_that_flush, no_gil);
}
