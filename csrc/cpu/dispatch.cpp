// Chooses the instruction set; no other file does. FASTLM_CPU_ISA=<name> forces one.
#include <cpuid.h>

#include <cstdlib>
#include <stdexcept>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/base/op.h"
#include "cpu/probes/product_rate.h"

namespace fastlm {
namespace {

constexpr const char* kNames[kIsaCount] = {"amx",        "avx512",       "avx512_fp16",
                                           "avx512_fma", "avx512f",      "avx2",
                                           "scalar",     "amx_emulated", "avx512_fp16_emulated"};

// Linux saves the 8 KiB of tile state per thread only after the process has requested it
// (arch_prctl ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 18). Without the request the first tile
// instruction raises SIGILL.
bool request_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

ProductRates measure_rates() {
  return product_rates(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bf16"));
}
const ProductChoice& product_choice() {
  static const ProductChoice choice = [] {
    const CpuModel cpu = cpu_model();
    return choose_product(cpu.vendor, cpu.family, cpu.model, measure_rates);
  }();
  return choice;
}

Features detect() {
  Features f;
  __builtin_cpu_init();  // also checks that the operating system saves the wide registers
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
  // Cooper Lake has bf16 without VBMI
  f.avx512_bf16 =
      f.avx512_vnni && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
  f.avx512_fp16 = f.avx512_vnni && __builtin_cpu_supports("avx512fp16");
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    const bool tile = d & (1u << 24), int8 = d & (1u << 25), bf16 = d & (1u << 22);
    f.amx_cpu = f.avx512_bf16 && tile && int8 && bf16;
  }
  if (f.amx_cpu) f.amx_permission = request_amx();
  f.widen = f.avx512_bf16 && product_choice().widen;
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
    case Isa::avx512f:
      return f.avx512 ? "" : "this CPU lacks one of AVX-512 F, BW, DQ and VL";
    case Isa::avx512_fp16:
      if (f.avx512_vnni && !f.avx512_fp16) return "this CPU has no AVX-512 FP16";
      return reason(Isa::avx512_fma, f);
    case Isa::avx512_fp16_emulated:
    case Isa::avx512_fma:
      if (f.avx512 && !f.avx512_vnni) return "this CPU has no AVX-512 VNNI";
      return reason(Isa::avx512f, f);
    case Isa::avx512:
    case Isa::amx_emulated:
      if (f.avx512 && !f.avx512_bf16) return "this CPU lacks AVX-512 BF16 or VBMI";
      return reason(Isa::avx512_fma, f);
    case Isa::avx2:
      return f.avx2 ? "" : "this CPU has no AVX2 with FMA";
    case Isa::scalar:
      return "";
  }
  return "";
}

Isa parse(const std::string& isa_name) {
  for (int i = 0; i < kIsaCount; ++i)
    if (isa_name == kNames[i]) return static_cast<Isa>(i);
  std::string names;
  for (const char* candidate : kNames) names += std::string(names.empty() ? "" : ", ") + candidate;
  throw std::invalid_argument("FASTLM_CPU_ISA: expected one of " + names + ", got '" + isa_name +
                              "'");
}

Isa parse_supported(const std::string& isa_name) {
  const Isa isa = parse(isa_name);
  const std::string message = reason(isa);
  if (!message.empty())
    throw std::invalid_argument("FASTLM_CPU_ISA: '" + isa_name + "' cannot run here: " + message);
  return isa;
}

// The levels to choose from, best first.
std::vector<Isa> in_order(const Features& f) {
  std::vector<Isa> levels = {Isa::amx,     Isa::avx512, Isa::avx512_fma,
                             Isa::avx512f, Isa::avx2,   Isa::scalar};
  if (f.widen) std::swap(levels[1], levels[2]);
  return levels;
}

Isa best(const Features& f) {
  for (Isa i : in_order(f))
    if (reason(i, f).empty()) return i;
  return Isa::scalar;
}

Isa choose() {
  const char* forced = std::getenv("FASTLM_CPU_ISA");
  return forced && *forced ? parse_supported(forced) : best(features());
}

Isa& current() {
  static Isa isa = choose();
  return isa;
}

}  // namespace

const char* name(Isa i) { return kNames[static_cast<int>(i)]; }
Isa isa() { return current(); }
void set_isa(const std::string& isa_name) { current() = parse_supported(isa_name); }
std::string unavailable_reason(const std::string& isa_name) { return reason(parse(isa_name)); }

std::pair<std::string, std::string> isa_choice(const Features& f) {
  return {name(best(f)), reason(Isa::amx, f)};
}

ProductsOfBf16 products_of_bf16() {
  const ProductRates rates = measure_rates();
  const Isa best_isa = best(features());
  if (best_isa == Isa::amx)
    return {"AMX tiles", "this CPU has them", rates.dot_gflops, rates.fma_gflops};
  if (best_isa == Isa::avx512)
    return {"the bf16 dot product", product_choice().because, rates.dot_gflops, rates.fma_gflops};
  const std::string message =
      features().avx512_bf16 ? product_choice().because : reason(Isa::avx512);
  return {"float32 FMA", message, rates.dot_gflops, rates.fma_gflops};
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa i : in_order(features()))
    if (reason(i).empty()) names.push_back(name(i));
  if (reason(Isa::amx_emulated).empty()) names.push_back(name(Isa::amx_emulated));
  return names;
}

}  // namespace fastlm

FASTLM_MODULE(m) {
  using namespace fastlm;
  m.def("isa", [] { return name(isa()); });
  m.def("products_of_bf16", [] {
    const ProductsOfBf16 p = products_of_bf16();
    return std::tuple(p.by, p.because, p.dot_gflops, p.fma_gflops);
  });
}
FASTLM_BIND(set_isa, "isa")
FASTLM_BIND(supported_isas, "")
FASTLM_BIND(unavailable_reason, "isa")

// For tests of the choice
FASTLM_MODULE(m) {
  using namespace fastlm;
  using namespace pybind11::literals;
  m.def(
      "isa_choice",
      [](bool avx2, bool avx512, bool avx512_vnni, bool avx512_bf16, bool amx_cpu,
         bool amx_permission, bool widen) {
        return isa_choice({avx2, avx512, avx512_vnni, avx512_bf16, amx_cpu, amx_permission, widen});
      },
      "avx2"_a, "avx512"_a, "avx512_vnni"_a, "avx512_bf16"_a, "amx_cpu"_a, "amx_permission"_a,
      "widen"_a);
  m.def(
      "choose_product",
      [](const std::string& vendor, int family, int model, double dot, double fma) {
        const ProductChoice c =
            choose_product(vendor, family, model, [=] { return ProductRates{dot, fma}; });
        return std::pair(c.widen, c.because);
      },
      "vendor"_a, "family"_a, "model"_a, "dot_gflops"_a, "fma_gflops"_a);
}
