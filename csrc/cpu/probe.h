// C = A . B^T with the matrix core (gemm.h) alone, for its tests and for the benchmark of the
// ceiling. Body of probe.cpp.
#include "cpu/gemm.h"

inline void matmul(const TensorView& a, const TensorView& b, const TensorView& c) {
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  with_float(a.dtype(), "a", [&](auto tag) {
    using T = decltype(tag);
    using E = Elem<T>;
    const T *pa = a.data<T>("a"), *pb = b.data<T>("b");
    float* pc = c.data<float>("c");
    const int64_t kp = padded_k<E>(k), block = 192;
    E* packed = new E[packed_b_elements<E>(k, n)];
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t n0 = 0; n0 < n; n0 += VL)
        pack_b<E>(pb + n0 * b.stride(0), b.stride(1), b.stride(0), k, std::min<int64_t>(VL, n - n0),
                  packed + n0 / VL * kp * VL);
      E* rows = new E[block * kp];
      {
        TileScope tiles;
#pragma omp for schedule(dynamic)
        for (int64_t m0 = 0; m0 < m; m0 += block) {
          const int64_t count = std::min(block, m - m0);
          pack_a<E>(pa + m0 * a.stride(0), a.stride(0), a.stride(1), count, k, rows);
          gemm<E>(count, n, k, rows, kp, packed, pc + m0 * n, n, false);
        }
      }
      delete[] rows;
    }
    delete[] packed;
  });
}
