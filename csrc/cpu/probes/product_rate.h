// The cost of a bf16 product on this core: by the dot product instruction, or by FMA on operands
// widened to float32. On Intel's cores the dot product has half the rate of FMA, on AMD's twice.
#pragma once

#include <functional>
#include <string>

namespace fastlm {

// The rate of one core with either instruction on registers; 0 where the instruction is missing.
struct ProductRates {
  double dot_gflops = 0, fma_gflops = 0;
};
ProductRates product_rates(bool avx512, bool avx512_bf16);  // takes 50 to 100 microseconds

// Whether FMA is the faster of the two, and the reason. The answer is the same in every process on
// a machine, so results are the same bits from run to run.
struct ProductChoice {
  bool widen;
  std::string because;
};
ProductChoice choose_product(const std::string& vendor, int family, int model,
                             const std::function<ProductRates()>& measure);

struct CpuModel {
  std::string vendor;  // "GenuineIntel", "AuthenticAMD"
  int family, model;
};
CpuModel cpu_model();

}  // namespace fastlm
