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

  m.def("rms_norm_forward", &rms_norm_forward, "x"_a, "residual"_a, "weight"_a, "eps"_a, "offset"_a,
        "y"_a, "h"_a, "rstd"_a, "stream"_a, Guard());
  m.def("quantized_linear_vector", &quantized_linear_vector, "x"_a, "x_scale"_a, "qdata"_a,
        "scales"_a, "zeros"_a, "bias"_a, "bits"_a, "group_size"_a, "k"_a, "y"_a, "stream"_a,
        Guard());
  m.def("quantized_linear_parts", &quantized_linear_parts, "rows"_a, "n"_a, "k"_a, "bits"_a,
        "multiprocessors"_a);
  m.def("quantized_linear_matrix", &quantized_linear_matrix, "x"_a, "x_scale"_a, "x_sums"_a,
        "qdata"_a, "scales"_a, "zeros"_a, "bias"_a, "bits"_a, "group_size"_a, "k"_a, "y"_a,
        "parts"_a, "stream"_a, Guard());
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
