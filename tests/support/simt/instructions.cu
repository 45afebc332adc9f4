// Every instruction of ptx.cuh, and every CUDA name that csrc/simt/cuda.h replaces, in a kernel of
// its own: each thread of one block takes a row of words and returns a row of words. nvcc compiles
// it for a GPU, g++ for the emulator. tests/kernels/test_cuda_instructions.py builds either, and takes the
// expected results from NVIDIA's manuals.
#include <cstdio>
#include <cstring>
#include <utility>

#include "cuda/launch.h"

using namespace fastlm;

namespace {

constexpr int kMostThreads = 128;

// The operands of a kernel: the row of this thread, the tables, the block's shared memory.
struct Rows {
  const uint32_t* x;  // of this thread
  uint32_t* y;
  uint32_t* all;  // y of all threads
  int t;

  DEVICE uint32_t word(int i) const { return load(x + i); }
  DEVICE float number(int i) const { return __uint_as_float(load(x + i)); }
  DEVICE void put(int i, uint32_t v) const { store(y + i, v); }
  DEVICE void put(int i, int v) const { store(y + i, static_cast<uint32_t>(v)); }
  DEVICE void put(int i, float v) const { store(y + i, __float_as_uint(v)); }
};

template <class F>
__global__ void each_thread(const uint32_t* x, uint32_t* y) {
  const int t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  F::run(Rows{x + t * F::kIn, y + t * F::kOut, y, t});
}

// OP(name, words in, words out) { statements on `r` }
#define OP(name, IN, OUT)                      \
  struct name {                                \
    static constexpr int kIn = IN, kOut = OUT; \
    static DEVICE void run(const Rows& r);     \
  };                                           \
  DEVICE void name::run([[maybe_unused]] const Rows& r)

// ---- indices

OP(indices, 1, 12) {
  const dim3 of[4] = {
      dim3(threadIdx.x, threadIdx.y, threadIdx.z), dim3(blockIdx.x, blockIdx.y, blockIdx.z),
      dim3(blockDim.x, blockDim.y, blockDim.z), dim3(gridDim.x, gridDim.y, gridDim.z)};
  for (int i = 0; i < 4; ++i) {
    r.put(3 * i, of[i].x);
    r.put(3 * i + 1, of[i].y);
    r.put(3 * i + 2, of[i].z);
  }
}

// ---- memory

OP(loads_and_stores, 4, 8) {
  const uint4 v = load_once(reinterpret_cast<const uint4*>(r.x));
  store_global(reinterpret_cast<uint4*>(r.y), uint4{v.w, v.z, v.y, v.x});
  store_global(reinterpret_cast<uint2*>(r.y + 4), uint2{v.x, v.y});
  store_global(global(r.y) + 6, v.z);
  const auto* bytes = reinterpret_cast<const uint8_t*>(r.x);
  store(reinterpret_cast<uint8_t*>(r.y + 7), load(bytes + 3));
  store(reinterpret_cast<int8_t*>(r.y + 7) + 1, -2);
  store(reinterpret_cast<uint16_t*>(r.y + 7) + 1, load(reinterpret_cast<const uint16_t*>(r.x) + 1));
}

// x: 4 words to copy, how many bytes of 4, 8, 16 are valid; y: a buffer of ones after the copy
OP(copies, 8, 12) {
  SHARED(uint4, buffer, 3 * kMostThreads);
  uint4* const to = buffer + 3 * r.t;
  for (int i = 0; i < 3; ++i) store(to + i, uint4{~0u, ~0u, ~0u, ~0u});
  cp_async<4>(to, r.x, r.word(4));
  cp_async_commit();
  cp_async<8>(to + 1, r.x, r.word(5));
  cp_async_commit();
  cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) r.put(i, load(reinterpret_cast<uint32_t*>(to) + i));
  cp_async<16>(to + 2, r.x, r.word(6));
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 4; i < 12; ++i) r.put(i, load(reinterpret_cast<uint32_t*>(to) + i));
}

OP(dynamic_shared, 1, 2) {
  DYNAMIC_SHARED(raw);
  auto* const s = reinterpret_cast<uint32_t*>(raw);
  store(s + r.t, r.word(0));
  __syncthreads();
  r.put(0, load(s + (r.t + 33) % blockDim.x));
  r.put(1, static_cast<uint32_t>(reinterpret_cast<uintptr_t>(raw) % 128));
}

// ---- barriers

// Warps 0 and 1 wait at barrier 1, warps 2 and 3 at barrier 15; the two of a pair exchange words.
OP(named_barriers, 1, 1) {
  SHARED(uint32_t, s, kMostThreads);
  store(s + r.t, r.word(0));
  named_barrier(r.t < 64 ? 1 : 15, 64);
  r.put(0, load(s + (r.t ^ 32)));
}

OP(block_barrier, 1, 1) {
  SHARED(uint32_t, s, kMostThreads);
  store(s + r.t, r.word(0));
  __syncthreads();
  r.put(0, load(s + (r.t + 45) % blockDim.x));
}

