// Rotary position embedding of q and k. Body of rope.cpp, compiled per instruction set.
//
//   y = x * cos + rotate(x) * sin on the first R of D elements, y = x on the rest; rotate is
//   half-split    (-x[R/2:R], x[0:R/2])         x[i] and x[i + R/2] are a pair
//   interleaved   (-x[1], x[0], -x[3], x[2]..)  x[2i] and x[2i + 1] are a pair
//   inverse       x * cos - rotate(x * sin), the transposed map: the gradient
//
// One unit of work is all heads of one position, so the table row (R floats, twice) is read from
// memory once and from the L1 for every further head. Each element of q and k is read once and
// written once.
#include "cpu/base/parallel.h"

// Swaps neighbours: (1, 0, 3, 2, ...).
FASTLM_INLINE vfloat swap_pairs(vfloat x) {
#if FASTLM_VL == 16
  return (vfloat)_mm512_permute_ps((__m512)x, 0xb1);
#elif FASTLM_VL == 8
  return (vfloat)_mm256_permute_ps((__m256)x, 0xb1);
#else
  return __builtin_shuffle(x, vint{1, 0, 3, 2});
#endif
}
// -1 in even lanes, +1 in odd ones.
FASTLM_INLINE vfloat pair_signs() {
  vfloat v;
  for (int i = 0; i < VL; ++i) v[i] = i % 2 ? 1.f : -1.f;
  return v;
}

template <class T, class U>
FASTLM_INLINE void rope_half_split(const T* x, const U* cos, const U* sin, int64_t half, float sign,
                                   T* y) {
  for (int64_t j = 0; j < half; j += VL) {
    const int n = int(std::min<int64_t>(VL, half - j));
    const auto at = [&](const auto* p) { return n == VL ? load(p + j) : load(p + j, n); };
    const vfloat a = at(x), b = at(x + half);
    const vfloat c1 = at(cos), c2 = at(cos + half), s1 = at(sin), s2 = at(sin + half);
    // forward: a c1 - b s1, b c2 + a s2;  transposed: a c1 + b s2, b c2 - a s1
    const vfloat lo = a * c1 - b * (sign > 0 ? s1 : -s2), hi = b * c2 + a * (sign > 0 ? s2 : -s1);
    if (n == VL)
      store(y + j, lo), store(y + half + j, hi);
    else
      store(y + j, lo, n), store(y + half + j, hi, n);
  }
}

template <class T, class U>
FASTLM_INLINE void rope_interleaved(const T* x, const U* cos, const U* sin, int64_t width,
                                    float sign, T* y) {
  const vfloat signs = pair_signs() * sign;
  for (int64_t j = 0; j < width; j += VL) {  // VL and width are even: a pair is never cut
    const int n = int(std::min<int64_t>(VL, width - j));
    const auto at = [&](const auto* p) { return n == VL ? load(p + j) : load(p + j, n); };
    const vfloat a = at(x), c = at(cos), s = at(sin);
    const vfloat swapped = sign > 0 ? swap_pairs(a) * s : swap_pairs(a * s);
    const vfloat r = a * c + signs * swapped;
    if (n == VL)
      store(y + j, r);
    else
      store(y + j, r, n);
  }
}

template <class T, class U>
void rope_typed(const TensorView* const (&inputs)[2], const TensorView* const (&outputs)[2],
                const TensorView& cos, const TensorView& sin, bool interleaved, bool inverse) {
  const int64_t batch = inputs[0]->size(0), length = inputs[0]->size(2), width = inputs[0]->size(3),
                rotary = cos.size(-1);
  check_size("cos", "rows, as q:", length, cos.size(-2));  // a trace skips ops/rope.py
  check_size("sin", "rows, as q:", length, sin.size(-2));
  const U *pc = cos.data<U>("cos"), *ps = sin.data<U>("sin");
  const int64_t c_row = cos.stride(-2), s_row = sin.stride(-2);
  const bool per_batch = cos.ndim() == 3 && cos.size(0) > 1;
  const int64_t c_batch = per_batch ? cos.stride(0) : 0, s_batch = per_batch ? sin.stride(0) : 0;
  const int64_t heads = inputs[0]->size(1) + inputs[1]->size(1);
  const float sign = inverse ? -1.f : 1.f;
  const T* px[2] = {inputs[0]->data<T>("q"), inputs[1]->data<T>("k")};
  T* py[2] = {outputs[0]->data<T>("q_out"), outputs[1]->data<T>("k_out")};
  // below 32768 elements a parallel region costs more than it saves
  const bool worthwhile = batch * length * heads * width > 32768;
  parallel_for(batch * length, worthwhile, [=](int64_t position) {
    const int64_t b = position / length, i = position % length;
    const U *c = pc + b * c_batch + i * c_row, *s = ps + b * s_batch + i * s_row;
    for (int t = 0; t < 2; ++t) {
      const TensorView &in = *inputs[t], &out = *outputs[t];
      const T* x = px[t] + b * in.stride(0) + i * in.stride(2);
      T* y = py[t] + b * out.stride(0) + i * out.stride(2);
      const int64_t x_head = in.stride(1), y_head = out.stride(1);
      for (int64_t h = 0; h < in.size(1); ++h, x += x_head, y += y_head) {
        if (interleaved)
          rope_interleaved(x, c, s, rotary, sign, y);
        else
          rope_half_split(x, c, s, rotary / 2, sign, y);
        if (rotary < width) memcpy(y + rotary, x + rotary, size_t(width - rotary) * sizeof(T));
      }
    }
  });
}

// q, q_out (B, H, S, D), k, k_out (B, Hkv, S, D): any strides, but 1 along D; cos, sin (S, R),
// (1, S, R) or (B, S, R): float32 or q's dtype, stride 1 along R
inline void rope(const TensorView& q, const TensorView& k, const TensorView& cos,
                 const TensorView& sin, bool interleaved, bool inverse, const TensorView& q_out,
                 const TensorView& k_out) {
  prefer_huge_pages(q_out), prefer_huge_pages(k_out);
  with_float(q.dtype(), "q", [&](auto tag) {
    using T = decltype(tag);
    if (cos.dtype() == DType::f32)
      rope_typed<T, float>({&q, &k}, {&q_out, &k_out}, cos, sin, interleaved, inverse);
    else
      rope_typed<T, T>({&q, &k}, {&q_out, &k_out}, cos, sin, interleaved, inverse);
  });
}
