// Kernels with one planted bug each (BUG true), and the same kernels without it. tests/kernels/test_simt.py
// runs both over many seeds, and expects a fault that names the bug, or none.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/ptx.cuh"

using namespace fastlm;

namespace {

// ---- order of accesses to shared memory

template <bool BUG>
__global__ void reads_before_the_barrier(const float* x, float* y, int) {
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  store(s + t, load(x + t));
  if (!BUG) __syncthreads();
  store(y + t, load(s + (t ^ 32)));
}

template <bool BUG>
__global__ void writes_before_all_have_read(const float* x, float* y, int) {
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    store(s + t, load(x + t) + i);
    __syncthreads();
    sum += load(s + (t + 1) % 64);
    if (!BUG) __syncthreads();
  }
  store(y + t, sum);
}

template <bool BUG>
__global__ void no_syncwarp(const float* x, float* y, int) {
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  store(s + t, load(x + t));
  if (!BUG) __syncwarp();
  store(y + t, load(s + (t ^ 1)));
}

template <bool BUG>  // a shuffle is not a memory barrier
__global__ void shuffle_for_a_barrier(const float* x, float* y, int) {
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  store(s + t, load(x + t));
  const float other = __shfl_xor_sync(kAllLanes, load(x + t), 1);
  if (!BUG) __syncwarp();
  store(y + t, load(s + (t ^ 1)) + other);
}

template <bool BUG>
__global__ void two_write_one_word(const float* x, float* y, int) {
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  store(s + (BUG ? t / 2 : t), load(x + t));
  __syncthreads();
  store(y + t, load(s + (BUG ? t / 2 : t)));
}

template <bool BUG>
__global__ void sum_without_atomics(const float* x, float* y, int) {
  SHARED(float, s, 1);
  const int t = threadIdx.x;
  if (t == 0) store(s, 0.0f);
  __syncthreads();
  if (BUG)
    store(s, load(s) + load(x + t));
  else
    atomicAdd(s, load(x + t));
  __syncthreads();
  store(y + t, load(s));
}

template <bool BUG>
__global__ void reads_what_nobody_wrote(const float* x, float* y, int) {
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  if (!BUG || t != 17) store(s + t, load(x + t));
  __syncthreads();
  store(y + t, load(s + t));
}

template <bool BUG>  // a barrier of 32 threads does not order the other half's writes
__global__ void named_barrier_of_too_few(const float* x, float* y, int) {
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  store(s + t, load(x + t));
  if (BUG)
    named_barrier(1 + t / 32, 32);
  else
    named_barrier(1, 64);
  store(y + t, load(s + (t ^ 32)));
}

template <bool BUG>
__global__ void syncwarp_of_others(const float* x, float* y, int) {
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  store(s + t, load(x + t));
  __syncwarp(BUG ? (t % 32 < 16 ? 0xffffu : 0xffff0000u) : kAllLanes);
  store(y + t, load(s + (t ^ 16)));
}

template <bool BUG>  // each half of a word has its own writer and readers
__global__ void writes_half_words(const float* x, float* y, int) {
  SHARED(uint16_t, s, 64);
  const int t = threadIdx.x;
  store(s + t, uint16_t{1});
  __syncthreads();
  const uint16_t neighbour = load(s + (t ^ 32));
  __syncthreads();
  store(s + t, uint16_t{2});
  if (!BUG || t % 2) __syncwarp(t % 2 ? 0xaaaaaaaau : 0x55555555u);
  store(y + t, load(x + t) + neighbour + load(s + (t & 32) + (t + 2) % 32));
}

template <bool BUG>  // one of many lanes reads late
__global__ void many_have_read(const float* x, float* y, int) {
  SHARED(float, s, 1);
  const int t = threadIdx.x;
  if (t == 0) store(s, load(x));
  __syncthreads();
  const float first = load(s);
  if (BUG)
    __syncwarp();
  else
    __syncthreads();
  if (t == 0) store(s, 2.0f);
  store(y + t, first);
}

template <bool BUG>
__global__ void many_have_added(const float* x, float* y, int) {
  SHARED(float, s, 1);
  const int t = threadIdx.x;
  if (t == 0) store(s, 0.0f);
  __syncthreads();
  atomicAdd(s, load(x + t));
  if (BUG)
    __syncwarp();
  else
    __syncthreads();
  store(y + t, load(s));
}

// ---- cp.async

template <bool BUG>
__global__ void no_wait(const float* x, float* y, int) {
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  cp_async<4>(s + t, x + t);
  cp_async_commit();
  if (!BUG) cp_async_wait<0>();
  __syncthreads();
  store(y + t, load(s + (t ^ 32)));
  if (BUG) cp_async_wait<0>();
}

