// A weight in int8 or int4 (fastlm/ops/quantized_weight.py) as the kernels of quantized_linear read
// it, and the conversion of its codes.
//
// The unit is an octet: 8 columns of a row that begin at a multiple of 8, 4 bytes of int4 or 8 of
// int8. A group is a multiple of 8 columns, so an octet has one scale and one offset. Integers are
// converted to floats by bit operations, because conversion instructions run at a quarter of the
// rate of others or less: the float 2^e + code has the code in the low bits of its mantissa.
#pragma once

#include "cuda/launch.h"
#include "cuda/ops.h"

namespace fastlm {

constexpr int kRunMax = 512;  // columns of 8-bit activations with one scale: reference.RUN_MAX

struct DeviceWeight {
  const uint8_t* codes;        // (n, row_bytes)
  const void *scales, *zeros;  // (n, groups) of `factors`; zeros may be null
  DType factors;
  int n, k, row_bytes, groups, group;
  uint32_t inverse;      // 2^32 / (group / 4)
  int runs, group_runs;  // per row, per group
  int granule;           // alignment of every row's address in bytes: 16, 4 or 1

  DEVICE int group_of(int column) const {  // a column past the last one is in the last group
    return min(static_cast<int>(__umulhi(column / 4, inverse)), groups - 1);
  }
  DEVICE int run_of(int column) const {
    const int g = group_of(column);
    return min(g * group_runs + (column - g * group) / kRunMax, runs - 1);
  }
  DEVICE bool begins_run(int column) const {
    return column < k && (column - group_of(column) * group) % kRunMax == 0;
  }
};

// An element of a tensor with a dtype that is known at run time: its bits, and their value. The two
// are separate so that many loads can be in flight: in one function nvcc would convert, and wait,
// inside the branch on the dtype.
DEVICE uint32_t load_bits(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return load(static_cast<const uint32_t*>(p) + i);
  return load(static_cast<const uint16_t*>(p) + i);
}
DEVICE float float_of(uint32_t bits, DType dtype) {
  const uint16_t low = static_cast<uint16_t>(bits);
  const float half = to_float(*reinterpret_cast<const float16*>(&low));
  return dtype == DType::f16 ? half : __uint_as_float(bits << (dtype == DType::f32 ? 0 : 16));
}
DEVICE float load_float(const void* p, DType dtype, int64_t i) {
  return float_of(load_bits(p, dtype, i), dtype);
}
DEVICE void store_float(void* p, DType dtype, int64_t i, float v) {
  if (dtype == DType::f32)
    store(static_cast<float*>(p) + i, v);
  else if (dtype == DType::bf16)
    store(static_cast<bfloat16*>(p) + i, from_float<bfloat16>(v));
  else
    store(static_cast<float16*>(p) + i, from_float<float16>(v));
}

// ---- numbers

// An octet's q in float32, exactly.
DEVICE void to_floats(const uint32_t (&octet)[1], float (&q)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    // the nibble keeps its bits, 4 p to 4 p + 3: 2^23 + 16^p code
    const int p = j % 4;
    const uint32_t bits = lop3<0xea>(octet[0] >> (j / 4 * 16), 0xfu << 4 * p, 0x4b000000u);
    const float unit = 1.0f / (1 << 4 * p);
    q[j] = __fmaf_rn(__uint_as_float(bits), unit, -(8388608.0f * unit + 8));
  }
}
DEVICE void to_floats(const uint32_t (&octet)[2], float (&q)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {  // 2^23 + q + 128
    const uint32_t bits = __byte_perm(octet[j / 4] ^ 0x80808080u, 0x4b000000u, 0x7440 + j % 4);
    q[j] = __uint_as_float(bits) - 8388736.0f;
  }
}

DEVICE uint32_t subtract(uint32_t a, uint32_t b, bfloat16) {
  const __nv_bfloat162 d = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                   *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}
DEVICE uint32_t subtract(uint32_t a, uint32_t b, float16) {
  const __half2 d =
      __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// An octet's q as four pairs of neighbours of T, exactly.
template <class T>
DEVICE void to_pairs(const uint32_t (&octet)[1], uint32_t (&pair)[4], T kind) {
  constexpr bool kBf16 = std::is_same_v<T, bfloat16>;
  const uint32_t odd = octet[0] >> 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // 128 + code or 1024 + code
    const uint32_t bytes = __byte_perm(octet[0], odd, 0x4400 + 0x1111 * i);
    pair[i] = subtract(lop3<0xea>(bytes, 0x000f000fu, kBf16 ? 0x43004300u : 0x64006400u),
                       kBf16 ? 0x43084308u : 0x64086408u, kind);
  }
}
DEVICE void to_pairs(const uint32_t (&octet)[2], uint32_t (&pair)[4], float16 kind) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // 1024 + q + 128
    const uint32_t bits =
        __byte_perm(octet[i / 2] ^ 0x80808080u, 0x64646464u, i % 2 ? 0x4342 : 0x4140);
    pair[i] = subtract(bits, 0x64806480u, kind);
  }
}
DEVICE void to_pairs(const uint32_t (&octet)[2], uint32_t (&pair)[4], bfloat16 kind) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // a mantissa of 7 bits cannot hold 128 + 8 bits: 128 + the low 7, minus 128, or minus 256 where
    // the sign is set
    const uint32_t bytes = __byte_perm(octet[i / 2], 0, i % 2 ? 0x3322 : 0x1100);
    pair[i] = subtract(lop3<0xea>(bytes, 0x007f007fu, 0x43004300u),
                       lop3<0xea>(bytes, 0x00800080u, 0x43004300u), kind);
  }
}

