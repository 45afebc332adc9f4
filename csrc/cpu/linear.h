// Products of a bf16 linear layer, y = x w^T + b: forward, gradient of x, gradient of w. Body of
// linear.cpp, compiled per instruction set.
//
//   forward   y  (M, N) = x  (M, K) . w^T (K, N)     A in place, B = w, all packed once;
//   input     dx (M, K) = dy (M, N) . w   (N, K)     threads share the blocks of rows
//   weight    dw (N, K) = dy^T (N, M) . x (M, K)     CHUNK of M at a time: B = x packed, shared; A
//                                                    packed by the thread that multiplies it, from
//                                                    its L2; sums (N, K) in float32 between chunks
//
// A packed operand has the order in which it is read, so the speed does not depend on the stride of
// the caller's rows: rows at a distance of a power of two share a few sets of the L2.
//
// E is the type of gemm.h's operands (bf16 or float), or fp16 (linear_fp16.h).
#include "cpu/base/gemm.h"
#include "cpu/base/workspace.h"

#ifdef FASTLM_FP16
#include "cpu/linear_fp16.h"
using E = f16;
constexpr int64_t BLOCK_STEP = VL;  // rows of A in a panel
#else
using E = Elem<bf16>;
constexpr int64_t BLOCK_STEP = ROWS_AT_A_TIME;
#endif
constexpr int64_t IN_L2 =
    (512 << 10) / int64_t(sizeof(E));  // elements of A per block: half of an L2 of 1 MiB
constexpr int64_t MAX_ROWS = 512;      // per block
constexpr int64_t CHUNK = 1024;        // rows of x and dy at a time: KC of bf16
constexpr int64_t GROUP = 4 * VL;      // columns that pack_b takes at a time
// Rows of y multiplied before they are stored. Their lines are fetched before, because rows of y
// lie far apart; the sums stay in the L1.
#ifdef FASTLM_AMX
constexpr int64_t STEP = MAX_ROWS;  // neither fewer rows nor the fetch were measured
#else
constexpr int64_t STEP = round_up(4 * MR, BLOCK_STEP);
#endif

// Rows per block, in whole register tiles: A fills half of the L2, and every thread has about the
// same number of blocks.
inline int64_t block_rows(int64_t m, int64_t padded_k) {
  const int64_t threads = omp_get_max_threads(),
                max_rows = std::max<int64_t>(BLOCK_STEP, std::min(MAX_ROWS, IN_L2 / padded_k)),
                blocks = (m + max_rows * threads - 1) / (max_rows * threads) * threads;
  return round_up((m + blocks - 1) / blocks, BLOCK_STEP);
}

// Bytes of a product's shared operands and of each thread's blocks.
struct LinearWorkspace {
  int64_t rows, shared, bytes_per_thread;
};
inline LinearWorkspace workspace_for_rows(int64_t m, int64_t n, int64_t k) {
  const int64_t kp = padded_k<E>(k), rows = block_rows(m, kp);
  return {rows, round_up(packed_b_elements<E>(k, n) * int64_t(sizeof(E)), 64),
          Buffer::size_of<float>(std::min(STEP, rows) * NR) + Buffer::size_of<E>(rows * kp)};
}
inline LinearWorkspace workspace_for_columns(int64_t m, int64_t n, int64_t k) {
  const int64_t chunk = padded_k<E>(std::min(CHUNK, m)), rows = block_rows(n, chunk);
  return {
      rows,
      round_up(packed_b_elements<E>(chunk, k) * int64_t(sizeof(E)), 64) + round_up(n * k * 4, 64),
      Buffer::size_of<E>(rows * chunk)};
}

// Bytes for y = x w^T of x (m, k), w (n, k), or for its dw; dx is the y of x (m, n) and w^T (k, n).
inline int64_t linear_workspace(int64_t m, int64_t n, int64_t k, bool weight_gradient) {
  const LinearWorkspace sizes =
      weight_gradient ? workspace_for_columns(m, n, k) : workspace_for_rows(m, n, k);
  return sizes.shared + sizes.bytes_per_thread * omp_get_max_threads() + 64;
}

