// The bare matrix product, and the ceilings of the machine by which a benchmark divides. Body of
// probe.cpp.
#include "cpu/base/gemm.h"

// C = A . B^T, packing included.
inline void matmul(const TensorView& a, const TensorView& b, const TensorView& c) {
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  check_size("b", "columns, as a:", k, b.size(1));
  check_size("c", "rows, as a:", m, c.size(0));
  check_size("c", "columns, as the rows of b:", n, c.size(1));
  check_contiguous("c", c);
  with_float(a.dtype(), "a", [&](auto tag) {
    using T = decltype(tag);
    using E = Elem<T>;
    const T *pa = a.data<T>("a"), *pb = b.data<T>("b");
    float* pc = c.data<float>("c");
    const int64_t kp = padded_k<E>(k), block = 192;
    std::vector<E> packed(packed_b_elements<E>(k, n));
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t n0 = 0; n0 < n; n0 += VL)
        pack_b<E>(pb + n0 * b.stride(0), b.stride(1), b.stride(0), k, std::min<int64_t>(VL, n - n0),
                  packed.data() + n0 / VL * kp * VL);
      std::vector<E> rows(block * kp);
      TileScope tiles;
#pragma omp for schedule(dynamic)
      for (int64_t m0 = 0; m0 < m; m0 += block) {
        const int64_t count = std::min(block, m - m0);
        pack_a<E>(pa + m0 * a.stride(0), a.stride(0), a.stride(1), count, k, rows.data());
        gemm<E>(count, n, k, rows.data(), kp, packed.data(), pc + m0 * n, n, false);
      }
    }
  });
}

// Multiply-adds on operands in the L1, on all threads: the upper bound of gemm(). The data is
// random, because zeros run faster. Returns the floating-point operations; the caller takes the
// time.
template <class E>
double multiply_elements_in_l1(int64_t repeats) {
  constexpr int64_t M = 4 * MR, K = (32 << 10) / NR / int64_t(sizeof(E));  // 32 KiB of b
  int threads = 0;
#pragma omp parallel
  {
#pragma omp atomic
    ++threads;
    alignas(64) static thread_local E a[M * K], b[NR * K];
    alignas(64) static thread_local float c[M * NR];
    uint32_t state = 1;
    const auto fill = [&](E* p, int64_t n) {
      for (int64_t i = 0; i < n; ++i)
        p[i] = to_elem<E>(float(int32_t(state = state * 1664525u + 1013904223u)) * 0x1p-31f);
    };
    fill(a, M * K), fill(b, NR * K);
    TileScope tiles;
    for (int64_t r = 0; r < repeats; ++r) gemm<E>(M, NR, K, a, K, b, c, NR, false);
  }
  return 2. * M * NR * K * double(repeats) * threads;
}

inline double multiply_in_l1(bool bf16_operands, int64_t repeats) {
  return bf16_operands ? multiply_elements_in_l1<Elem<bf16>>(repeats)
                       : multiply_elements_in_l1<float>(repeats);
}

// Reads a buffer once with all threads; the sum keeps the compiler from removing the loop.
inline float read_all(const TensorView& buffer) {
  const float* p = buffer.data<float>("buffer");
  const int64_t n = buffer.numel() / (8 * VL) * (8 * VL);
  float total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
  for (int64_t block = 0; block < n; block += 8 * VL) {
    vfloat s[8];
    for (int i = 0; i < 8; ++i) s[i] = load(p + block + i * VL);
    total += hsum((s[0] + s[1]) + (s[2] + s[3]) + ((s[4] + s[5]) + (s[6] + s[7])));
  }
  return total;
}
