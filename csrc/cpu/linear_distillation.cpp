#include <cstdlib>
#include <type_traits>

#define FASTLM_BODY "cpu/linear_distillation.h"
#include "cpu/base/each_isa.h"

FASTLM_OP(linear_distillation_scores, "x w softcap scale scores lse workspace")
FASTLM_OP(linear_distillation_rows,
          "kind beta softcap classes student_scores student_lse teacher_scores teacher_lse loss"
          " d_scores workspace")
