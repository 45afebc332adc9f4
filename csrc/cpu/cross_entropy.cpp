#define FASTLM_BODY "cpu/cross_entropy.h"
#include "cpu/base/each_isa.h"
#include "cpu/base/huge_pages.h"
#include "cpu/ops.h"

namespace fastlm {

int64_t first_bad_target(const TensorView& target, int64_t classes, int64_t ignore_index) {
  const int64_t *t = target.data<int64_t>("target"), n = target.numel();
  for (int64_t i = 0; i < n; ++i)
    if (t[i] != ignore_index && (t[i] < 0 || t[i] >= classes)) return i;
  return -1;
}

void cross_entropy_forward(TensorView logits, TensorView target, OptionalTensor class_weight,
                           int64_t ignore_index, float softcap, float scale, TensorView shift,
                           TensorView log_sum, TensorView nll, TensorView smoothed) {
  FASTLM_RUN(cross_entropy_forward, logits, target, class_weight ? &*class_weight : nullptr,
             ignore_index, softcap, scale, shift, log_sum, nll, smoothed);
}

void cross_entropy_backward(TensorView on_p, TensorView on_target, OptionalTensor on_all,
                            TensorView logits, TensorView target, OptionalTensor class_weight,
                            TensorView shift, TensorView log_sum, int64_t ignore_index,
                            float softcap, float scale, TensorView dlogits) {
  prefer_huge_pages(dlogits);
  FASTLM_RUN(cross_entropy_backward, on_p, on_target, on_all ? &*on_all : nullptr, logits, target,
             class_weight ? &*class_weight : nullptr, shift, log_sum, ignore_index, softcap, scale,
             dlogits);
}

int64_t cross_entropy_loss(TensorView logits, TensorView target, int64_t ignore_index, bool mean,
                           float softcap, float scale, TensorView loss, OptionalTensor stats) {
  const int64_t bad = first_bad_target(target, logits.size(1), ignore_index);
  if (bad >= 0) return bad;
  const auto run = [&] {
    FASTLM_RUN(cross_entropy_loss, logits, target, ignore_index, mean, softcap, scale, loss,
               stats ? &*stats : nullptr);
  };
  run();
  return -1;
}

void cross_entropy_loss_backward(TensorView dloss, TensorView logits, TensorView target,
                                 TensorView stats, int64_t ignore_index, bool mean, float softcap,
                                 float scale, TensorView dlogits) {
  prefer_huge_pages(dlogits);
  FASTLM_RUN(cross_entropy_loss_backward, dloss, logits, target, stats, ignore_index, mean, softcap,
             scale, dlogits);
}

}  // namespace fastlm
