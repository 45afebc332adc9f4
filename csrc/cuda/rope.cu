// Rotary embedding of q and k in one launch: y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2, where
// x1, x2 are elements j and j + R / 2 of a head, or 2 j and 2 j + 1 (interleaved). The inverse is
// the same with (sin1, sin2) := (-sin2, -sin1). Elements past R are copied.
//
//     thread (u, row)   row = (batch, position, group of heads of q or of k)
// unit u < units    two runs of VEC elements, from u VEC and from R / 2 + u VEC; the units after
//                       those copy a run of the rest
//
// Elements of a head are contiguous, all other strides are free. Products and sums are float32. A
// thread reads its part of the tables once for all heads of its group. A group is one head in a
// decode step, where all heads run at once; it is several heads with many positions, where the
// tables would otherwise be most of the traffic from L2. Not measured on a GPU.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/ops.h"

namespace fastlm {
namespace {

constexpr int kThreads = 128;

template <class T>
struct RopeHeads {
  const T* x;
  T* y;
  int heads;
  int64_t x_batch, x_head, x_token, y_batch, y_head, y_token;  // strides
};

template <class U>
struct RopeTable {
  const U* at;
  int64_t batch, token;  // strides; 0 where one entry serves all of the batch
};

template <class T, class U>
struct RopeProblem {
  RopeHeads<T> q, k;
  RopeTable<U> cos, sin;
  int64_t rows;
  int length, half, width,
      heads_per_group;  // positions, pairs and elements of a head, heads per group
  bool inverse;
};

template <int VEC, class U>
DEVICE void load_run(const U* p, float* x) {
  const auto v = load(reinterpret_cast<const Vector<U, VEC>*>(p));
#pragma unroll
  for (int j = 0; j < VEC; ++j) x[j] = to_float(v.at[j]);
}
template <int VEC, class T>
DEVICE void store_run(T* p, const Vector<T, VEC>& v) {
  if constexpr (VEC > 1)
    store_global(reinterpret_cast<Vector<T, VEC>*>(p), v);
  else
    store(p, v.at[0]);
}

template <int VEC, bool INTERLEAVED, class T, class U>
__global__ void __launch_bounds__(kThreads) rope_kernel(RopeProblem<T, U> p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const int of_q = (p.q.heads + p.heads_per_group - 1) / p.heads_per_group;
  const int groups = of_q + (p.k.heads + p.heads_per_group - 1) / p.heads_per_group;
  const unsigned position = static_cast<unsigned>(row) / groups;
  const int group = static_cast<unsigned>(row) % groups;
  const int64_t batch = position / p.length, token = position % p.length;
  const RopeHeads<T>& t = group < of_q ? p.q : p.k;
  const int first_head = (group < of_q ? group : group - of_q) * p.heads_per_group;
  const int last_head = min(first_head + p.heads_per_group, t.heads);
  const T* x = t.x + batch * t.x_batch + token * t.x_token + first_head * t.x_head;
  T* y = t.y + batch * t.y_batch + token * t.y_token + first_head * t.y_head;
  const int units = p.half / VEC;
  for (int u = threadIdx.x; u < units; u += blockDim.x) {
    constexpr bool APART = INTERLEAVED && VEC == 1;  // a run is half a pair
    const int first = APART ? 2 * u : u * VEC, second = first + (APART ? 1 : p.half);
    float c[2 * VEC], s[2 * VEC];
    const U* cos = p.cos.at + batch * p.cos.batch + token * p.cos.token;
    const U* sin = p.sin.at + batch * p.sin.batch + token * p.sin.token;
    load_run<VEC>(cos + first, c), load_run<VEC>(cos + second, c + VEC);
    load_run<VEC>(sin + first, s), load_run<VEC>(sin + second, s + VEC);
    for (int head = first_head; head < last_head; ++head) {
      const T* from = x + (head - first_head) * t.x_head;
      T* to = y + (head - first_head) * t.y_head;
      float v[2 * VEC];
      load_run<VEC>(from + first, v), load_run<VEC>(from + second, v + VEC);
      Vector<T, VEC> rotated[2];
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const int first_index = INTERLEAVED ? 2 * j : j,
                  second_index = INTERLEAVED ? 2 * j + 1 : VEC + j;
        const float sin1 = p.inverse ? -s[second_index] : s[first_index],
                    sin2 = p.inverse ? -s[first_index] : s[second_index];
        rotated[first_index / VEC].at[first_index % VEC] =
            from_float<T>(v[first_index] * c[first_index] - v[second_index] * sin1);
        rotated[second_index / VEC].at[second_index % VEC] =
            from_float<T>(v[second_index] * c[second_index] + v[first_index] * sin2);
      }
      store_run<VEC>(to + first, rotated[0]);
      store_run<VEC>(to + second, rotated[1]);
    }
  }
  for (int at = 2 * p.half + threadIdx.x * VEC; at < p.width; at += blockDim.x * VEC)
    for (int head = first_head; head < last_head; ++head) {
      const auto v =
          load(reinterpret_cast<const Vector<T, VEC>*>(x + (head - first_head) * t.x_head + at));
      store_run<VEC>(y + (head - first_head) * t.y_head + at, v);
    }
}

template <class T>
RopeHeads<T> heads_of(const TensorView& x, const TensorView& y, const char* name) {
  if (x.stride(3) != 1 && x.size(3) > 1)
    throw std::invalid_argument(std::string(name) +
                                ": expected elements side by side, got stride " +
                                std::to_string(x.stride(3)));
  for (int i = 0; i < 4; ++i) check_size(name, "a size of its result", y.size(i), x.size(i));
  return {input<T>(x, name), output<T>(y, name), static_cast<int>(x.size(1)),
          x.stride(0),       x.stride(1),        x.stride(2),
          y.stride(0),       y.stride(1),        y.stride(2)};
}

template <class U>
RopeTable<U> table_of(const TensorView& t, const char* name) {
  const bool shared = t.ndim() == 2 || t.size(0) == 1;
  return {input<U>(t, name), shared ? 0 : t.stride(0), t.stride(-2)};
}

template <class T>
bool fits_vectors(const RopeHeads<T>& t, int vec) {
  return aligned(vec * sizeof(T), t.x, t.y) && t.x_batch % vec == 0 && t.x_head % vec == 0 &&
         t.x_token % vec == 0 && t.y_batch % vec == 0 && t.y_head % vec == 0 &&
         t.y_token % vec == 0;
}
template <class U>
bool fits_vectors(const RopeTable<U>& t, int vec) {
  return aligned(16, t.at) && t.batch % vec == 0 && t.token % vec == 0;
}

template <int VEC, class T, class U>
void start(const RopeProblem<T, U>& p, bool interleaved, Stream stream) {
  const int units = std::max({1, p.half / VEC, (p.width - 2 * p.half + VEC - 1) / VEC});
  const int across = std::min(units, 32), down = kThreads / across;
  const Launch config{"rope", dim3(ceil_div(p.rows, down)), dim3(across, down), 0,
                      reinterpret_cast<cudaStream_t>(stream)};
  if (interleaved)
    launch(config, rope_kernel<VEC, true, T, U>, p);
  else
    launch(config, rope_kernel<VEC, false, T, U>, p);
}

}  // namespace

