#include <cstdint>

namespace fastlm {
// Rows per partial sum of the gradients of weight and bias: 64 partial sums for 4096 rows
constexpr int64_t LAYER_NORM_BLOCK_ROWS = 64;
}  // namespace fastlm

#define FASTLM_BODY "cpu/layer_norm.h"
#include "cpu/base/each_isa.h"

FASTLM_OP(layer_norm_forward, "x residual weight bias eps y h mean rstd")
FASTLM_OP(layer_norm_backward, "dy dh_above h weight mean rstd dx dweight dbias partial")
FASTLM_CONSTANT(LAYER_NORM_BLOCK_ROWS)
