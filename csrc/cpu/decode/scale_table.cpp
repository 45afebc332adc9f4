// The scales of a quantized weight in the order in which decode steps read them (decode_plan.h).
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/decode/decode_plan.h"
#include "cpu/base/huge_pages.h"
#include "cpu/base/op.h"

namespace fastlm {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Whether `value` is exact in the narrower type; if so, it is written. NaN never is.
bool narrow(float value, float& out) {
  out = value;
  return true;
}
bool narrow(float value, bf16& out) {
  const uint32_t bits = bits_of(value);
  out.bits = uint16_t(bits >> 16);
  return (bits & 0xffff) == 0 && value == value;
}
bool narrow(float value, f16& out) {
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (size >= 0x38800000 && size < 0x47800000) {  // float16's normal numbers, 2^-14 to 2^16
    out.bits = uint16_t(sign | ((size >> 13) - (112 << 10)));
    return (bits & 0x1fff) == 0;
  }
  if (size >= 0x47800000) {
    out.bits = uint16_t(sign | 0x7c00);
    return size == 0x7f800000;
  }
  const float steps = std::fabs(value) * 0x1p24f;  // of float16's subnormal numbers
  out.bits = uint16_t(sign | uint16_t(steps));
  return steps == float(uint16_t(steps));
}

template <class T>
bool fill(const float* scales, const float* zeros, int64_t n, int64_t groups, int bits, T* table) {
  const int64_t blocks = (n + DECODE_TILE - 1) / DECODE_TILE, parts = zeros ? 2 : 1;
  bool exact = true;
#pragma omp parallel for schedule(static) reduction(&& : exact)
  for (int64_t block = 0; block < blocks; ++block) {
    T* const out = table + block * groups * parts * DECODE_TILE;
    for (int64_t i = 0; i < DECODE_TILE; ++i) {
      const int64_t row = block * DECODE_TILE + i;
      for (int64_t g = 0; g < groups; ++g) {
        const float scale = row < n ? scales[row * groups + g] : 0;
        exact &= narrow(scale, out[g * parts * DECODE_TILE + i]);
        if (!zeros) continue;
        const float zero = row < n ? zeros[row * groups + g] : 0;
        const float offset = bits == 4 ? zero - 8 * scale : zero;
        exact &= narrow(offset, out[(g * parts + 1) * DECODE_TILE + i]);
      }
    }
  }
  return exact;
}

}  // namespace

// Writes scales, and zeros if any, (n, groups) float32, to the table of a DecodeLinear. Returns
// whether the table's dtype holds every number exactly.
bool scale_table(TensorView scales, OptionalTensor zeros, int bits, TensorView table) {
  const int64_t n = scales.size(0), groups = scales.size(1);
  check_contiguous("scales", scales);
  check_contiguous("table", table);
  check_size("table", "blocks of 16 rows:", (n + DECODE_TILE - 1) / DECODE_TILE, table.size(0));
  check_size("table", "groups:", groups, table.size(1));
  check_size("table", "parts:", zeros ? 2 : 1, table.size(2));
  check_size("table", "rows of a block:", DECODE_TILE, table.size(3));
  const float* offsets = nullptr;
  if (zeros) {
    check_contiguous("zeros", *zeros);
    check_size("zeros", "elements:", n * groups, zeros->numel());
    offsets = zeros->data<float>("zeros");
  }
  prefer_huge_pages(table);
  bool exact = false;
  with_float(table.dtype(), "table", [&](auto tag) {
    exact = fill(scales.data<float>("scales"), offsets, n, groups, bits,
                 table.data<decltype(tag)>("table"));
  });
  return exact;
}

}  // namespace fastlm

FASTLM_BIND(scale_table, "scales zeros bits table")
