// Rows of x in int8, a scale for each run of them: the activations of quantized_linear with
// act_bits 8 (reference.round_rows: q = round(x (127 / absmax)), half to even; a run is a group of
// W's columns, cut at 512). x is read once.
//
//     warp: one run of one row, an octet a lane (two in runs over 256) -> absmax -> q, scale, sum
//
// q is laid out for the products: rows are 16 bytes apart or a multiple of that, zeros behind the
// last column, and for int4 weights an octet's even columns come before its odd ones. A run with
// NaN or infinity has the scale NaN, and zeros.
#include "cuda/quantized_weight.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 128;
constexpr int kOctets = kRunMax / 8 / 32;  // of a lane

template <class X>
__global__ void __launch_bounds__(kThreads)
    round_kernel(const X* x, int64_t x_stride, bool whole, int rows, Weight w, bool even_first,
                 int8_t* q, int64_t q_stride, float* scales, float* sums, int64_t scale_stride) {
  const int64_t task = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const int64_t row = task / w.runs;
  if (row >= rows) return;
  const int run = static_cast<int>(task % w.runs), lane = threadIdx.x % 32;
  const int group = run / w.group_runs;
  const int begin = group * w.group + run % w.group_runs * kRunMax;
  const int end = min(min(begin + kRunMax, (group + 1) * w.group), w.k);
  float value[kOctets][8] = {};
  float largest = 0;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int column = begin + (i * 32 + lane) * 8;
    const X* from = x + row * x_stride + column;
    constexpr int kVec = 16 / sizeof(X);
#pragma unroll
    for (int j = 0; j < 8; j += kVec) {
      if (column + j >= end) break;
      Vector<X, kVec> v{};
      if (whole) {
        v = load(reinterpret_cast<const Vector<X, kVec>*>(from + j));
      } else {
#pragma unroll
        for (int e = 0; e < kVec; ++e)
          if (column + j + e < end) v.at[e] = load(from + j + e);
      }
#pragma unroll
      for (int e = 0; e < kVec; ++e) value[i][j + e] = to_float(v.at[e]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      largest = fmaxf(largest, fabsf(value[i][j]));
      finite = finite && value[i][j] * 0.0f == 0.0f;
    }
  }
  finite = __all_sync(kAllLanes, finite);
  const float absmax = fmaxf(max_of_warp(largest), 1e-30f);  // 127 / absmax stays finite
  const float inverse = 127.0f / absmax;
  float sum = 0;  // of integers: exact
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int column = begin + (i * 32 + lane) * 8;
    uint32_t octet[2] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int rounded = finite ? __float2int_rn(value[i][j] * inverse) : 0;
      const int at = even_first ? j % 2 * 4 + j / 2 : j;
      octet[at / 4] |= (rounded & 0xffu) << at % 4 * 8;
      sum += static_cast<float>(rounded);
    }
    if (column >= end) continue;
    using Octet = Vector<uint32_t, 2>;
    int8_t* to = q + row * q_stride + column;
    store(reinterpret_cast<Octet*>(to), Octet{{octet[0], octet[1]}});
    if (column + 8 >= w.k && column + 8 < q_stride)
      store(reinterpret_cast<Octet*>(to + 8), Octet{{0, 0}});
  }
  sum = sum_of_warp(sum);
  if (lane) return;
  const float scale = finite ? absmax / 127.0f : __int_as_float(0x7fc00000);
  store(scales + run * scale_stride + row, scale);
  store(sums + run * scale_stride + row, scale * sum);
}

}  // namespace

void quantized_linear_round(TensorView x, TensorView qdata, TensorView scales, int bits,
                            int64_t group_size, TensorView q, TensorView x_scale, TensorView x_sums,
                            Stream stream) {
  const int64_t k = x.size(1), x_stride = x.stride(0);
  check_contiguous("q", q);
  check_size("q", "rows", x.size(0), q.size(0));
  check_size("q", "columns", (k + 15) / 16 * 16, q.size(1));
  const Weight w = weight_of(qdata, scales, std::nullopt, bits, group_size, k);
  for (const auto& [t, argument] : {std::pair{&x_scale, "x_scale"}, {&x_sums, "x_sums"}}) {
    check_contiguous(argument, *t);
    check_size(argument, "rows", w.runs, t->size(0));
    check_size(argument, "columns", (x.size(0) + 63) / 64 * 64, t->size(1));
  }
  const int rows = static_cast<int>(x.size(0));
  const Launch how{"quantized_linear round",
                   dim3(ceil_div(static_cast<int64_t>(rows) * w.runs, kThreads / 32)),
                   dim3(kThreads), 0, reinterpret_cast<cudaStream_t>(stream)};
  with_device_float(x.dtype(), "x", [&](auto element) {
    using X = decltype(element);
    const X* from = input<X>(x, "x");
    const bool whole = aligned(16, from) && x_stride * sizeof(X) % 16 == 0 && k % 8 == 0;
    launch(how, round_kernel<X>, from, x_stride, whole, rows, w, bits == 4, output<int8_t>(q, "q"),
           q.size(1), output<float>(x_scale, "x_scale"), output<float>(x_sums, "x_sums"),
           x_scale.size(1));
  });
}

}  // namespace fastlm
