// AdamW for every tensor of an optimizer: one launch updates all tensors, of any dtypes.
//
// tensors (T, 12) int64, settings (S, 8) float64, chunks (C, 2) int32: fastlm/cuda/adamw_tables.py
//
//     squares    only to clip; a chunk per block: the sum of squares of its gradients
//     norm       one block: their sum, in order; the norm and the factor of the gradients
//     begin      a tensor per thread: step += 1, the step's scalars (float64), its random key
//     update     a chunk per block: reads g, p, m, v once, writes p, m, v once
//
//     a warp       256 elements, which share the scales of 8-bit states; 8 per thread, in two runs
//     a block      8 warps, four passes: the 8192 elements of a chunk
//
// dtypes, masters, 8-bit states and rounding are properties of a tensor and read at run time. The
// branch is uniform and costs a few instructions, while memory leaves time for a hundred per
// element. Templates would make a hundred kernels, each with a separate launch. A thread issues
// all its loads (5 times 32 bytes at most) before it uses any. Formulas and random numbers are
// those of csrc/cpu/adamw.h, which explains the 8-bit codes. Nothing waits for the host: a step can
// be captured. Not measured on a GPU.
#include <cstring>

#include "cuda/launch.h"
#include "cuda/ops.h"

namespace fastlm {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 8;             // elements per thread
constexpr int kStateBlock = 256;     // elements that share a scale: one warp's
constexpr int kRandomChunk = 32768;  // elements that share a key of random numbers
constexpr int kNormThreads = 1024;
constexpr int kBeginThreads = 128;
static_assert(32 * kEach == kStateBlock);

// columns of a row of `tensors`; the upper half of kOrdinal is the kind
enum Column {
  kParam,
  kGrad,
  kMoment,
  kRoot,
  kMomentScale,
  kRootScale,
  kMaster,
  kSize,
  kStep,
  kSetting,
  kSeed,
  kOrdinal,
  kColumns
};
enum Type { kFloat32, kBfloat16, kFloat16 };
enum Masters {
  kNoMasters,
  kFloatMasters,
  kLowHalves
};  // none; float32; the 16 bits that bfloat16 lacks

struct Kind {
  int param, grad, masters;
  bool packed, rounds, aligned;  // 8-bit states; stochastic rounding; aligned to 16 bytes

  DEVICE explicit Kind(int code)
      : param(code & 3),
        grad(code >> 2 & 3),
        masters(code >> 4 & 3),
        packed(code >> 6 & 1),
        rounds(code >> 7 & 1),
        aligned(code >> 8 & 1) {}
};

DEVICE Kind kind_of(const int64_t* row) {
  return Kind(static_cast<int>(load(row + kOrdinal) >> 32));
}
template <class T>
DEVICE T* pointer(const int64_t* row, Column column) {
  return global(reinterpret_cast<T*>(load(row + column)));
}

DEVICE uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// ---- a thread's eight elements ------------------------------------------------------------------

// kEach values of 4, 2 or 1 bytes, as in memory
struct Raw {
  uint32_t word[kEach];
};

// Four elements from `at` and four from kApart later: adjacent lanes read whole sectors of any
// dtype.
struct ThreadElements {
  static constexpr int kRunStride = kStateBlock / 2, kRun = kEach / 2;
  int64_t at;
  int remaining;  // elements of the chunk from `at` on: at most kStateBlock, may be negative
  bool aligned;

