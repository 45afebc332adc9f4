// The Python module fastlm._cuda, and fastlm._simt, which runs the same kernels on the emulator.
// The table in ops.h lists their exports; this file defines how a line of it is bound.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "tensor_caster.h"

#if defined(FASTLM_SIMT)
#include <mutex>

#include "simt/count.h"
#endif

namespace py = pybind11;
using namespace py::literals;

namespace {

#if defined(FASTLM_SIMT)
struct OneCall {  // one call at a time: the emulator has one list of tensors
  OneCall() { simt::unregister_tensors(); }
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock{mutex};
};
std::mutex OneCall::mutex;
using Guard = py::call_guard<py::gil_scoped_release, OneCall>;

void bind_emulator(py::module_& m) {
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
    for (const auto& [site, c] : simt::report())
      result[py::str(site)] = py::make_tuple(c.instructions, c.transactions, c.min_transactions);
    return result;
  });
  m.def("reset_report", &simt::reset_report);
}
#else
using Guard = py::call_guard<py::gil_scoped_release>;
void bind_emulator(py::module_&) {}
#endif

// One function per line of the table; they run when the module is imported.
using Binder = void (*)(py::module_&);
std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}
struct Binding {
  explicit Binding(Binder binder) { binders().push_back(binder); }
};

// "(TensorView x, float eps)" -> x, eps: the last word of each parameter. No type has a comma.
std::vector<std::string> names_of(const std::string& parameters) {
  std::vector<std::string> names;
  for (size_t end = parameters.find_first_of(",)"); end != std::string::npos;
       end = parameters.find_first_of(",)", end + 1)) {
    const size_t begin = parameters.find_last_of(" *&", end) + 1;
    names.push_back(parameters.substr(begin, end - begin));
  }
  return names;
}

// pybind11 copies the names.
template <class R, class... A, size_t... I, class... Guards>
void define(py::module_& m, const char* name, const std::vector<std::string>& names,
            R (*function)(A...), std::index_sequence<I...>, const Guards&... guards) {
  if (names.size() != sizeof...(A))
    throw std::logic_error(std::string(name) + ": expected " + std::to_string(sizeof...(A)) +
                           " names of parameters, got " + std::to_string(names.size()));
  m.def(name, function, py::arg(names[I].c_str())..., guards...);
}
template <class R, class... A, class... Guards>
void bind_function(py::module_& m, const char* name, const char* parameters, R (*function)(A...),
                   const Guards&... guards) {
  define(m, name, names_of(parameters), function, std::index_sequence_for<A...>{}, guards...);
}

}  // namespace

#define FASTLM_OP(name, parameters)    \
  void name parameters;                \
  static const Binding name##_binding( \
      [](py::module_& m) { bind_function(m, #name, #parameters, &name, Guard()); });
#define FASTLM_QUERY(result, name, parameters) \
  result name parameters;                      \
  static const Binding name##_binding(         \
      [](py::module_& m) { bind_function(m, #name, #parameters, &name); });
#define FASTLM_CONSTANT(name, value) \
  constexpr int name = value;        \
  static const Binding name##_binding([](py::module_& m) { m.attr(#name) = name; });
#include "cuda/ops.h"

namespace {

void bind_all(py::module_& m) {
  m.doc() =
      "fastlm's CUDA kernels. Outputs are allocated by the caller; the public functions are in "
      "fastlm.ops.";
  bind_emulator(m);
  for (const Binder binder : binders()) binder(m);
}

}  // namespace

#if defined(FASTLM_SIMT)
PYBIND11_MODULE(_simt, m) { bind_all(m); }
#else
PYBIND11_MODULE(_cuda, m) { bind_all(m); }
#endif
