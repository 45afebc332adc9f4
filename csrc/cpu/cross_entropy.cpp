#include <cstdint>

namespace fastlm {
constexpr int64_t CROSS_ENTROPY_FEW_ROWS = 64;  // statistics of up to this many are on the stack
}  // namespace fastlm

#define FASTLM_BODY "cpu/cross_entropy.h"
#include "cpu/base/each_isa.h"

namespace fastlm {

// Returns the first row with a target that is neither a class nor ignored, or -1.
int64_t first_bad_target(const TensorView& target, int64_t classes, int64_t ignore_index) {
  const int64_t *t = target.data<int64_t>("target"), n = target.numel();
  for (int64_t i = 0; i < n; ++i)
    if (t[i] != ignore_index && (t[i] < 0 || t[i] >= classes)) return i;
  return -1;
}

// The loss of all rows. Returns first_bad_target, and computes nothing unless that is -1.
int64_t cross_entropy_loss(const TensorView& logits, const TensorView& target, int64_t ignore_index,
                           bool mean, float softcap, float scale, const TensorView& loss,
                           const TensorView* stats) {
  const int64_t bad = first_bad_target(target, logits.size(1), ignore_index);
  if (bad >= 0) return bad;
  const auto run = [&] {
    FASTLM_RUN(cross_entropy_loss, logits, target, ignore_index, mean, softcap, scale, loss, stats);
  };
  run();
  return -1;
}

}  // namespace fastlm

FASTLM_OP(cross_entropy_forward,
          "logits target class_weight ignore_index softcap scale shift log_sum nll smoothed")
FASTLM_OP(cross_entropy_backward,
          "on_p on_target on_all logits target class_weight shift log_sum ignore_index softcap"
          " scale dlogits")
FASTLM_BIND(first_bad_target, "target classes ignore_index")
FASTLM_BIND(cross_entropy_loss, "logits target ignore_index mean softcap scale loss stats")
FASTLM_OP(cross_entropy_loss_backward,
          "dloss logits target stats ignore_index mean softcap scale dlogits")
FASTLM_CONSTANT(CROSS_ENTROPY_FEW_ROWS)