template <bool BUG>
__global__ void waits_for_too_few(const float* x, float* y, int) {
  SHARED(float, s, 192);
  const int t = threadIdx.x;
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    cp_async<4>(s + i * 64 + t, x + t);
    cp_async_commit();
  }
  for (int i = 0; i < 6; ++i) {
    cp_async_wait<BUG ? 2 : 1>();
    __syncthreads();
    sum += load(s + i % 3 * 64 + (t ^ 32));
    if (i < 4) cp_async<4>(s + (i + 2) % 3 * 64 + t, x + t);
    cp_async_commit();
  }
  store(y + t, sum);
  cp_async_wait<0>();
}

template <bool BUG>
__global__ void copies_into_what_is_read(const float* x, float* y, int) {
  SHARED(float, s, 128);
  const int t = threadIdx.x;
  float sum = 0;
  cp_async<4>(s + t, x + t);
  cp_async_commit();
  for (int i = 0; i < 4; ++i) {
    if (i < 3) cp_async<4>(s + (i + 1) % 2 * 64 + t, x + t);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    sum += load(s + i % 2 * 64 + (t ^ 32));
    if (!BUG) __syncthreads();
  }
  store(y + t, sum);
}

template <bool BUG>
__global__ void returns_before_copies(const float* x, float* y, int) {
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  cp_async<4>(s + t, x + t);
  cp_async_commit();
  if (!BUG) cp_async_wait<0>();
  store(y + t, load(x + t));
}

// ---- which threads a barrier waits for

template <bool BUG>
__global__ void divergent_barrier(const float* x, float* y, int) {
  const int t = threadIdx.x;
  if (BUG && t < 32)
    __syncthreads();
  else
    __syncthreads();
  store(y + t, load(x + t));
}

template <bool BUG>
__global__ void mask_of_lanes_that_returned(const float* x, float* y, int) {
  const int t = threadIdx.x;
  if (t % 32 >= 16) return;
  const float sum = __shfl_xor_sync(BUG ? kAllLanes : 0xffffu, load(x + t), 1);
  store(y + t, sum);
}

template <bool BUG>
__global__ void shuffle_from_outside_the_mask(const float* x, float* y, int) {
  const int t = threadIdx.x;
  if (t % 32 < 16) store(y + t, __shfl_sync(0xffffu, load(x + t), BUG ? 20 : 3));
}

template <bool BUG>
__global__ void half_a_warp_multiplies(const float*, float* y, int) {
  const int t = threadIdx.x;
  uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  if (BUG && t % 32 >= 16)
    d[0] = __shfl_sync(kAllLanes, d[0], 0);
  else if (BUG)
    mma(d, a, b, bfloat16{});
  else
    mma(d, a, b, bfloat16{});
  store(y + t, d[0]);
}

template <bool BUG>
__global__ void barrier_that_one_warp_skips(const float* x, float* y, int) {
  const int t = threadIdx.x;
  if (!BUG || t < 32) named_barrier(3, 64);
  store(y + t, load(x + t));
}

template <bool BUG>  // the hardware counts warps
__global__ void barrier_of_half_warps(const float* x, float* y, int) {
  const int t = threadIdx.x;
  if (BUG ? t % 32 < 16 : t < 32) named_barrier(1, 32);
  __syncwarp();  // does not wait for lanes that have returned
  store(y + t, load(x + t));
}

template <bool BUG>
__global__ void barrier_of_no_whole_warps(const float* x, float* y, int) {
  const int t = threadIdx.x;
  named_barrier(1, BUG ? 48 : 64);
  store(y + t, load(x + t));
}

template <bool BUG>
__global__ void barrier_that_is_not_there(const float* x, float* y, int) {
  const int t = threadIdx.x;
  named_barrier(BUG ? 16 : 15, 64);
  store(y + t, load(x + t));
}

// ---- addresses

template <bool BUG>
__global__ void reads_behind_the_end(const float* x, float* y, int n) {
  const int t = threadIdx.x;
  if (t < n) store(y + t, load(x + t + (BUG ? 1 : 0)));
}

template <bool BUG>
__global__ void writes_before_the_start(const float* x, float* y, int) {
  const int t = threadIdx.x;
  store(y + t - (BUG && t == 0 ? 1 : 0), load(x + t));
}

template <bool BUG>
__global__ void writes_an_input(const float* x, float* y, int) {
  const int t = threadIdx.x;
  store(BUG ? const_cast<float*>(x) + t : y + t, 1.0f);
}

template <bool BUG>
__global__ void reads_an_output_once(const float* x, float* y, int) {
  const int t = threadIdx.x;
  if (t >= 8) return;
  const uint4 v = load_once(reinterpret_cast<const uint4*>(BUG ? y : x) + t);
  store(y + 32 + t, __uint_as_float(v.x));
}

