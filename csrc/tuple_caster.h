// Fills a C++ struct from a Python tuple, such as a NamedTuple, field by field in their order:
//
//     FASTLM_TUPLE_CASTER(fastlm::AdamwOptions, lr, beta1, beta2, eps, weight_decay, ...)
//
// A parameter `const Struct*` is null where Python passes None; `const Struct&` refuses it.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor_caster.h"

namespace pybind11::detail {

template <class T>
bool load_field(handle source, T& field) {
  make_caster<T> caster;
  if (!caster.load(source, true)) return false;
  field = cast_op<T>(std::move(caster));
  return true;
}
inline bool load_field(handle source, fastlm::OptionalTensor& field) {
  field.reset();
  return source.is_none() || load_field(source, field.emplace());
}

template <class... T>
bool load_fields(handle source, T&... fields) {
  if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != sizeof...(T)) return false;
  Py_ssize_t i = 0;
  return (load_field(PyTuple_GET_ITEM(source.ptr(), i++), fields) && ...);
}

// FASTLM_TUPLE_CASTER defines its member `load(source, struct)`.
template <class Struct>
struct tuple_fields;

template <class Struct>
struct fields_caster {
  static constexpr auto name = const_name("NamedTuple");
  template <class T>
  using cast_op_type = movable_cast_op_type<T>;
  operator Struct*() { return is_none ? nullptr : &value; }
  operator Struct&() {
    if (is_none) throw reference_cast_error();
    return value;
  }
  operator Struct&&() && { return std::move(static_cast<Struct&>(*this)); }

  bool load(handle source, bool) {
    return (is_none = source.is_none()) || tuple_fields<Struct>::load(source, value);
  }

 private:
  Struct value{};
  bool is_none = false;
};

}  // namespace pybind11::detail

// The fields: all those of the struct
#define FASTLM_TUPLE_CASTER(Struct, ...)             \
  template <>                                        \
  struct pybind11::detail::tuple_fields<Struct> {    \
    static bool load(handle source, Struct& value) { \
      auto& [__VA_ARGS__] = value;                   \
      return load_fields(source, __VA_ARGS__);       \
    }                                                \
  };                                                 \
  template <>                                        \
  struct pybind11::detail::type_caster<Struct> : fields_caster<Struct> {};
