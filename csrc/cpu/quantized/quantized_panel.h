// The panel form of quantized_linear.h for 16-bit activations (and, with tiles, for 8-bit ones of
// many rows), and the gradient of x: blocks of W are dequantized into B of the matrix core (gemm.h).
//
//   task: PANEL_N rows of W for PANEL_M rows of x. For each block of k: W -> B, which stays in the
//   L2, while the next block of W is fetched; then, ROW_STEP rows of x at a time, C (+)= A . B.
//
// Rejected: fetching the next block while multiplying, a share with each ROW_STEP rows: 12 to 20 %
// slower at 16 to 64 rows.
constexpr int64_t PANEL_N = NR;
template <class E>
constexpr int64_t PANEL_K = KC<E>;  // most k of a block: 128 KiB of B
constexpr int64_t PANEL_M = 512;    // rows per dequantized W (256 rows: 2 to 4 % slower)
#ifdef FASTLM_AMX
constexpr int64_t ROW_STEP = 32;
#else
constexpr int64_t ROW_STEP = 4 * MR;
#endif

// Scales (or zeros) of rows [n, n + rows) as [groups][VL]; rows beyond W are zero.
inline void transpose_scales(const Scales& source, int64_t n, int64_t groups, int rows,
                             float* out) {
  for (int64_t g = 0; g < groups; g += VL) {
    const int count = int(std::min<int64_t>(VL, groups - g));
    vint t[VL];
    for (int i = 0; i < VL; ++i)
      t[i] = i < rows ? as_int(source.lanes((n + i) * groups + g, count)) : vint{};
    transpose(t);
    for (int i = 0; i < count; ++i) store(out + (g + i) * VL, as_float(t[i]));
  }
}

// Scales and offsets of a group; turns lanes of W into columns of B.
template <int BITS, class E>
struct GroupOfPanel {
  vfloat s, z;
  FASTLM_INLINE GroupOfPanel(const float* scales, const float* zeros)
      : s(load(scales)), z(zeros ? load(zeros) : vfloat{}) {}
  template <int J = 0>
  FASTLM_INLINE void dequantize(vint lanes, E* out) const {
    if constexpr (J < PER_LANE<BITS>) {
      const vfloat first = column<BITS, J>(lanes) * s + z;
      if constexpr (sizeof(E) == 4) {
        store(out + J * VL, first);
        dequantize<J + 1>(lanes, out);
      } else {
#ifdef FASTLM_BF16_DOT
        store_words(out + J * VL, pair(first, column<BITS, J + 1>(lanes) * s + z));
        dequantize<J + 2>(lanes, out);
#endif
      }
    }
  }
};
#ifdef FASTLM_BF16_DOT
// Bytes are moved to their position in B before they become floats: two columns of eight lanes per
// vector, the halves of a vector of pairs. That is half the operations of the above. A byte stays
// the highest of its word, 2^24 times too large, which the scale undoes (a shift costs 20 %); a
// scale below 2^-102 becomes zero.
template <>
struct GroupOfPanel<8, bf16> {
  __m512 s[2], z[2];
  FASTLM_INLINE GroupOfPanel(const float* scales, const float* zeros) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    for (int half = 0; half < 2; ++half) {
      const __m512i lanes = _mm512_add_epi32(twice, _mm512_set1_epi32(8 * half));
      s[half] = _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(scales)) * 0x1p-24f;
      z[half] = zeros ? _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(zeros)) : _mm512_setzero_ps();
    }
  }
  template <int HALF, int COLUMN>
  FASTLM_INLINE __m512 floats(vint lanes) const {
    constexpr vint from = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
    const vint bytes = (from + (32 * HALF + COLUMN)) << 24;
    const __m512i q =
        _mm512_maskz_permutexvar_epi8(0x8888888888888888, (__m512i)bytes, (__m512i)lanes);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), s[HALF], z[HALF]);
  }
  FASTLM_INLINE void dequantize(vint lanes, bf16* out) const {
    const auto both = [](__m512 first, __m512 second) {
      return (vint)(__m512i)_mm512_cvtne2ps_pbh(second, first);
    };
    store_words(out, both(floats<0, 0>(lanes), floats<1, 0>(lanes)));
    store_words(out + 2 * VL, both(floats<0, 2>(lanes), floats<1, 2>(lanes)));
  }
};
#endif

