#define FASTLM_BODY "cpu/rope.h"
#include "cpu/base/each_isa.h"
#include "cpu/base/huge_pages.h"
#include "cpu/ops.h"

namespace fastlm {

void rope(TensorView q, TensorView k, TensorView cos, TensorView sin, bool interleaved,
          bool inverse, TensorView q_out, TensorView k_out) {
  prefer_huge_pages(q_out), prefer_huge_pages(k_out);
  FASTLM_RUN(rope, q, k, cos, sin, interleaved, inverse, q_out, k_out);
}

}  // namespace fastlm
