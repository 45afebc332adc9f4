#define FASTLM_BODY "cpu/glu.h"
#include "cpu/base/each_isa.h"
#include "cpu/base/huge_pages.h"
#include "cpu/ops.h"

namespace fastlm {

void glu_forward(TensorView gate, TensorView up, const std::string& act, TensorView y) {
  prefer_huge_pages(y);
  FASTLM_RUN(glu_forward, gate, up, act, y);
}

void glu_backward(TensorView dy, TensorView gate, TensorView up, const std::string& act,
                  TensorView dgate, TensorView dup) {
  prefer_huge_pages(dgate), prefer_huge_pages(dup);
  FASTLM_RUN(glu_backward, dy, gate, up, act, dgate, dup);
}

}  // namespace fastlm
