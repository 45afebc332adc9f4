// Work in phases, on threads that may lose their cores at any time. A phase ends when its units are
// done, not when its threads have arrived.
//
// next_    (phase << 32 | first unclaimed unit)   advanced by compare and swap, which claims units
//            of a phase atomically
//   undone_  units of the phase not yet reported as done   the thread that takes it to 0 opens the
//            next phase
//
// A thread that has not reported its claim keeps its phase open, so it may read and write the data
// of that phase; a thread without a claim touches nothing. A thread that lost its core finds the
// current phase when it returns. A release sequence on `undone_` carries the results of all units
// to the thread that opens the next phase; the store of `next_` carries them to the threads that
// claim there.
//
// A thread without work spins for a while, then sleeps until a phase opens. Its core is free
// meanwhile, and the scheduler credits it that time, so it wakes at once when the thread it waited
// for is done. With sched_yield it would use up its time and queue after the other processes.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>

namespace fastlm {

// A Program has
//   int phases()                                 their number, at least 1
//   int64_t units(int phase)                     less than 2^32; 0: the phase is skipped
//   void run(int phase, int64_t from, int64_t to)
// with the same results on every thread. Which thread computes a unit, and which units run at the
// same time, is not fixed.
class Phases {
 public:
  template <class Program>
  explicit Phases(const Program& program) {
    open(program, 0);
  }

  // Works until the last phase is done; called by every thread of `threads`.
  template <class Program>
  void work(Program& program, int threads) {
    const auto last = uint64_t(program.phases());
    int64_t mine = 0;  // units done here and not yet reported: they keep the phase open
    for (uint64_t seen = next_.load(std::memory_order_acquire); seen >> 32 < last;) {
      const int phase = int(seen >> 32);
      const int64_t from = int64_t(seen & UINT32_MAX), left = program.units(phase) - from;
      if (left > 0) {
        // guided self-scheduling: large pieces first, for few claims and long reads, then small
        // ones, so that threads end at the same time
        const int64_t count = (left + threads - 1) / threads;
        if (!next_.compare_exchange_weak(seen, seen + uint64_t(count), std::memory_order_acq_rel,
                                         std::memory_order_acquire))
          continue;
        program.run(phase, from, from + count);
        mine += count;
        seen = next_.load(std::memory_order_acquire);
        continue;
      }
      if (mine && undone_.fetch_sub(mine, std::memory_order_acq_rel) == mine)
        open(program, phase + 1);
      mine = 0;
      seen = wait(seen);
    }
  }

 private:
  // Some 20 us (AMD) to 80 us (Intel): longer than the smallest units of a phase, which is how long
  // running threads wait for each other.
  static constexpr int LOOKS = 2000;

  template <class Program>
  void open(const Program& program, int phase) {
    const int last = program.phases();
    while (phase < last && program.units(phase) == 0) ++phase;
    undone_.store(phase < last ? program.units(phase) : 0, std::memory_order_relaxed);
    next_.store(uint64_t(phase) << 32, std::memory_order_seq_cst);
    // either the kernel's check, before the sleep, comes after the store, or this load sees the
    // sleeper
    if (sleepers_.load(std::memory_order_seq_cst))
      syscall(SYS_futex, phase_word(), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  // `next_` once another phase than that of `seen` is open.
  uint64_t wait(uint64_t seen) {
    const uint64_t phase = seen >> 32;
    for (int looks = 0;; ++looks) {
      const uint64_t now = next_.load(std::memory_order_acquire);
      if (now >> 32 != phase) return now;
      if (looks < LOOKS) {
        _mm_pause();
        continue;
      }
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      syscall(SYS_futex, phase_word(), FUTEX_WAIT_PRIVATE, uint32_t(phase), nullptr, nullptr, 0);
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }
  }

  // the upper half of `next_`, which the kernel compares before it lets a thread sleep
  uint32_t* phase_word() { return reinterpret_cast<uint32_t*>(&next_) + 1; }

  static_assert(sizeof(std::atomic<uint64_t>) == 8 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  alignas(64) std::atomic<uint64_t> next_{0};
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int64_t> undone_{0};
};

}  // namespace fastlm
