#define FASTLM_BODY "cpu/linear.h"
#include "cpu/base/each_isa.h"
#include "cpu/base/huge_pages.h"
#include "cpu/ops.h"

namespace fastlm {

int64_t linear_workspace(int64_t m, int64_t n, int64_t k, bool weight_gradient) {
  FASTLM_RUN(linear_workspace, m, n, k, weight_gradient);
  return 0;
}

void linear_forward(TensorView x, TensorView w, OptionalTensor bias, TensorView y,
                    TensorView workspace) {
  prefer_huge_pages(y);
  FASTLM_RUN(linear_forward, x, w, bias ? &*bias : nullptr, y, workspace);
}

void linear_input_gradient(TensorView dy, TensorView w, TensorView dx, TensorView workspace) {
  prefer_huge_pages(dx);
  FASTLM_RUN(linear_input_gradient, dy, w, dx, workspace);
}

void linear_weight_gradient(TensorView dy, TensorView x, TensorView dw, TensorView workspace) {
  prefer_huge_pages(dw);
  FASTLM_RUN(linear_weight_gradient, dy, x, dw, workspace);
}

int64_t linear_split_workspace(int64_t m, int64_t n, int64_t k) {
  FASTLM_RUN(linear_split_workspace, m, n, k);
  return 0;
}

void linear_split(TensorView x, TensorView w, OptionalTensor bias, TensorView y,
                  TensorView workspace) {
  prefer_huge_pages(y);
  FASTLM_RUN(linear_split, x, w, bias ? &*bias : nullptr, y, workspace);
}

}  // namespace fastlm
