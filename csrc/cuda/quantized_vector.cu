// y = x W^T + bias for a few rows of x and a W in int8 or int4: without matrix instructions, in
// float32, or in exact integers where x is int8 (quantized_round.cu). W is read once, 16 bytes per
// lane; reading it takes longer than the arithmetic.
//
//     block: R rows of W for each warp_row, all of K            k ->
//       warp 0   n [R x 32 lanes x 16 bytes][                ][ warp 0 again ..
//       warp 1     [                ][R x 32 x 16 bytes      ][ ..
//
// The warps of a block share the columns of W in chunks (1024 of int4, 512 of int8); each lane has
// R rows in flight. x is staged in shared memory, once per block, in the order in which lanes read
// it: the 16-byte units of a lane's columns are kPlane units apart, so that neither the write (by
// columns) nor the read (by lanes) has a bank conflict. Lanes are summed by shuffles, then warps in
// order through shared memory, so results are the same bits on every run.
//
// Not measured on a GPU. By instruction count, each int4 code takes 1.13 instructions of the
// integer pipe (64 per clock) and 2 of the float32 pipe (128 per clock). For a W of 4096 x 4096
// that is 1.3 us of either on 132 multiprocessors at 1.75 GHz; reading its 8.4 MB at 3.35 TB/s
// takes 2.5 us.
#include "cuda/quantized_weight.cuh"

namespace fastlm {
namespace {

constexpr int kWarps = 4;

template <class X>
struct VectorInput {
  const X* x;          // (rows, k), row stride x_stride
  const float* scale;  // (runs, scale_stride), for int8 x
  int rows;
  int64_t x_stride, scale_stride;
  bool aligned_rows;  // rows of x begin and end at multiples of 16 bytes
};

template <int BITS, class X, int M>
struct VectorShape {
  // rows of W in flight, as many as registers allow
  static constexpr int kR = M == 1 ? 8 : M == 4 && BITS == 8 && sizeof(X) == 1 ? 2 : 4;
  static constexpr int kColumns = 128 / BITS;           // columns per lane: 16 bytes of codes
  static constexpr int kChunk = 32 * kColumns;          // columns per warp
  static constexpr int kUnit = 16 / sizeof(X);          // columns in 16 bytes of x
  static constexpr int kUnits = kColumns / kUnit;       // units per lane
  static constexpr int kPlane = 32 + 8 / kUnits % 8;    // units between two of the same lane
  static constexpr int kStaged = kUnits * kPlane * 16;  // bytes per chunk and row of x
};

// The 16 bytes of codes at byte `at` of a row, zeros past its end. ALIGNED: rows are aligned to 16
// bytes.
template <bool ALIGNED>
DEVICE uint4 load_codes(const DeviceWeight& w, const uint8_t* row, int at) {
  if constexpr (ALIGNED)
    return at < w.row_bytes ? load_once(reinterpret_cast<const uint4*>(row + at))
                            : uint4{0, 0, 0, 0};
  uint32_t v[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (at + i < w.row_bytes) v[i / 4] |= static_cast<uint32_t>(load(row + at + i)) << i % 4 * 8;
  return {v[0], v[1], v[2], v[3]};
}

// Copies chunks `first` .. of M rows of x to shared memory, with zeros past the ends.
template <int BITS, class X, int M>
DEVICE void stage(const VectorInput<X>& p, int first_row, int k, int first, int chunks,
                  unsigned char* staged) {
  using S = VectorShape<BITS, X, M>;
  using Unit = Vector<X, S::kUnit>;
  const int units = chunks * (S::kChunk / S::kUnit);
  for (int u = threadIdx.x; u < units; u += kWarps * 32) {
    const int column = first * S::kChunk + u * S::kUnit;
    const int chunk = u / (S::kChunk / S::kUnit), inner = u % (S::kChunk / S::kUnit);
    const int slot = inner % S::kUnits * S::kPlane + inner / S::kUnits;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      Unit v{};
      const X* from = p.x + (first_row + m) * p.x_stride + column;
      if (first_row + m < p.rows && column < k) {
        if (p.aligned_rows) {
          v = load(reinterpret_cast<const Unit*>(from));
        } else {
#pragma unroll
          for (int j = 0; j < S::kUnit; ++j)
            if (column + j < k) v.at[j] = load(from + j);
        }
      }
      unsigned char* to = staged + (chunk * M + m) * S::kStaged + slot * 16;
      store(reinterpret_cast<Unit*>(to), v);
    }
  }
}

// part[r][m] += the products of an octet of kR rows of W, sum[m] += those with 1.
template <int BITS, class X, int M, int R>
DEVICE void multiply(const uint4 (&codes)[R], int o, const unsigned char* staged,
                     float (&part)[R][M], float (&sum)[M]) {
  using S = VectorShape<BITS, X, M>;
  constexpr int kVectors = 8 / S::kUnit;  // per octet of x
  float x[M][8];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const auto v = load(reinterpret_cast<const Vector<X, S::kUnit>*>(
          staged + m * S::kStaged + (o * kVectors + i) * S::kPlane * 16));
#pragma unroll
      for (int j = 0; j < S::kUnit; ++j) {
        x[m][i * S::kUnit + j] = to_float(v.at[j]);
        sum[m] += x[m][i * S::kUnit + j];
      }
    }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    uint32_t octet[BITS / 4];
    const uint32_t words[4] = {codes[r].x, codes[r].y, codes[r].z, codes[r].w};
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) octet[i] = words[o * (BITS / 4) + i];
    float q[8];
    to_floats(octet, q);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int j = 0; j < 8; ++j) part[r][m] += q[j] * x[m][j];
  }
}

