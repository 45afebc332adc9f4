#include <cstdint>
#include <type_traits>

namespace fastlm {
// A tile takes 64 int8 of k, and its sums are stored after every group: with groups below this size
// the int8 dot product is as fast or faster (groups of 32: 1.7 to 2.2 times) ...
constexpr int64_t TILE_GROUP = 128;
// ... and from this many rows on, which pay for dequantizing the weight, bf16 tiles are (groups of
// 32, 512 rows: 2.2 times; the limit is estimated from the two rates). A block of the engine's cache
// has as many rows, so the products of whole blocks have the same bits in every batch.
constexpr int64_t BF16_TILE_ROWS = 64;
}  // namespace fastlm

#define FASTLM_BODY "cpu/quantized/quantized_linear.h"
#define FASTLM_INT8_BODY
#include "cpu/base/each_isa.h"

namespace fastlm {
namespace {

// Whether the int8 dot product of avx512 runs on a machine with tiles.
bool tiles_lose(const TensorView& x, int64_t group_size, int act_bits, int form) {
  const bool many_rows = x.numel() >= BF16_TILE_ROWS * x.size(-1);
  return isa() == Isa::amx && act_bits == 8 && group_size < TILE_GROUP && (form || !many_rows);
}

}  // namespace

// One row of up to this many columns is arranged on the stack (ON_STACK of quantized_dot.h) in any
// format: a decode step need not query the size of its workspace, 0.6 us of 28.
constexpr int64_t QUANTIZED_ROW_ON_STACK = 8192;

void quantized_linear(const TensorView& x, const TensorView& qdata, const TensorView& scales,
                      const TensorView* zeros, const TensorView* bias, int bits, int64_t group_size,
                      int act_bits, int form, const TensorView& y, const TensorView* workspace) {
  prefer_huge_pages(y);
  if (tiles_lose(x, group_size, act_bits, form))
    return avx512::quantized_linear(x, qdata, scales, zeros, bias, bits, group_size, act_bits, form,
                                    y, workspace);
  FASTLM_RUN(quantized_linear, x, qdata, scales, zeros, bias, bits, group_size, act_bits, form, y,
             workspace);
}

int64_t quantized_linear_workspace(const TensorView& x, int64_t n, int bits, int64_t group_size,
                                   int act_bits, int form) {
  if (tiles_lose(x, group_size, act_bits, form))
    return avx512::quantized_linear_workspace(x, n, bits, group_size, act_bits, form);
  FASTLM_RUN(quantized_linear_workspace, x, n, bits, group_size, act_bits, form);
  return 0;
}

}  // namespace fastlm

FASTLM_CONSTANT(QUANTIZED_ROW_ON_STACK)
FASTLM_CONSTANT(BF16_TILE_ROWS)
FASTLM_BIND(quantized_linear, "x qdata scales zeros bias bits group_size act_bits form y workspace")
FASTLM_BIND(quantized_linear_workspace, "x n bits group_size act_bits form")
FASTLM_OP(quantized_linear_backward, "dy qdata scales zeros bits group_size dx workspace")
FASTLM_OP(quantized_linear_backward_workspace, "dy")
FASTLM_OP(dequantize, "qdata scales zeros bits group_size out")
