// A fiber: a stack and the address where it stopped. Each CUDA thread runs on one.
//
// On x86-64 a switch is fifteen instructions; elsewhere it is ucontext, which enters the kernel for
// the signal mask. Every switch is reported to AddressSanitizer and ThreadSanitizer.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
  void* sp = nullptr;  // the stack pointer at which it stopped
  char* stack = nullptr;
  size_t size = 0;             // of the stack
  bool adopted = false;        // the stack is the OS thread's
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's
#if !defined(__x86_64__)
  ucontext_t context;
#endif

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber();
};

// Makes `fiber` begin at `entry` when it is next switched to; `entry` never returns. The first call
// allocates a stack with a guard page below it.
void prepare(Fiber& fiber, void (*entry)());

// Switches to `to`; returns when something switches back to `from`. `ends`: nothing will.
void switch_fiber(Fiber& from, Fiber& to, bool ends = false);

// Makes `fiber` represent the stack of the calling OS thread.
void adopt(Fiber& fiber);

// Must be the first call on a fiber.
void arrived(Fiber& self, Fiber& from);

}  // namespace simt