OP(warp_barrier, 1, 1) {  // the lower and the upper half of a warp separately
  SHARED(uint32_t, s, kMostThreads);
  store(s + r.t, r.word(0));
  if (r.t % 32 < 16)
    __syncwarp(0x0000ffff);
  else
    __syncwarp(0xffff0000);
  r.put(0, load(s + (r.t ^ 9)));
}

// ---- lanes of a warp. x: a value, a lane or distance

template <int WIDTH>
DEVICE void shuffle_of(const Rows& r) {
  const uint32_t v = r.word(0);
  const int lane = r.word(1);
  r.put(0, __shfl_sync(kAllLanes, v, lane, WIDTH));
  r.put(1, __shfl_up_sync(kAllLanes, v, lane, WIDTH));
  r.put(2, __shfl_down_sync(kAllLanes, v, lane, WIDTH));
  r.put(3, __shfl_xor_sync(kAllLanes, v, lane, WIDTH));
  r.put(4, __shfl_xor_sync(kAllLanes, __uint_as_float(v), lane, WIDTH));
}
OP(shuffle_32, 2, 5) { shuffle_of<32>(r); }
OP(shuffle_16, 2, 5) { shuffle_of<16>(r); }
OP(shuffle_8, 2, 5) { shuffle_of<8>(r); }
OP(shuffle_2, 2, 5) { shuffle_of<2>(r); }

OP(shuffle_of_other_types, 2, 3) {
  const double d = __shfl_xor_sync(kAllLanes, static_cast<double>(r.word(0)) / 3, 1);
  r.put(0, static_cast<float>(d));
  const long long v = static_cast<long long>(r.word(0)) << 32 | r.word(1);
  const long long other = __shfl_sync(kAllLanes, v, 5);
  r.put(1, static_cast<uint32_t>(other >> 32));
  r.put(2, static_cast<uint32_t>(other));
}

OP(shuffle_of_some, 1, 1) {  // only the even lanes
  if (r.t % 2 == 0) r.put(0, __shfl_xor_sync(0x55555555u, r.word(0), 2));
}

OP(votes, 2, 6) {
  const int p = r.word(0), all = r.word(1);
  r.put(0, __ballot_sync(kAllLanes, p));
  r.put(1, __any_sync(kAllLanes, p));
  r.put(2, __all_sync(kAllLanes, all));
  if (r.t % 32 < 8) {
    r.put(3, __ballot_sync(0xffu, p));
    r.put(4, __any_sync(0xffu, p));
    r.put(5, __all_sync(0xffu, all));
  }
}

OP(sums, 1, 4) {
  r.put(0, sum_of_warp(r.number(0)));
  r.put(1, max_of_warp(r.number(0)));
  r.put(2, sum_of_block<kMostThreads>(r.number(0)));
  r.put(3, max_of_block<kMostThreads>(r.number(0)));
}

// ---- atomics and their results. x: an integer, a float

OP(atomics, 2, 6) {
  SHARED(int, total, 1);
  SHARED(unsigned, positive, 1);
  SHARED(float, real, 1);
  if (r.t == 0) {
    store(total, 0);
    store(positive, 0u);
    store(real, 0.0f);
  }
  __syncthreads();
  r.put(0, atomicAdd(total, static_cast<int>(r.word(0))));
  r.put(1, atomicAdd(positive, 1u));
  r.put(2, atomicAdd(real, r.number(1)));
  __syncthreads();
  if (r.t == 0) {
    r.put(3, load(total));
    r.put(4, load(positive));
    r.put(5, load(real));
  }
}

OP(atomics_of_global_memory, 1, 2) {  // the counter is thread 0's first word, and begins at 0
  r.put(1, atomicAdd(r.all, r.word(0)));
  __threadfence();
  __threadfence_block();
}

// ---- matrices

// The block's shared memory is `rows` of 16 bytes; x: a row of 4 words, and which row to return.
template <class F>
DEVICE void matrices_of(const Rows& r, F&& read) {
  SHARED(uint4, rows, 32);
  store(rows + r.t, load(reinterpret_cast<const uint4*>(r.x)));
  __syncwarp();
  read(rows + r.word(4));
}
OP(matrices_4, 8, 4) {
  uint32_t v[4];
  matrices_of(r, [&](const uint4* row) { ldmatrix_x4(v, row); });
  for (int i = 0; i < 4; ++i) r.put(i, v[i]);
}
OP(matrices_2, 8, 2) {
  uint32_t v[2];
  matrices_of(r, [&](const uint4* row) { ldmatrix_x2(v, row); });
  for (int i = 0; i < 2; ++i) r.put(i, v[i]);
}
OP(matrices_4_transposed, 8, 4) {
  uint32_t v[4];
  matrices_of(r, [&](const uint4* row) { ldmatrix_x4_transposed(v, row); });
  for (int i = 0; i < 4; ++i) r.put(i, v[i]);
}

