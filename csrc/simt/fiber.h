// A fiber: a stack of its own and the place where it stopped. One CUDA thread runs on one.
//
// On x86-64 a switch is fifteen instructions; elsewhere it is ucontext, which enters the kernel for
// the signal mask. AddressSanitizer and ThreadSanitizer are told of every switch.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
  void* sp = nullptr;  // where it stopped
  char* stack = nullptr;
  size_t size = 0;             // of the stack
  bool adopted = false;        // the stack is the OS thread's own
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's
#if !defined(__x86_64__)
  ucontext_t context;
#endif

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber();
};

// Makes `fiber` begin at `entry` when it is next switched to; `entry` never returns. A stack is
// made at the first call, with a page below it that no one can touch.
void prepare(Fiber& fiber, void (*entry)());

// Goes on with `to`; returns when something switches back to `from`. `ends`: nothing will.
void switch_fiber(Fiber& from, Fiber& to, bool ends = false);

// `fiber` stands for the stack that the calling OS thread runs on.
void adopt(Fiber& fiber);

// The first thing a fiber does.
void arrived(Fiber& self, Fiber& from);

}  // namespace simt
