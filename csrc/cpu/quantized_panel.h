// The panel form of quantized_linear.h for 16-bit activations, and the gradient of x: blocks of W
// are dequantized into B of the matrix core (gemm.h).
//
//   task: PANEL_N rows of W for PANEL_M rows of x. For each block of k: W -> B, which stays in the
//   L2; then, ROW_STEP rows of x at a time, C (+)= A . B, while the next block of W is fetched.
constexpr int64_t PANEL_N = NR;
template <class E>
constexpr int64_t PANEL_K = KC<E>;  // most k of a block: 128 KiB of B
constexpr int64_t PANEL_M = 512;    // W is dequantized once for them (256 rows: 2 to 4 % slower)
#ifdef FASTLM_AMX
constexpr int64_t ROW_STEP = 32;
#else
constexpr int64_t ROW_STEP = 4 * MR;
#endif

// Scales (or zeros) of rows [n, n + rows) as [groups][VL]; rows that do not exist are zero.
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

template <int BITS, int J, class E>
FASTLM_INLINE void dequantize_columns(vint v, vfloat s, vfloat z, E* out) {
  if constexpr (J < PER_LANE<BITS>) {
    if constexpr (sizeof(E) == 4) {
      store(out + J * VL, column<BITS, J>(v) * s + z);
      dequantize_columns<BITS, J + 1>(v, s, z, out);
    } else {
#ifdef FASTLM_BF16_DOT
      const vfloat low = column<BITS, J>(v) * s + z, high = column<BITS, J + 1>(v) * s + z;
      const __m512i interleave =
          _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                           6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      const __m512i pair = _mm512_permutexvar_epi16(
          interleave, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
      _mm512_storeu_si512(out + J * VL, pair);
      dequantize_columns<BITS, J + 2>(v, s, z, out);
#endif
    }
  }
}

// Panel of rows [n, n + rows) of W, columns [k0, k0 + kb), k0 a multiple of CHUNK: what pack_b
// would make of the dequantized weight. scales, zeros as [groups][VL].
template <int BITS, class E>
void dequantize_panel(const Weight& w, int64_t n, int rows, int64_t k0, int64_t kb,
                      const float* scales, const float* zeros, E* out) {
  const int64_t kp = padded_k<E>(kb);
  int64_t g = k0 / w.size;
  for (int64_t k = 0; k < kp; k += CHUNK<BITS>) {
    vint t[VL];
    load_transposed(w, n, rows, (k0 + k) / PER_LANE<BITS>, 0, t);
    for (int j = 0; j < VL && k + j * PER_LANE<BITS> < kp; ++j) {
      const int64_t at = k + j * PER_LANE<BITS>;
      while (k0 + at >= (g + 1) * w.size && g + 1 < w.groups) ++g;
      const vfloat s = load(scales + g * VL), z = zeros ? load(zeros + g * VL) : vfloat{};
      if (at + PER_LANE<BITS> <= kp) {
        dequantize_columns<BITS, 0>(t[j], s, z, out + at * VL);
      } else {
        alignas(64) E whole[PER_LANE<BITS> * VL];
        dequantize_columns<BITS, 0>(t[j], s, z, whole);
        memcpy(out + at * VL, whole, size_t(kp - at) * VL * sizeof(E));
      }
    }
  }
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

// Columns [k0, k0 + kb) of rows [n, n + rows) of W, to be fetched before they are dequantized: the
// machine's own prefetching does not follow so many short rows.
struct ComingBlock {
  const uint8_t* first;
  int64_t row_bytes, lines_a_row, lines;
  template <int BITS>
  static ComingBlock of(const Weight& w, int64_t n, int64_t rows, int64_t k0, int64_t kb) {
    rows = std::clamp<int64_t>(w.n - n, 0, rows);
    const int64_t lines = (kb * BITS / 8 + 63) / 64;
    return {w.row(n) + k0 * BITS / 8, w.row_bytes, lines, lines * rows};
  }
  // Part i of `parts`.
  FASTLM_INLINE void fetch(int64_t i, int64_t parts) const {
    for (int64_t l = lines * i / parts; l < lines * (i + 1) / parts; ++l)
      __builtin_prefetch(first + l / lines_a_row * row_bytes + l % lines_a_row * 64, 0, 2);
  }
};

template <int BITS, class T>
struct PanelForm {
  using E = Elem<T>;
  int64_t m;
  const Weight& w;
  int64_t kp = padded_k<E>(w.k);
  bool in_place = sizeof(E) == sizeof(T) && kp == w.k;
  // equal blocks, not a rest of a few columns
  int64_t blocks_k = (w.k + PANEL_K<E> - 1) / PANEL_K<E>;
  int64_t block_k = round_up((w.k + blocks_k - 1) / blocks_k, 128);
  int64_t block_m = std::min(PANEL_M, round_up(m, ROW_STEP));
  int64_t table = PANEL_N / VL * w.groups * VL;  // scales of a task

  int64_t shared() const { return in_place ? 0 : round_up(m * kp * int64_t(sizeof(E)), 64); }
  int64_t each() const {
    return Buffer::size_of<E>(PANEL_N * block_k) + Buffer::size_of<float>(block_m * PANEL_N) +
           2 * Buffer::size_of<float>(table);
  }

  void operator()(const T* x, int64_t x_stride, const float* bias, T* y, Workspace room) const {
    E* packed = in_place ? nullptr : room.take<E>(m * kp);
    const E* a = in_place ? reinterpret_cast<const E*>(x) : packed;
    const int64_t lda = in_place ? x_stride : kp;
    room.divide(each());
    const int64_t blocks_m = (m + PANEL_M - 1) / PANEL_M, blocks_n = (w.n + PANEL_N - 1) / PANEL_N;
#pragma omp parallel num_threads(room.threads)
    {
      if (packed) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; ++i)
          pack_a<E>(x + i * x_stride, x_stride, 1, 1, w.k, packed + i * kp);
      }
      Buffer memory(room.mine());
      E* b = memory.take<E>(PANEL_N * block_k);
      float* c = memory.take<float>(block_m * PANEL_N);
      float* scales = memory.take<float>(table);
      float* zeros = w.zeros ? memory.take<float>(table) : nullptr;
      TileScope tiles;
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < blocks_m * blocks_n; ++t) {
        const int64_t m0 = t / blocks_n * PANEL_M, n0 = t % blocks_n * PANEL_N;
        const int64_t mb = std::min(PANEL_M, m - m0), nb = std::min(PANEL_N, w.n - n0);
        const auto rows = [&](int64_t p) { return int(std::min<int64_t>(VL, nb - p * VL)); };
        const int64_t panel_table = w.groups * VL;
        for (int64_t p = 0; p * VL < nb; ++p) {
          transpose_scales(w.scales, n0 + p * VL, w.groups, rows(p), scales + p * panel_table);
          if (zeros)
            transpose_scales(w.zeros, n0 + p * VL, w.groups, rows(p), zeros + p * panel_table);
        }
        for (int64_t k0 = 0; k0 < w.k; k0 += block_k) {
          const int64_t kb = std::min(block_k, w.k - k0);
          const bool last = k0 + kb == w.k;
          // the thread's next task is about as many further on as there are threads
          const auto coming =
              last ? ComingBlock::of<BITS>(w, n0 + PANEL_N * room.threads, PANEL_N, 0, block_k)
                   : ComingBlock::of<BITS>(w, n0, nb, k0 + kb, std::min(block_k, w.k - k0 - kb));
          for (int64_t p = 0; p * VL < nb; ++p)
            dequantize_panel<BITS>(w, n0 + p * VL, rows(p), k0, kb, scales + p * panel_table,
                                   zeros ? zeros + p * panel_table : nullptr,
                                   b + p * VL * padded_k<E>(kb));
          for (int64_t i = 0; i < mb; i += ROW_STEP) {
            const int64_t count = std::min(ROW_STEP, mb - i);
            coming.fetch(i / ROW_STEP, (mb + ROW_STEP - 1) / ROW_STEP);
            T* out = y + (m0 + i) * w.n + n0;
            if (last)
              for (int64_t r = 0; r < count; ++r)
                for (int64_t j = 0; j < nb; j += 64 / int64_t(sizeof(T)))
                  __builtin_prefetch(out + r * w.n + j, 1);
            gemm<E>(count, nb, kb, a + (m0 + i) * lda + k0, lda, b, c + i * PANEL_N, PANEL_N,
                    k0 > 0);
            if (last)
              store_rows(c + i * PANEL_N, PANEL_N, count, nb, bias ? bias + n0 : nullptr, out, w.n);
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
  static int64_t each() {
    return Buffer::size_of<float>(PART * PANEL_N) + Buffer::size_of<float>(PANEL_M * PANEL_N) +
           Buffer::size_of<E>(PART * PANEL_N);
  }

  void operator()(const T* dy, int64_t dy_stride, T* dx, Workspace room) const {
    const int64_t np = padded_k<E>(w.n), blocks_k = (w.k + PANEL_N - 1) / PANEL_N,
                  blocks_m = (m + PANEL_M - 1) / PANEL_M;
    E* a = room.take<E>(m * np);
    room.divide(each());
#pragma omp parallel num_threads(room.threads)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < m; ++i)
        pack_a<E>(dy + i * dy_stride, dy_stride, 1, 1, w.n, a + i * np);
      Buffer memory(room.mine());
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