template <bool BUG>
__global__ void misaligned_vector(const float* x, float* y, int) {
  const int t = threadIdx.x;
  if (t >= 8) return;
  const float4 v = load(reinterpret_cast<const float4*>(x + 4 * t + (BUG ? 1 : 0)));
  store(y + t, v.x);
}

template <bool BUG>
__global__ void shared_out_of_bounds(const float* x, float* y, int) {
  DYNAMIC_SHARED(raw);
  float* s = reinterpret_cast<float*>(raw);
  const int t = threadIdx.x;
  store(s + t, load(x + t));
  __syncthreads();
  store(y + t, load(s + (BUG ? t + 1 : t)));
}

template <bool BUG>
__global__ void ldmatrix_of_registers(const float* x, float* y, int) {
  SHARED(uint4, s, 32);
  const int t = threadIdx.x;
  if (t < 32) store(s + t, uint4{});
  __syncthreads();
  uint32_t r[4];
  const void* row = BUG ? static_cast<const void*>(x) : s + t % 32;
  ldmatrix_x4(r, row);
  store(y + t, float(r[0]));
}

template <bool BUG>
__global__ void runs_into_the_next_array(const float* x, float* y, int) {
  SHARED(float, s, 64);
  SHARED(float, next, 64);
  const int t = threadIdx.x;
  store(s + t, load(x + t));
  store(next + t, load(x + t));
  __syncthreads();
  store(y + t, load(s + t + (BUG ? 1 : 0)) + load(next + t));
}

template <bool BUG>  // an array of float is aligned to 4 bytes only
__global__ void vector_of_a_shared_array(const float* x, float* y, int) {
  SHARED(float, s, 64);
  SHARED(float4, v, 16);
  const int t = threadIdx.x;
  store((BUG ? s : reinterpret_cast<float*>(v)) + t, load(x + t));
  __syncthreads();
  const auto* vectors = BUG ? reinterpret_cast<const float4*>(s) : v;
  store(y + t, load(vectors + t / 4).x);
}

template <bool BUG>
__global__ void copies_from_shared(const float* x, float* y, int) {
  SHARED(float, s, 128);
  const int t = threadIdx.x;
  store(s + t, load(x + t));
  cp_async<4>(s + 64 + t, BUG ? s + t : x + t);
  cp_async_commit();
  cp_async_wait<0>();
  store(y + t, load(s + 64 + t));
}

template <bool BUG>
__global__ void stores_global_to_shared(const float* x, float* y, int) {
  SHARED(float, s, 64);
  const int t = threadIdx.x;
  store_global(BUG ? s + t : y + t, load(x + t));
}

template <bool BUG>  // with 256 bytes of dynamic shared memory
__global__ void too_much_shared(const float* x, float* y, int) {
  SHARED(float, s, (48 * 1024 - (BUG ? 0 : 256)) / 4);
  const int t = threadIdx.x;
  store(s + t, load(x + t));
  store(y + t, load(s + t));
}

// ---- order of accesses to global memory

template <bool BUG>
__global__ void two_warps_write_one_word(const float* x, float* y, int) {
  const int t = threadIdx.x;
  if (blockIdx.x == 0 && t % 32 == 0) store(y + (BUG ? 0 : t), load(x + t));
}

template <bool BUG>
__global__ void two_blocks_write_one_word(const float* x, float* y, int) {
  const int t = threadIdx.x;
  if (t < 8) store(y + t + (BUG ? 0 : 8 * blockIdx.x), load(x + t));
}

// The last block to arrive adds up what all have written. COUNT: an atomic finds the last block;
// FENCE, FENCE_BEHIND: fences before and after it; BARRIER: before it, since other threads wrote.
template <bool COUNT, bool FENCE, bool FENCE_BEHIND, bool BARRIER>
DEVICE void sum_over_blocks(const float* x, float* y) {
  SHARED(int, last, 1);
  const int t = threadIdx.x, each = 4;
  if (t % 16 == 0) store(y + blockIdx.x * each + t / 16, load(x + t));
  if (BARRIER) __syncthreads();
  if (t == 0) {
    if (FENCE) __threadfence();
    auto* counter = reinterpret_cast<unsigned*>(y + 60);
    store(last, COUNT ? int(atomicAdd(counter, 1u) == gridDim.x - 1) : int(blockIdx.x == 1));
    if (FENCE_BEHIND) __threadfence();
  }
  __syncthreads();
  if (t < each && load(last)) store(y + 10 + t, load(y + t) + load(y + each + t));
}
template <bool BUG>
__global__ void sums_of_blocks(const float* x, float* y, int) {
  sum_over_blocks<!BUG, true, true, true>(x, y);
}
template <bool BUG>
__global__ void sums_without_a_fence(const float* x, float* y, int) {
  sum_over_blocks<true, !BUG, true, true>(x, y);
}
template <bool BUG>
__global__ void sums_without_a_fence_behind(const float* x, float* y, int) {
  sum_over_blocks<true, true, !BUG, true>(x, y);
}
template <bool BUG>
__global__ void sums_without_a_barrier(const float* x, float* y, int) {
  sum_over_blocks<true, true, true, !BUG>(x, y);
}

