// The happens-before order that the kernel itself establishes, in any order of the threads.
//
// - lanes of one warp: by a barrier or a __syncwarp of both (a shuffle, a vote or a matrix
//   instruction orders nothing);
// - warps of one block: by barriers;
// - blocks: by atomics on one address, with a __threadfence before the first and after the second.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace simt {

struct Thread;

// A point in a thread's run: the counts of its warp's barriers, and of the thread's __syncwarps and
// fences. The spare bits next to the thread's number are for memory.h, which stores many of these.
struct Moment {
  uint32_t block = 0, clock = 0, syncs = 0;
  uint16_t fences = 0, thread : 10 = 0, bytes : 4 = 0, access : 2 = 0;
};
static_assert(sizeof(Moment) == 16);

// The clocks of a thread when it ran a fence.
struct View {
  Moment at;
  std::vector<uint32_t> clocks;
  uint32_t syncs_before[32];
};
using Views = std::map<std::pair<uint32_t, uint16_t>, std::shared_ptr<const View>>;  // latest ones

Moment now();                        // the running thread's
bool ordered(const Moment& before);  // whether it comes before the running thread's position

void join_at_barrier(const std::vector<Thread*>& threads);
void join_at_syncwarp(uint32_t (&syncs_before)[32][32], uint32_t mask);
void fence();
void exchange_views(const void* address);  // between blocks, at an atomic
void begin_order();                        // begins a launch

}  // namespace simt