// Panel of rows [n, n + rows) of W, columns [k0, k0 + kb), k0 a multiple of CHUNK: the output of
// pack_b for the dequantized weight. scales, zeros as [groups][VL]; `ahead`: see load_transposed.
template <int BITS, class E>
void dequantize_panel(const Weight& w, int64_t n, int rows, int64_t k0, int64_t kb,
                      const float* scales, const float* zeros, int64_t ahead, E* out) {
  constexpr int64_t LANE = PER_LANE<BITS>;
  const int64_t kp = padded_k<E>(kb), full_end = kp / LANE * LANE;
  vint t[VL];
  const auto lanes_at = [&](int64_t k) __attribute__((always_inline)) {
    const int64_t j = k / LANE % VL;
    if (j == 0) load_transposed(w, n, rows, (k0 + k) / LANE, ahead, t);
    return t[j];
  };
  const auto group_of = [&](int64_t g) __attribute__((always_inline)) {
    return GroupOfPanel<BITS, E>(scales + g * VL, zeros ? zeros + g * VL : nullptr);
  };
  int64_t k = 0, g = k0 / w.size;
  for (; k < full_end; ++g) {
    const auto group = group_of(g);
    const int64_t end = g + 1 < w.groups ? std::min(full_end, (g + 1) * w.size - k0) : full_end;
    for (; k < end; k += LANE) group.dequantize(lanes_at(k), out + k * VL);
  }
  if (k == kp) return;
  alignas(64) E last[LANE * VL];  // a partial lane
  group_of(std::min((k0 + k) / w.size, w.groups - 1)).dequantize(lanes_at(k), last);
  memcpy(out + k * VL, last, size_t(kp - k) * VL * sizeof(E));
}

template <class T>
void store_rows(const float* c, int64_t ldc, int64_t m, int64_t n, const float* bias, T* y,
                int64_t ldy) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; j += VL) {
      const int count = int(std::min<int64_t>(VL, n - j));
      const vfloat v = load(c + i * ldc + j) + (bias ? load(bias + j, count) : vfloat{});
      if (count == VL)
        store(y + i * ldy + j, v);
      else
        store(y + i * ldy + j, v, count);
    }
  }
}

// E: the type of gemm.h's operands; x is rounded to it.
template <int BITS, class T, class E = Elem<T>>
struct PanelForm {
  int64_t m;
  const Weight& w;
  int64_t kp = padded_k<E>(w.k);
  bool in_place = std::is_same_v<E, T> && kp == w.k;
  // equal blocks, no remainder of a few columns
  int64_t blocks_k = (w.k + PANEL_K<E> - 1) / PANEL_K<E>;
  int64_t block_k = round_up((w.k + blocks_k - 1) / blocks_k, 128);
  int64_t blocks_m = (m + PANEL_M - 1) / PANEL_M;
  int64_t block_m = round_up((m + blocks_m - 1) / blocks_m, ROW_STEP);
  int64_t table = PANEL_N / VL * w.groups * VL;  // scales per task

  int64_t shared() const { return in_place ? 0 : round_up(m * kp * int64_t(sizeof(E)), 64); }
  int64_t bytes_per_thread() const {
    return Buffer::size_of<E>(PANEL_N * block_k) + Buffer::size_of<float>(block_m * PANEL_N) +
           2 * Buffer::size_of<float>(table);
  }