struct Case {
  const char* name;
  void (*kernels[2])(const float*, float*, int);  // without the bug, with it
};
#define CASE(kernel)                         \
  {                                          \
    #kernel, { kernel<false>, kernel<true> } \
  }
const Case cases[] = {
    CASE(reads_before_the_barrier),
    CASE(writes_before_all_have_read),
    CASE(no_syncwarp),
    CASE(shuffle_for_a_barrier),
    CASE(two_write_one_word),
    CASE(sum_without_atomics),
    CASE(reads_what_nobody_wrote),
    CASE(named_barrier_of_too_few),
    CASE(syncwarp_of_others),
    CASE(writes_half_words),
    CASE(many_have_read),
    CASE(many_have_added),
    CASE(no_wait),
    CASE(waits_for_too_few),
    CASE(copies_into_what_is_read),
    CASE(returns_before_copies),
    CASE(divergent_barrier),
    CASE(mask_of_lanes_that_returned),
    CASE(shuffle_from_outside_the_mask),
    CASE(half_a_warp_multiplies),
    CASE(barrier_that_one_warp_skips),
    CASE(barrier_of_half_warps),
    CASE(barrier_of_no_whole_warps),
    CASE(barrier_that_is_not_there),
    CASE(reads_behind_the_end),
    CASE(writes_before_the_start),
    CASE(writes_an_input),
    CASE(reads_an_output_once),
    CASE(misaligned_vector),
    CASE(shared_out_of_bounds),
    CASE(ldmatrix_of_registers),
    CASE(runs_into_the_next_array),
    CASE(vector_of_a_shared_array),
    CASE(copies_from_shared),
    CASE(stores_global_to_shared),
    CASE(too_much_shared),
    CASE(two_warps_write_one_word),
    CASE(two_blocks_write_one_word),
    CASE(sums_of_blocks),
    CASE(sums_without_a_fence),
    CASE(sums_without_a_fence_behind),
    CASE(sums_without_a_barrier),
};
constexpr int kGlobal = 6;  // the last cases, which need EmulatorOptions::races

__global__ void touches_nothing_at_all(float* y) { y[threadIdx.x] = 1; }

__global__ void strides(const float* x, float* y, int stride) {
  SHARED(float, s, 32 * 33);
  const int t = threadIdx.x;
  store(s + t * stride, load(x + t * stride % 64));
  __syncthreads();
  store(y + t, load(s + t * stride));
}

}  // namespace

// planted both|mended SEEDS: every case over seeds 0 to SEEDS - 1, one line per run.
// planted wild: a raw access to unmapped memory. planted global: a race in global memory.
// planted count: the cost of three strides.
int main(int argc, char** argv) {
  if (argc < 2) return 2;
  alignas(128) static float x[64], y[64];
  simt::register_tensor(x, sizeof x, "x", false);
  simt::register_tensor(y, sizeof y, "y", true);
  if (!strcmp(argv[1], "wild")) {
    simt::launch({"touches_nothing_at_all", 1, 32}, touches_nothing_at_all,
                 reinterpret_cast<float*>(64));
    return 0;
  }
  if (!strcmp(argv[1], "global")) {
    simt::launch({"two_warps_write_one_word", 1, 64}, two_warps_write_one_word<true>, x, y, 64);
    return 0;
  }
  if (!strcmp(argv[1], "count")) {
    simt::options().count = true;
    for (int stride : {1, 32, 33}) {
      simt::reset_report();
      simt::launch({"strides", 1, 32}, strides, x, y, stride);
      for (const auto& [site, c] : simt::report())
        printf("%d\t%s\t%d\t%d\t%d\n", stride, site.c_str(), int(c.instructions),
               int(c.transactions), int(c.min_transactions));
    }
    return 0;
  }
  const int variants = strcmp(argv[1], "both") ? 1 : 2;
  for (const Case& c : cases)
    for (int bug = 0; bug < variants; ++bug)
      for (int seed = 0; seed < atoi(argv[2]); ++seed) {
        simt::options().seed = seed;
        simt::options().races = &c >= std::end(cases) - kGlobal;
        memset(y, 0, sizeof y);
        const char* fault = "";
        std::string text;
        try {
          simt::launch({c.name, 2, 64, 256}, c.kernels[bug], x, y, 64);
        } catch (const simt::Fault& f) {
          text = f.what();
          fault = text.c_str();
        }
        printf("%s\t%d\t%d\t%s\n", c.name, bug, seed, fault);
      }
}