// Returns the operand itself where gemm multiplies bf16, else null.
template <class T>
FASTLM_INLINE const E* in_place([[maybe_unused]] const T* p) {
  if constexpr (std::is_same_v<E, T>)
    return p;
  else
    return nullptr;
}

// Non-temporal stores for outputs that the L2s cannot hold: a full line is then written without
// being read first. On Intel this is 1.1 to 1.2 times as fast with tiles, 1.00 to 1.04 times with
// operands widened to float32; not measured elsewhere.
#if FASTLM_VL == 16 && (defined(FASTLM_AMX) || !defined(FASTLM_BF16_DOT))
constexpr bool STREAMS = true;
// Writes NR floats to the bf16 line or lines at `to`.
FASTLM_INLINE void stream_lines(bf16* to, const float* from) {
  FASTLM_WRITES(to, 2 * NR);
#pragma GCC unroll 4
  for (int j = 0; j < NR; j += VL)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + j), rounded_to_bf16(load(from + j)));
}
#else
constexpr bool STREAMS = false;
inline void stream_lines(bf16*, const float*) {}
#endif
constexpr int64_t STREAM_BYTES = 1 << 20;  // of output per thread

// Writes a row of `from` (float32) as bf16.
FASTLM_INLINE void store_row(bf16* to, const float* from, int64_t n) {
  for (int64_t j = 0; j < n; j += VL) {
    const int width = int(std::min<int64_t>(VL, n - j));
    if (width == VL)
      store(to + j, load(from + j));
    else
      store(to + j, load(from + j, width), width);
  }
}

// out (m, n) = a (m, k) . b (k, n) + bias; rows of a and out have any stride.
inline void multiply_rows(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t a_stride,
                          const bf16* b, int64_t b_k_stride, int64_t b_n_stride, const bf16* bias,
                          bf16* out, int64_t out_stride, Workspace arena) {
  const int64_t kp = padded_k<E>(k);
  const auto [rows, _, bytes_per_thread] = workspace_for_rows(m, n, k);
  E* packed = arena.take<E>(packed_b_elements<E>(k, n));
  arena.divide(bytes_per_thread);
  const bool streams = STREAMS && m * n * int64_t(sizeof(bf16)) >= STREAM_BYTES * arena.threads &&
                       out_stride % 32 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
#pragma omp parallel num_threads(arena.threads) firstprivate(rows)
  {
    Buffer memory(arena.thread_part());
    float* c = memory.take<float>(std::min(STEP, rows) * NR);
    E* packed_a = memory.take<E>(rows * kp);
    TileScope tiles;
#pragma omp for schedule(static)
    for (int64_t n0 = 0; n0 < n; n0 += GROUP)
      pack_b<E>(b + n0 * b_n_stride, b_k_stride, b_n_stride, k, std::min(GROUP, n - n0),
                packed + n0 * kp);
#pragma omp for schedule(dynamic)
    for (int64_t m0 = 0; m0 < m; m0 += rows) {
      const int64_t count = std::min(rows, m - m0);
      const E* block = kp == k ? in_place(a + m0 * a_stride) : nullptr;
      const int64_t lda = block ? a_stride : kp;
      if (!block) pack_a<E>(a + m0 * a_stride, a_stride, 1, count, k, packed_a), block = packed_a;
      for (int64_t n0 = 0; n0 < n; n0 += NR) {
        const int64_t width = std::min<int64_t>(NR, n - n0);
        for (int64_t i0 = 0; i0 < count; i0 += STEP) {
          const int64_t height = std::min(STEP, count - i0);
          bf16* to = out + (m0 + i0) * out_stride + n0;
          if (STEP < MAX_ROWS && !streams)
            for (int64_t i = 0; i < height; ++i)
              for (int64_t j = 0; j < width; j += 32)
                __builtin_prefetch(to + i * out_stride + j, 1);
          gemm<E>(height, width, k, block + i0 * lda, lda, packed + n0 * kp, c, NR, false);
          for (int64_t i = 0; i < height; ++i, to += out_stride) {
            if (bias)
              for (int64_t j = 0; j < width; ++j) c[i * NR + j] += to_float(bias[n0 + j]);
            if (streams && width == NR)
              stream_lines(to, c + i * NR);
            else
              store_row(to, c + i * NR, width);
          }
        }
      }
    }
    if (streams) _mm_sfence();
  }
}

