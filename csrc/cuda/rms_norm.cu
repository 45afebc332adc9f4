// y = h / rms(h) * (offset + weight), h = x + residual or x: RMSNorm of each row (arXiv:1910.07467)
// for the decode step, where launches take most of the time.
//
//     block = row:   h[row, ..] -> sum of squares (warps, then block) -> y[row, ..]
//
// `rms_norm_kernel` keeps a row in registers, PER vectors per thread, and reads it once;
// `rms_norm_wide_kernel` reads a row of any width twice. Sums are float32. The norm is of h as
// stored.
//
// `rms_norm_round_kernel` returns y in int8, as quantized_linear reads it, which saves a decode
// step one launch. The row is kept in shared memory, since another warp rounds the columns of a
// run.
#include "cuda/quantized_round.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 256;

template <class T>
struct NormRows {
  const T *x, *residual;  // row strides x_stride, residual_stride; residual may be null
  T *y, *h;               // contiguous; h only with residual
  float* rstd;            // may be null
  int width;
  int64_t x_stride, residual_stride;
};

// Loads one vector of h in float32; stores it where there is a residual.
template <int VEC, class T>
DEVICE void load_h(const NormRows<T>& p, int64_t row, int at, float (&value)[VEC]) {
  using V = Vector<T, VEC>;
  const V v = load(reinterpret_cast<const V*>(p.x + row * p.x_stride + at));
#pragma unroll
  for (int j = 0; j < VEC; ++j) value[j] = to_float(v.at[j]);
  if (!p.residual) return;
  const V r = load(reinterpret_cast<const V*>(p.residual + row * p.residual_stride + at));
  V sum;
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    sum.at[j] = from_float<T>(value[j] + to_float(r.at[j]));
    value[j] = to_float(sum.at[j]);
  }
  store(reinterpret_cast<V*>(p.h + row * p.width + at), sum);
}

// Stores one vector of y.
template <int VEC, class T, class W>
DEVICE void store_y(T* to, const W* weight, float offset, const float (&value)[VEC], float scale) {
  const auto w = load(reinterpret_cast<const Vector<W, VEC>*>(weight));
  Vector<T, VEC> v;
#pragma unroll
  for (int j = 0; j < VEC; ++j)
    v.at[j] = from_float<T>(value[j] * scale * (offset + to_float(w.at[j])));
  store(reinterpret_cast<Vector<T, VEC>*>(to), v);
}

// Returns the scale of a row, from all threads' shares of the sum of squares; thread 0 stores it.
template <class T>
DEVICE float scale_of(const NormRows<T>& p, int64_t row, float squares, float eps) {
  const float scale = rsqrtf(sum_of_block<kThreads>(squares) / p.width + eps);
  if (threadIdx.x == 0 && p.rstd) store(p.rstd + row, scale);
  return scale;
}

template <int VEC, int PER, class T, class W>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(NormRows<T> p, const W* weight, float eps, float offset) {
  const int64_t row = blockIdx.x;
  float value[PER][VEC];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int at = (i * kThreads + threadIdx.x) * VEC;
    if (at >= p.width) break;
    load_h(p, row, at, value[i]);
#pragma unroll
    for (int j = 0; j < VEC; ++j) squares += value[i][j] * value[i][j];
  }
  const float scale = scale_of(p, row, squares, eps);
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int at = (i * kThreads + threadIdx.x) * VEC;
    if (at < p.width) store_y(p.y + row * p.width + at, weight + at, offset, value[i], scale);
  }
}

template <int VEC, class T, class W>
__global__ void __launch_bounds__(kThreads)
    rms_norm_wide_kernel(NormRows<T> p, const W* weight, float eps, float offset) {
  const int64_t row = blockIdx.x;
  float value[VEC];
  float squares = 0;
#pragma unroll 1  // nvcc's default of four spills on sm_90
  for (int at = threadIdx.x * VEC; at < p.width; at += kThreads * VEC) {
    load_h(p, row, at, value);
#pragma unroll
    for (int j = 0; j < VEC; ++j) squares += value[j] * value[j];
  }
  const float scale = scale_of(p, row, squares, eps);
#pragma unroll 1
  for (int at = threadIdx.x * VEC; at < p.width; at += kThreads * VEC) {
    load_h(p, row, at, value);  // stores the same h again, which is cheaper than reading it back
    store_y(p.y + row * p.width + at, weight + at, offset, value, scale);
  }
}

template <int VEC, class T, class W>
__global__ void __launch_bounds__(kThreads)
    rms_norm_round_kernel(NormRows<T> p, const W* weight, float eps, float offset, DeviceWeight w,
                          RoundedRows to) {
  DYNAMIC_SHARED(memory);
  T* const y = reinterpret_cast<T*>(memory);  // holds h at first; a thread reads its own elements
  const int64_t row = blockIdx.x;
  float squares = 0;
#pragma unroll 1
  for (int at = threadIdx.x * VEC; at < p.width; at += kThreads * VEC) {
    float value[VEC];
    load_h(p, row, at, value);
    Vector<T, VEC> h;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      squares += value[j] * value[j];
      h.at[j] = from_float<T>(value[j]);
    }
    store(reinterpret_cast<Vector<T, VEC>*>(y + at), h);
  }
  const float scale = scale_of(p, row, squares, eps);
