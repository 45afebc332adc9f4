// Functions for tests and benchmarks of the extension itself: the bare matrix core, the machine's
// ceilings, the cost of a bound call, the threads.
#include <vector>

#define FASTLM_BODY "cpu/probes/probe.h"
#include "cpu/base/each_isa.h"
#include "cpu/ops.h"

namespace fastlm {

void matmul(TensorView a, TensorView b, TensorView c) { FASTLM_RUN(matmul, a, b, c); }

double multiply_in_l1(bool bf16_operands, int64_t repeats) {
  FASTLM_RUN(multiply_in_l1, bf16_operands, repeats);
  return 0;
}

double read_all(TensorView buffer) {
  FASTLM_RUN(read_all, buffer);
  return 0;
}

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

int threads_that_flush() {
  int n = 0;
#pragma omp parallel
#pragma omp atomic
  n += (_mm_getcsr() & 0x8040) != 0;
  return n;
}

}  // namespace fastlm
