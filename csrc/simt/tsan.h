// Lets ThreadSanitizer check kernels, not the emulator: `Quiet` hides the emulator's work,
// `release` and `acquire` report that it orders two CUDA threads. All are empty without SIMT_TSAN.
#pragma once

#if defined(SIMT_TSAN)
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace simt {

struct Quiet {
#if defined(SIMT_TSAN)
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Quiet() {}  // avoids the warning about an unused variable
#endif
};

inline void acquire([[maybe_unused]] void* address) {
#if defined(SIMT_TSAN)
  __tsan_acquire(address);
#endif
}

inline void release([[maybe_unused]] void* address) {
#if defined(SIMT_TSAN)
  __tsan_release(address);
#endif
}

}  // namespace simt
