// THE place that chooses the instruction set. FASTLM_CPU_ISA=amx|avx512|avx2|scalar|amx_emulated
// forces one.
#include <cpuid.h>

#include <cstdlib>
#include <stdexcept>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/isa.h"

namespace fastlm {
namespace {

constexpr const char* kNames[kIsaCount] = {"amx", "avx512", "avx2", "scalar", "amx_emulated"};

// The tile state is 8 KiB that the kernel saves per thread only after a process has asked for it
// (arch_prctl ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 18). Without it the first tile instruction
// is SIGILL.
bool request_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features f;
  __builtin_cpu_init();  // also checks that the operating system saves the wide registers
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  // The avx512 kernels are one level: what Cooper Lake, Sapphire Rapids and Zen 4 share. Older
  // AVX-512 machines (no bf16 dot product) run the avx2 kernels.
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512bf16");
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    const bool tile = d & (1u << 24), int8 = d & (1u << 25), bf16 = d & (1u << 22);
    f.amx_cpu = f.avx512 && tile && int8 && bf16;
  }
  if (f.amx_cpu) f.amx_permission = request_amx();
  return f;
}

const Features& features() {
  static const Features f = detect();
  return f;
}

std::string reason(Isa isa, const Features& f = features()) {
  switch (isa) {
    case Isa::amx:
      if (!f.amx_cpu) return "this CPU has no AMX tiles (amx-tile, amx-int8, amx-bf16)";
      return f.amx_permission ? "" : "the kernel refused the permission to use AMX tiles";
    case Isa::avx512:
    case Isa::amx_emulated:
      return f.avx512 ? "" : "this CPU has not all of AVX-512 F, BW, DQ, VL, VNNI, VBMI and BF16";
    case Isa::avx2:
      return f.avx2 ? "" : "this CPU has no AVX2 with FMA";
    case Isa::scalar:
      return "";
  }
  return "";
}

Isa parse(const std::string& wanted) {
  for (int i = 0; i < kIsaCount; ++i)
    if (wanted == kNames[i]) return static_cast<Isa>(i);
  throw std::invalid_argument(
      "FASTLM_CPU_ISA: wanted one of amx, avx512, avx2, scalar, amx_emulated, got '" + wanted +
      "'");
}

Isa checked(const std::string& wanted) {
  const Isa isa = parse(wanted);
  const std::string why = reason(isa);
  if (!why.empty())
    throw std::invalid_argument("FASTLM_CPU_ISA: '" + wanted + "' cannot run here: " + why);
  return isa;
}

Isa best(const Features& f) {
  for (Isa i : {Isa::amx, Isa::avx512, Isa::avx2})
    if (reason(i, f).empty()) return i;
  return Isa::scalar;
}

Isa choose() {
  const char* forced = std::getenv("FASTLM_CPU_ISA");
  return forced && *forced ? checked(forced) : best(features());
}

Isa& current() {
  static Isa isa = choose();
  return isa;
}

}  // namespace

const char* name(Isa i) { return kNames[static_cast<int>(i)]; }
Isa isa() { return current(); }
void set_isa(const std::string& wanted) { current() = checked(wanted); }
std::string why_not(const std::string& wanted) { return reason(parse(wanted)); }

std::pair<std::string, std::string> choice_on(const Features& f) {
  return {name(best(f)), reason(Isa::amx, f)};
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i)
    if (reason(static_cast<Isa>(i)).empty()) names.push_back(kNames[i]);
  return names;
}

}  // namespace fastlm
