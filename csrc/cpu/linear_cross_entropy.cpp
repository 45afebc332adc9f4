#include <cstdlib>
#include <type_traits>
#include <utility>

#define FASTLM_BODY "cpu/linear_cross_entropy.h"
#include "cpu/base/each_isa.h"

namespace fastlm {

// Every chunk but the last has a multiple of this many rows.
constexpr int64_t CHUNK_ROW_STEP = scalar::RP;

// Bytes of the exponentials, and float32 elements of the statistics and the threads' arrays, for a
// chunk of `rows` rows of x (N, D). The layouts are those of the largest instruction set.
std::pair<int64_t, int64_t> linear_cross_entropy_workspace(const TensorView& x, int64_t classes,
                                                           int64_t rows) {
  constexpr int64_t VB = scalar::VB;
  const int64_t padded = scalar::padded_rows(rows), blocks = scalar::vocabulary_blocks(classes),
                width = (x.size(1) + 31) / 32 * 32;
  // shared: x packed, scaled and packed again, 14 numbers per row, 2 per block; a maximum per row,
  // two sums per block and row; per thread: blocks of w, of scores, of gradients and of dx; gaps in
  // between
  const int64_t shared = padded * (3 * width + 14) + 2 * blocks + 256 + (1 + 2 * blocks) * padded;
  const int64_t per_thread = VB * (2 * width + padded + 3 * VB) + VB * padded + 1024;
  const auto element = [&] { FASTLM_RUN(matrix_element_bytes, x) return int64_t{0}; };
  return {padded * blocks * VB * element(), shared + omp_get_max_threads() * per_thread};
}

}  // namespace fastlm

FASTLM_CONSTANT(CHUNK_ROW_STEP)
FASTLM_BIND(linear_cross_entropy_workspace, "x classes rows")
FASTLM_OP(matrix_element_bytes, "x")
FASTLM_OP(linear_cross_entropy_scores,
          "x w bias target class_weight ignore_index softcap scale exponentials stats at_target"
          " shift log_sum nll smoothed entropy")
FASTLM_OP(linear_cross_entropy_gradients,
          "on_p on_target on_all on_entropy x w bias target class_weight shift log_sum entropy"
          " ignore_index softcap scale have_exponentials exponentials stats at_target dx dw dbias"
          " accumulate")
FASTLM_OP(scale_to, "source factor out")
