#include "simt/segv.h"

#include <unistd.h>

#include <cstdio>

#include "simt/block.h"

#if defined(__SANITIZE_ADDRESS__) || defined(SIMT_TSAN)  // the sanitizers install handlers
#define SIMT_HANDLES_FAULTS 0
#else
#define SIMT_HANDLES_FAULTS 1
#endif

namespace simt {
namespace {

const char* current_kernel = "?";

[[maybe_unused]] void on_fault(int number, siginfo_t* info, void*) {
  char text[256];
  int n;
  if (self && self->block) {
    const uint3 b = self->block->index, t = self->index;
    n = std::snprintf(
        text, sizeof text,
        "simt: access to %p [kernel %s, block %u,%u,%u, thread %u,%u,%u, last checked "
        "access at %s:%u]\n",
        info->si_addr, current_kernel, b.x, b.y, b.z, t.x, t.y, t.z, self->site.file_name(),
        static_cast<unsigned>(self->site.line()));
  } else {
    n = std::snprintf(text, sizeof text, "simt: access to %p outside of a kernel\n", info->si_addr);
  }
  if (write(2, text, n) < 0) _exit(1);
  signal(number, SIG_DFL);  // the access happens again
}

}  // namespace

SegvGuard::SegvGuard(const char* kernel) {
  current_kernel = kernel;
#if SIMT_HANDLES_FAULTS
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
#endif
}

SegvGuard::~SegvGuard() {
#if SIMT_HANDLES_FAULTS
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
#endif
}

SegvStack::SegvStack() {
#if SIMT_HANDLES_FAULTS
  stack_t alternate = {};
  alternate.ss_sp = stack;
  alternate.ss_size = sizeof stack;
  sigaltstack(&alternate, &before);
#endif
}

SegvStack::~SegvStack() {
#if SIMT_HANDLES_FAULTS
  sigaltstack(&before, nullptr);
#endif
}

}  // namespace simt