  DEVICE ThreadElements(int64_t at, int64_t end, bool aligned)
      : at(at),
        remaining(end - at < kStateBlock ? static_cast<int>(end - at) : kStateBlock),
        aligned(aligned) {}
  static DEVICE int offset(int j) { return j / kRun * kRunStride + j % kRun; }
  DEVICE bool inside(int j) const { return offset(j) < remaining; }
  DEVICE bool is_full(int run) const { return aligned && inside(run * kRun + kRun - 1); }
};

template <int BYTES>
using Element =
    std::conditional_t<BYTES == 4, uint32_t, std::conditional_t<BYTES == 2, uint16_t, uint8_t>>;

template <int BYTES>
DEVICE Raw read(const void* from, const ThreadElements& elements) {
  constexpr int OF_WORD = 4 / BYTES;
  const auto* p = static_cast<const Element<BYTES>*>(from) + elements.at;
  Raw raw{};
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    if (elements.is_full(run)) {
      using V = Vector<uint32_t, BYTES>;
      const V v = load(reinterpret_cast<const V*>(p + run * ThreadElements::kRunStride));
#pragma unroll
      for (int i = 0; i < BYTES; ++i) raw.word[run * BYTES + i] = v.at[i];
      continue;
    }
#pragma unroll
    for (int j = run * ThreadElements::kRun; j < (run + 1) * ThreadElements::kRun; ++j)
      if (elements.inside(j))
        raw.word[j / OF_WORD] |= static_cast<uint32_t>(load(p + ThreadElements::offset(j)))
                                 << j % OF_WORD * 8 * BYTES;
  }
  return raw;
}

template <int BYTES>
DEVICE void write(void* to, const ThreadElements& elements, const Raw& raw) {
  constexpr int OF_WORD = 4 / BYTES;
  auto* p = static_cast<Element<BYTES>*>(to) + elements.at;
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    if (elements.is_full(run)) {
      using V = Vector<uint32_t, BYTES>;
      V v;
#pragma unroll
      for (int i = 0; i < BYTES; ++i) v.at[i] = raw.word[run * BYTES + i];
      store_global(reinterpret_cast<V*>(p + run * ThreadElements::kRunStride), v);
      continue;
    }
#pragma unroll
    for (int j = run * ThreadElements::kRun; j < (run + 1) * ThreadElements::kRun; ++j)
      if (elements.inside(j))
        store(p + ThreadElements::offset(j),
              static_cast<Element<BYTES>>(raw.word[j / OF_WORD] >> j % OF_WORD * 8 * BYTES));
  }
}

DEVICE Raw read_floats(const void* from, int type, const ThreadElements& elements) {
  return type == kFloat32 ? read<4>(from, elements) : read<2>(from, elements);
}
DEVICE uint32_t half_word(const Raw& raw, int j) { return raw.word[j / 2] >> j % 2 * 16 & 0xffff; }

DEVICE void to_floats(const Raw& raw, int type, float (&x)[kEach]) {
  if (type == kFloat32) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) x[j] = __uint_as_float(raw.word[j]);
  } else if (type == kBfloat16) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) x[j] = __uint_as_float(half_word(raw, j) << 16);
  } else {
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      x[j] = __half2float(__ushort_as_half(static_cast<unsigned short>(half_word(raw, j))));
  }
}
DEVICE Raw of_floats(const float (&x)[kEach]) {
  Raw raw;
#pragma unroll
  for (int j = 0; j < kEach; ++j) raw.word[j] = __float_as_uint(x[j]);
  return raw;
}
// Pack words of two 16-bit values
DEVICE Raw of_halves(const uint32_t (&x)[kEach]) {
  Raw raw{};
#pragma unroll
  for (int j = 0; j < kEach; ++j) raw.word[j / 2] |= (x[j] & 0xffff) << j % 2 * 16;
  return raw;
}
DEVICE Raw of_bytes(const int (&x)[kEach]) {
  Raw raw{};
#pragma unroll
  for (int j = 0; j < kEach; ++j) raw.word[j / 4] |= static_cast<uint32_t>(x[j]) << j % 4 * 8;
  return raw;
}

// ---- 8-bit states -------------------------------------------------------------------------------

// The upper bits of a float in [0, 1]; MANTISSA of them are its mantissa
template <int MANTISSA, int MAX>
struct Code {
  static constexpr int SHIFT = 23 - MANTISSA, OFFSET = (0x3f800000 >> SHIFT) - MAX;
  static DEVICE float decode(int code) {
    return code > 0 ? __int_as_float((code + OFFSET) << SHIFT) : 0.0f;
  }
  static DEVICE int encode(float x) {  // the nearest, ties up; under 1 where x is too small
    return ((__float_as_int(x) + (1 << (SHIFT - 1))) >> SHIFT) - OFFSET;
  }
};
using MomentCode = Code<3, 127>;  // plus a sign
using RootCode = Code<4, 255>;

