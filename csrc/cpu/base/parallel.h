// Calls f(i) for i in [0, count): in equal shares on all threads where that is `worthwhile`, else
// on this thread without a parallel region. libgomp makes a team even for one thread (`omp parallel
// if (false)`), which costs 1 us, as much as a kernel on one row. f captures by value: each thread
// has a copy, which the compiler keeps in registers (with references rope was 10 % slower).
template <class F>
FASTLM_INLINE void parallel_for(int64_t count, bool worthwhile, F f) {
  if (!worthwhile) {
    FlushDenormals flush;
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
#pragma omp parallel firstprivate(f)
  {
    FlushDenormals flush;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) f(i);
  }
}
