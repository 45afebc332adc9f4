#include <cstdlib>
#include <tuple>
#include <type_traits>

#define FASTLM_BODY "cpu/linear_distillation.h"
#include "cpu/base/each_isa.h"

namespace fastlm {

// Returns the shape of a chunk's scores (classes, rows), both padded, and the float32 elements of
// the workspace, for rows of up to `width` elements.
std::tuple<int64_t, int64_t, int64_t> linear_distillation_workspace(int64_t classes, int64_t width,
                                                                    int64_t rows) {
  constexpr int64_t VB = scalar::VB;
  const int64_t padded = scalar::padded_rows(rows), blocks = scalar::vocabulary_blocks(classes);
  width = (width + 31) / 32 * 32;
  // x packed; 2 numbers per block and row, 5 per row; a block of w per thread; gaps in between
  const int64_t shared = padded * (width + 2 * blocks + 5) + 256, per_thread = VB * width + 64;
  return {blocks * VB, padded, shared + omp_get_max_threads() * per_thread};
}

}  // namespace fastlm

FASTLM_BIND(linear_distillation_workspace, "classes width rows")
FASTLM_OP(linear_distillation_scores, "x w softcap scale scores lse workspace")
FASTLM_OP(linear_distillation_rows,
          "kind beta softcap classes student_scores student_lse teacher_scores teacher_lse loss"
          " d_scores workspace")