DEVICE int code_at(const Raw& raw, int j) { return raw.word[j / 4] >> j % 4 * 8 & 255; }
DEVICE float decode_moment(int code) {
  const float x = MomentCode::decode(code & 127);
  return code > 127 ? -x : x;
}
DEVICE int encode_moment(float x) {
  const float magnitude = fabsf(x);
  const int code = MomentCode::encode(magnitude);
  const int low = magnitude >= 1.25f / (1 << 17) ? 1 : 0;  // half of code 1
  return (code > 0 ? code : low) | (__float_as_int(x) >> 24 & 128);
}
DEVICE int encode_root(float x) { return max(RootCode::encode(x), x > 0.0f ? 1 : 0); }

DEVICE float inverse_of(float scale) { return scale > 1e-37f ? 1.0f / scale : 0.0f; }

// ---- the update ---------------------------------------------------------------------------------

struct Scalars {
  float step_size, decay, beta1, rest1, beta2, rest2, eps, root_scale, sign;
};
DEVICE Scalars scalars_of(const float* values) {
  return {load(values),     load(values + 1), load(values + 2), load(values + 3), load(values + 4),
          load(values + 5), load(values + 6), load(values + 7), load(values + 8)};
}

// The new moment and the root of the new second moment of a warp's 256 elements. Reads and
// overwrites their codes.
DEVICE void packed_states(const int64_t* row, const ThreadElements& elements, const Scalars& s,
                          const float (&g)[kEach], const Raw& raw_m, const Raw& raw_r,
                          float (&m)[kEach], float (&root)[kEach]) {
  const int64_t block = elements.at / kStateBlock;
  float* scale_m_at = pointer<float>(row, kMomentScale) + block;
  float* scale_r_at = pointer<float>(row, kRootScale) + block;
  const float scale_m = load(scale_m_at), scale_r = load(scale_r_at);
  float max_m = 0, max_r = 0, poison = 0;  // poison: NaN where a state is not finite, else 0
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    m[j] = decode_moment(code_at(raw_m, j)) * (scale_m * s.beta1) + g[j] * s.rest1;
    const float before = RootCode::decode(code_at(raw_r, j)) * scale_r;
    root[j] = sqrtf(before * before * s.beta2 + g[j] * g[j] * s.rest2);
    max_m = fmaxf(max_m, fabsf(m[j])), max_r = fmaxf(max_r, root[j]);
    poison += (m[j] + root[j]) * 0.0f;
  }
  // one value that is not finite makes its whole block NaN; a maximum alone would ignore a NaN
  poison = sum_of_warp(poison);
  max_m = max_of_warp(max_m) + poison, max_r = max_of_warp(max_r) + poison;
  __syncwarp();  // all lanes have read the scales; a shuffle orders no memory access
  if (threadIdx.x % 32 == 0) store(scale_m_at, max_m), store(scale_r_at, max_r);
  const float inverse_m = inverse_of(max_m), inverse_r = inverse_of(max_r);
  int code_m[kEach], code_r[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    code_m[j] = encode_moment(m[j] * inverse_m);
    code_r[j] = encode_root(root[j] * inverse_r);
  }
  write<1>(pointer<void>(row, kMoment), elements, of_bytes(code_m));
  write<1>(pointer<void>(row, kRoot), elements, of_bytes(code_r));
}

