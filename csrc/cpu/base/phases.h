// Runs work in phases, on threads that may lose their cores at any time. A phase ends when its
// units are done, not when its threads have arrived at a barrier.
//
//   next_     (phase << 32 | first unclaimed unit)   advanced by compare and swap, which claims
//             units of a phase atomically
//   pending_  units of the phase not yet reported as done   the thread that takes it to 0 opens the
//             next phase
//
// A thread that has not reported its claim keeps its phase open, so it may read and write the data
// of that phase; a thread without a claim accesses nothing. A thread that lost its core finds the
// current phase when it runs again. A release sequence on `pending_` carries the results of all
// units to the thread that opens the next phase; the store of `next_` carries them to the threads
// that claim units there.
//
// A thread without work spins for a while, then sleeps until a phase opens. Its core is free
// meanwhile, and the scheduler credits it that time, so it wakes at once when the thread for which
// it waited is done. With sched_yield it would use up its time and queue after other processes.
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
    int64_t completed = 0;  // units done by this thread and not yet reported: the phase stays open
    for (uint64_t state = next_.load(std::memory_order_acquire); state >> 32 < last;) {
      const int phase = int(state >> 32);
      const int64_t from = int64_t(state & UINT32_MAX), remaining = program.units(phase) - from;
      if (remaining > 0) {
        // guided self-scheduling: large pieces first, for few claims and long reads, then small
        // ones, so that threads end at the same time
        const int64_t count = (remaining + threads - 1) / threads;
        if (!next_.compare_exchange_weak(state, state + uint64_t(count), std::memory_order_acq_rel,
                                         std::memory_order_acquire))
          continue;
        program.run(phase, from, from + count);
        completed += count;
        state = next_.load(std::memory_order_acquire);
        continue;
      }
      if (completed && pending_.fetch_sub(completed, std::memory_order_acq_rel) == completed)
        open(program, phase + 1);
      completed = 0;
      state = wait(state);
    }
  }

 private:
  // Some 20 us (AMD) to 80 us (Intel): longer than the smallest units of a phase, which is how long
  // running threads wait for each other.
  static constexpr int SPINS = 2000;

  template <class Program>
  void open(const Program& program, int phase) {
    const int last = program.phases();
    while (phase < last && program.units(phase) == 0) ++phase;
    pending_.store(phase < last ? program.units(phase) : 0, std::memory_order_relaxed);
    next_.store(uint64_t(phase) << 32, std::memory_order_seq_cst);
    // either the kernel's check before the sleep comes after this store, or this load sees the
    // sleeping thread
    if (sleepers_.load(std::memory_order_seq_cst))
      syscall(SYS_futex, phase_word(), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  // Returns `next_` once another phase than that of `state` is open.
  uint64_t wait(uint64_t state) {
    const uint64_t phase = state >> 32;
    for (int spins = 0;; ++spins) {
      const uint64_t now = next_.load(std::memory_order_acquire);
      if (now >> 32 != phase) return now;
      if (spins < SPINS) {
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
  alignas(64) std::atomic<int64_t> pending_{0};
};

}  // namespace fastlm
