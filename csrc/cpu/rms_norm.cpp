#define FASTLM_BODY "cpu/rms_norm.h"
#include "cpu/base/each_isa.h"
#include "cpu/base/huge_pages.h"
#include "cpu/ops.h"

namespace fastlm {

void rms_norm_forward(TensorView x, std::optional<TensorView> residual, TensorView weight,
                      float eps, float offset, TensorView y, std::optional<TensorView> h,
                      TensorView rstd) {
  prefer_huge_pages(y);
  if (h) prefer_huge_pages(*h);
  FASTLM_RUN(rms_norm_forward, x, residual ? &*residual : nullptr, weight, eps, offset, y,
             h ? &*h : nullptr, rstd);
}

void rms_norm_backward(TensorView dy, std::optional<TensorView> dh_above, TensorView h,
                       TensorView weight, TensorView rstd, float offset, TensorView dx,
                       TensorView dw) {
  prefer_huge_pages(dx);
  FASTLM_RUN(rms_norm_backward, dy, dh_above ? &*dh_above : nullptr, h, weight, rstd, offset, dx,
             dw);
}

}  // namespace fastlm
