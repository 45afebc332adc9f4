#define FASTLM_BODY "cpu/linear.h"
#define FASTLM_FP16_BODY
#include "cpu/base/each_isa.h"

FASTLM_OP(linear_forward, "x w bias y workspace")
FASTLM_OP(linear_input_gradient, "dy w dx workspace")
FASTLM_OP(linear_weight_gradient, "dy x dw workspace")
FASTLM_OP(linear_workspace, "m n k weight_gradient")
FASTLM_OP(linear_split, "x w bias y workspace")
FASTLM_OP(linear_split_workspace, "m n k")