  void operator()(const T* x, int64_t x_stride, const float* bias, T* y, Workspace arena) const {
    E* packed = in_place ? nullptr : arena.take<E>(m * kp);
    const E* a = in_place ? reinterpret_cast<const E*>(x) : packed;
    const int64_t lda = in_place ? x_stride : kp;
    arena.divide(bytes_per_thread());
    const int64_t blocks_n = (w.n + PANEL_N - 1) / PANEL_N;
#pragma omp parallel num_threads(arena.threads)
    {
      if (packed) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; ++i)
          pack_a<E>(x + i * x_stride, x_stride, 1, 1, w.k, packed + i * kp);
      }
      Buffer memory(arena.thread_part());
      E* b = memory.take<E>(PANEL_N * block_k);
      float* c = memory.take<float>(block_m * PANEL_N);
      float* scales = memory.take<float>(table);
      float* zeros = w.zeros ? memory.take<float>(table) : nullptr;
      TileScope tiles;
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < blocks_m * blocks_n; ++t) {
        const int64_t m0 = t / blocks_n * block_m, n0 = t % blocks_n * PANEL_N;
        const int64_t mb = std::min(block_m, m - m0), nb = std::min(PANEL_N, w.n - n0);
        if (mb <= 0) continue;
        const bool scaled =
            SCALED_SUMS<BITS, E> && !zeros && nb == NR && m <= SCALED_M && w.size >= SCALED_SIZE;
        const auto rows = [&](int64_t p) { return int(std::min<int64_t>(VL, nb - p * VL)); };
        const int64_t panel_table = w.groups * VL;
        // the rows of this thread's next task: about as many tasks ahead as there are threads
        const int64_t next = n0 + PANEL_N * arena.threads;
        w.scales.prefetch(next * w.groups, PANEL_N * w.groups);
        w.zeros.prefetch(next * w.groups, PANEL_N * w.groups);
        for (int64_t p = 0; p * VL < nb; ++p) {
          transpose_scales(w.scales, n0 + p * VL, w.groups, rows(p), scales + p * panel_table);
          if (zeros)
            transpose_scales(w.zeros, n0 + p * VL, w.groups, rows(p), zeros + p * panel_table);
        }
        for (int64_t k0 = 0; k0 < w.k; k0 += block_k) {
          const int64_t kb = std::min(block_k, w.k - k0);
          const bool last = k0 + kb == w.k;
          const int64_t ahead =
              last ? (next - n0) * w.row_bytes - k0 * BITS / 8 : block_k * BITS / 8;
          for (int64_t p = 0; p * VL < nb; ++p) {
            E* to = b + p * VL * padded_k<E>(kb);
            if constexpr (SCALED_SUMS<BITS, E>) {
              if (scaled) {
                integer_panel(w, n0 + p * VL, rows(p), k0, kb, ahead, to);
                continue;
              }
            }
            dequantize_panel<BITS>(w, n0 + p * VL, rows(p), k0, kb, scales + p * panel_table,
                                   zeros ? zeros + p * panel_table : nullptr, ahead, to);
          }
          for (int64_t i = 0; i < mb; i += ROW_STEP) {
            const int64_t count = std::min(ROW_STEP, mb - i);
            T* out = y + (m0 + i) * w.n + n0;
            if (last)
              for (int64_t r = 0; r < count; ++r)
                for (int64_t j = 0; j < nb; j += 64 / int64_t(sizeof(T)))
                  __builtin_prefetch(out + r * w.n + j, 1);
            const E* rows_of_x = a + (m0 + i) * lda + k0;
            float* sums = c + i * PANEL_N;
            if constexpr (SCALED_SUMS<BITS, E>) {
              if (scaled) gemm_scaled(count, w, k0, kb, rows_of_x, lda, b, scales, sums);
            }
            if (!scaled) gemm<E>(count, nb, kb, rows_of_x, lda, b, sums, PANEL_N, k0 > 0);
            if (last) store_rows(sums, PANEL_N, count, nb, bias ? bias + n0 : nullptr, out, w.n);
          }
        }
      }
    }
  }
};

// dx (M, K) = dy (M, N) . W: rows of W are dequantized in blocks and packed along n.
template <class T>
struct InputGradient {
  using E = Elem<T>;
  static constexpr int64_t PART = 256;  // rows of W: 64 KiB of floats
  int64_t m;
  const Weight& w;
  int bits;

  static int64_t shared(int64_t m, int64_t n) {
    return round_up(m * padded_k<E>(n) * int64_t(sizeof(E)), 64);
  }
  static int64_t bytes_per_thread() {
    return Buffer::size_of<float>(PART * PANEL_N) + Buffer::size_of<float>(PANEL_M * PANEL_N) +
           Buffer::size_of<E>(PART * PANEL_N);
  }

  void operator()(const T* dy, int64_t dy_stride, T* dx, Workspace arena) const {
    const int64_t np = padded_k<E>(w.n), blocks_k = (w.k + PANEL_N - 1) / PANEL_N,
                  blocks_m = (m + PANEL_M - 1) / PANEL_M;
    E* a = arena.take<E>(m * np);
    arena.divide(bytes_per_thread());
#pragma omp parallel num_threads(arena.threads)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < m; ++i)
        pack_a<E>(dy + i * dy_stride, dy_stride, 1, 1, w.n, a + i * np);
      Buffer memory(arena.thread_part());
      float* wide = memory.take<float>(PART * PANEL_N);
      float* c = memory.take<float>(PANEL_M * PANEL_N);
      E* b = memory.take<E>(PART * PANEL_N);
      TileScope tiles;
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < blocks_m * blocks_k; ++t) {
        const int64_t m0 = t / blocks_k * PANEL_M, k0 = t % blocks_k * PANEL_N;
        const int64_t mb = std::min(PANEL_M, m - m0), kb = std::min(PANEL_N, w.k - k0);
        if (w.n == 0) memset(c, 0, size_t(PANEL_M * PANEL_N) * 4);
        for (int64_t n0 = 0; n0 < w.n; n0 += PART) {
          const int64_t nb = std::min(PART, w.n - n0);
          for (int64_t i = 0; i < nb; ++i) {
            if (bits == 4)
              dequantize_row<4>(w, n0 + i, k0, k0 + kb, wide + i * PANEL_N);
            else
              dequantize_row<8>(w, n0 + i, k0, k0 + kb, wide + i * PANEL_N);
          }
          pack_b<E>(wide, PANEL_N, 1, nb, kb, b);
          gemm<E>(mb, kb, nb, a + m0 * np + n0, np, b, c, PANEL_N, n0 > 0);
        }
        store_rows(c, PANEL_N, mb, kb, nullptr, dx + m0 * w.k + k0, w.k);
      }
    }
  }
};
