// Functions for tests and benchmarks of the extension itself: the bare matrix product, the
// machine's ceilings, the cost of a bound call, the threads.
#include <vector>

#define FASTLM_BODY "cpu/probes/probe.h"
#include "cpu/base/each_isa.h"

namespace fastlm {

// Does nothing: measures how long four tensors take over the boundary.
int64_t count_elements(TensorView a, TensorView b, TensorView c, TensorView d) {
  return a.numel() + b.numel() + c.numel() + d.numel();
}

int thread_count() {
  int n = 0;
#pragma omp parallel
#pragma omp atomic
  ++n;
  return n;
}

// Returns the number of threads to which a denormal number is zero.
int threads_that_flush() {
  int n = 0;
#pragma omp parallel
#pragma omp atomic
  n += (_mm_getcsr() & 0x8040) != 0;
  return n;
}

}  // namespace fastlm

FASTLM_OP(matmul, "a b c")
FASTLM_OP(multiply_in_l1, "bf16_operands repeats")
FASTLM_OP(read_all, "buffer")
FASTLM_BIND(count_elements, "a b c d")
FASTLM_BIND(thread_count, "")
FASTLM_BIND(threads_that_flush, "")