DEVICE void float_states(const int64_t* row, const ThreadElements& elements, const Scalars& s,
                         const float (&g)[kEach], const Raw& raw_m, const Raw& raw_v,
                         float (&m)[kEach], float (&root)[kEach]) {
  float v[kEach];
  to_floats(raw_m, kFloat32, m);
  to_floats(raw_v, kFloat32, v);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    m[j] = m[j] * s.beta1 + g[j] * s.rest1;
    v[j] = v[j] * s.beta2 + g[j] * g[j] * s.rest2;
    root[j] = sqrtf(v[j]);
  }
  write<4>(pointer<void>(row, kMoment), elements, of_floats(m));
  write<4>(pointer<void>(row, kRoot), elements, of_floats(v));
}

// A float32 master in two halves. The parameter is its upper 16 bits, rounded to nearest (ties away
// from zero). The lower 16 bits, read as a signed number and added to the parameter's bits, give
// the master back. Zero has no lower half: a parameter that the user set to zero still has its last
// step's.
DEVICE void join(const Raw& high_half, const Raw& low_half, float (&w)[kEach]) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const uint32_t high = half_word(high_half, j) << 16;
    const int low = static_cast<int16_t>(half_word(low_half, j));
    w[j] = __uint_as_float(high << 1 ? high + static_cast<uint32_t>(low) : high);
  }
}
DEVICE void split(const float (&w)[kEach], uint32_t (&high)[kEach], uint32_t (&low)[kEach]) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    low[j] = w[j] == w[j] ? __float_as_uint(w[j]) : 0x7fc00000u;  // a NaN that does not round up
    high[j] = (low[j] + 0x8000u) >> 16;
  }
}

DEVICE float round_stochastic(float w, uint32_t random) {
  const float rounded = __uint_as_float((__float_as_uint(w) + (random >> 16)) & 0xffff0000u);
  return fabsf(w) <= 3.4028234663852886e38f ? rounded : w;
}

// Writes eight parameters; `key` is the key of the chunk's random numbers.
DEVICE void write_params(void* to, const Kind& kind, const ThreadElements& elements,
                         float (&w)[kEach], uint32_t key) {
  if (kind.param == kFloat32) return write<4>(to, elements, of_floats(w));
  uint32_t bits[kEach];
  if (kind.param == kFloat16) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) bits[j] = __half_as_ushort(__float2half(w[j]));
  } else {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (kind.rounds) {
        const uint32_t i =
            static_cast<uint32_t>(elements.at % kRandomChunk) + ThreadElements::offset(j);
        w[j] = round_stochastic(w[j], mix(i * 0x9e3779b9u + key));
      }
      bits[j] = __bfloat16_as_ushort(__float2bfloat16(w[j]));
    }
  }
  write<2>(to, elements, of_halves(bits));
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const int64_t* tensors, const float* scalars, const uint32_t* keys,
                 const int2* chunks, const float* clip, int chunk_size) {
  const int2 chunk = load(chunks + blockIdx.x);
  const int64_t* row = tensors + static_cast<int64_t>(chunk.x) * kColumns;
  const int64_t start = static_cast<int64_t>(chunk.y) * chunk_size, size = load(row + kSize);
  const int64_t end = start + chunk_size < size ? start + chunk_size : size;
  const Kind kind = kind_of(row);
  const Scalars s = scalars_of(scalars + static_cast<int64_t>(chunk.x) * ADAMW_SCALARS);
  const uint32_t key =
      mix(load(keys + chunk.x) + static_cast<uint32_t>(start / kRandomChunk) * 0x9e3779b9u);
  const float factor = (clip ? load(clip) : 1.0f) * s.sign;
  void* param = pointer<void>(row, kParam);
  void* master = pointer<void>(row, kMaster);
  const int lane_at = threadIdx.x % 32 * ThreadElements::kRun;
#pragma unroll 1
  for (int64_t of_warp = start + threadIdx.x / 32 * kStateBlock; of_warp < end;
       of_warp += kThreads * kEach) {
    const ThreadElements elements(of_warp + lane_at, end, kind.aligned);
    const Raw raw_g = read_floats(pointer<void>(row, kGrad), kind.grad, elements);
    const Raw raw_p =
        kind.masters == kFloatMasters ? Raw{} : read_floats(param, kind.param, elements);
    const Raw raw_w = kind.masters == kFloatMasters ? read<4>(master, elements)
                      : kind.masters == kLowHalves  ? read<2>(master, elements)
                                                    : Raw{};
    Raw raw_m, raw_r;
    if (kind.packed) {
      raw_m = read<1>(pointer<void>(row, kMoment), elements);
      raw_r = read<1>(pointer<void>(row, kRoot), elements);
    } else {
      raw_m = read<4>(pointer<void>(row, kMoment), elements);
      raw_r = read<4>(pointer<void>(row, kRoot), elements);
    }
    float g[kEach], m[kEach], root[kEach], w[kEach];
    to_floats(raw_g, kind.grad, g);
#pragma unroll
    for (int j = 0; j < kEach; ++j) g[j] *= factor;
    if (kind.packed)
      packed_states(row, elements, s, g, raw_m, raw_r, m, root);
    else
      float_states(row, elements, s, g, raw_m, raw_r, m, root);
    if (kind.masters == kLowHalves)
      join(raw_p, raw_w, w);
    else if (kind.masters == kFloatMasters)
      to_floats(raw_w, kFloat32, w);
    else
      to_floats(raw_p, kind.param, w);
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      w[j] -= w[j] * s.decay + m[j] / (root[j] * s.root_scale + s.eps) * s.step_size;
    if (kind.masters == kLowHalves) {
      uint32_t high[kEach], low[kEach];
      split(w, high, low);
      write<2>(param, elements, of_halves(high));
      write<2>(master, elements, of_halves(low));
      continue;
    }
    if (kind.masters == kFloatMasters) write<4>(master, elements, of_floats(w));
    write_params(param, kind, elements, w, key);
  }
}

