#include <cstdint>

namespace fastlm {
// Rows per partial sum of the weight's gradient: 64 partial sums for a batch of 4096 rows
constexpr int64_t RMS_NORM_BLOCK_ROWS = 64;
}  // namespace fastlm

#define FASTLM_BODY "cpu/rms_norm.h"
#include "cpu/base/each_isa.h"

FASTLM_OP(rms_norm_forward, "x residual weight eps offset y h rstd")
FASTLM_OP(rms_norm_backward, "dy dh_above h weight rstd offset dx dw")
FASTLM_CONSTANT(RMS_NORM_BLOCK_ROWS)
