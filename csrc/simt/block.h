// What runs: the threads of one block, on fibers, one at a time; the scheduler that picks the next.
//
// A thread stops only at a barrier, at a warp collective, at an atomic, and now and then at a
// checked access; who goes on is drawn with the launch's seed (seed 0: first come, first served).
// The same seed gives the same order, also on several cores: blocks are independent, and each has
// its own random numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simt/fiber.h"
#include "simt/order.h"

namespace simt {

using Site = std::source_location;

// What a kernel did wrong; `launch` throws it, with kernel, block and thread in its text.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  uint64_t seed = 1;
  bool count = false;  // bank conflicts and memory transactions; see count.h
  bool races = false;  // in global memory; blocks run one at a time
  bool dry = false;    // launches are noted, nothing runs
  int preempt = 16;    // one checked access in so many lets another thread run; 0: none
  int64_t max_steps = 2'000'000'000;  // switches of a launch before it counts as stuck
};
Options& options();

struct Thread;
struct Barrier;
struct Block;
struct Shared;
struct Counts;

constexpr uint32_t kAllLanes = 0xffffffffu;

// What the last lane to come to a collective does, on the arguments of all 32.
using Operation = void (*)(void** arguments, uint32_t mask, const Site& site);

struct Warp {
  uint32_t live = 0;     // lanes that have not returned
  uint32_t waiting = 0;  // lanes inside a collective
  Thread* thread[32] = {};
  uint32_t mask[32];
  void* argument[32];
  Operation operation[32];
  // What orders accesses (order.h). clocks[v]: what happened in warp v up to then came before what
  // this warp does now; its own counts barriers. seen[l][m]: so many __syncwarps of lane m came
  // before what lane l does now; seen[l][l] counts its own.
  std::vector<uint32_t> clocks;
  uint32_t seen[32][32] = {};
};

struct Copy {  // cp.async
  void* to;
  const void* from;
  uint32_t bytes;  // of the destination; those beyond `valid` become zero
  uint32_t valid;
};

struct Thread {
  uint3 index{};
  int lane = 0, number = 0;  // in the warp, in the block
  Block* block = nullptr;
  Warp* warp = nullptr;
  bool done = true;
  const char* waits_in = nullptr;  // what for, and where: for the report of a deadlock
  Barrier* waits_at = nullptr;
  Site site;
  std::vector<Copy> open;                // copies since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, not waited for
  uint16_t fences = 0;
  Views read, released;  // met at atomics since its last fence; had at that fence
  Fiber fiber;
};

struct Barrier {
  std::vector<Thread*> waiting;
  Site site;
  int expected = 0;
};

struct Block {
  uint3 index{};
  uint32_t number = 0;
  dim3 dim, grid;
  int live = 0;  // threads that have not returned
  std::vector<Warp> warps;
  Barrier barriers[16];
  // what threads of other blocks had done, and at which fence of this block's threads it was known
  std::vector<std::pair<std::shared_ptr<const View>, Moment>> acquired;
  Shared* shared = nullptr;
  Counts* counts = nullptr;
};

// The thread that runs now, of this OS thread.
extern thread_local constinit Thread* self __attribute__((tls_model("initial-exec")));

struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
};

std::vector<Launch>& dry_launches();

// Runs every block of the grid, those of OpenMP's threads at a time. Throws the first Fault.
void run(const Launch& launch, const std::function<void()>& kernel);

// Ends the launch: `what` with kernel, block and thread.
[[noreturn]] void fail(const std::string& what, const Site& site);

uint32_t random_number();  // the block's
void yield();              // lets another thread run
void maybe_yield();        // at a checked access

// So many threads wait for each other, whole warps; 0: those of the block that have not returned.
void barrier(int number, int expected, const Site& site);

// Lanes of `mask` meet; the last to come runs `operation`.
void collective(uint32_t mask, const char* name, void* argument, Operation operation,
                const Site& site);

}  // namespace simt
