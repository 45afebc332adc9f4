#include <cstdlib>
#include <type_traits>

#define FASTLM_BODY "cpu/linear_distillation.h"
#include "cpu/base/each_isa.h"
#include "cpu/base/huge_pages.h"
#include "cpu/ops.h"

namespace fastlm {

void linear_distillation_scores(TensorView x, TensorView w, float softcap, float scale,
                                TensorView scores, TensorView lse, TensorView workspace) {
  prefer_huge_pages(scores);
  FASTLM_RUN(linear_distillation_scores, x, w, softcap, scale, scores, lse, workspace);
}

void linear_distillation_rows(const std::string& kind, float beta, float softcap, int64_t classes,
                              TensorView student_scores, TensorView student_lse,
                              TensorView teacher_scores, TensorView teacher_lse, TensorView loss,
                              OptionalTensor d_scores, TensorView workspace) {
  FASTLM_RUN(linear_distillation_rows, kind, beta, softcap, classes, student_scores, student_lse,
             teacher_scores, teacher_lse, loss, d_scores ? &*d_scores : nullptr, workspace);
}

}  // namespace fastlm