// ---- the norm and the step's scalars ------------------------------------------------------------

template <int THREADS>
DEVICE double sum_of_block(double x) {
  SHARED(double, part, THREADS / 32);
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  if (threadIdx.x % 32 == 0) store(part + threadIdx.x / 32, x);
  __syncthreads();
  x = 0;
  for (int i = 0; i < THREADS / 32; ++i) x += load(part + i);
  return x;
}

__global__ void __launch_bounds__(kThreads)
    adamw_squares_kernel(const int64_t* tensors, const int2* chunks, double* sums, int chunk_size) {
  const int2 chunk = load(chunks + blockIdx.x);
  const int64_t* row = tensors + static_cast<int64_t>(chunk.x) * kColumns;
  const int64_t start = static_cast<int64_t>(chunk.y) * chunk_size, size = load(row + kSize);
  const int64_t end = start + chunk_size < size ? start + chunk_size : size;
  const Kind kind = kind_of(row);
  const void* grad = pointer<void>(row, kGrad);
  float sum = 0;  // of 32 squares, which are then added in float64
  const int thread_at = threadIdx.x / 32 * kStateBlock + threadIdx.x % 32 * ThreadElements::kRun;
  for (int64_t at = start + thread_at; at < end; at += kThreads * kEach) {
    const ThreadElements elements(at, end, kind.aligned);
    float g[kEach];
    to_floats(read_floats(grad, kind.grad, elements), kind.grad, g);
#pragma unroll
    for (int j = 0; j < kEach; ++j) sum += g[j] * g[j];
  }
  const double total = sum_of_block<kThreads>(static_cast<double>(sum));
  if (threadIdx.x == 0) store(sums + blockIdx.x, total);
}

// `sums` null: the norm is given.
__global__ void __launch_bounds__(kNormThreads)
    adamw_norm_kernel(const double* sums, int count, float max_grad_norm, float* grad_norm,
                      float* clip) {
  float norm;
  if (sums) {
    double total = 0;
    for (int i = threadIdx.x; i < count; i += kNormThreads) total += load(sums + i);
    norm = static_cast<float>(sqrt(sum_of_block<kNormThreads>(total)));
    if (threadIdx.x == 0) store(grad_norm, norm);
  } else {
    norm = load(grad_norm);
  }
  const float ratio = max_grad_norm / (norm + 1e-6f);              // as clip_grad_norm_
  if (threadIdx.x == 0) store(clip, ratio > 1.0f ? 1.0f : ratio);  // NaN stays
}

