// Writes keys and values of new tokens to the pages of a cache, unchanged or in int8: q = round(x /
// scale of the head), half to even, clamped to -127 .. 127. One launch, where torch takes an index
// and a scatter, and for int8 a division, a rounding, a clamp and a conversion, for each of k and
// v. A block is one token; a thread takes 16 bytes of a head of k or v, or one element where those
// are not aligned. Everything is read and written once. Not measured on a GPU.
#include "cuda/ops.h"
#include "cuda/token_slots.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 128;

template <class T, class C>
struct AppendedHeads {  // k or v
  const T* x;           // (B, S, Hkv, D)
  C* cache;             // (pages, page_size, Hkv, D), T or int8
  const float* scale;   // (Hkv,), for int8
  int width;
  int64_t x_step[3], cache_step[3];  // strides of sequence, token, head; of page, slot, head
};

template <int VEC, class T, class C>
DEVICE void append(const AppendedHeads<T, C>& h, int b, int s, int page, int slot, int head,
                   int at) {
  const auto x = load(reinterpret_cast<const Vector<T, VEC>*>(
      h.x + b * h.x_step[0] + s * h.x_step[1] + head * h.x_step[2] + at));
  auto* to = reinterpret_cast<Vector<C, VEC>*>(
      h.cache + page * h.cache_step[0] + slot * h.cache_step[1] + head * h.cache_step[2] + at);
  if constexpr (std::is_same_v<T, C>) {
    store(to, x);
  } else {
    const float scale = load(h.scale + head);
    Vector<C, VEC> q;
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      q.at[i] = static_cast<C>(
          __float2int_rn(fminf(fmaxf(__fdiv_rn(to_float(x.at[i]), scale), -127.0f), 127.0f)));
    store(to, q);
  }
}

template <int VEC, class T, class C>
__global__ void __launch_bounds__(kThreads)
    paged_append_kernel(AppendedHeads<T, C> k, AppendedHeads<T, C> v, TokenSlots slots, int heads) {
  const auto [b, s, position, page, slot] = slots.slot_of(blockIdx.x);
  if (page < 0) return;
  const int of_k = k.width / VEC, of_head = of_k + v.width / VEC;
  for (int i = blockIdx.y * kThreads + threadIdx.x; i < heads * of_head;
       i += gridDim.y * kThreads) {
    const int head = i / of_head, at = i % of_head;
    if (at < of_k)
      append<VEC>(k, b, s, page, slot, head, at * VEC);
    else
      append<VEC>(v, b, s, page, slot, head, (at - of_k) * VEC);
  }
}

template <class T, class C>
AppendedHeads<T, C> part_of(const char* name, const TensorView& x, const char* cache_name,
                            const TensorView& cache, const char* scale_name,
                            const OptionalTensor& scale) {
  check_size(name, "key heads as its cache", cache.size(2), x.size(2));
  check_size(name, "elements of a head as its cache", cache.size(3), x.size(3));
  if (scale.has_value() != std::is_same_v<C, int8_t>)
    throw std::invalid_argument(std::string(scale_name) + ": expected " +
                                (scale ? "none for a float cache, got one"
                                       : "one for each key head of an int8 cache, got none"));
  if (scale) {
    check_size(scale_name, "one for each key head", cache.size(2), scale->numel());
    check_contiguous(scale_name, *scale);
  }
  if (cache.size(3) > 1)
    check_size(cache_name, "elements of a head side by side, stride", 1, cache.stride(3));
  return {input<T>(x, name),
          output<C>(cache, cache_name),
          input<float>(scale, scale_name),
          static_cast<int>(x.size(3)),
          {x.stride(0), x.stride(1), x.stride(2)},
          {cache.stride(0), cache.stride(1), cache.stride(2)}};
}

template <int VEC, class T, class C>
bool fits_vectors(const AppendedHeads<T, C>& h) {
  bool aligned_rows =
      h.width % VEC == 0 && aligned(VEC * sizeof(T), h.x) && aligned(VEC * sizeof(C), h.cache);
  for (int i = 0; i < 3; ++i)
    aligned_rows = aligned_rows && h.x_step[i] % VEC == 0 && h.cache_step[i] % VEC == 0;
  return aligned_rows;
}

}  // namespace

void paged_append(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache,
                  TensorView block_table, TensorView positions, OptionalTensor k_scale,
                  OptionalTensor v_scale, Stream stream) {
  check_size("v", "tokens as k", k.size(0) * k.size(1), v.size(0) * v.size(1));
  const int heads = static_cast<int>(k_cache.size(2));
  const TokenSlots slots =
      token_slots(positions, block_table, k.size(0), k.size(1), k_cache, v_cache);
  const auto start = [&](auto element, auto of_cache) {
    using T = decltype(element);
    using C = decltype(of_cache);
    constexpr int VEC = 16 / sizeof(T);
    const auto keys = part_of<T, C>("k", k, "k_cache", k_cache, "k_scale", k_scale);
    const auto values = part_of<T, C>("v", v, "v_cache", v_cache, "v_scale", v_scale);
    const bool vectors = fits_vectors<VEC>(keys) && fits_vectors<VEC>(values);
    const int work = heads * (keys.width + values.width) / (vectors ? VEC : 1);
    const Launch config{"paged_append",
                        dim3(positions.numel(), std::min(ceil_div(work, kThreads), 8)),
                        dim3(kThreads), 0, reinterpret_cast<cudaStream_t>(stream)};
    if (vectors)
      launch(config, paged_append_kernel<VEC, T, C>, keys, values, slots, heads);
    else
      launch(config, paged_append_kernel<1, T, C>, keys, values, slots, heads);
  };
  with_device_float(k.dtype(), "k", [&](auto element) {
    if (k_cache.dtype() == DType::i8)
      start(element, int8_t{});
    else
      start(element, element);
  });
}

}  // namespace fastlm