// An octet's q for products of int8, times kIntegerUnit: int4 stays in the upper half of a byte.
// The octet of x must have the order of the result: the even columns of int4 come first.
template <int BITS>
constexpr int kIntegerUnit = BITS == 4 ? 16 : 1;
DEVICE void to_bytes(const uint32_t (&octet)[1], uint32_t (&q)[2]) {
  q[0] = lop3<(0xf0 & 0xcc) ^ 0xaa>(octet[0] << 4, 0xf0f0f0f0u, 0x80808080u);
  q[1] = lop3<(0xf0 & 0xcc) ^ 0xaa>(octet[0], 0xf0f0f0f0u, 0x80808080u);
}
DEVICE void to_bytes(const uint32_t (&octet)[2], uint32_t (&q)[2]) {
  q[0] = octet[0];
  q[1] = octet[1];
}

// A sum of such products starts at the bits of 1.5 * 2^23, so its bits are a float without
// conversion: 128 columns of 128 * 127 (or 16 * 8 * 127) stay below 2^22 in magnitude, which that
// float can hold.
constexpr int kIntegerZero = 0x4b400000;
DEVICE float value_of(int sum) { return __int_as_float(sum) - 12582912.0f; }
DEVICE float value_of(float sum) { return sum; }

// ---- host

// The largest of 16, 4, 1 that divides the address and the row stride.
inline int granule_of(const void* p, int64_t row_bytes) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(row_bytes);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 1;
}

// A tensor of any float dtype; null where it is absent.
inline const void* any_float(const OptionalTensor& t, const char* argument) {
  const void* p = nullptr;
  if (t)
    with_device_float(t->dtype(), argument,
                      [&](auto element) { p = input<decltype(element)>(*t, argument); });
  return p;
}

inline DeviceWeight weight_of(const TensorView& qdata, const TensorView& scales,
                              const OptionalTensor& zeros, int bits, int64_t group_size,
                              int64_t k) {
  check_contiguous("qdata", qdata);
  check_contiguous("scales", scales);
  if (bits != 4 && bits != 8)
    throw std::invalid_argument("bits: expected 4 or 8, got " + std::to_string(bits));
  check_size("qdata", "columns", bits == 4 ? (k + 1) / 2 : k, qdata.size(1));
  const int64_t group = group_size < k ? group_size : k, groups = (k + group - 1) / group;
  check_size("scales", "columns", groups, scales.size(1));
  check_size("scales", "rows", qdata.size(0), scales.size(0));
  if (scales.numel() > INT32_MAX)  // the kernels' indices
    throw std::invalid_argument("scales: expected fewer than 2^31 elements, got " +
                                std::to_string(scales.numel()));
  if (groups > 1 && (group % 8 || k / 4 > (int64_t{1} << 32) / (group / 4)))
    throw std::invalid_argument("group_size: expected a multiple of 8 of at most 2^36 / K, got " +
                                std::to_string(group_size));
  if (zeros) {
    check_contiguous("zeros", *zeros);
    check_size("zeros", "elements", scales.numel(), zeros->numel());
    if (zeros->dtype() != scales.dtype())
      throw std::invalid_argument(std::string("zeros: expected the dtype of scales, ") +
                                  name(scales.dtype()) + ", got " + name(zeros->dtype()));
  }
  DeviceWeight w{};
  w.codes = bits == 4 ? input<uint8_t>(qdata, "qdata")
                      : reinterpret_cast<const uint8_t*>(input<int8_t>(qdata, "qdata"));
  w.scales = any_float(scales, "scales");
  w.zeros = any_float(zeros, "zeros");
  w.factors = scales.dtype();
  w.n = static_cast<int>(qdata.size(0));
  w.k = static_cast<int>(k);
  w.row_bytes = static_cast<int>(qdata.size(1));
  w.groups = static_cast<int>(groups);
  w.group = static_cast<int>(group);
  // n d < 2^32, n = column / 4 and d = group / 4, makes the high half of n (2^32 / d + 1) exact
  w.inverse = groups > 1 ? static_cast<uint32_t>((int64_t{1} << 32) / (group / 4) + 1) : 0;
  w.group_runs = static_cast<int>((group + kRunMax - 1) / kRunMax);
  w.runs = w.group_runs * w.groups;
  w.granule = granule_of(w.codes, w.row_bytes);
  return w;
}

}  // namespace fastlm
