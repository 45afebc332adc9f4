// The pybind11 caster that fills a struct from a Python tuple, item by item and without looking up
// an attribute. The struct passes its members to a function, in the order of the tuple:
//
//     struct Options {
//       bool causal;
//       float scale;
//       OptionalTensor bias;
//       template <class F> void members(F&& f) { f(causal), f(scale), f(bias); }
//     };
//     template <> struct pybind11::detail::type_caster<Options> : struct_caster<Options> {};
//
// A parameter `const Options*` is null where Python passes None; `const Options&` refuses it.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor_caster.h"

namespace pybind11::detail {

template <class Struct>
struct struct_caster {
  static constexpr auto name = const_name("tuple");
  template <class T>
  using cast_op_type = movable_cast_op_type<T>;
  operator Struct*() { return is_none ? nullptr : &value; }
  operator Struct&() {
    if (is_none) throw reference_cast_error();
    return value;
  }
  operator Struct&&() && { return std::move(static_cast<Struct&>(*this)); }

  bool load(handle source, bool) {
    if ((is_none = source.is_none())) return true;
    PyObject* const tuple = source.ptr();
    if (!PyTuple_Check(tuple)) return false;
    Py_ssize_t i = 0;
    const Py_ssize_t size = PyTuple_GET_SIZE(tuple);
    bool good = true;
    value.members([&](auto& member) {
      good = good && i < size && read(PyTuple_GET_ITEM(tuple, i), member);
      ++i;
    });
    if (PyErr_Occurred()) PyErr_Clear();
    return good && i == size;
  }

 private:
  Struct value{};
  bool is_none = false;

  static bool read(PyObject* item, bool& to) {
    const int truth = PyObject_IsTrue(item);
    to = truth == 1;
    return truth >= 0;
  }
  static bool read(PyObject* item, int64_t& to) {
    to = PyLong_AsLongLong(item);
    return to != -1 || !PyErr_Occurred();
  }
  static bool read(PyObject* item, double& to) {
    to = PyFloat_AsDouble(item);
    return to != -1 || !PyErr_Occurred();
  }
  static bool read(PyObject* item, float& to) {
    double wide;
    if (!read(item, wide)) return false;
    to = float(wide);
    return true;
  }
  static bool read(PyObject* item, fastlm::TensorView& to) {
    type_caster<fastlm::TensorView> caster;
    if (item == Py_None || !caster.load(item, true)) return false;
    to = caster;
    return true;
  }
  static bool read(PyObject* item, fastlm::OptionalTensor& to) {
    return item == Py_None || read(item, to.emplace());
  }
};

}  // namespace pybind11::detail
