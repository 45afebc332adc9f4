// Collectives of the lanes of a warp: shuffles, votes, ldmatrix, mma. Each lane passes a pointer to
// its arguments; the last to arrive does the work for all (`collective` in block.h).
//
// Fragment layouts are those of the PTX manual, "Matrix fragments for mma.m16n8k16" and
// "ldmatrix": lane 4 r + c holds row r (and r + 8), columns 2 c, 2 c + 1 (and + 8) of 16-bit
// operands. Not confirmed on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "simt/memory.h"

namespace simt {

template <class T>
struct ShuffleArgument {
  T value, result;
  int source;  // lane to read; -1: its own value
};

template <class T>
void shuffle_all(void** arguments, uint32_t mask, const Site& site) {
  auto at = [&](int lane) { return static_cast<ShuffleArgument<T>*>(arguments[lane]); };
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
    auto* a = at(__builtin_ctz(lanes));
    if (a->source < 0) continue;
    if (!(mask >> a->source & 1)) fail("a shuffle reads a lane that is not in its mask", site);
    a->result = at(a->source)->value;
  }
}

template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source, int width, const Site& site) {
  if (width < 1 || width > 32 || width & (width - 1))
    fail(std::string(name) + ": expected a width of 1, 2, 4, 8, 16 or 32", site);
  ShuffleArgument<T> a{value, value, source};
  collective(mask, name, &a, shuffle_all<T>, site);
  return a.result;
}

uint32_t ballot(uint32_t mask, bool predicate, const Site& site);
void sync_warp(uint32_t mask, const Site& site);

// Each group of 8 lanes passes the addresses of 8 rows of 16 bytes, one matrix. A lane receives two
// neighbours of one row of every matrix (`transposed`: of one column).
void load_matrices(uint32_t* registers, int matrices, bool transposed, const void* row,
                   const Site& site);

// d += a b for one tile of 16 x 8; a: 16 x K, b: K x 8, K = 16 of 16 bits or 32 of 8.
void mma(float* d, const uint32_t* a, const uint32_t* b, __nv_bfloat16, const Site& site);
void mma(float* d, const uint32_t* a, const uint32_t* b, __half, const Site& site);
void mma(int* d, const uint32_t* a, const uint32_t* b, int8_t, const Site& site);

}  // namespace simt
