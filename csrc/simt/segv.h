// A raw access (`p[i]`) to unmapped memory ends the process, as it would without an emulator. The
// handler first prints the kernel, block and thread.
#pragma once

#include <signal.h>

namespace simt {

class SegvGuard {  // per launch: installs the handler
 public:
  explicit SegvGuard(const char* kernel);
  ~SegvGuard();

 private:
  struct sigaction before_segv, before_bus;
};

class SegvStack {  // per OS thread: the handler's stack, since the fiber's may have overflowed
 public:
  SegvStack();
  ~SegvStack();

 private:
  stack_t before;
  char stack[16384];
};

}  // namespace simt
