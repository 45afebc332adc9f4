#include "cpu/probes/product_rate.h"

#include <cpuid.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cpu/probes/peak.h"

namespace fastlm {
namespace {

constexpr int STEPS = 400;    // 1 to 4 microseconds
constexpr int ATTEMPTS = 20;  // the fastest counts: another process may take the core meanwhile

// `operations`: per product.
double gflops(void (*loop)(int64_t), double operations) {
  const auto start = std::chrono::steady_clock::now();
  loop(STEPS);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return operations * PEAK_SUMS * STEPS / elapsed.count() * 1e-9;
}

struct KnownCpu {
  const char* vendor;
  int family, first_model, last_model;
  bool widen;
};
// Measured on these machines (docs/log.md); 143 is the same core as 207.
constexpr KnownCpu KNOWN_CPUS[] = {
    {"AuthenticAMD", 25, 0, 255, false},  // Zen 4 (Zen 3 has neither instruction)
    {"AuthenticAMD", 26, 0, 255, false},  // Zen 5
    {"GenuineIntel", 6, 143, 143, true},  // Sapphire Rapids
    {"GenuineIntel", 6, 207, 207, true},  // Emerald Rapids
};
constexpr double CLEAR = 1.3;  // a ratio above any noise

}  // namespace

ProductRates product_rates(bool avx512, bool avx512_bf16) {
  ProductRates best;
  for (int i = 0; i < ATTEMPTS; ++i) {  // in turns: the first ones power up the wide units
    if (avx512_bf16) best.dot_gflops = std::max(best.dot_gflops, gflops(bf16_avx512, 64));
    if (avx512) best.fma_gflops = std::max(best.fma_gflops, gflops(fp32_avx512, 32));
  }
  return best;
}

ProductChoice choose_product(const std::string& vendor, int family, int model,
                             const std::function<ProductRates()>& measure) {
  for (const KnownCpu& k : KNOWN_CPUS)
    if (vendor == k.vendor && family == k.family && model >= k.first_model && model <= k.last_model)
      return {k.widen, "known of " + vendor + " family " + std::to_string(family) + " model " +
                           std::to_string(model)};
  const ProductRates rates = measure();
  const bool widen = rates.fma_gflops > CLEAR * rates.dot_gflops;
  return {widen, widen ? "measured: FMA is clearly faster" : "measured: FMA is not clearly faster"};
}

CpuModel cpu_model() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  char vendor[13] = {};
  __get_cpuid(0, &a, &b, &c, &d);
  memcpy(vendor, &b, 4), memcpy(vendor + 4, &d, 4), memcpy(vendor + 8, &c, 4);
  __get_cpuid(1, &a, &b, &c, &d);
  int family = a >> 8 & 15, model = a >> 4 & 15;
  if (family == 6 || family == 15) model |= (a >> 16 & 15) << 4;
  if (family == 15) family += a >> 20 & 255;
  return {vendor, family, model};
}

}  // namespace fastlm
