// The pybind11 caster that fills a TensorView from any DLPack producer.
//
// There are two methods. `type(x).__dlpack_c_exchange_api__` (torch >= 2.10) fills the view without
// creating a Python object, in 0.1 us; it accepts Parameters and tensors that require grad.
// `x.__dlpack__()` (numpy, jax, cupy) creates a capsule that is kept until the call ends. Rejected:
// torch/extension.h (seconds of compile time, one build per torch release) and passing data_ptr()
// integers (they cost the same as a view, and have no shape to check).
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace pybind11::detail {

// A parameter `const TensorView*` is null where Python passes None; `TensorView` and
// `const TensorView&` refuse it.
template <>
struct type_caster<fastlm::TensorView> {
  static constexpr auto name = const_name("Tensor");
  template <class T>
  using cast_op_type = movable_cast_op_type<T>;
  operator fastlm::TensorView*() { return is_none ? nullptr : &value; }
  operator fastlm::TensorView&() { return reference(); }
  operator fastlm::TensorView&&() && { return std::move(reference()); }

  bool load(handle source, bool) {
    if ((is_none = source.is_none())) return true;
    const fastlm::dlpack::ExchangeApi* api = exchange_api(Py_TYPE(source.ptr()));
    if (api) {
      if (api->view_of_object(source.ptr(), &value.dl) != 0) throw error_already_set();
      return true;
    }
    if (!hasattr(source, "__dlpack__")) return false;
    object capsule;
    // numpy < 2.1 and older producers do not know max_version
    try {
      capsule = source.attr("__dlpack__")(arg("max_version") = make_tuple(1, 0));
    } catch (error_already_set& e) {
      if (!e.matches(PyExc_TypeError)) throw;
      capsule = source.attr("__dlpack__")();
    }
    // The call keeps the capsule, not this caster: casters inside an optional or a vector are
    // destroyed before the function runs. It is never renamed to "used_": the capsule's destructor
    // frees the tensor.
    loader_life_support::add_patient(capsule);
    if (void* p = PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned")) {
      auto* managed = static_cast<fastlm::dlpack::ManagedVersioned*>(p);
      if (managed->version.major != 1)
        throw type_error("DLPack major version " + std::to_string(managed->version.major) +
                         ": expected 1");
      value.dl = managed->tensor;
    } else {
      PyErr_Clear();
      p = PyCapsule_GetPointer(capsule.ptr(), "dltensor");
      if (!p) throw error_already_set();
      value.dl = static_cast<fastlm::dlpack::Managed*>(p)->tensor;
    }
    return true;
  }

 private:
  fastlm::TensorView value;
  bool is_none = false;

  fastlm::TensorView& reference() {
    if (is_none) throw reference_cast_error();
    return value;
  }

  // The exchange table of a Python type, or null. One entry is cached: consecutive calls mostly
  // have the same type.
  static const fastlm::dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
    static PyTypeObject* last_type = nullptr;
    static const fastlm::dlpack::ExchangeApi* last_api = nullptr;
    if (type == last_type) return last_api;
    const fastlm::dlpack::ExchangeApi* api = nullptr;
    if (PyObject* attribute = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type),
                                                     "__dlpack_c_exchange_api__")) {
      if (PyCapsule_IsValid(attribute, "dlpack_exchange_api"))
        api = static_cast<const fastlm::dlpack::ExchangeApi*>(
            PyCapsule_GetPointer(attribute, "dlpack_exchange_api"));
      Py_DECREF(attribute);
      while (api && (api->version.major != 1 || !api->view_of_object)) api = api->previous;
    } else {
      PyErr_Clear();
    }
    Py_INCREF(type);  // the address of a freed type could become another type's
    Py_XDECREF(last_type);
    last_type = type;
    last_api = api;
    return api;
  }
};

}  // namespace pybind11::detail
