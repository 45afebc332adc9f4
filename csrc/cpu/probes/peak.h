// Loops of one instruction on operands in registers (peak.cpp). Each of `steps` is PEAK_SUMS
// independent products, more than two units with a latency of 4 to 6 have in flight.
#pragma once

#include <cstdint>

namespace fastlm {

constexpr int PEAK_SUMS = 12;
// These two also decide how bf16 is multiplied (product_rate.h): 32 and 64 operations per product.
void fp32_avx512(int64_t steps);
void bf16_avx512(int64_t steps);

}  // namespace fastlm
