// Unpacks blocks of 32 values of a GGUF file to the parts of a QuantizedWeight, in one pass that
// reads every byte of the file once and writes every byte of the result once.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/base/huge_pages.h"
#include "cpu/base/op.h"

namespace fastlm {
namespace {

constexpr int64_t BLOCK = 32;  // values of a block, one scale each

// float16 -> float32, exact. The exponent's bias differs by 112; float16's subnormal numbers are
// normal after the product.
float half(const uint8_t* at) {
  uint16_t bits;
  memcpy(&bits, at, 2);
  uint32_t wide = uint32_t(bits & 0x7fff) << 13;
  if ((bits & 0x7c00) == 0x7c00) wide |= 0x7f800000;  // inf, NaN: the product keeps them
  float value;
  memcpy(&value, &wide, 4);
  value *= 0x1p112f;
  return bits & 0x8000 ? -value : value;
}

// The file's byte j holds value j in its low nibble and j + 16 in the high one; `out` holds values
// 2i and 2i + 1 in byte i.
void pairs(const uint8_t* nibbles, uint8_t* out) {
  for (int i = 0; i < 8; ++i) {
    const uint8_t a = nibbles[2 * i], b = nibbles[2 * i + 1];
    out[i] = uint8_t((a & 15) | b << 4);
    out[i + 8] = uint8_t(a >> 4 | (b & 0xf0));
  }
}

}  // namespace

// raw (N, bytes a row) uint8 in blocks of `kind` (Q4_0, Q4_1 or Q8_0) as qdata and (N, groups)
// float16 scales, and float32 zeros for Q4_1 (fastlm/checkpoint/gguf_blocks.py has the formulas).
void unpack_blocks(TensorView raw, const std::string& kind, TensorView qdata, TensorView scales,
                   OptionalTensor zeros) {
  const bool offsets = kind == "Q4_1", bytes = kind == "Q8_0";
  if (!offsets && !bytes && kind != "Q4_0")
    throw std::invalid_argument("kind: expected Q4_0, Q4_1 or Q8_0, got " + kind);
  if (offsets != zeros.has_value())
    throw std::invalid_argument("zeros: expected a tensor for Q4_1 alone, got " + kind);
  const int64_t head = offsets ? 4 : 2, codes = bytes ? BLOCK : BLOCK / 2, size = head + codes;
  const int64_t rows = raw.size(0), blocks = raw.size(1) / size;
  for (const TensorView* t : {&raw, &qdata, &scales}) check_contiguous("raw, qdata, scales", *t);
  check_size("raw", "bytes a row:", blocks * size, raw.size(1));
  check_size("qdata", "rows:", rows, qdata.size(0));
  check_size("qdata", "bytes a row:", blocks * codes, qdata.size(1));
  check_size("scales", "elements:", rows * blocks, scales.numel());
  prefer_huge_pages(qdata);
  const uint8_t* from = raw.data<uint8_t>("raw");
  uint8_t* q = bytes ? reinterpret_cast<uint8_t*>(qdata.data<int8_t>("qdata"))
                     : qdata.data<uint8_t>("qdata");
  f16* scale = scales.data<f16>("scales");
  float* zero = nullptr;
  if (zeros) {
    check_contiguous("zeros", *zeros);
    check_size("zeros", "elements:", rows * blocks, zeros->numel());
    zero = zeros->data<float>("zeros");
  }
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const uint8_t* block = from + n * blocks * size;
    for (int64_t b = n * blocks; b < (n + 1) * blocks; ++b, block += size) {
      memcpy(&scale[b].bits, block, 2);
      if (offsets) zero[b] = half(block + 2) + 8 * half(block);
      if (bytes)
        memcpy(q + b * codes, block + head, size_t(codes));
      else
        pairs(block + head, q + b * codes);
    }
  }
}

}  // namespace fastlm

FASTLM_BIND(unpack_blocks, "raw kind qdata scales zeros")
