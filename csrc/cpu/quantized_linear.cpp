#include <new>

#define FASTLM_BODY "cpu/quantized_linear.h"
#include "cpu/each_isa.h"
#include "cpu/huge_pages.h"
#include "cpu/ops.h"

namespace fastlm {

void quantized_linear(TensorView x, TensorView qdata, TensorView scales, OptionalTensor zeros,
                      OptionalTensor bias, int bits, int64_t group_size, int act_bits, int form,
                      TensorView y) {
  prefer_huge_pages(y);
  FASTLM_RUN(quantized_linear, x, qdata, scales, zeros ? &*zeros : nullptr, bias ? &*bias : nullptr,
             bits, group_size, act_bits, form, y);
}

void quantized_linear_backward(TensorView dy, TensorView qdata, TensorView scales,
                               OptionalTensor zeros, int bits, int64_t group_size, TensorView dx) {
  FASTLM_RUN(quantized_linear_backward, dy, qdata, scales, zeros ? &*zeros : nullptr, bits,
             group_size, dx);
}

void dequantize(TensorView qdata, TensorView scales, OptionalTensor zeros, int bits,
                int64_t group_size, TensorView out) {
  FASTLM_RUN(dequantize, qdata, scales, zeros ? &*zeros : nullptr, bits, group_size, out);
}

}  // namespace fastlm
