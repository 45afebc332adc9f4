#include <cstdlib>
#include <type_traits>

#define FASTLM_BODY "cpu/linear_cross_entropy.h"
#include "cpu/base/each_isa.h"
#include "cpu/base/huge_pages.h"
#include "cpu/ops.h"

namespace fastlm {
namespace {
const TensorView* pointer(const OptionalTensor& t) { return t ? &*t : nullptr; }
}  // namespace

int64_t matrix_element_bytes(TensorView x) {
  FASTLM_RUN(matrix_element_bytes, x);
  return 0;
}

void linear_cross_entropy_scores(TensorView x, TensorView w, OptionalTensor bias, TensorView target,
                                 OptionalTensor class_weight, int64_t ignore_index, float softcap,
                                 float scale, OptionalTensor exponentials, TensorView stats,
                                 TensorView at_target, TensorView shift, TensorView log_sum,
                                 TensorView nll, TensorView smoothed, OptionalTensor entropy) {
  if (exponentials) prefer_huge_pages(*exponentials);
  FASTLM_RUN(linear_cross_entropy_scores, x, w, pointer(bias), target, pointer(class_weight),
             ignore_index, softcap, scale, pointer(exponentials), stats, at_target, shift, log_sum,
             nll, smoothed, pointer(entropy));
}

void linear_cross_entropy_gradients(TensorView on_p, TensorView on_target, OptionalTensor on_all,
                                    OptionalTensor on_entropy, TensorView x, TensorView w,
                                    OptionalTensor bias, TensorView target,
                                    OptionalTensor class_weight, TensorView shift,
                                    TensorView log_sum, OptionalTensor entropy,
                                    int64_t ignore_index, float softcap, float scale,
                                    bool have_exponentials, TensorView exponentials,
                                    TensorView stats, TensorView at_target, OptionalTensor dx,
                                    OptionalTensor dw, OptionalTensor dbias, bool accumulate) {
  if (dw && !accumulate) prefer_huge_pages(*dw);
  if (!have_exponentials) prefer_huge_pages(exponentials);
  FASTLM_RUN(linear_cross_entropy_gradients, on_p, on_target, pointer(on_all), pointer(on_entropy),
             x, w, pointer(bias), target, pointer(class_weight), shift, log_sum, pointer(entropy),
             ignore_index, softcap, scale, have_exponentials, exponentials, stats, at_target,
             pointer(dx), pointer(dw), pointer(dbias), accumulate);
}

void scale_to(TensorView source, float factor, TensorView out) {
  prefer_huge_pages(out);
  FASTLM_RUN(scale_to, source, factor, out);
}

}  // namespace fastlm
