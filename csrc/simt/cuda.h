// CUDA's names for device code, on the host: indices, barriers, shuffles, votes, atomics, and the
// mathematics that the CUDA headers leave to nvcc. Only names that a kernel uses are here.
#pragma once

#include <bit>
#include <cfloat>
#include <climits>
#include <cmath>
#include <type_traits>

#include "simt/warp.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#undef __forceinline__
#define __forceinline__ inline

#define threadIdx (::simt::self->index)
#define blockIdx (::simt::self->block->index)
#define blockDim (::simt::self->block->dim)
#define gridDim (::simt::self->block->grid)

// ---- barriers

inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::barrier(0, 0, site); }
inline void __syncwarp(unsigned mask = simt::kAllLanes, simt::Site site = simt::Site::current()) {
  simt::sync_warp(mask, site);
}
inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  simt::fence();
}
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- shuffles: groups of `width` lanes, a power of 2; distances are modulo 32

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32,
              simt::Site site = simt::Site::current()) {
  const int group = simt::self->lane & -width;
  return simt::shuffle("__shfl_sync", mask, v, group + (source & (width - 1)), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32,
                  simt::Site site = simt::Site::current()) {
  const int lane = simt::self->lane, source = lane ^ (lanes & 31), end = (lane & -width) + width;
  return simt::shuffle("__shfl_xor_sync", mask, v, source < end ? source : -1, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int lanes, int width = 32,
                   simt::Site site = simt::Site::current()) {
  const int lane = simt::self->lane, source = lane + (lanes & 31), end = (lane & -width) + width;
  return simt::shuffle("__shfl_down_sync", mask, v, source < end ? source : -1, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int lanes, int width = 32,
                 simt::Site site = simt::Site::current()) {
  const int lane = simt::self->lane, source = lane - (lanes & 31);
  return simt::shuffle("__shfl_up_sync", mask, v, source >= (lane & -width) ? source : -1, width,
                       site);
}

inline unsigned __ballot_sync(unsigned mask, int p, simt::Site site = simt::Site::current()) {
  return simt::ballot(mask, p != 0, site);
}
inline int __any_sync(unsigned mask, int p, simt::Site site = simt::Site::current()) {
  return simt::ballot(mask, p != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int p, simt::Site site = simt::Site::current()) {
  return simt::ballot(mask, p == 0, site) == 0;
}

// ---- atomics: atomic across blocks, since OpenMP runs several at a time

namespace simt {
template <class T, class F>
T atomic(T* p, F&& change, const Site& site) {
  check(p, sizeof(T), sizeof(T), Access::atomic, site);
  exchange_views(p);
  T before, after;
  __atomic_load(p, &before, __ATOMIC_RELAXED);
  do after = change(before);
  while (!__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  yield();  // a thread that waits for another one's atomic must let it run
  return before;
}
}  // namespace simt

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  return simt::atomic(p, [v](T x) { return T(x + v); }, site);
}

// ---- mathematics; the fast forms are as exact as the others

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
template <class A, class B>
void min(A, B) = delete;  // no conversion of other types to int
template <class A, class B>
void max(A, B) = delete;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fdividef(float x, float y) {
  const float size = std::fabs(y);
  return size > 0x1p126f && size <= FLT_MAX ? x * 0.0f : x / y;  // 1 / y would be below 2^-126
}
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  return x >= 0x1p31f ? INT_MAX : x < -0x1p31f ? INT_MIN : static_cast<int>(std::nearbyint(x));
}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t(a) * b) >> 32; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> 4 * i;
    unsigned byte = bytes >> 8 * (s & 7) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  unsigned sum = c;  // may wrap around
  for (int i = 0; i < 4; ++i) sum += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
  return sum;
}
