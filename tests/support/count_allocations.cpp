// Counts what the kernels allocate: preloaded by test_allocation.py.
//
// A kernel runs between the release of Python's lock and its return (every one is bound so). While
// any thread is in between, each allocation is counted whose caller is code of the extension: the
// threads' own of OpenMP, of torch and of the interpreter are not. Operator new is defined here
// too, or its caller would be the C++ library.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {
std::atomic<int> released{0};
std::atomic<long> found{0};

void look(const void* caller) {
  if (released.load(std::memory_order_relaxed) == 0) return;
  Dl_info info;
  if (dladdr(caller, &info) && info.dli_fname && strstr(info.dli_fname, "_cpu.")) ++found;
}

template <class F>
F next(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}
}  // namespace

#define CALLER __builtin_extract_return_addr(__builtin_return_address(0))

extern "C" {
long allocations_found() { return found; }

void* PyEval_SaveThread() {
  static const auto real = next<void* (*)()>("PyEval_SaveThread");
  Dl_info info;
  void* state = real();
  if (dladdr(CALLER, &info) && info.dli_fname && strstr(info.dli_fname, "_cpu.")) ++released;
  return state;
}
void PyEval_RestoreThread(void* state) {
  static const auto real = next<void (*)(void*)>("PyEval_RestoreThread");
  Dl_info info;
  if (dladdr(CALLER, &info) && info.dli_fname && strstr(info.dli_fname, "_cpu.")) --released;
  real(state);
}

void* malloc(size_t n) { return look(CALLER), __libc_malloc(n); }
void* calloc(size_t n, size_t size) { return look(CALLER), __libc_calloc(n, size); }
void* realloc(void* p, size_t n) { return look(CALLER), __libc_realloc(p, n); }
void* memalign(size_t to, size_t n) { return look(CALLER), __libc_memalign(to, n); }
void* aligned_alloc(size_t to, size_t n) { return look(CALLER), __libc_memalign(to, n); }
int posix_memalign(void** p, size_t to, size_t n) {
  look(CALLER);
  *p = __libc_memalign(to, n);
  return *p ? 0 : 12;  // ENOMEM
}
}

void* operator new(size_t n) { return look(CALLER), __libc_malloc(n); }
void* operator new[](size_t n) { return look(CALLER), __libc_malloc(n); }
void* operator new(size_t n, std::align_val_t to) {
  return look(CALLER), __libc_memalign(size_t(to), n);
}
void* operator new[](size_t n, std::align_val_t to) {
  return look(CALLER), __libc_memalign(size_t(to), n);
}
