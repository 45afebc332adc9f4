// The panel form of quantized_linear.h for 8-bit activations: W becomes panels of integers, x is
// rounded, and the int8 matrix core multiplies them (gemm_int8.h).
constexpr int64_t PANEL_M8 = 1024;      // most rows of x per unpacked W (512: 3 % slower)
constexpr int64_t ROWS_A_THREAD = 128;  // from this many rows on, unpacking W takes under 4 %
// B of NR8 columns for the runs that stay in the L1 (32 to 48 KiB on every CPU; the rest is for A
// and C).
constexpr int64_t B_BLOCK_BYTES = 32 << 10;

template <int BITS, class T>
struct PanelForm8 {
  int64_t m;
  const Weight& w;
  Runs runs{w.k, w.size};
  int64_t block = std::max<int64_t>(1, B_BLOCK_BYTES / NR8 / runs.stride);  // runs
  int64_t panel = std::min(block, runs.count) * runs.stride * VL, table = w.groups * VL;
  // Many rows: a thread rounds and multiplies its own rows, which stay in its L2, and unpacks all
  // of W for them. Few: W is unpacked once, and threads share its columns.
  int64_t threads = omp_get_max_threads();
  bool by_rows = m >= ROWS_A_THREAD * threads;
  int64_t parts = by_rows ? threads : 1;
  int64_t blocks_m = (m + PANEL_M8 * parts - 1) / (PANEL_M8 * parts) * parts;
  int64_t block_m = round_up((m + blocks_m - 1) / blocks_m, ROWS_AT_A_TIME);

  int64_t shared() const {
    return round_up(m * runs.row(), 64) + round_up(Rounded::size(m, runs.count) * 4, 64) +
           round_up(runs.count * int64_t(sizeof(Run)), 64);
  }
  int64_t bytes_per_thread() const {
    return Buffer::size_of<int8_t>(NP8 * panel) + Buffer::size_of<float>(block_m * NR8) +
           2 * Buffer::size_of<float>(NP8 * table);
  }

  struct ThreadArrays {  // per thread
    int8_t* b;
    float *c, *scales, *zeros;
  };

  void operator()(const T* x, int64_t x_stride, const float* bias, T* y, Workspace arena) const {
    int8_t* q = arena.take<int8_t>(m * runs.row());
    float* numbers = arena.take<float>(Rounded::size(m, runs.count));
    const Rounded a{q, numbers, runs.row(), runs.count};
    Run* list = arena.take<Run>(runs.count);
    runs.list(list);
    arena.divide(bytes_per_thread());
    const auto round = [&](int64_t i) { round_row<BITS>(x + i * x_stride, i, runs, a); };
#pragma omp parallel num_threads(arena.threads)
    {
      Buffer memory(arena.thread_part());
      ThreadArrays arrays{};
      arrays.b = memory.take<int8_t>(NP8 * panel);
      arrays.c = memory.take<float>(block_m * NR8);
      arrays.scales = memory.take<float>(NP8 * table);
      if (w.zeros) arrays.zeros = memory.take<float>(NP8 * table);
      TileScope tiles;
      if (by_rows) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < blocks_m; ++t) {
          const int64_t m0 = t * block_m, end = std::min(m, m0 + block_m);
          for (int64_t i = m0; i < end; ++i) round(i);
          for (int64_t n0 = 0; n0 < w.n && m0 < m; n0 += NR8)
            multiply(a, list, m0, n0, bias, y, arrays);
        }
      } else {
        const int64_t blocks_n = (w.n + NR8 - 1) / NR8;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; ++i) round(i);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < blocks_m * blocks_n; ++t)
          multiply(a, list, t / blocks_n * block_m, t % blocks_n * NR8, bias, y, arrays);
      }
    }
  }

  // Computes NR8 columns of y from n0 on for block_m rows from m0 on.
  void multiply(const Rounded& a, const Run* list, int64_t m0, int64_t n0, const float* bias, T* y,
                const ThreadArrays& arrays) const {
    const int64_t mb = std::min(block_m, m - m0), nb = std::min<int64_t>(NR8, w.n - n0);
    const auto rows = [&](int64_t p) { return int(std::min<int64_t>(VL, nb - p * VL)); };
    w.scales.prefetch((n0 + NR8) * w.groups, NR8 * w.groups);
    w.zeros.prefetch((n0 + NR8) * w.groups, NR8 * w.groups);
    for (int64_t p = 0; p * VL < nb; ++p) {
      transpose_scales(w.scales, n0 + p * VL, w.groups, rows(p), arrays.scales + p * table);
      if (arrays.zeros)
        transpose_scales(w.zeros, n0 + p * VL, w.groups, rows(p), arrays.zeros + p * table);
    }
    for (int64_t first = 0; first < runs.count; first += block) {
      const int64_t last = std::min(first + block, runs.count), width = runs.stride * VL;
      // bytes to the same position in the next block, or in the first block of the next columns
      const int64_t ahead = last < runs.count
                                ? runs.begin(last) * BITS / 8 - runs.begin(first) * BITS / 8
                                : NR8 * w.row_bytes - runs.begin(first) * BITS / 8;
      for (int64_t p = 0; p * VL < nb; ++p) {
        int8_t* to = arrays.b + p * (last - first) * width;
        const int64_t n = n0 + p * VL;
        if (runs.contiguous())
          integer_panel<BITS>(w, n, rows(p), runs.begin(first),
                              (last - first - 1) * runs.stride + list[last - 1].length, ahead, to);
        else
          for (int64_t r = first; r < last; ++r)
            integer_panel<BITS>(w, n, rows(p), runs.begin(r), list[r].length, ahead,
                                to + (r - first) * width);
      }
      // Stores rows of y, and fetches the lines of the next ones, which lie a row of y apart.
      const auto finish = [&](int64_t i, int64_t count) {
        if (last < runs.count) return;
        T* out = y + (m0 + i) * w.n + n0;
        const int64_t next = std::min(count, mb - i - count);
        for (int64_t r = count; r < count + next; ++r)
          for (int64_t j = 0; j < nb; j += 64 / int64_t(sizeof(T)))
            __builtin_prefetch(out + r * w.n + j, 1);
        store_rows(arrays.c + i * NR8, NR8, count, nb, bias ? bias + n0 : nullptr, out, w.n);
      };
      gemm_int8<BITS>(
          mb, nb,
          Block8{list, first, last, runs.stride, arrays.b, arrays.scales, arrays.zeros, table}, a,
          m0, arrays.c, first > 0, finish);
    }
  }
};
