// The Python module fastlm._cpu. Each file of csrc/cpu binds what it defines (cpu/base/op.h).
#include "cpu/base/huge_pages.h"
#include "cpu/base/op.h"

FASTLM_BIND(prefer_huge_pages, "output")
FASTLM_MODULE(m) {
  using namespace pybind11::literals;
  m.def("set_huge_pages", [](bool enabled) { fastlm::use_huge_pages = enabled; }, "enabled"_a);
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() =
      "fastlm's CPU kernels. Outputs are allocated by the caller; the public functions are in "
      "fastlm.ops.";
  for (const fastlm::Binder bind : fastlm::binders()) bind(m);
}
