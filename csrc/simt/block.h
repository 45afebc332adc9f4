// The scheduler: runs the threads of one block on fibers, one at a time.
//
// A thread stops only at a barrier, at a warp collective, at an atomic, and now and then at a
// checked access. The launch's seed decides which thread continues (seed 0: first come, first
// served). The same seed gives the same order, also on several cores: blocks are independent, and
// each has a separate random generator.
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

// An error of a kernel; `launch` throws it, with kernel, block and thread in its text.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct EmulatorOptions {
  uint64_t seed = 1;
  bool count = false;  // bank conflicts and memory transactions; see count.h
  bool races = false;  // in global memory; blocks run one at a time
  bool dry = false;    // launches are recorded, nothing runs
  int preempt = 16;    // mean number of checked accesses between switches of threads; 0: never
  int64_t max_steps = 2'000'000'000;  // switches after which a launch counts as stuck
};
EmulatorOptions& options();

struct Thread;
struct Barrier;
struct Block;
struct Shared;
struct Counts;

constexpr uint32_t kAllLanes = 0xffffffffu;

// The operation of a collective: the last lane to arrive runs it on the arguments of all 32.
using Operation = void (*)(void** arguments, uint32_t mask, const Site& site);

struct Warp {
  uint32_t live = 0;     // lanes that have not returned
  uint32_t waiting = 0;  // lanes inside a collective
  Thread* thread[32] = {};
  uint32_t mask[32];
  void* argument[32];
  Operation operation[32];
  // Clocks that order accesses (order.h). clocks[v]: everything in warp v up to that count comes
  // before this warp's current position; at its own index a warp counts its barriers.
  // syncs_before[l][m]: the number of __syncwarps of lane m that come before the current position
  // of lane l; syncs_before[l][l] counts those of lane l.
  std::vector<uint32_t> clocks;
  uint32_t syncs_before[32][32] = {};
};

struct Copy {  // cp.async
  void* to;
  const void* from;
  uint32_t bytes;  // of the destination; zeros beyond `valid`
  uint32_t valid;
};

struct Thread {
  uint3 index{};
  int lane = 0, number = 0;  // index in the warp, in the block
  Block* block = nullptr;
  Warp* warp = nullptr;
  bool finished = true;
  const char* waits_in = nullptr;  // the operation that waits, for the report of a deadlock
  Barrier* waits_at = nullptr;
  Site site;
  std::vector<Copy> open;                // copies since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, not yet waited for
  uint16_t fences = 0;
  Views read, released;  // views taken at atomics since its last fence; views it had at that fence
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
  // views of threads of other blocks, and the fence of this block's threads that acquired each
  std::vector<std::pair<std::shared_ptr<const View>, Moment>> acquired;
  Shared* shared = nullptr;
  Counts* counts = nullptr;
};

// The thread that runs now, on this OS thread.
extern thread_local constinit Thread* self __attribute__((tls_model("initial-exec")));

struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared = 0;  // dynamic shared memory, bytes
  cudaStream_t stream = nullptr;
};

std::vector<Launch>& dry_launches();

// Runs every block of the grid, one per OpenMP thread at a time. Throws the first Fault.
void run(const Launch& launch, const std::function<void()>& kernel);

// Ends the launch with `message`, and the kernel, block and thread.
[[noreturn]] void fail(const std::string& message, const Site& site);

uint32_t random_number();  // from the block's generator
void yield();              // lets another thread run
void maybe_yield();        // at a checked access

// Barrier for that many threads, in whole warps; 0: all of the block that have not returned.
void barrier(int number, int expected, const Site& site);

// Collective of the lanes of `mask`; the last to arrive runs `operation`.
void collective(uint32_t mask, const char* name, void* argument, Operation operation,
                const Site& site);

}  // namespace simt