// The same in integers; for int4, x has the even columns of an octet first.
template <int BITS, class X, int M, int R>
DEVICE void multiply(const uint4 (&codes)[R], int o, const unsigned char* staged, int (&part)[R][M],
                     int (&sum)[M]) {
  using S = VectorShape<BITS, X, M>;
  using Unit = Vector<int, 4>;  // two octets; for the second one it is in registers already
  const int at = o % 2 * 2;
  int x[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const Unit v =
        load(reinterpret_cast<const Unit*>(staged + m * S::kStaged + o / 2 * S::kPlane * 16));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x[m][i] = v.at[at + i];
      sum[m] = __dp4a(x[m][i], 0x01010101, sum[m]);
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    uint32_t octet[BITS / 4], q[2];
    const uint32_t words[4] = {codes[r].x, codes[r].y, codes[r].z, codes[r].w};
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) octet[i] = words[o * (BITS / 4) + i];
    to_bytes(octet, q);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) part[r][m] = __dp4a(static_cast<int>(q[i]), x[m][i], part[r][m]);
  }
}

template <int BITS, class X, int M, bool ALIGNED>
// int8 by int8: 3 blocks per multiprocessor, since 4 leave too few registers
__global__ void __launch_bounds__(kWarps * 32, std::is_same_v<X, int8_t>&& BITS == 8 ? 3 : 4)
    vector_kernel(VectorInput<X> p, DeviceWeight w, const void* bias, DType bias_dtype, void* y,
                  DType y_dtype, int warps_k) {
  using S = VectorShape<BITS, X, M>;
  constexpr bool kInteger = std::is_same_v<X, int8_t>;
  constexpr int kOctets = S::kColumns / 8, kR = S::kR;
  using Sum = std::conditional_t<kInteger, int, float>;
  constexpr Sum kZero = kInteger ? kIntegerZero : 0;
  DYNAMIC_SHARED(staged);
  SHARED(float, sums, kWarps * kR * M);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_k = warp % warps_k, warps_n = kWarps / warps_k;
  // a grid of one dimension: the others are limited to 65535 blocks, too few for a vocabulary
  const int blocks_n = (w.n + warps_n * kR - 1) / (warps_n * kR);
  const int first_n = blockIdx.x % blocks_n * warps_n * kR, first_m = blockIdx.x / blocks_n * M;
  const bool narrow = w.groups > 1 && w.group % S::kColumns;  // a lane needs several scales
  const int chunks = (w.k + S::kChunk - 1) / S::kChunk;

  int row[kR];  // rows past the last one repeat it and are not stored
#pragma unroll
  for (int r = 0; r < kR; ++r) row[r] = min(first_n + warp / warps_k * kR + r, w.n - 1);
  float acc[kR][M] = {};
  for (int slab = 0; slab < chunks; slab += warps_k) {
    const int column = (slab + warp_k) * S::kChunk + lane * S::kColumns;
    uint4 codes[kR];
    uint32_t scale_bits[kR];
    int group = w.group_of(column);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      codes[r] = load_codes<ALIGNED>(w, w.codes + static_cast<int64_t>(row[r]) * w.row_bytes,
                                     column * BITS / 8);
      scale_bits[r] = load_bits(w.scales, w.factors, row[r] * w.groups + group);
    }
    if (slab) __syncthreads();  // all warps have read the previous slab of x
    stage<BITS, X, M>(p, first_m, w.k, slab, min(warps_k, chunks - slab), staged);
    __syncthreads();
    if (slab + warp_k >= chunks) continue;
    const unsigned char* lane_x = staged + warp_k * M * S::kStaged + lane * 16;
    Sum part[kR][M], sum[M] = {};
    float scale[kR];
#pragma unroll
    for (int r = 0; r < kR; ++r) scale[r] = float_of(scale_bits[r], w.factors);
#pragma unroll
    for (int i = 0; i < kR * M; ++i) part[i / M][i % M] = kZero;
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      multiply<BITS, X, M, kR>(codes, o, lane_x, part, sum);
      if (o < kOctets - 1 && !narrow) continue;
      float factor[M], scaled_sum[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        factor[m] = 1;
        if constexpr (kInteger)
          factor[m] = load(p.scale + w.run_of(column + (narrow ? 8 * o : 0)) * p.scale_stride +
                           first_m + m);
        scaled_sum[m] = static_cast<float>(sum[m]) * factor[m];
        if constexpr (kInteger) factor[m] *= 1.0f / kIntegerUnit<BITS>;
        sum[m] = 0;
      }
      if (narrow && o) group = w.group_of(column + 8 * o);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const int at = row[r] * w.groups + group;
        if (narrow && o) scale[r] = load_float(w.scales, w.factors, at);
        const float zero = w.zeros ? load_float(w.zeros, w.factors, at) : 0.0f;
#pragma unroll
        for (int m = 0; m < M; ++m) {
          acc[r][m] += value_of(part[r][m]) * (scale[r] * factor[m]);
          if (w.zeros) acc[r][m] += zero * scaled_sum[m];
          part[r][m] = kZero;
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kR; ++r)
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float sum = sum_of_warp(acc[r][m]);
      if (lane == 0) store(sums + (warp * kR + r) * M + m, sum);
    }
  __syncthreads();
  for (int i = threadIdx.x; i < warps_n * kR * M; i += kWarps * 32) {
    const int m = i / (warps_n * kR), r = i % (warps_n * kR);
    if (first_n + r >= w.n || first_m + m >= p.rows) continue;
    float sum = bias ? load_float(bias, bias_dtype, first_n + r) : 0.0f;
    for (int part = 0; part < warps_k; ++part)
      sum += load(sums + ((r / kR * warps_k + part) * kR + r % kR) * M + m);
    store_float(y, y_dtype, static_cast<int64_t>(first_m + m) * w.n + first_n + r, sum);
  }
}