// x: 4 registers of a, 2 of b, 4 of d
template <class D, class E>
DEVICE void product_of(const Rows& r, E kind) {
  uint32_t a[4], b[2];
  D d[4];
  for (int i = 0; i < 4; ++i) a[i] = r.word(i);
  for (int i = 0; i < 2; ++i) b[i] = r.word(4 + i);
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = r.word(6 + i);
    memcpy(&d[i], &bits, 4);
  }
  mma(d, a, b, kind);
  for (int i = 0; i < 4; ++i) r.put(i, d[i]);
}
OP(product_bf16, 10, 4) { product_of<float>(r, bfloat16{}); }
OP(product_f16, 10, 4) { product_of<float>(r, float16{}); }
OP(product_s8, 10, 4) { product_of<int>(r, int8_t{}); }

// ---- bits. x: three words

template <int... TABLE>
DEVICE void tables_of(const Rows& r, std::integer_sequence<int, TABLE...>) {
  (r.put(TABLE, lop3<TABLE>(r.word(0), r.word(1), r.word(2))), ...);
}
OP(truth_tables, 3, 256) { tables_of(r, std::make_integer_sequence<int, 256>{}); }

OP(bits, 3, 6) {
  const uint32_t a = r.word(0), b = r.word(1), c = r.word(2);
  r.put(0, __byte_perm(a, b, c));
  r.put(1, __umulhi(a, b));
  r.put(2, __dp4a(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c)));
  r.put(3, __float_as_int(__int_as_float(static_cast<int>(a & 0x7f7fffffu))));
  r.put(4, min(static_cast<int>(a), static_cast<int>(b)));
  r.put(5, max(static_cast<int>(a), static_cast<int>(b)));
}

// ---- numbers. x: three floats

OP(numbers, 3, 14) {
  const float a = r.number(0), b = r.number(1), c = r.number(2);
  r.put(0, rsqrtf(a));
  r.put(1, __expf(b));
  r.put(2, __logf(a));
  r.put(3, __fdiv_rn(b, c));
  r.put(4, __fdividef(b, c));
  r.put(5, __fsqrt_rn(a));
  r.put(6, __frcp_rn(c));
  r.put(7, __fmul_rn(b, c));
  r.put(8, __fmaf_rn(a, b, c));
  r.put(9, __float2int_rn(b));
  r.put(10, exp2_approximate(b));
  // __fmul_rn is not contracted with a following addition
  r.put(11, __fmul_rn(a, b) + c);
  r.put(12, fmaxf(b, c));
  r.put(13, fminf(b, c));
}

template <class T>
DEVICE void rounded(const Rows& r) {
  const T v = from_float<T>(r.number(0));
  uint16_t bits;
  memcpy(&bits, &v, 2);
  r.put(0, static_cast<uint32_t>(bits));
  const uint16_t low = r.word(0) & 0xffff;
  T of;
  memcpy(static_cast<void*>(&of), &low, 2);
  r.put(1, to_float(of));
}
OP(bf16, 1, 2) { rounded<bfloat16>(r); }
OP(f16, 1, 2) { rounded<float16>(r); }

struct Case {
  const char* name;
  void (*kernel)(const uint32_t*, uint32_t*);
  int in, out;
};
#define CASE(op) {#op, each_thread<op>, op::kIn, op::kOut}
const Case cases[] = {
    CASE(indices),
    CASE(loads_and_stores),
    CASE(copies),
    CASE(dynamic_shared),
    CASE(named_barriers),
    CASE(block_barrier),
    CASE(warp_barrier),
    CASE(shuffle_32),
    CASE(shuffle_16),
    CASE(shuffle_8),
    CASE(shuffle_2),
    CASE(shuffle_of_other_types),
    CASE(shuffle_of_some),
    CASE(votes),
    CASE(sums),
    CASE(atomics),
    CASE(atomics_of_global_memory),
    CASE(matrices_4),
    CASE(matrices_2),
    CASE(matrices_4_transposed),
    CASE(product_bf16),
    CASE(product_f16),
    CASE(product_s8),
    CASE(truth_tables),
    CASE(bits),
    CASE(numbers),
    CASE(bf16),
    CASE(f16),
};

}  // namespace

// Runs one kernel on x (threads, in) and y (threads, out). Returns the error, or an empty string.
extern "C" const char* run(const char* name, int x_threads, int y_threads, int z_threads, int in,
                           int out, const uint32_t* x, uint32_t* y, [[maybe_unused]] int seed) {
  static std::string fault;
  fault.clear();
  const int threads = x_threads * y_threads * z_threads;
  for (const Case& c : cases) {
    if (strcmp(c.name, name)) continue;
    if (c.in != in || c.out != out) return "of other sizes";
    try {
#ifndef __CUDACC__
      simt::options().seed = seed;
      simt::options().races = seed % 2 == 0;
      simt::unregister_tensors();
      simt::register_tensor(x, sizeof(*x) * threads * in, "x", false);
      simt::register_tensor(y, sizeof(*y) * threads * out, "y", true);
#endif
      launch({name, 1, dim3(x_threads, y_threads, z_threads), sizeof(uint32_t) * threads}, c.kernel,
             x, y);
#ifdef __CUDACC__
      check_cuda(cudaDeviceSynchronize(), name);
#endif
    } catch (const std::exception& e) {
      fault = e.what();
    }
    return fault.c_str();
  }
  return "no such kernel";
}
