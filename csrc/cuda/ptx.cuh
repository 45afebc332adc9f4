// The instructions that kernels use: one wrapper each, with the same name and meaning under nvcc
// (PTX) and under g++ (the emulator in csrc/simt). A kernel reaches memory through `load` and
// `store`, so that the emulator can check it; `p[i]` compiles to the same instruction, unchecked.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef __CUDACC__
#include "simt/simt.h"
#endif

namespace fastlm {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr uint32_t kAllLanes = 0xffffffffu;

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
// N values of T that the threads of a block share, with the alignment of T; every element is read
// and written by load, store
#define SHARED(T, name, N) __shared__ T name[N]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <class T>
DEVICE T load(const T* p) {
  return *p;
}
template <class T, class V>
DEVICE void store(T* p, V value) {
  *p = value;
}

// For data that the whole grid reads once (weights of a decode step): does not stay in L1.
DEVICE uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// An address from a table, marked as global; nvcc would use generic loads.
template <class T>
DEVICE T* global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

// 4, 8 or 16 bytes of global memory in one instruction: nvcc may split `store` of a vector.
template <class V>
DEVICE void store_global(V* p, const V& value) {
  static_assert(alignof(V) == sizeof(V));
  uint32_t v[sizeof(V) / 4];
  memcpy(v, &value, sizeof v);
  if constexpr (sizeof(V) == 4)
    asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(v[0]) : "memory");
  else if constexpr (sizeof(V) == 8)
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v[0]), "r"(v[1]) : "memory");
  else
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
}

// Copies `valid` of Bytes (4, 8, 16) bytes to shared memory, and zeros for the rest,
// asynchronously.
template <int Bytes>
DEVICE void cp_async(void* to, const void* from, int valid = Bytes) {
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "n"(Bytes), "r"(valid)
                 : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GroupsLeft>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
}

// Barrier `number` (1 to 15) for `threads` threads of the block.
DEVICE void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Four 8 x 8 matrices of 16 bits; lanes 8 i to 8 i + 7 pass the rows of matrix i.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8), sums in float32
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d (16 x 8) += a (16 x 32) b (32 x 8), exact
DEVICE void mma(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int8_t) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// For each bit, the entry of the truth table that the bits of a, b, c select: (a & b) | c has the
// table (0xf0 & 0xcc) | 0xaa.
template <int Table>
DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return d;
}

// 2^x to 2 ulp; below 2^-126: 0.
DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

#define DEVICE inline
using simt::Site;

template <class T>
T load(const T* p, Site site = Site::current()) {
  simt::check(p, sizeof(T), alignof(T), simt::Access::read, site);
  return *p;
}
template <class T, class V>
void store(T* p, V value, Site site = Site::current()) {
  simt::check(p, sizeof(T), alignof(T), simt::Access::write, site);
  *p = value;
}
inline uint4 load_once(const uint4* p, Site site = Site::current()) {
  simt::check_constant(p, "load_once", site);
  return load(p, site);
}
template <class T>
T* global(T* p, Site site = Site::current()) {
  simt::check_global(p, "global", site);
  return p;
}
template <class V>
void store_global(V* p, const V& value, Site site = Site::current()) {
  simt::check_global(p, "store_global", site);
  store(p, value, site);
}

template <int Bytes>
void cp_async(void* to, const void* from, int valid = Bytes, Site site = Site::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  simt::start_copy({to, from, Bytes, static_cast<uint32_t>(valid)}, site);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int GroupsLeft>
void cp_async_wait(Site site = Site::current()) {
  simt::wait_copies(GroupsLeft, site);
}

inline void named_barrier(int number, int threads, Site site = Site::current()) {
  if (number < 1 || threads < 1) simt::fail("named_barrier: expected 1 to 15, threads", site);
  simt::barrier(number, threads, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  simt::load_matrices(r, 4, false, row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, Site site = Site::current()) {
  simt::load_matrices(r, 2, false, row, site);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  simt::load_matrices(r, 4, true, row, site);
}

template <class D, class E>
void mma(D (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], E kind,
         Site site = Site::current()) {
  simt::mma(d, a, b, kind, site);
}

template <int Table>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i)
    if (Table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
}

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

#endif

// ---- for nvcc and g++

template <class T>
DEVICE float to_float(T x) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return __bfloat162float(x);
  else if constexpr (std::is_same_v<T, float16>)
    return __half2float(x);
  else
    return x;
}
template <class T>
DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return __float2bfloat16(x);
  else if constexpr (std::is_same_v<T, float16>)
    return __float2half(x);
  else
    return x;
}

// N neighbours that are read and written at once. The alignment is 16 bytes at most: a wider vector
// (8 float32, where another operand has 8 elements of 16 bits) takes two accesses.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T at[N];
};

DEVICE float sum_of_warp(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}
DEVICE float max_of_warp(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// Returns the largest x of a block of THREADS to all its threads; ends with a barrier.
template <int THREADS>
DEVICE float max_of_block(float x) {
  SHARED(float, part, THREADS / 32);
  x = max_of_warp(x);
  if (threadIdx.x % 32 == 0) store(part + threadIdx.x / 32, x);
  __syncthreads();
  x = max_of_warp(load(part + threadIdx.x % (THREADS / 32)));
  __syncthreads();  // `part` may be written again
  return x;
}
template <int THREADS>
DEVICE float sum_of_block(float x) {
  SHARED(float, part, THREADS / 32);
  x = sum_of_warp(x);
  if (threadIdx.x % 32 == 0) store(part + threadIdx.x / 32, x);
  __syncthreads();
  x = sum_of_warp(threadIdx.x % 32 < THREADS / 32 ? load(part + threadIdx.x % 32) : 0.0f);
  __syncthreads();  // `part` may be written again
  return x;
}

}  // namespace fastlm
