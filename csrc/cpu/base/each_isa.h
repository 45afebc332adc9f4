// Compiles one kernel body for every instruction set. In <op>.cpp:
//
//     #define FASTLM_BODY "cpu/<op>.h"
//     #define FASTLM_INT8_BODY           only if it multiplies int8
//     #define FASTLM_FP16_BODY           only if it multiplies fp16 (and no int8)
//     #include "cpu/base/each_isa.h"
//     FASTLM_OP(<op>_forward, "x weight y")
//
// The body is included once per instruction set, inside namespace fastlm::<isa> and inside a target
// region. So the file is compiled for the baseline, and only these functions use the wide
// registers. A global -mavx512f would put AVX-512 into inline functions of the standard library,
// and old machines would raise SIGILL. For the same reason every standard header is included here,
// before the first region, and a body includes none.
//
// simd.h (vectors of VL floats, load and store of float, bf16, f16) is included before a body. A
// body that multiplies matrices includes gemm.h itself.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/base/huge_pages.h"
#include "cpu/base/isa.h"
#include "cpu/base/op.h"
#include "tensor.h"

// AddressSanitizer does not see masked moves (opaque builtins in GCC), so a partial load or store
// names the bytes it touches. Other builds compile these to nothing.
#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_loadN(const void* p, size_t bytes);
extern "C" void __asan_storeN(const void* p, size_t bytes);
extern "C" void __asan_poison_memory_region(const volatile void* p, size_t bytes);
extern "C" void __asan_unpoison_memory_region(const volatile void* p, size_t bytes);
#define FASTLM_READS(p, bytes) __asan_loadN(p, size_t(bytes))
#define FASTLM_WRITES(p, bytes) __asan_storeN(p, size_t(bytes))
#define FASTLM_GUARD 64  // bytes between two parts of one allocation: no access is allowed
#define FASTLM_POISON(p, bytes) __asan_poison_memory_region(p, size_t(bytes))
#define FASTLM_UNPOISON(p, bytes) __asan_unpoison_memory_region(p, size_t(bytes))
#else
#define FASTLM_READS(p, bytes)
#define FASTLM_WRITES(p, bytes)
#define FASTLM_GUARD 0
#define FASTLM_POISON(p, bytes)
#define FASTLM_UNPOISON(p, bytes)
#endif

#ifndef FASTLM_BODY
#error "define FASTLM_BODY before including each_isa.h"
#endif

#define FASTLM_VL 4
namespace fastlm::scalar {
#include "cpu/base/simd.h"
#include FASTLM_BODY
}  // namespace fastlm::scalar
#undef FASTLM_VL

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define FASTLM_VL 8
namespace fastlm::avx2 {
#include "cpu/base/simd.h"
#include FASTLM_BODY
}  // namespace fastlm::avx2
#undef FASTLM_VL
#pragma GCC pop_options

#define FASTLM_VL 16
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
namespace fastlm::avx512f {
#include "cpu/base/simd.h"
#include FASTLM_BODY
}  // namespace fastlm::avx512f
#pragma GCC pop_options

// Products of bf16 in float32: for machines whose bf16 dot product is missing or slower than FMA.
// Only bodies that multiply int8 (FASTLM_INT8_BODY) differ from avx512f.
#ifdef FASTLM_INT8_BODY
#define FASTLM_VNNI
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace fastlm::avx512_fma {
#include "cpu/base/simd.h"
#include FASTLM_BODY
}  // namespace fastlm::avx512_fma
#pragma GCC pop_options
#else
#define FASTLM_VNNI
namespace fastlm {
namespace avx512_fma = avx512f;
}
#endif

// Products of bf16 by fp16 FMA. Only bodies that have them (FASTLM_FP16_BODY) differ from avx512_fma.
#ifdef FASTLM_FP16_BODY
#define FASTLM_FP16
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512fp16")
namespace fastlm::avx512_fp16 {
#include "cpu/base/simd.h"
#include FASTLM_BODY
}  // namespace fastlm::avx512_fp16
#pragma GCC pop_options
#define FASTLM_FP16_EMULATED
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
namespace fastlm::avx512_fp16_emulated {
#include "cpu/base/simd.h"
#include FASTLM_BODY
}  // namespace fastlm::avx512_fp16_emulated
#pragma GCC pop_options
#undef FASTLM_FP16_EMULATED
#undef FASTLM_FP16
#else
namespace fastlm {
namespace avx512_fp16 = avx512_fma;
namespace avx512_fp16_emulated = avx512_fma;
}  // namespace fastlm
#endif

#define FASTLM_VBMI
#define FASTLM_BF16_DOT
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16")
namespace fastlm::avx512 {
#include "cpu/base/simd.h"
#include FASTLM_BODY
}  // namespace fastlm::avx512

#define FASTLM_AMX
#define FASTLM_AMX_EMULATED
namespace fastlm::amx_emulated {
#include "cpu/base/simd.h"
#include FASTLM_BODY
}  // namespace fastlm::amx_emulated
#undef FASTLM_AMX_EMULATED
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,amx-tile,amx-int8,amx-bf16")
namespace fastlm::amx {
#include "cpu/base/simd.h"
#include FASTLM_BODY
}  // namespace fastlm::amx
#undef FASTLM_AMX
#pragma GCC pop_options
#undef FASTLM_BF16_DOT
#undef FASTLM_VBMI
#undef FASTLM_VNNI
#undef FASTLM_VL

// Runs a function of the body from C++ that is compiled once.
#define FASTLM_RUN(function, ...)                                   \
  switch (::fastlm::isa()) {                                        \
    case ::fastlm::Isa::amx:                                        \
      return ::fastlm::amx::function(__VA_ARGS__);                  \
    case ::fastlm::Isa::avx512:                                     \
      return ::fastlm::avx512::function(__VA_ARGS__);               \
    case ::fastlm::Isa::avx512_fp16:                                \
      return ::fastlm::avx512_fp16::function(__VA_ARGS__);          \
    case ::fastlm::Isa::avx512_fma:                                 \
      return ::fastlm::avx512_fma::function(__VA_ARGS__);           \
    case ::fastlm::Isa::avx512f:                                    \
      return ::fastlm::avx512f::function(__VA_ARGS__);              \
    case ::fastlm::Isa::avx2:                                       \
      return ::fastlm::avx2::function(__VA_ARGS__);                 \
    case ::fastlm::Isa::scalar:                                     \
      return ::fastlm::scalar::function(__VA_ARGS__);               \
    case ::fastlm::Isa::amx_emulated:                               \
      return ::fastlm::amx_emulated::function(__VA_ARGS__);         \
    case ::fastlm::Isa::avx512_fp16_emulated:                       \
      return ::fastlm::avx512_fp16_emulated::function(__VA_ARGS__); \
  }
