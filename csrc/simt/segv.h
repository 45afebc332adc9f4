// A raw access (`p[i]`) to memory that is not there ends the process, as without an emulator, but
// says first which kernel, block and thread it was.
#pragma once

#include <signal.h>

namespace simt {

class SegvGuard {  // of a launch: installs the handler
 public:
  explicit SegvGuard(const char* kernel);
  ~SegvGuard();

 private:
  struct sigaction before_segv, before_bus;
};

class SegvStack {  // of an OS thread: handlers run here, for the fiber's own stack may be what
                   // ended
 public:
  SegvStack();
  ~SegvStack();

 private:
  stack_t before;
  char stack[16384];
};

}  // namespace simt
