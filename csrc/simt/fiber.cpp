#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)  // this file itself is compiled without -fsanitize=thread
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
constexpr unsigned kTsanNoSync = 1;  // a switch orders nothing; barriers do
#endif

namespace simt {
namespace {

constexpr size_t kPage = 4096;
#if defined(__SANITIZE_ADDRESS__) || defined(SIMT_TSAN)
constexpr size_t kStack = 512 << 10;  // sanitized frames are several times as large
#else
constexpr size_t kStack = 128 << 10;
#endif

}  // namespace

#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#endif

void prepare(Fiber& fiber, void (*entry)()) {
  if (!fiber.stack) {
    void* p = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, kPage, PROT_NONE);
    fiber.stack = static_cast<char*>(p) + kPage;
    fiber.size = kStack;
  }
#if defined(__SANITIZE_ADDRESS__)  // of a thread that was abandoned
  __asan_unpoison_memory_region(fiber.stack, fiber.size);
#endif
#if defined(SIMT_TSAN)
  if (fiber.tsan) __tsan_destroy_fiber(fiber.tsan);
  fiber.tsan = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
  // six registers, the entry, and no return address, since rsp % 16 is 8 at a function's start
  auto* top = reinterpret_cast<void**>(fiber.stack + fiber.size);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.sp = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void adopt(Fiber& fiber) {
  fiber.adopted = true;
#if defined(SIMT_TSAN)
  fiber.tsan = __tsan_get_current_fiber();
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.size);
#endif
#if defined(SIMT_TSAN)
  // a switch to or from the OS thread's own stack orders everything: a launch begins and ends there
  __tsan_switch_to_fiber(to.tsan, from.adopted || to.adopted ? 0 : kTsanNoSync);
#endif
#if defined(__x86_64__)
  simt_switch(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void arrived([[maybe_unused]] Fiber& self, [[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  // the first switch away from the OS thread's stack reports its bounds
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &size);
  if (from.adopted && !from.size) {
    from.stack = static_cast<char*>(const_cast<void*>(bottom));
    from.size = size;
  }
#endif
}

Fiber::~Fiber() {
#if defined(SIMT_TSAN)
  if (!adopted && tsan) __tsan_destroy_fiber(tsan);
#endif
  if (!adopted && stack) munmap(stack - kPage, size + kPage);
}

}  // namespace simt
