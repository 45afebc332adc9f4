// What is done to weights once, when a model is loaded.
#pragma once

#include <string>

#include "cpu/ops.h"

namespace fastlm {

// gguf_blocks.cpp: raw (N, bytes a row) uint8 in blocks of `kind` (Q4_0, Q4_1 or Q8_0) as qdata and
// (N, groups) float32 scales, and zeros for Q4_1 (fastlm/checkpoint/gguf_blocks.py has the
// formulas).
void unpack_blocks(TensorView raw, const std::string& kind, TensorView qdata, TensorView scales,
                   OptionalTensor zeros);

// scale_table.cpp: scales, and zeros if any, (n, groups) float32, as the table of a DecodeLinear
// (decode_plan.h). Whether the table's dtype holds every number of it exactly.
bool scale_table(TensorView scales, OptionalTensor zeros, int bits, TensorView table);

}  // namespace fastlm