template <int BITS, class X, int M, bool ALIGNED = true>
void start(const VectorInput<X>& p, const DeviceWeight& w, const OptionalTensor& bias, void* y,
           DType y_dtype, Stream stream) {
  using S = VectorShape<BITS, X, M>;
  const int chunks = ceil_div(w.k, S::kChunk);
  const int warps_k = chunks >= 4 ? 4 : chunks >= 2 ? 2 : 1;
  const dim3 grid(ceil_div(w.n, kWarps / warps_k * S::kR) * ceil_div(p.rows, M));
  const size_t shared = static_cast<size_t>(warps_k) * M * S::kStaged;
  launch({"quantized_linear vector", grid, dim3(kWarps * 32), shared,
          reinterpret_cast<cudaStream_t>(stream)},
         vector_kernel<BITS, X, M, ALIGNED>, p, w, any_float(bias, "bias"),
         bias ? bias->dtype() : DType::f32, y, y_dtype, warps_k);
}

}  // namespace

void quantized_linear_vector(TensorView x, OptionalTensor x_scale, TensorView qdata,
                             TensorView scales, OptionalTensor zeros, OptionalTensor bias, int bits,
                             int64_t group_size, int64_t k, TensorView y, Stream stream) {
  check_contiguous("y", y);
  check_size("y", "rows", x.size(0), y.size(0));
  check_size("y", "columns", qdata.size(0), y.size(1));
  const DeviceWeight w = weight_of(qdata, scales, zeros, bits, group_size, k);
  void* to = nullptr;
  with_device_float(y.dtype(), "y", [&](auto element) { to = output<decltype(element)>(y, "y"); });
  const auto with_rows = [&](auto* from) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
    const int64_t stride = x.stride(0);
    const VectorInput<X> p{
        from,
        input<float>(x_scale, "x_scale"),
        static_cast<int>(x.size(0)),
        stride,
        x_scale ? x_scale->size(1) : 0,
        aligned(16, from) && stride * sizeof(X) % 16 == 0 && (x_scale || k * sizeof(X) % 16 == 0)};
    const auto with_bits = [&](auto b) {
      constexpr int kBits = decltype(b)::value;
      constexpr int kMost = sizeof(X) == 2   ? QUANTIZED_VECTOR_ROWS_16
                            : sizeof(X) == 1 ? QUANTIZED_VECTOR_ROWS_8
                                             : QUANTIZED_VECTOR_ROWS_32;
      if (w.granule != 16)  // one variant is enough for weights of odd widths
        start<kBits, X, kMost, false>(p, w, bias, to, y.dtype(), stream);
      else if (p.rows == 1)
        start<kBits, X, 1>(p, w, bias, to, y.dtype(), stream);
      else if (p.rows == 2)
        start<kBits, X, 2>(p, w, bias, to, y.dtype(), stream);
      else
        start<kBits, X, kMost>(p, w, bias, to, y.dtype(), stream);
    };
    if (bits == 4)
      with_bits(std::integral_constant<int, 4>{});
    else
      with_bits(std::integral_constant<int, 8>{});
  };
  if (x_scale) return with_rows(input<int8_t>(x, "x"));
  with_device_float(x.dtype(), "x",
                    [&](auto element) { with_rows(input<decltype(element)>(x, "x")); });
}

}  // namespace fastlm
