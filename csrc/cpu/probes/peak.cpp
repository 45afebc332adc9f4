// The rate of each multiplying instruction with operands in registers, on all threads: the ceilings
// by which a benchmark divides.
#include "cpu/probes/peak.h"

#include <immintrin.h>

#include <stdexcept>

#include "cpu/base/op.h"

namespace fastlm {

static_assert(PEAK_SUMS == 12, "the pragmas below unroll by it");
// An empty asm keeps each sum in its register. Values are not zero, because zeros run faster.
// `multiply` reads sum, a, b.
#define FASTLM_PEAK(function, isa, vector, value_of_one, multiply)                       \
  __attribute__((target(isa), noinline)) void function(int64_t steps) {                  \
    vector a = value_of_one, b = value_of_one, sums[PEAK_SUMS];                          \
    asm volatile("" : "+v"(a), "+v"(b));                                                 \
    _Pragma("GCC unroll 12") for (int i = 0; i < PEAK_SUMS; ++i) sums[i] = value_of_one; \
    for (int64_t step = 0; step < steps; ++step) {                                       \
      _Pragma("GCC unroll 12") for (int i = 0; i < PEAK_SUMS; ++i) {                     \
        vector& sum = sums[i];                                                           \
        asm volatile("" : "+v"(a)); /* keeps the product in the loop */                  \
        sum = multiply;                                                                  \
        asm volatile("" : "+v"(sum));                                                    \
      }                                                                                  \
    }                                                                                    \
  }

FASTLM_PEAK(fp32_avx512, "avx512f", __m512, _mm512_set1_ps(1e-3f), _mm512_fmadd_ps(a, b, sum))
FASTLM_PEAK(bf16_avx512, "avx512f,avx512bf16", __m512, _mm512_set1_ps(1e-3f),
            _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b))

namespace {

FASTLM_PEAK(fp32_sse, "sse2", __m128, _mm_set1_ps(1e-3f), _mm_add_ps(sum, _mm_mul_ps(a, b)))
FASTLM_PEAK(fp32_avx2, "avx2,fma", __m256, _mm256_set1_ps(1e-3f), _mm256_fmadd_ps(a, b, sum))
FASTLM_PEAK(int8_avx2, "avx2", __m256i, _mm256_set1_epi8(3),
            _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), a)))
FASTLM_PEAK(int8_avx512f, "avx512f,avx512bw", __m512i, _mm512_set1_epi8(3),
            _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), a)))
FASTLM_PEAK(int8_avx512, "avx512f,avx512vnni", __m512i, _mm512_set1_epi32(0x03050709),
            _mm512_dpbusd_epi32(sum, a, b))
FASTLM_PEAK(fp16_avx512, "avx512f,avx512bw,avx512vl,avx512fp16", __m512h,
            _mm512_set1_ph((_Float16)1e-3f), _mm512_fmadd_ph(a, b, sum))
#undef FASTLM_PEAK

// 12 products as well: four sums of 16 x 16 take turns. Tiles 4 to 7 are the operands.
#define FASTLM_TILE_PEAK(function, instruction)                                                    \
  void function(int64_t steps) {                                                                   \
    struct alignas(64) {                                                                           \
      uint8_t palette = 1, start_row = 0, reserved[14] = {};                                       \
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};                                   \
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};                                         \
    } config;                                                                                      \
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");                                         \
    alignas(64) uint16_t values[16][32];                                                           \
    for (auto& row : values)                                                                       \
      for (uint16_t& value : row) value = 0x3a83; /* bf16 1e-3 */                                  \
    const int64_t row_bytes = 64;                                                                  \
    asm volatile(                                                                                  \
        "tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3\n"                  \
        "tileloadd (%0,%1,1), %%tmm4\n tileloadd (%0,%1,1), %%tmm5\n"                              \
        "tileloadd (%0,%1,1), %%tmm6\n tileloadd (%0,%1,1), %%tmm7\n" ::"r"(values),               \
        "r"(row_bytes)                                                                             \
        : "memory");                                                                               \
    for (int64_t step = 0; step < 3 * steps; ++step)                                               \
      asm volatile(instruction                                                                     \
                   " %%tmm6, %%tmm4, %%tmm0\n" instruction " %%tmm7, %%tmm4, %%tmm1\n" instruction \
                   " %%tmm6, %%tmm5, %%tmm2\n" instruction " %%tmm7, %%tmm5, %%tmm3\n" ::);        \
    asm volatile("tilerelease" ::: "memory");                                                      \
  }

FASTLM_TILE_PEAK(bf16_tiles, "tdpbf16ps")
FASTLM_TILE_PEAK(int8_tiles, "tdpbssd")
#undef FASTLM_TILE_PEAK

struct Instruction {
  const char* name;
  void (*run)(int64_t steps);
  double operations;  // per product
};

// The instructions of the instruction set in use.
std::vector<Instruction> instructions() {
  const std::string level = name(isa());
  if (level == "scalar") return {{"fp32 FMA", fp32_sse, 8}};
  if (level == "avx2") return {{"fp32 FMA", fp32_avx2, 16}, {"int8 dot", int8_avx2, 64}};
  if (level == "avx512f") return {{"fp32 FMA", fp32_avx512, 32}, {"int8 dot", int8_avx512f, 128}};
  std::vector<Instruction> all = {{"fp32 FMA", fp32_avx512, 32}, {"int8 dot", int8_avx512, 128}};
  if (__builtin_cpu_supports("avx512bf16")) all.push_back({"bf16 dot", bf16_avx512, 64});
  if (__builtin_cpu_supports("avx512fp16")) all.push_back({"fp16 FMA", fp16_avx512, 64});
  if (level == "amx") {
    all.push_back({"bf16 tiles", bf16_tiles, 2. * 16 * 16 * 32});
    all.push_back({"int8 tiles", int8_tiles, 2. * 16 * 16 * 64});
  }
  return all;
}

}  // namespace

std::vector<std::string> peak_instructions() {
  std::vector<std::string> names;
  for (const Instruction& i : instructions()) names.push_back(i.name);
  return names;
}

// Returns the number of operations.
double run_peak(const std::string& instruction, int64_t steps) {
  for (const Instruction& i : instructions()) {
    if (instruction != i.name) continue;
    int threads = 0;
#pragma omp parallel
    {
#pragma omp atomic
      ++threads;
      i.run(steps);
    }
    return i.operations * PEAK_SUMS * double(steps) * threads;
  }
  throw std::invalid_argument("instruction: expected one of peak_instructions(), got '" +
                              instruction + "'");
}

}  // namespace fastlm

FASTLM_BIND(peak_instructions, "")
FASTLM_BIND(run_peak, "instruction steps")
