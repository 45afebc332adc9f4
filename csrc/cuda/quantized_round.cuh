// Activations in int8 with one scale per run, which quantized_linear multiplies with act_bits 8
// (reference.round_rows: q = round(x (127 / absmax)), half to even; a run is a group of W's
// columns, at most 512).
//
//     warp: one run of one row, an octet per lane (two in runs over 256) -> absmax -> q, scale, sum
//
// q is laid out for the products: the row stride is a multiple of 16 bytes, with zeros after the
// last column, and for int4 weights the even columns of an octet come before the odd ones. A run
// with NaN or infinity has the scale NaN, and zeros.
//
// A row is read from memory (quantized_round.cu), or computed by the kernel that rounds it: a norm
// (rms_norm.cu), a gated activation (glu.cu).
#pragma once

#include "cuda/quantized_weight.cuh"

namespace fastlm {

struct RoundedRows {
  int8_t* q;
  int64_t q_stride;
  float *scales, *sums;  // (runs, rows): scale; scale * the sum of the run's q
  int64_t scale_stride;
  bool even_first;
};

// Called by all lanes of a warp. octet(column, end, value) sets `value` to the 8 columns of the row
// from `column` on, with zeros from `end` on; it is not called with a column past `end`.
template <class Octet>
DEVICE void round_run(const DeviceWeight& w, const RoundedRows& to, int64_t row, int run,
                      Octet octet) {
  constexpr int kOctets = kRunMax / 8 / 32;  // per lane
  const int lane = threadIdx.x % 32;
  const int group = run / w.group_runs;
  const int begin = group * w.group + run % w.group_runs * kRunMax;
  const int end = min(min(begin + kRunMax, (group + 1) * w.group), w.k);
  float value[kOctets][8] = {};
  float largest = 0;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int column = begin + (i * 32 + lane) * 8;
    if (column < end) octet(column, end, value[i]);
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
    uint32_t packed[2] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int rounded = finite ? __float2int_rn(value[i][j] * inverse) : 0;
      const int at = to.even_first ? j % 2 * 4 + j / 2 : j;
      packed[at / 4] |= (rounded & 0xffu) << at % 4 * 8;
      sum += static_cast<float>(rounded);
    }
    if (column >= end) continue;
    using Bytes = Vector<uint32_t, 2>;
    int8_t* q = to.q + row * to.q_stride + column;
    store(reinterpret_cast<Bytes*>(q), Bytes{{packed[0], packed[1]}});
    if (column + 8 >= w.k && column + 8 < to.q_stride)
      store(reinterpret_cast<Bytes*>(q + 8), Bytes{{0, 0}});
  }
  sum = sum_of_warp(sum);
  if (lane) return;
  const float scale = finite ? absmax / 127.0f : __int_as_float(0x7fc00000);
  store(to.scales + run * to.scale_stride + row, scale);
  store(to.sums + run * to.scale_stride + row, scale * sum);
}

// Loads the first `left` of 8 elements of a row; the rest of `value` is unchanged. `whole`: the row
// is aligned, and read in vectors.
template <class X>
DEVICE void load_octet(const X* from, bool vectorized, int remaining, float (&value)[8]) {
  constexpr int kVec = 16 / sizeof(X);
#pragma unroll
  for (int j = 0; j < 8; j += kVec) {
    if (j >= remaining) break;
    Vector<X, kVec> v{};
    if (vectorized) {
      v = load(reinterpret_cast<const Vector<X, kVec>*>(from + j));
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e)
        if (j + e < remaining) v.at[e] = load(from + j + e);
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) value[j + e] = to_float(v.at[e]);
  }
}

// ---- host

// Where the int8 rows go: q (rows, columns rounded up to ROUNDED_COLUMNS), x_scale and x_sums
// (runs, rows rounded up to ROUNDED_ROWS).
inline RoundedRows rounded_rows(const DeviceWeight& w, int bits, int64_t rows, const TensorView& q,
                                const TensorView& x_scale, const TensorView& x_sums) {
  check_contiguous("q", q);
  check_size("q", "rows", rows, q.size(0));
  check_size("q", "columns", round_up(w.k, ROUNDED_COLUMNS), q.size(1));
  for (const auto& [t, argument] : {std::pair{&x_scale, "x_scale"}, {&x_sums, "x_sums"}}) {
    check_contiguous(argument, *t);
    check_size(argument, "rows", w.runs, t->size(0));
    check_size(argument, "columns", round_up(rows, ROUNDED_ROWS), t->size(1));
  }
  return {output<int8_t>(q, "q"),          q.size(1),       output<float>(x_scale, "x_scale"),
          output<float>(x_sums, "x_sums"), x_scale.size(1), bits == 4};
}

}  // namespace fastlm
