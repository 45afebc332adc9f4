// The choice of the instruction set for the CPU kernels: one ordered list, best first, and one
// override.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace fastlm {

// Best first, except that the faster of avx512 and avx512_fma is chosen (product_rate.h). The three
// have the same vectors. avx512 multiplies bf16 by its dot product, avx512_fma widens it to float32
// (Cascade Lake, Ice Lake), avx512f also has no dot product of int8 (Skylake).
// Three are never chosen, only forced: avx512_fp16 is avx512_fma with `linear` by fp16 FMA
// (linear_fp16.h), not measured on a machine that has it. amx_emulated is the amx code with software
// tiles (amx.h), avx512_fp16_emulated that of avx512_fp16 with conversions around float32 FMA, for
// tests on machines without either.
enum class Isa {
  amx,
  avx512,
  avx512_fp16,
  avx512_fma,
  avx512f,
  avx2,
  scalar,
  amx_emulated,
  avx512_fp16_emulated
};
constexpr int kIsaCount = 9;

// Features that the choice depends on; each implies the one before it, except avx512_fp16.
// `widen`: FMA is faster than the bf16 dot product.
struct Features {
  bool avx2 = false, avx512 = false, avx512_vnni = false, avx512_bf16 = false, amx_cpu = false,
       amx_permission = false, widen = false, avx512_fp16 = false;
};

const char* name(Isa);
Isa isa();                                  // the instruction set in use
void set_isa(const std::string& isa);       // forces one; throws if this machine cannot run it
std::vector<std::string> supported_isas();  // best first, then amx_emulated where it can run
std::string unavailable_reason(const std::string& isa);  // why it cannot run here; "" when it can
// The choice for a machine with these features, and the reason why it is not amx: for tests
std::pair<std::string, std::string> isa_choice(const Features&);

// How bf16 is multiplied by default, the reason, and the rates of both methods on one core
struct ProductsOfBf16 {
  std::string by, because;
  double dot_gflops, fma_gflops;
};
ProductsOfBf16 products_of_bf16();

}  // namespace fastlm
