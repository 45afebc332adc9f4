// The Python module fastlm._cuda, and fastlm._simt, which runs the same kernels on the emulator: one
// m.def per function, named arguments, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/ops.h"
#include "tensor_caster.h"

#if defined(FASTLM_SIMT)
#include "simt/count.h"
#endif

namespace py = pybind11;
using namespace py::literals;
using namespace fastlm;

namespace {

#if defined(FASTLM_SIMT)
struct ForgetTensors {  // of the last call
  ForgetTensors() { simt::forget(); }
};
using Guard = py::call_guard<py::gil_scoped_release, ForgetTensors>;

void emulator(py::module_& m) {
  py::register_exception<simt::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def(
      "set_options",
      [](uint64_t seed, bool count, int preempt) {
        simt::options().seed = seed;
        simt::options().count = count;
        simt::options().preempt = preempt;
      },
      "seed"_a = 1, "count"_a = false, "preempt"_a = 16);
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

  m.def("paged_append", &paged_append, "k"_a, "v"_a, "k_cache"_a, "v_cache"_a, "block_table"_a,
        "positions"_a, "k_scale"_a, "v_scale"_a, "stream"_a, Guard());
  m.def("paged_attention_shared", &paged_attention_shared, "rows"_a, "d"_a, "dv"_a, "bytes"_a);
  m.def("paged_attention_forward", &paged_attention_forward, "q"_a, "k"_a, "v"_a, "block_table"_a,
        "seq_lens"_a, "k_scale"_a, "v_scale"_a, "sinks"_a, "slopes"_a, "bias"_a, "causal"_a,
        "scale"_a, "window"_a, "softcap"_a, "rows"_a, "blocks"_a, "least_tiles"_a, "out"_a,
        "lse"_a, "workspace"_a, "stream"_a, Guard());

  m.def("rms_norm_forward", &rms_norm_forward, "x"_a, "residual"_a, "weight"_a, "eps"_a, "offset"_a,
        "y"_a, "h"_a, "rstd"_a, "stream"_a, Guard());
}

}  // namespace

#if defined(FASTLM_SIMT)
PYBIND11_MODULE(_simt, m) { bind(m); }
#else
PYBIND11_MODULE(_cuda, m) { bind(m); }
#endif
