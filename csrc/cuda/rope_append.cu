// Everything between projections and attention of a decode step, in one launch: rotates q and k by
// their positions (rope.cu) and writes k and v to the cache (paged_append.cu).
//
//     y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin      x1, x2: elements j and j + R / 2 of a head
//
// A block is one token, or down to an eighth of one. Its threads take VEC pairs of a head of q or
// k, or VEC elements of v or past R, until the token is done. The kernel also reads the token's row
// of the tables, which saves a launch that gathers rows. Products and sums are float32. Not
// measured on a GPU.
#include <algorithm>

#include "cuda/ops.h"
#include "cuda/token_slots.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 128;

template <class T>
struct TokenHeads {  // q, k or v, (B, S, heads, D), and their destination
  const T* x;
  T* y;
  int heads, width;
  int64_t x_step[3], y_step[3];  // strides of sequence, token, head; in the cache: page, slot, head
};

struct RopeTables {
  const float *cos, *sin;  // (rows, 2 half)
  int rows, half;
};

template <class T>
struct RopeAppendProblem {
  TokenHeads<T> q, k, v;
  TokenSlots slots;
  RopeTables tables;
};

template <int VEC, class T>
DEVICE void copy(const T* from, T* to) {
  store(reinterpret_cast<Vector<T, VEC>*>(to), load(reinterpret_cast<const Vector<T, VEC>*>(from)));
}

// Unit `unit` of a head: the pairs first, then the elements past R.
template <int VEC, class T>
DEVICE void rotate(const T* from, T* to, const RopeTables& tables, int64_t row, int unit) {
  const int at = unit * VEC, half = tables.half;
  if (at >= half) return copy<VEC>(from + at + half, to + at + half);
  const auto x1 = load(reinterpret_cast<const Vector<T, VEC>*>(from + at));
  const auto x2 = load(reinterpret_cast<const Vector<T, VEC>*>(from + at + half));
  using F = Vector<float, VEC>;
  const float *cos = tables.cos + row * 2 * half + at, *sin = tables.sin + row * 2 * half + at;
  const F c1 = load(reinterpret_cast<const F*>(cos)), s1 = load(reinterpret_cast<const F*>(sin));
  const F c2 = load(reinterpret_cast<const F*>(cos + half));
  const F s2 = load(reinterpret_cast<const F*>(sin + half));
  Vector<T, VEC> y1, y2;
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    const float a = to_float(x1.at[j]), b = to_float(x2.at[j]);
    y1.at[j] = from_float<T>(a * c1.at[j] - b * s1.at[j]);
    y2.at[j] = from_float<T>(b * c2.at[j] + a * s2.at[j]);
  }
  store(reinterpret_cast<Vector<T, VEC>*>(to + at), y1);
  store(reinterpret_cast<Vector<T, VEC>*>(to + at + half), y2);
}

template <int VEC, class T>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(RopeAppendProblem<T> p) {
  const auto [b, s, position, page, slot] = p.slots.slot_of(blockIdx.x);
  const bool has_slot = page >= 0;
  const int64_t row = min(max(position, 0), p.tables.rows - 1);
  const int of_head = (p.q.width - p.tables.half) / VEC;  // units per head
  const int of_q = p.q.heads * of_head, of_k = has_slot ? p.k.heads * of_head : 0;
  const int of_v = has_slot ? p.v.heads * (p.v.width / VEC) : 0;
  for (int i = blockIdx.y * kThreads + threadIdx.x; i < of_q + of_k + of_v;
       i += gridDim.y * kThreads) {
    const bool is_q = i < of_q, is_v = i >= of_q + of_k;
    const TokenHeads<T>& t = is_q ? p.q : is_v ? p.v : p.k;
    const int unit = i - (is_q ? 0 : is_v ? of_q + of_k : of_q);
    const int units_per_head = is_v ? t.width / VEC : of_head, head = unit / units_per_head;
    const T* from = t.x + b * t.x_step[0] + s * t.x_step[1] + head * t.x_step[2];
    T* to = t.y + (is_q ? b : page) * t.y_step[0] + (is_q ? s : slot) * t.y_step[1] +
            head * t.y_step[2];
    if (is_v)
      copy<VEC>(from + unit % units_per_head * VEC, to + unit % units_per_head * VEC);
    else
      rotate<VEC>(from, to, p.tables, row, unit % units_per_head);
  }
}

