#include <type_traits>

#define FASTLM_BODY "cpu/quantized/quantized_linear.h"
#include "cpu/base/each_isa.h"
#include "cpu/base/huge_pages.h"
#include "cpu/ops.h"

namespace fastlm {
namespace {

// A tile takes 64 int8 of k, and its sums are stored after every group: with groups below 128 the
// int8 dot product is as fast or faster (groups of 32: 1.7 to 2.2 times).
bool tiles_lose(int64_t group_size, int act_bits) {
  return isa() == Isa::amx && act_bits == 8 && group_size < 128;
}

}  // namespace

void quantized_linear(TensorView x, TensorView qdata, TensorView scales, OptionalTensor zeros,
                      OptionalTensor bias, int bits, int64_t group_size, int act_bits, int form,
                      TensorView y, OptionalTensor workspace) {
  prefer_huge_pages(y);
  const TensorView *z = zeros ? &*zeros : nullptr, *b = bias ? &*bias : nullptr,
                   *room = workspace ? &*workspace : nullptr;
  if (tiles_lose(group_size, act_bits))
    return avx512::quantized_linear(x, qdata, scales, z, b, bits, group_size, act_bits, form, y,
                                    room);
  FASTLM_RUN(quantized_linear, x, qdata, scales, z, b, bits, group_size, act_bits, form, y, room);
}

int64_t quantized_linear_workspace(TensorView x, int64_t n, int bits, int64_t group_size,
                                   int act_bits, int form) {
  if (tiles_lose(group_size, act_bits))
    return avx512::quantized_linear_workspace(x, n, bits, group_size, act_bits, form);
  FASTLM_RUN(quantized_linear_workspace, x, n, bits, group_size, act_bits, form);
  return 0;
}

void quantized_linear_backward(TensorView dy, TensorView qdata, TensorView scales,
                               OptionalTensor zeros, int bits, int64_t group_size, TensorView dx,
                               TensorView workspace) {
  FASTLM_RUN(quantized_linear_backward, dy, qdata, scales, zeros ? &*zeros : nullptr, bits,
             group_size, dx, workspace);
}

int64_t quantized_linear_backward_workspace(TensorView dy) {
  FASTLM_RUN(quantized_linear_backward_workspace, dy);
  return 0;
}

void dequantize(TensorView qdata, TensorView scales, OptionalTensor zeros, int bits,
                int64_t group_size, TensorView out) {
  FASTLM_RUN(dequantize, qdata, scales, zeros ? &*zeros : nullptr, bits, group_size, out);
}

}  // namespace fastlm
