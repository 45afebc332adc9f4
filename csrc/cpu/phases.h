// Work in phases, on threads of which any may lose its core at any time: a phase ends when its
// units are done, not when its threads have come.
//
//   next_    (phase << 32 | first unit that nobody has)   moved on by compare and swap, so that
//            phase and units are claimed in one
//   undone_  units of the phase that nobody has reported as done   who takes it to 0 opens the next
//
// A thread that has not reported a claim keeps its phase open, so it may read and write what the
// phase does; one without touches nothing. A thread that was away sees the phase that is current
// when it is back. A release sequence on `undone_` carries the results of all units to whoever
// opens the next phase, the store of `next_` carries them on to whoever claims there.
//
// A thread without work looks for a while in place, then sleeps until a phase opens: its core is
// free meanwhile, and the system owes it that time, so that it wakes beside the thread it waited
// for. With sched_yield instead it would queue behind the other processes, its time spent.
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
//   int64_t units(int phase)                     less than 2^32; 0: the phase is passed over
//   void run(int phase, int64_t from, int64_t to)
// all the same on every thread. Which thread computes a unit, and beside which others, is chance.
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
    int64_t mine = 0;  // units of the current phase that are done here: they keep it open
    for (uint64_t seen = next_.load(std::memory_order_acquire); seen >> 32 < last;) {
      const int phase = int(seen >> 32);
      const int64_t from = int64_t(seen & UINT32_MAX), left = program.units(phase) - from;
      if (left > 0) {
        // guided self-scheduling: large pieces first, for few claims and long reads, then small
        // ones, so that threads end alike
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
  // Some 20 us (AMD) to 80 us (Intel): longer than the smallest units of a phase take, which is
  // what threads that have their cores wait for each other.
  static constexpr int LOOKS = 2000;

  template <class Program>
  void open(const Program& program, int phase) {
    const int last = program.phases();
    while (phase < last && program.units(phase) == 0) ++phase;
    undone_.store(phase < last ? program.units(phase) : 0, std::memory_order_relaxed);
    next_.store(uint64_t(phase) << 32, std::memory_order_seq_cst);
    // either the sleeper's own look, in the kernel, comes after the store, or this one sees it
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

  // the upper half of `next_`, which the system compares before a thread falls asleep
  uint32_t* phase_word() { return reinterpret_cast<uint32_t*>(&next_) + 1; }

  static_assert(sizeof(std::atomic<uint64_t>) == 8 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  alignas(64) std::atomic<uint64_t> next_{0};
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int64_t> undone_{0};
};

}  // namespace fastlm
