#include <cstdlib>
#include <type_traits>

#define FASTLM_BODY "cpu/linear_cross_entropy.h"
#include "cpu/base/each_isa.h"

FASTLM_OP(matrix_element_bytes, "x")
FASTLM_OP(linear_cross_entropy_scores,
          "x w bias target class_weight ignore_index softcap scale exponentials stats at_target"
          " shift log_sum nll smoothed entropy")
FASTLM_OP(linear_cross_entropy_gradients,
          "on_p on_target on_all on_entropy x w bias target class_weight shift log_sum entropy"
          " ignore_index softcap scale have_exponentials exponentials stats at_target dx dw dbias"
          " accumulate")
FASTLM_OP(scale_to, "source factor out")
