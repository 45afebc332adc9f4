// Which instruction set the CPU kernels run on: one ordered list, best first, one override.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace fastlm {

// Best first, but for avx512 and avx512_fma, of which the faster one is chosen (product_rate.h):
// the same vectors, products of bf16 by its dot product or widened to float32. amx_emulated is the
// amx code with software tiles (amx.h): chosen by force only, for tests on machines without AMX.
enum class Isa { amx, avx512, avx512_fma, avx2, scalar, amx_emulated };
constexpr int kIsaCount = 6;

// What the choice is made from; each has what the one before it has. `widen`: FMA is faster than
// the bf16 dot product.
struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_cpu = false, amx_permission = false,
       widen = false;
};

const char* name(Isa);
Isa isa();                                    // what kernels run on now
void set_isa(const std::string& isa);         // force one; throws if this machine cannot run it
std::vector<std::string> supported_isas();    // best first, then amx_emulated where it can run
std::string why_not(const std::string& isa);  // "" when it can run here
// What a machine with these features would run on, and why not amx: for tests of the choice
std::pair<std::string, std::string> choice_on(const Features&);

// How products of bf16 are made by choice, how that is known, and what either way reaches on a core
struct ProductsOfBf16 {
  std::string by, because;
  double dot_gflops, fma_gflops;
};
ProductsOfBf16 products_of_bf16();

}  // namespace fastlm
