// What comes before what, as far as the kernel itself says so, in whatever order threads ran.
//
// - lanes of one warp: by a barrier or a __syncwarp of both (a shuffle, a vote or a matrix
//   instruction orders nothing);
// - warps of one block: by barriers;
// - blocks: by atomics on one address, with a __threadfence before the one and after the other.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace simt {

struct Thread;

// Where a thread was: counts of its warp's barriers, of its own __syncwarps and fences. The room
// beside the thread's number is memory.h's: many are kept.
struct Moment {
  uint32_t block = 0, clock = 0, syncs = 0;
  uint16_t fences = 0, thread : 10 = 0, bytes : 4 = 0, access : 2 = 0;
};
static_assert(sizeof(Moment) == 16);

// What a thread knew of its block when it ran a fence.
struct View {
  Moment at;
  std::vector<uint32_t> clocks;
  uint32_t seen[32];
};
using Views = std::map<std::pair<uint32_t, uint16_t>, std::shared_ptr<const View>>;  // the latest

Moment now();                        // of the running thread
bool ordered(const Moment& before);  // before what the running thread does now

void join_at_barrier(const std::vector<Thread*>& threads);
void join_at_syncwarp(uint32_t (&seen)[32][32], uint32_t mask);
void fence();
void meet_blocks(const void* address);  // at an atomic
void begin_order();                     // of a launch

}  // namespace simt
