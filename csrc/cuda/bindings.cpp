// The Python module fastlm._cuda, and fastlm._simt, which runs the same kernels on the emulator:
// one m.def per function, named arguments, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/ops.h"
#include "tensor_caster.h"

#if defined(FASTLM_SIMT)
#include <mutex>

#include "simt/count.h"
#endif

namespace py = pybind11;
using namespace py::literals;
using namespace fastlm;

namespace {

#if defined(FASTLM_SIMT)
struct OneCall {  // one call at a time: the emulator has one list of tensors
  OneCall() { simt::forget(); }
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock{mutex};
};
std::mutex OneCall::mutex;
using Guard = py::call_guard<py::gil_scoped_release, OneCall>;

void emulator(py::module_& m) {
  py::register_exception<simt::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def(
      "set_options",
      [](uint64_t seed, bool count, bool races, bool dry, int preempt) {
        simt::options().seed = seed;
        simt::options().count = count;
        simt::options().races = races;
        simt::options().dry = dry;
        simt::options().preempt = preempt;
      },
      "seed"_a = 1, "count"_a = false, "races"_a = false, "dry"_a = false, "preempt"_a = 16);
  // [(kernel, blocks, threads of a block, bytes of dynamic shared memory)] since the last call
  m.def("dry_launches", [] {
    py::list result;
    for (const simt::Launch& l : simt::dry_launches())
      result.append(py::make_tuple(l.name, int64_t(l.grid.x) * l.grid.y * l.grid.z,
                                   l.block.x * l.block.y * l.block.z, l.shared));
    simt::dry_launches().clear();
    return result;
  });
  // {"kernel file:line read|write|atomic global|shared": (instructions, sectors or passes, least)}
  m.def("report", [] {
    py::dict result;
    for (const auto& [place, c] : simt::report())
      result[py::str(place)] = py::make_tuple(c.instructions, c.done, c.least);
    return result;
  });
  m.def("reset_report", &simt::reset_report);
}
#else
using Guard = py::call_guard<py::gil_scoped_release>;
void emulator(py::module_&) {}
#endif

void bind(py::module_& m) {
  m.doc() =
      "fastlm's CUDA kernels. Outputs are allocated by the caller; the public functions are in "
      "fastlm.ops.";
  emulator(m);

  m.def("adamw", &adamw, "tensors"_a, "settings"_a, "chunks"_a, "chunk_size"_a, "scalars"_a,
        "keys"_a, "sums"_a, "grad_norm"_a, "clip"_a, "max_grad_norm"_a, "read"_a, "written"_a,
        "stream"_a, Guard());
  m.def("cross_entropy_forward", &cross_entropy_forward, "logits"_a, "target"_a, "class_weight"_a,
        "smooth"_a, "ignore_index"_a, "softcap"_a, "scale"_a, "partial"_a, "shift"_a, "log_sum"_a,
        "nll"_a, "smoothed"_a, "stream"_a, Guard());
  m.def("cross_entropy_sum", &cross_entropy_sum, "nll"_a, "target"_a, "ignore_index"_a, "mean"_a,
        "loss"_a, "stream"_a, Guard());
  m.def("cross_entropy_backward", &cross_entropy_backward, "on_p"_a, "on_target"_a, "on_all"_a,
        "logits"_a, "target"_a, "class_weight"_a, "shift"_a, "log_sum"_a, "ignore_index"_a,
        "softcap"_a, "scale"_a, "d_logits"_a, "stream"_a, Guard());
  m.def("cross_entropy_loss_backward", &cross_entropy_loss_backward, "d_loss"_a, "logits"_a,
        "target"_a, "shift"_a, "log_sum"_a, "ignore_index"_a, "mean"_a, "softcap"_a, "scale"_a,
        "share"_a, "d_logits"_a, "stream"_a, Guard());
  m.def("glu_forward", &glu_forward, "gate"_a, "up"_a, "act"_a, "y"_a, "stream"_a, Guard());
  m.def("glu_round", &glu_round, "gate"_a, "up"_a, "act"_a, "qdata"_a, "scales"_a, "bits"_a,
        "group_size"_a, "q"_a, "x_scale"_a, "x_sums"_a, "stream"_a, Guard());
  m.def("paged_append", &paged_append, "k"_a, "v"_a, "k_cache"_a, "v_cache"_a, "block_table"_a,
        "positions"_a, "k_scale"_a, "v_scale"_a, "stream"_a, Guard());
  m.def("paged_attention_shared", &paged_attention_shared, "rows"_a, "d"_a, "dv"_a, "bytes"_a);
  m.def("paged_attention_forward", &paged_attention_forward, "q"_a, "k"_a, "v"_a, "block_table"_a,
        "seq_lens"_a, "k_scale"_a, "v_scale"_a, "sinks"_a, "slopes"_a, "bias"_a, "causal"_a,
        "scale"_a, "window"_a, "softcap"_a, "rows"_a, "blocks"_a, "least_tiles"_a, "out"_a, "lse"_a,
        "workspace"_a, "stream"_a, Guard());

  m.def("rms_norm_forward", &rms_norm_forward, "x"_a, "residual"_a, "weight"_a, "eps"_a, "offset"_a,
        "y"_a, "h"_a, "rstd"_a, "stream"_a, Guard());
  m.def("rms_norm_round", &rms_norm_round, "x"_a, "residual"_a, "weight"_a, "eps"_a, "offset"_a,
        "h"_a, "qdata"_a, "scales"_a, "bits"_a, "group_size"_a, "q"_a, "x_scale"_a, "x_sums"_a,
        "stream"_a, Guard());
  m.def("rope", &rope, "q"_a, "k"_a, "cos"_a, "sin"_a, "interleaved"_a, "inverse"_a,
        "heads_of_group"_a, "q_out"_a, "k_out"_a, "stream"_a, Guard());
  m.def("rope_append", &rope_append, "q"_a, "k"_a, "v"_a, "cos"_a, "sin"_a, "q_out"_a, "k_cache"_a,
        "v_cache"_a, "block_table"_a, "positions"_a, "stream"_a, Guard());
  m.def("quantized_linear_vector", &quantized_linear_vector, "x"_a, "x_scale"_a, "qdata"_a,
        "scales"_a, "zeros"_a, "bias"_a, "bits"_a, "group_size"_a, "k"_a, "y"_a, "stream"_a,
        Guard());
  m.def("quantized_linear_stripe", &quantized_linear_stripe, "x"_a, "qdata"_a, "bits"_a, "k"_a,
        "multiprocessors"_a);
  m.def("quantized_linear_matrix", &quantized_linear_matrix, "x"_a, "x_scale"_a, "x_sums"_a,
        "qdata"_a, "scales"_a, "zeros"_a, "bias"_a, "bits"_a, "group_size"_a, "k"_a, "y"_a,
        "stripe"_a, "parts"_a, "stream"_a, Guard());
  m.def("quantized_linear_round", &quantized_linear_round, "x"_a, "qdata"_a, "scales"_a, "bits"_a,
        "group_size"_a, "q"_a, "x_scale"_a, "x_sums"_a, "stream"_a, Guard());
  m.def("dequantize", &dequantize, "qdata"_a, "scales"_a, "zeros"_a, "bits"_a, "group_size"_a,
        "out"_a, "stream"_a, Guard());
}

}  // namespace

#if defined(FASTLM_SIMT)
PYBIND11_MODULE(_simt, m) { bind(m); }
#else
PYBIND11_MODULE(_cuda, m) { bind(m); }
#endif
