// Which instruction set the CPU kernels run on: one ordered list, best first, one override.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace fastlm {

// Best first. amx_emulated is the amx code with software tiles (amx.h): chosen by force only, for
// tests on machines without AMX.
enum class Isa { amx, avx512, avx2, scalar, amx_emulated };
constexpr int kIsaCount = 5;

// What the choice is made from; each has what the one before it has.
struct Features {
  bool avx2 = false, avx512 = false, amx_cpu = false, amx_permission = false;
};

const char* name(Isa);
Isa isa();                                    // what kernels run on now
void set_isa(const std::string& isa);         // force one; throws if this machine cannot run it
std::vector<std::string> supported_isas();    // best first, then amx_emulated where it can run
std::string why_not(const std::string& isa);  // "" when it can run here
// What a machine with these features would run on, and why not amx: for tests of the choice
std::pair<std::string, std::string> choice_on(const Features&);

}  // namespace fastlm