template <class T>
TokenHeads<T> rows_of(const char* name, const TensorView& x, const char* to, const TensorView& y) {
  check_size(name, "heads", y.size(2), x.size(2));
  check_size(name, "elements of a head", y.size(3), x.size(3));
  for (const auto& [argument, t] : {std::pair{name, &x}, {to, &y}})
    if (t->size(3) > 1)
      check_size(argument, "elements of a head side by side, stride", 1, t->stride(3));
  return {input<T>(x, name),
          output<T>(y, to),
          static_cast<int>(x.size(2)),
          static_cast<int>(x.size(3)),
          {x.stride(0), x.stride(1), x.stride(2)},
          {y.stride(0), y.stride(1), y.stride(2)}};
}

template <class T>
bool fits_vectors(const TokenHeads<T>& t, int vec) {
  bool all = t.width % vec == 0 && aligned(vec * sizeof(T), t.x, t.y);
  for (int i = 0; i < 3; ++i) all = all && t.x_step[i] % vec == 0 && t.y_step[i] % vec == 0;
  return all;
}

}  // namespace

void rope_append(TensorView q, TensorView k, TensorView v, TensorView cos, TensorView sin,
                 TensorView q_out, TensorView k_cache, TensorView v_cache, TensorView block_table,
                 TensorView positions, Stream stream) {
  for (const auto& [argument, t] : {std::pair{"k", &k}, {"v", &v}, {"q_out", &q_out}}) {
    check_size(argument, "sequences", q.size(0), t->size(0));
    check_size(argument, "tokens of a sequence", q.size(1), t->size(1));
  }
  for (const auto& [argument, t] : {std::pair{"cos", &cos}, {"sin", &sin}}) {
    check_contiguous(argument, *t);
    check_size(argument, "rows as cos", cos.size(0), t->size(0));
    check_size(argument, "columns as cos", cos.size(1), t->size(1));
  }
  if (cos.size(0) == 0 || cos.size(1) % 2 || cos.size(1) > q.size(3))
    throw std::invalid_argument("cos: expected rows of an even number up to " +
                                std::to_string(q.size(3)) + ", got " + std::to_string(cos.size(0)) +
                                " of " + std::to_string(cos.size(1)));
  check_size("k", "elements of a head as q", q.size(3), k.size(3));
  const TokenSlots slots =
      token_slots(positions, block_table, q.size(0), q.size(1), k_cache, v_cache);
  const RopeTables tables{input<float>(cos, "cos"), input<float>(sin, "sin"),
                          static_cast<int>(cos.size(0)), static_cast<int>(cos.size(1) / 2)};
  with_device_float(q.dtype(), "q", [&](auto element) {
    using T = decltype(element);
    const auto of_q = rows_of<T>("q", q, "q_out", q_out);
    const auto of_k = rows_of<T>("k", k, "k_cache", k_cache);
    const auto of_v = rows_of<T>("v", v, "v_cache", v_cache);
    const auto start = [&](auto vec) {
      constexpr int VEC = decltype(vec)::value;
      const int64_t units = (of_q.heads + of_k.heads) * ((of_q.width - tables.half) / VEC) +
                            of_v.heads * (of_v.width / VEC);
      launch({"rope_append", dim3(positions.numel(), std::min(ceil_div(units, kThreads), 8)),
              dim3(kThreads), 0, reinterpret_cast<cudaStream_t>(stream)},
             rope_append_kernel<VEC, T>, RopeAppendProblem<T>{of_q, of_k, of_v, slots, tables});
    };
    constexpr int VEC = 4;  // 16 bytes of a table
    if (fits_vectors(of_q, VEC) && fits_vectors(of_k, VEC) && fits_vectors(of_v, VEC) &&
        tables.half % VEC == 0 && aligned(16, tables.cos, tables.sin))
      start(std::integral_constant<int, VEC>{});
    else
      start(std::integral_constant<int, 1>{});
  });
}

}  // namespace fastlm
