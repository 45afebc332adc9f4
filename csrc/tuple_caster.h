// Fills a C++ struct from a Python tuple, such as a NamedTuple, field by field in their order:
//
//     FASTLM_TUPLE_CASTER(fastlm::AdamwOptions, lr, beta1, beta2, eps, weight_decay, ...)
#pragma once

#include <pybind11/pybind11.h>

namespace pybind11::detail {

template <class T>
bool load_field(handle source, T& field) {
  make_caster<T> caster;
  if (!caster.load(source, true)) return false;
  field = cast_op<T>(std::move(caster));
  return true;
}

template <class... T>
bool load_fields(handle source, T&... fields) {
  if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != sizeof...(T)) return false;
  Py_ssize_t i = 0;
  return (load_field(PyTuple_GET_ITEM(source.ptr(), i++), fields) && ...);
}

}  // namespace pybind11::detail

// The fields: all those of the struct
#define FASTLM_TUPLE_CASTER(Struct, ...)                    \
  template <>                                               \
  struct pybind11::detail::type_caster<Struct> {            \
    PYBIND11_TYPE_CASTER(Struct, const_name("NamedTuple")); \
    bool load(handle source, bool) {                        \
      auto& [__VA_ARGS__] = value;                          \
      return load_fields(source, __VA_ARGS__);              \
    }                                                       \
  };