void rope(TensorView q, TensorView k, TensorView cos, TensorView sin, bool interleaved,
          bool inverse, int heads_of_group, TensorView q_out, TensorView k_out, Stream stream) {
  const int64_t length = q.size(2), width = q.size(3), heads_per_group = heads_of_group;
  check_size("cos", "positions", length, cos.size(-2));
  const int64_t groups =
      ceil_div(q.size(1), heads_per_group) + ceil_div(k.size(1), heads_per_group);
  const int64_t rows = q.size(0) * length * groups;
  if (rows > INT32_MAX)
    throw std::invalid_argument("q: expected fewer heads and positions, got " +
                                std::to_string(rows) + " rows");
  with_device_float(q.dtype(), "q", [&](auto element) {
    using T = decltype(element);
    const auto with_table = [&](auto entry) {
      using U = decltype(entry);
      const RopeProblem<T, U> p{heads_of<T>(q, q_out, "q"),
                                heads_of<T>(k, k_out, "k"),
                                table_of<U>(cos, "cos"),
                                table_of<U>(sin, "sin"),
                                rows,
                                static_cast<int>(length),
                                static_cast<int>(cos.size(-1) / 2),
                                static_cast<int>(width),
                                static_cast<int>(heads_per_group),
                                inverse};
      constexpr int VEC = 16 / sizeof(U);  // longer runs: half sectors of the tables per lane
      if (fits_vectors(p.q, VEC) && fits_vectors(p.k, VEC) && fits_vectors(p.cos, VEC) &&
          fits_vectors(p.sin, VEC) && p.half % VEC == 0 && p.width % VEC == 0)
        start<VEC>(p, interleaved, stream);
      else
        start<1>(p, interleaved, stream);
    };
    if (cos.dtype() == DType::f32)
      with_table(float{});
    else
      with_table(T{});
  });
}

}  // namespace fastlm
