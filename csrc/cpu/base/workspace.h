// Memory that Python allocates for a call: shared arrays, then a part for each thread. No kernel
// allocates: in a parallel region a failure would end the process.
FASTLM_INLINE constexpr int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// The caller's memory for one call, allocated array by array.
struct Buffer {
  char* const begin;
  char* p;
  explicit Buffer(void* memory) : begin(static_cast<char*>(memory)), p(begin) {}
  ~Buffer() { FASTLM_UNPOISON(begin, p - begin); }
  Buffer(const Buffer&) = delete;

  // The next n elements, aligned to a cache line.
  template <class X>
  X* take(int64_t n) {
    X* out = reinterpret_cast<X*>(p);
    p += size_of<X>(n);
    FASTLM_POISON(out + n, p - reinterpret_cast<char*>(out + n));
    return out;
  }
  // Releases all arrays.
  void clear() {
    FASTLM_UNPOISON(begin, p - begin);
    p = begin;
  }
  template <class X>
  static int64_t size_of(int64_t n) {
    return round_up(n * int64_t(sizeof(X)), 64) + FASTLM_GUARD;
  }
};

// The workspace of a call: arrays that its threads share, then one part for each thread.
struct Workspace {
  char* p;
  int64_t bytes;
  int threads = 0;
  int64_t bytes_per_thread = 0;
  explicit Workspace(void* memory = nullptr, int64_t bytes = 0)
      : p(static_cast<char*>(memory)), bytes(bytes) {}
  explicit Workspace(const TensorView& t)
      : p(reinterpret_cast<char*>(t.data<float>("workspace"))), bytes(t.numel() * 4) {
    const int64_t skipped = -reinterpret_cast<intptr_t>(p) & 63;
    p += skipped, bytes -= skipped;
  }

  template <class X>
  X* take(int64_t n) {
    const int64_t size = round_up(n * int64_t(sizeof(X)), 64);
    check(size);
    X* out = reinterpret_cast<X*>(p);
    p += size, bytes -= size;
    return out;
  }
  // Divides the rest into equal parts; the region must run on no more threads than there are parts.
  void divide(int64_t bytes_a_thread) {
    check(bytes_a_thread);
    bytes_per_thread = bytes_a_thread, threads = omp_get_max_threads();
    if (bytes_per_thread > 0) threads = int(std::min<int64_t>(threads, bytes / bytes_per_thread));
  }
  char* thread_part() const { return p + omp_get_thread_num() * bytes_per_thread; }

 private:
  void check(int64_t needed) const {
    if (needed > bytes) check_size("workspace", "bytes more:", needed, bytes);
  }
};