DEVICE double power(double base, int exponent) {
  double result = 1;
  for (; exponent; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}

__global__ void __launch_bounds__(kBeginThreads)
    adamw_begin_kernel(const int64_t* tensors, const double* settings, float* scalars,
                       uint32_t* keys, int count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBeginThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t* row = tensors + i * kColumns;
  float* step_at = pointer<float>(row, kStep);
  const float before = load(step_at);
  store(step_at, before + 1.0f);
  const double* setting = settings + load(row + kSetting) * 8;
  const double lr = load(setting), beta1 = load(setting + 1), beta2 = load(setting + 2);
  const double eps = load(setting + 3), decay = load(setting + 4), sign = load(setting + 5);
  const int step = static_cast<int>(before + 1.0f);
  const double values[9] = {
      lr / (1 - power(beta1, step)),    lr * decay, beta1, 1 - beta1, beta2, 1 - beta2, eps,
      1 / sqrt(1 - power(beta2, step)), sign};
#pragma unroll
  for (int j = 0; j < 9; ++j) store(scalars + i * ADAMW_SCALARS + j, static_cast<float>(values[j]));
  const auto seed = static_cast<uint32_t>(load(row + kSeed));
  const auto ordinal = static_cast<uint32_t>(load(row + kOrdinal));
  store(keys + i, mix(mix(seed ^ static_cast<uint32_t>(before)) ^ ordinal));
}

}  // namespace

void adamw(TensorView tensors, TensorView settings, TensorView chunks, int chunk_size,
           TensorView scalars, TensorView keys, OptionalTensor sums, OptionalTensor grad_norm,
           OptionalTensor clip, float max_grad_norm, const std::vector<TensorView>& read,
           const std::vector<TensorView>& written, Stream stream) {
  check_size("tensors", "columns", kColumns, tensors.size(1));
  check_size("chunk_size", "a multiple of a block's elements; rest", 0,
             chunk_size % (kThreads * kEach));
#ifndef __CUDACC__  // the emulator cannot see the tensors behind a table of addresses
  for (const TensorView& t : read) simt::register_tensor(t.dl.data, span(t), "a gradient", false);
  for (const TensorView& t : written)
    simt::register_tensor(t.dl.data, span(t), "a parameter or state", true);
#else
  (void)read, (void)written;
#endif
  const int count = static_cast<int>(tensors.size(0)), blocks = static_cast<int>(chunks.size(0));
  const auto* rows = input<int64_t>(tensors, "tensors");
  const auto* table = reinterpret_cast<const int2*>(input<int32_t>(chunks, "chunks"));
  auto* scalars_out = output<float>(scalars, "scalars");
  auto* random = reinterpret_cast<uint32_t*>(output<int32_t>(keys, "keys"));
  auto* factor = output<float>(clip, "clip");
  const auto config = [&](const char* name, int grid, int threads) {
    return Launch{name, dim3(grid), dim3(threads), 0, reinterpret_cast<cudaStream_t>(stream)};
  };
  if (factor) {
    auto* parts = output<double>(sums, "sums");
    if (parts)
      launch(config("adamw_squares", blocks, kThreads), adamw_squares_kernel, rows, table, parts,
             chunk_size);
    launch(config("adamw_norm", 1, kNormThreads), adamw_norm_kernel, parts, blocks, max_grad_norm,
           output<float>(grad_norm, "grad_norm"), factor);
  }
  launch(config("adamw_begin", ceil_div(count, kBeginThreads), kBeginThreads), adamw_begin_kernel,
         rows, input<double>(settings, "settings"), scalars_out, random, count);
  launch(config("adamw", blocks, kThreads), adamw_kernel, rows, scalars_out, random, table, factor,
         chunk_size);
}

}  // namespace fastlm
