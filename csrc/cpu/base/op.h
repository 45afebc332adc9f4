// Binds a C++ function to the Python module fastlm._cpu, by one line at the foot of the file that
// defines it. That line has the names of the arguments; their types follow from the function
// pointer.
//
//     FASTLM_OP(rms_norm_forward, "x residual weight eps offset y h rstd")
//         a kernel body (each_isa.h): a table with one version per instruction set; a call runs
//         that of the instruction set in use
//     FASTLM_BIND(first_bad_target, "target classes ignore_index")
//         a function that is compiled once
//     FASTLM_CONSTANT(RMS_NORM_BLOCK_ROWS)
//         a constant that the host code in Python needs
//     FASTLM_MODULE(m) { pybind11::class_<DecodePlan>(m, "DecodePlan") ...; }
//         anything else
//
// A reference (const TensorView&) is a required tensor; a pointer (const TensorView*) is null where
// Python passes None. No call holds the interpreter's lock. Rejected: declarations in a header and
// one m.def per function in bindings.cpp, which repeated every signature five times.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu/base/isa.h"
#include "tensor_caster.h"

namespace fastlm {

using Binder = void (*)(pybind11::module_&);

// Every binder of the extension; bindings.cpp runs them when the module is imported.
inline std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}

struct Binding {
  explicit Binding(Binder binder) { binders().push_back(binder); }
};

// The versions of a kernel, in the order of Isa.
template <class R, class... A>
struct IsaTable {
  R (*at[kIsaCount])(A...);
  R operator()(A... arguments) const { return at[int(isa())](std::forward<A>(arguments)...); }
};
template <class R, class... A, class... Others>
constexpr IsaTable<R, A...> isa_table(R (*first)(A...), Others... others) {
  static_assert(sizeof...(Others) + 1 == kIsaCount);
  return {{first, others...}};
}

// `names`: the arguments', separated by spaces.
template <class Function, size_t... I>
void define(pybind11::module_& m, const char* name, const char* names, Function function,
            std::index_sequence<I...>) {
  std::istringstream words(names);
  std::vector<std::string> argument;
  for (std::string word; words >> word;) argument.push_back(word);
  if (argument.size() != sizeof...(I))
    throw std::logic_error(std::string(name) + ": expected " + std::to_string(sizeof...(I)) +
                           " names of arguments, got " + std::to_string(argument.size()));
  m.def(name, function, pybind11::arg(argument[I].c_str())...,
        pybind11::call_guard<pybind11::gil_scoped_release>());
}
template <class R, class... A>
void bind(pybind11::module_& m, const char* name, const char* names, R (*function)(A...)) {
  define(m, name, names, function, std::index_sequence_for<A...>{});
}
template <class R, class... A>
void bind(pybind11::module_& m, const char* name, const char* names,
          const IsaTable<R, A...>& versions) {
  const IsaTable<R, A...>* table = &versions;
  define(
      m, name, names,
      [table](A... arguments) -> R { return (*table)(std::forward<A>(arguments)...); },
      std::index_sequence_for<A...>{});
}

}  // namespace fastlm

#define FASTLM_MODULE(m) FASTLM_MODULE_AT(m, __LINE__)
#define FASTLM_MODULE_AT(m, line) FASTLM_MODULE_NAMED(m, line)
#define FASTLM_MODULE_NAMED(m, line)                                 \
  static void bind_at_##line(pybind11::module_&);                    \
  static const ::fastlm::Binding binding_at_##line{&bind_at_##line}; \
  static void bind_at_##line(pybind11::module_& m)

#define FASTLM_BIND(function, names) \
  FASTLM_MODULE(m) { ::fastlm::bind(m, #function, names, &::fastlm::function); }

#define FASTLM_CONSTANT(name) \
  FASTLM_MODULE(m) { m.attr(#name) = ::fastlm::name; }

#define FASTLM_OP(function, names)                                                              \
  static constexpr auto function##_by_isa = ::fastlm::isa_table(                                \
      &::fastlm::amx::function, &::fastlm::avx512::function, &::fastlm::avx512_fp16::function,  \
      &::fastlm::avx512_fma::function, &::fastlm::avx512f::function, &::fastlm::avx2::function, \
      &::fastlm::scalar::function, &::fastlm::amx_emulated::function,                           \
      &::fastlm::avx512_fp16_emulated::function);                                               \
  FASTLM_MODULE(m) { ::fastlm::bind(m, #function, names, function##_by_isa); }