// dw (n, k) = dy^T (n, m) . x (m, k)
inline void multiply_columns(int64_t m, int64_t n, int64_t k, const bf16* dy, int64_t dy_stride,
                             const bf16* x, int64_t x_stride, bf16* dw, Workspace arena) {
  const int64_t chunk = padded_k<E>(std::min(CHUNK, m));
  const auto [rows, _, bytes_per_thread] = workspace_for_columns(m, n, k);
  E* b = arena.take<E>(packed_b_elements<E>(chunk, k));
  float* c = arena.take<float>(n * k);
  arena.divide(bytes_per_thread);
#pragma omp parallel num_threads(arena.threads) firstprivate(rows)
  {
    Buffer memory(arena.thread_part());
    E* a = memory.take<E>(rows * chunk);
    TileScope tiles;
    for (int64_t m0 = 0; m0 < m; m0 += CHUNK) {
      const int64_t count = std::min(CHUNK, m - m0), kp = padded_k<E>(count);
#pragma omp for schedule(static)
      for (int64_t j = 0; j < k; j += GROUP)
        pack_b<E>(x + m0 * x_stride + j, x_stride, 1, count, std::min(GROUP, k - j), b + j * kp);
#pragma omp for schedule(dynamic)
      for (int64_t i0 = 0; i0 < n; i0 += rows) {
        const int64_t height = std::min(rows, n - i0);
        for (int64_t i = 0; i < height; i += GROUP)
          pack_a<E>(dy + m0 * dy_stride + i0 + i, 1, dy_stride, std::min(GROUP, height - i), count,
                    a + i * kp);
        gemm<E>(height, k, count, a, kp, b, c + i0 * k, k, m0 > 0);
        if (m0 + count == m) store_row(dw + i0 * k, c + i0 * k, height * k);
      }
    }
  }
}

inline void linear_forward(const TensorView& x, const TensorView& w, const TensorView* bias,
                           const TensorView& y, const TensorView& workspace) {
  prefer_huge_pages(y);
  check_size("w", "columns, as x:", x.size(1), w.size(1));
  check_contiguous("y", y);
  multiply_rows(x.size(0), w.size(0), x.size(1), x.data<bf16>("x"), x.stride(0), w.data<bf16>("w"),
                1, w.stride(0), bias ? bias->data<bf16>("bias") : nullptr, y.data<bf16>("y"),
                w.size(0), Workspace(workspace));
}

inline void linear_input_gradient(const TensorView& dy, const TensorView& w, const TensorView& dx,
                                  const TensorView& workspace) {
  prefer_huge_pages(dx);
  check_size("w", "rows, as columns of dy:", dy.size(1), w.size(0));
  check_contiguous("dx", dx);
  multiply_rows(dy.size(0), w.size(1), dy.size(1), dy.data<bf16>("dy"), dy.stride(0),
                w.data<bf16>("w"), w.stride(0), 1, nullptr, dx.data<bf16>("dx"), w.size(1),
                Workspace(workspace));
}

inline void linear_weight_gradient(const TensorView& dy, const TensorView& x, const TensorView& dw,
                                   const TensorView& workspace) {
  prefer_huge_pages(dw);
  check_size("x", "rows, as dy:", dy.size(0), x.size(0));
  check_contiguous("dw", dw);
  multiply_columns(dy.size(0), dy.size(1), x.size(1), dy.data<bf16>("dy"), dy.stride(0),
                   x.data<bf16>("x"), x.stride(0), dw.data<bf16>("dw"), Workspace(workspace));
}

#include "cpu/linear_split.h"