#pragma unroll 1
  for (int at = threadIdx.x * VEC; at < p.width; at += kThreads * VEC) {
    const auto h = load(reinterpret_cast<const Vector<T, VEC>*>(y + at));
    float value[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) value[j] = to_float(h.at[j]);
    store_y(y + at, weight + at, offset, value, scale);
  }
  __syncthreads();
  for (int run = threadIdx.x / 32; run < w.runs; run += kThreads / 32)
    round_run(w, to, row, run, [&](int column, int end, float (&value)[8]) {
      load_octet(y + column, column + 8 <= end, end - column, value);
    });
}

template <int VEC, class T, class W>
void start(const NormRows<T>& p, const W* weight, float eps, float offset, int rows,
           Stream stream) {
  const Launch config{"rms_norm", dim3(rows), dim3(kThreads), 0,
                      reinterpret_cast<cudaStream_t>(stream)};
  const int vectors = ceil_div(p.width, VEC * kThreads);
  if (vectors <= 1)
    launch(config, rms_norm_kernel<VEC, 1, T, W>, p, weight, eps, offset);
  else if (vectors <= 2)
    launch(config, rms_norm_kernel<VEC, 2, T, W>, p, weight, eps, offset);
  else if (vectors <= 4)
    launch(config, rms_norm_kernel<VEC, 4, T, W>, p, weight, eps, offset);
  else
    launch(config, rms_norm_wide_kernel<VEC, T, W>, p, weight, eps, offset);
}

int64_t row_stride(const TensorView& t) {  // (rows, width), or contiguous of any shape
  return t.contiguous() ? t.size(-1) : t.stride(0);
}

// The operands of both functions; y is absent in rms_norm_round.
template <class T>
NormRows<T> rows_of(const TensorView& x, const OptionalTensor& residual, T* y,
                    const OptionalTensor& h, float* rstd) {
  return {input<T>(x, "x"),
          input<T>(residual, "residual"),
          y,
          output<T>(h, "h"),
          rstd,
          static_cast<int>(x.size(-1)),
          row_stride(x),
          residual ? row_stride(*residual) : 0};
}

// Calls f(weight in its own dtype, number of elements that a thread can take at once).
template <class T, class F>
void with_weight(const NormRows<T>& p, const TensorView& weight, F&& f) {
  check_contiguous("weight", weight);
  check_size("weight", "size", p.width, weight.numel());
  const auto with = [&](auto* w) {
    constexpr int kVec = 16 / sizeof(T);
    const bool vectorized = aligned(16, p.x, p.residual, p.y, p.h, w) && p.width % kVec == 0 &&
                            p.x_stride % kVec == 0 && p.residual_stride % kVec == 0;
    if (vectorized)
      f(w, std::integral_constant<int, kVec>{});
    else
      f(w, std::integral_constant<int, 1>{});
  };
  if (weight.dtype() == DType::f32)
    with(input<float>(weight, "weight"));
  else
    with(input<T>(weight, "weight"));
}

}  // namespace

void rms_norm_forward(TensorView x, OptionalTensor residual, TensorView weight, float eps,
                      float offset, TensorView y, OptionalTensor h, TensorView rstd,
                      Stream stream) {
  check_contiguous("y", y);
  check_size("y", "elements", x.numel(), y.numel());
  const int64_t rows = rstd.numel();
  if (x.numel() == 0) return;
  with_device_float(x.dtype(), "x", [&](auto element) {
    using T = decltype(element);
    const NormRows<T> p =
        rows_of<T>(x, residual, output<T>(y, "y"), h, output<float>(rstd, "rstd"));
    with_weight(p, weight, [&](auto* w, auto vec) {
      start<decltype(vec)::value>(p, w, eps, offset, rows, stream);
    });
  });
}

void rms_norm_round(TensorView x, OptionalTensor residual, TensorView weight, float eps,
                    float offset, OptionalTensor h, TensorView qdata, TensorView scales, int bits,
                    int64_t group_size, TensorView q, TensorView x_scale, TensorView x_sums,
                    Stream stream) {
  const DeviceWeight into = weight_of(qdata, scales, std::nullopt, bits, group_size, x.size(-1));
  const int64_t rows = q.size(0);
  const RoundedRows to = rounded_rows(into, bits, rows, q, x_scale, x_sums);
  if (x.numel() == 0) return;
  check_size("x", "elements", rows * into.k, x.numel());
  if (into.k * x.dl.dtype.bits / 8 > RMS_NORM_ROUND_BYTES)
    throw std::invalid_argument("x: expected rows of at most " +
                                std::to_string(RMS_NORM_ROUND_BYTES) + " bytes, got " +
                                std::to_string(into.k * x.dl.dtype.bits / 8));
  with_device_float(x.dtype(), "x", [&](auto element) {
    using T = decltype(element);
    const NormRows<T> p = rows_of<T>(x, residual, nullptr, h, nullptr);
    with_weight(p, weight, [&](auto* w, auto vec) {
      using W = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
      const Launch config{"rms_norm round", dim3(rows), dim3(kThreads), p.width * sizeof(T),
                          reinterpret_cast<cudaStream_t>(stream)};
      launch(config, rms_norm_round_kernel<decltype(vec)::value, T, W>, p, w, eps, offset, into,
             to);
    });
  });
}

}  // namespace fastlm
