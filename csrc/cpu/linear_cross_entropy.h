// Cross-entropy of x (R, D) . w (V, D)^T + bias, and the entropy of its softmax, for one chunk of R
// rows; the caller loops over chunks. Body of linear_cross_entropy.cpp, compiled per instruction
// set. linear_scores.h computes the scores z, and its head has the index legend.
//
//            R columns (rows of x)            scores     z^T block = w block . x^T, with its
//          +------------------------+                    E = e^(z - base) and their sum per column;
//   VB rows|  block of z^T, one     |                    E may be stored
//   of w   |  thread's work         |         gradients  dw block (+)= E . (f x), f turning E into
//          +------------------------+                    dloss/dz^T; E is transposed; then, all
//          |  ...                   |                    blocks done, dx = f (E^T . w)
//
// E is already the A operand of dw. dloss/dz is f E except for one element per target, which is
// added to dw and dx in float32. With label smoothing dloss/dz overwrites E: its terms may cancel,
// so they are added before they are rounded.
//
// `base` is one number per row, not the block's maximum, so that f is also one number per row. It
// is the largest of a few scores. Within a window around the row's maximum nothing over- or
// underflows. Outside that window the chunk is recomputed with the maximum itself.
//
// How often an operand is read. (In the head of a 124M model, V 50257 and D 768 in bf16, a chunk of
// 320 rows has 32 MB of E; w has 77 MB and dw in float32 154 MB.)
//
//   E    written once by the scores; read from the memory by dw's product, then from the L2 by its
//        transposition. Each of dx's `across` tasks in a row reads E^T once, from the memory
//   f x  packed once; read once per block, from the L2 or (all threads read it) the L3
//   dw   written by the first chunk; each later one reads and writes it, in the memory
//   w    read once for dx, each task its columns; without E once more for the scores
//   dx   summed over all blocks in the L2 of the task's thread, then written once
//
//   dw (V, D)      D features           dx (R, D)   `across` tasks
//              +------------------+            +--------+--------+--------+
//   VB classes |  block b, by one |     height |  task  |  task  |  task  |  reads E^T of its rows
//              |  thread          |     rows   |        |        |        |  and w's columns, of
//              +------------------+            +--------+--------+--------+  all blocks
//              |  ...             |            |  ...                     |
#include "cpu/linear_scores.h"

constexpr int64_t DB = 256;       // most columns of dx per task: 512 x 256 fp32 in the L2
constexpr int64_t SAMPLE = 64;    // the first `base` is the maximum of these: one micro-panel
constexpr double WINDOW = 50;     // e^50 squared is a float, e^-50 and 16 digits below it are too
constexpr float MIN_LOGP = -128;  // e^-128 is 0 in float, and 0 * -128 is 0 where 0 * -inf is NaN

// Statistics of a chunk: `base` per column, then per block and column the sum of E and the sum of
// z - base weighted by class_weight or, for the entropy, its mean weighted by E.
struct ChunkStats {
  float *base, *sum, *weighted;
  int64_t padded;
  static int64_t elements(int64_t blocks, int64_t padded) { return (1 + 2 * blocks) * padded; }
  ChunkStats(float* stats, int64_t blocks, int64_t padded)
      : base(stats), sum(base + padded), weighted(sum + blocks * padded), padded(padded) {}
};

// The target class of each row of x.
struct TargetClasses {
  const int64_t* class_of;
  int64_t ignore_index;
  FASTLM_INLINE bool ignored(int64_t i) const { return class_of[i] == ignore_index; }
  // Whether row i's target is one of `count` classes from v0 on.
  FASTLM_INLINE bool is_in(int64_t i, int64_t v0, int64_t count) const {
    return !ignored(i) && class_of[i] >= v0 && class_of[i] < v0 + count;
  }
};

// For P vectors of columns of z (count, n): the sum of E, and the mean of z - base weighted by E.
// Both are summed relative to the block's largest score: a sum of E (z - base) would be rounded to
// the precision of z - base, which is far from 0 where `base` is far below the largest scores.
template <int P>
void means_of(const float* z, int64_t count, int64_t n, const float* base, float* sums,
              float* means) {
  vfloat maximum[P], sum[P], weighted[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)  // finite where every score is -inf
    maximum[p] = splat(std::numeric_limits<float>::lowest()), sum[p] = weighted[p] = vfloat{};
  for (int64_t c = 0; c < count; ++c)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) maximum[p] = vmax(maximum[p], load(z + c * n + p * VL));
  for (int64_t c = 0; c < count; ++c)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const vfloat below = load(z + c * n + p * VL) - maximum[p], e = vexp(below);
      sum[p] += e;
      weighted[p] += e * vmax(below, splat(MIN_LOGP));
    }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const vfloat above = maximum[p] - load(base + p * VL);
    store(sums + p * VL, sum[p] * vexp(above));
    store(means + p * VL, weighted[p] / sum[p] + above);
  }
}

// y += a x
template <class X>
FASTLM_INLINE void add_scaled(float* y, float a, const X* x, int64_t n) {
  for (int64_t j = 0; j < n; j += VL) {
    const int k = int(std::min<int64_t>(VL, n - j));
    if (k == VL)
      store(y + j, load(y + j) + a * load(x + j));
    else
      store(y + j, load(y + j, k) + a * load(x + j, k), k);
  }
}

// Results per row of x, (R) float32. shift + log_sum is the log of the sum of e^z, shift its
// nearest float. smoothed is written where there is a class_weight. entropy, that of softmax(z),
// may be null; with it exponentials and class_weight are.
struct RowStatistics {
  float *at_target, *shift, *log_sum, *nll, *smoothed, *entropy;
};

// x (R, D), w (V, D), bias (V) float32 or null, class_weight (V) float32 or null; exponentials: (V
// rounded up to VB) x (R padded) elements of E, or null.
template <class T>
struct ChunkScores {
  using E = Elem<T>;
  const LinearScores<T>& chunk;
  const TargetClasses target;
  const float* class_weight;
  E* exponentials;
  const ChunkStats stats;
  const RowStatistics out;
  const int64_t rows, padded, blocks;
  const int64_t columns;  // only exponentials that are stored need columns of padding
  Workspace workspace;
  E* packed;         // x
  double* total;     // (R): the sum of E over all blocks
  float* max_score;  // (R padded)

  // `workspace`: fastlm/cpu/linear_cross_entropy.py computes its size
  ChunkScores(const LinearScores<T>& chunk, TargetClasses target, const float* class_weight,
              E* exponentials, ChunkStats stats, RowStatistics out, Workspace workspace)
      : chunk(chunk),
        target(target),
        class_weight(class_weight),
        exponentials(exponentials),
        stats(stats),
        out(out),
        rows(chunk.rows),
        padded(chunk.padded()),
        blocks(chunk.blocks()),
        columns(chunk.has_few_rows() && !exponentials ? round_up(rows, VL) : padded),
        workspace(workspace) {
    Workspace& shared = this->workspace;
    packed = shared.take<E>(chunk.packed_elements());
    total = shared.take<double>(rows);
    max_score = shared.take<float>(padded);
    shared.divide(Buffer::size_of<E>(chunk.block_elements()) + Buffer::size_of<float>(VB * RC));
  }

  void run() const {
    chunk.pack_x(packed);
    sample_base();
    sum_exponentials();
    if (!is_in_window()) {
      set_base_to_maximum();
      sum_exponentials();
    }
    write_results();
  }

  // base: the largest of each row's first SAMPLE scores, or 0 where that is not finite.
  void sample_base() const {
    const int64_t count = std::min(SAMPLE, chunk.classes),
                  width = std::min<int64_t>(columns, 2 * RP);
#pragma omp parallel num_threads(workspace.threads)
    {
      Buffer memory(workspace.thread_part());
      E* rows_of_w = memory.take<E>(SAMPLE * padded_k<E>(chunk.width));
      float* z = memory.take<float>(SAMPLE * width);
      TileScope tiles;
#pragma omp for schedule(static)
      for (int64_t i0 = 0; i0 < columns; i0 += width) {
        const ScoreTile t{0, 0, count, i0, std::min(width, columns - i0), z};
        chunk.compute(t, packed, rows_of_w, true);
        column_maxima(z, count, t.n, max_score + i0);
      }
    }
    set_base(max_score);
    for (int64_t i = 0; i < rows; ++i)
      if (!std::isfinite(stats.base[i])) stats.base[i] = 0;
  }

  // base: the largest of all scores of a row. `stats.sum` holds those of the blocks meanwhile.
  void set_base_to_maximum() const {
    chunk.each_tile(workspace, packed, columns, [&](const ScoreTile& t) {
      column_maxima(t.z, t.count, t.n, stats.sum + t.b * padded + t.i0);
    });
    for (int64_t b = 1; b < blocks; ++b)
      for (int64_t i = 0; i < rows; ++i)
        stats.sum[i] = std::max(stats.sum[i], stats.sum[b * padded + i]);
    set_base(stats.sum);
  }

  void set_base(const float* max_score) const {
    for (int64_t i = 0; i < padded; ++i)  // a padded column's E is 0 for any bias
      stats.base[i] = i >= rows ? INFINITE : finite_max(max_score[i]);
  }

  bool is_in_window() const {
    bool in_window = true;  // not where a total is NaN
    for (int64_t i = 0; i < rows; ++i) in_window &= std::abs(std::log(total[i])) < WINDOW;
    return in_window;
  }

  // Computes stats.sum, `total` and, where needed, E, at_target and stats.weighted.
  void sum_exponentials() const {
    chunk.each_tile(workspace, packed, columns, [&](const ScoreTile& t) {
      copy_targets(t);
      sum_columns(t);
      if (class_weight) weigh_classes(t);
    });
    for (int64_t i = 0; i < rows; ++i) total[i] = 0;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < rows; ++i) total[i] += stats.sum[b * padded + i];
  }

  void copy_targets(const ScoreTile& t) const {
    for (int64_t i = t.i0; i < std::min(t.i0 + t.n, rows); ++i)
      if (target.is_in(i, t.v0, t.count))
        out.at_target[i] = t.z[(target.class_of[i] - t.v0) * t.n + i - t.i0];
  }

  void sum_columns(const ScoreTile& t) const {
    constexpr int P = VL == 16 ? 8 : RP / VL;  // 128 columns with 32 registers
    int64_t j = 0;
    for (; t.n - j >= P * VL; j += P * VL) sum_vectors<P>(t, j);
    for (; t.n - j >= RP; j += RP) sum_vectors<RP / VL>(t, j);
    for (; j < t.n; j += VL) sum_vectors<1>(t, j);
  }

  // P vectors of columns from column j of the tile on.
  template <int P>
  void sum_vectors(const ScoreTile& t, int64_t j) const {
    const int64_t i = t.i0 + j, at = t.b * padded + i;
    if (out.entropy)
      means_of<P>(t.z + j, t.count, t.n, stats.base + i, stats.sum + at, stats.weighted + at);
    else
      exponentials_of<P, E>(chunk.score, t.z + j, t.count, t.n, stats.base + i, stats.sum + at,
                            exponentials ? exponentials + t.v0 * padded + i : nullptr, padded);
  }

  void weigh_classes(const ScoreTile& t) const {
    for (int64_t j = 0; j < t.n; j += VL) {
      vfloat weighted{};
      for (int64_t c = 0; c < t.count; ++c)
        weighted +=
            class_weight[t.v0 + c] * (load(t.z + c * t.n + j) - load(stats.base + t.i0 + j));
      store(stats.weighted + t.b * padded + t.i0 + j, weighted);
    }
  }

  void write_results() const {
    double weights = 0;
    if (class_weight)
      for (int64_t v = 0; v < chunk.classes; ++v) weights += class_weight[v];
    for (int64_t i = 0; i < rows; ++i) {
      const double above = std::log(total[i]), lse = stats.base[i] + above;
      out.shift[i] = float(lse);
      out.log_sum[i] = std::isfinite(lse) ? float(lse - out.shift[i]) : 0.f;
      out.nll[i] = target.ignored(i) ? 0.f : float(lse - out.at_target[i]);
      if (class_weight) {
        double weighted = 0;
        for (int64_t b = 0; b < blocks; ++b) weighted += stats.weighted[b * padded + i];
        out.smoothed[i] = float(weights * above - weighted);
      }
      if (out.entropy) {
        double weighted = 0;
        for (int64_t b = 0; b < blocks; ++b)
          if (const double sum = stats.sum[b * padded + i]; sum != 0)  // the mean of nothing is NaN
            weighted += sum * stats.weighted[b * padded + i];
        out.entropy[i] = float(std::max(above - weighted / total[i], 0.0));
      }
    }
  }
};

// Coefficients of the rows, (R) float32: dloss/dz = on_p p - on_target [v is the target]
// - on_all class_weight - on_entropy p (log p + entropy), p the softmax of z. on_all may be null;
// on_entropy and entropy too.
struct LossCoefficients {
  const float *on_p, *on_target, *on_all, *on_entropy, *shift, *log_sum, *entropy;
};

// dx (R, D) like x; dw (V, D) float32, or like x where nothing is added to it (`dw_narrow`); dbias
// (V) float32: each may be null. `accumulate` adds to dw and dbias.
template <class T>
struct HeadGradients {
  T* dx;
  float* dw;
  T* dw_narrow;
  float* dbias;
  bool accumulate;
};

// Per column, (R padded) each: the coefficients, times the scores' scale and 0 in padding, and what
// follows from them.
struct ColumnFactors {
  static constexpr int ARRAYS = 11;
  float *on_p, *on_target, *on_all, *on_entropy, *shift, *log_sum, *entropy;
  float* of_e;          // turns E into on_p p
  float* of_row;        // f, the part of `of_e` that scales x and dx
  float* target_value;  // at the target: on_p p - on_target
  float* target_e;      // at the target: E
  bool has_all, has_entropy;
  ScoreFunction score;

  ColumnFactors(float* memory, int64_t padded, const LossCoefficients& loss, ScoreFunction score)
      : has_all(loss.on_all), has_entropy(loss.on_entropy), score(score) {
    for (float** p : {&on_p, &on_target, &on_all, &on_entropy, &shift, &log_sum, &entropy, &of_e,
                      &of_row, &target_value, &target_e})
      *p = memory, memory += padded;
  }

  FASTLM_INLINE float slope(vfloat s, int lane) const {
    return score.cap ? score.slope(s)[lane] : 1.f;
  }

  // dloss/dz of the scores s of columns i .. i + VL, without the target's share; w: class_weight
  FASTLM_INLINE vfloat gradient(vfloat s, int64_t i, float w) const {
    const vfloat logp = s - load(shift + i) - load(log_sum + i);
    vfloat on = load(on_p + i);
    if (has_entropy) on -= load(on_entropy + i) * (vmax(logp, splat(MIN_LOGP)) + load(entropy + i));
    vfloat e = vexp(logp) * on;
    if (has_all) e -= load(on_all + i) * w;
    return score.cap ? e * score.slope(s) : e;
  }
};

// With `has_exponentials`, `exponentials`, `stats` and `at_target` are those that ChunkScores
// wrote; without, `exponentials` is workspace, and dloss/dz^T is computed there from recomputed
// scores; only so is the entropy differentiated.
template <class T>
struct ChunkGradients {
  using E = Elem<T>;
  const LinearScores<T>& chunk;
  const TargetClasses target;
  const float* class_weight;
  const bool has_exponentials;
  const bool direct;  // E is multiplied as stored; else dloss/dz^T is first computed in its place
  E* exponentials;
  const HeadGradients<T> out;
  const int64_t rows, padded, width, blocks;
  Workspace workspace;
  E* packed;       // x, for z^T = w . x^T
  E* scaled;       // f x
  E* packed_rows;  // f x, for dw = E . (f x)
  ColumnFactors column;
  E** transposed;  // where a block's E^T is

  // A thread's arrays. E^T of a block is written where E of the thread's block before it was:
  //
  //   spare       E of block 0    E of block 5    E of block 7     blocks that one thread took
  //   E^T of 0    E^T of 5        E^T of 7        the next spare
  struct ThreadArrays {
    E *rows_of_w, *spare;
    float *z, *dw_wide;
    double* dbias;  // double: the terms of all rows and those of the targets may cancel
  };
  struct ThreadSizes {
    int64_t rows_of_w, spare, panels, z, dw_wide, dx;
  };

  ChunkGradients(const LinearScores<T>& chunk, const LossCoefficients& loss, TargetClasses target,
                 const float* class_weight, bool has_exponentials, E* exponentials,
                 const HeadGradients<T>& out, Workspace shared)
      : chunk(chunk),
        target(target),
        class_weight(class_weight),
        has_exponentials(has_exponentials),
        direct(has_exponentials && !loss.on_all),
        exponentials(exponentials),
        out(out),
        rows(chunk.rows),
        padded(chunk.padded()),
        width(chunk.width),
        blocks(chunk.blocks()),
        packed(shared.take<E>(has_exponentials ? 0 : chunk.packed_elements())),
        scaled(shared.take<E>(rows * width)),
        packed_rows(shared.take<E>(packed_b_elements<E>(rows, width))),
        column(shared.take<float>(ColumnFactors::ARRAYS * padded), padded, loss, chunk.score),
        transposed(shared.take<E*>(blocks)) {
    workspace = shared;
    workspace.divide(bytes_per_thread());
  }

  ThreadSizes sizes() const {
    return {has_exponentials ? 0 : chunk.block_elements(),
            VB * padded,
            packed_b_elements<E>(VB, DB),
            has_exponentials ? 0 : VB * RC,
            out.dw_narrow ? VB * width : 0,
            padded * DB};
  }
  int64_t bytes_per_thread() const {
    const ThreadSizes n = sizes();
    int64_t bytes = Buffer::size_of<double>(VB);
    for (int64_t e : {n.rows_of_w, n.spare, n.panels}) bytes += Buffer::size_of<E>(e);
    for (int64_t f : {n.z, n.dw_wide, n.dx}) bytes += Buffer::size_of<float>(f);
    return bytes;
  }
  ThreadArrays take_arrays(Buffer& memory) const {
    const ThreadSizes n = sizes();
    ThreadArrays arrays;
    arrays.rows_of_w = memory.take<E>(n.rows_of_w), arrays.spare = memory.take<E>(n.spare);
    arrays.z = memory.take<float>(n.z), arrays.dw_wide = memory.take<float>(n.dw_wide);
    arrays.dbias = memory.take<double>(VB);
    return arrays;
  }

  void run(const LossCoefficients& loss, const ChunkStats& stats, const float* at_target) const {
    fill_columns(loss, stats, at_target);
    if (!has_exponentials) chunk.pack_x(packed);
#pragma omp parallel num_threads(workspace.threads)
    {
      Buffer memory(workspace.thread_part());
      TileScope tiles;
      if (out.dw || out.dw_narrow) pack_scaled_rows();
      ThreadArrays arrays = take_arrays(memory);
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < blocks; ++b) block_gradients(b, arrays);
      if (out.dx) input_gradients(memory);
    }
  }

  void fill_columns(const LossCoefficients& loss, const ChunkStats& stats,
                    const float* at_target) const {
    const ColumnFactors& f = column;
    const float scale = f.score.scale;
    for (int64_t i = 0; i < padded; ++i) {
      const bool real = i < rows;
      f.on_p[i] = real ? loss.on_p[i] * scale : 0.f;
      f.on_target[i] = real ? loss.on_target[i] * scale : 0.f;
      f.on_all[i] = real && f.has_all ? loss.on_all[i] * scale : 0.f;
      f.on_entropy[i] = real && f.has_entropy ? loss.on_entropy[i] * scale : 0.f;
      f.entropy[i] = real && f.has_entropy ? loss.entropy[i] : 0.f;
      // a padded column's scores are the bias: e^(bias - inf) is 0 for any bias
      f.shift[i] = real ? loss.shift[i] : INFINITE;
      f.log_sum[i] = real ? loss.log_sum[i] : 0.f;
      f.of_row[i] = real ? 1.f : 0.f;
      f.of_e[i] = f.target_value[i] = f.target_e[i] = 0.f;
      if (!real || !has_exponentials) continue;
      const double lse = double(f.shift[i]) + f.log_sum[i];
      f.of_e[i] = float(f.on_p[i] * std::exp(stats.base[i] - lse));
      if (direct) f.of_row[i] = f.of_e[i];
      f.target_value[i] = float(f.on_p[i] * std::exp(at_target[i] - lse) - f.on_target[i]) *
                          f.slope(splat(at_target[i]), 0);
    }
  }

  // `scaled` and `packed_rows`, VL features at a time; inside the parallel region.
  void pack_scaled_rows() const {
    const int64_t panel = padded_k<E>(rows) * VL;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < (width + VL - 1) / VL; ++p) {
      const int64_t d = p * VL;
      const int n = int(std::min<int64_t>(VL, width - d));
      for (int64_t i = 0; i < rows; ++i) {
        const T* from = chunk.x + i * chunk.x_stride + d;
        const vfloat x = n == VL ? load(from) : load(from, n);
        store(scaled + i * width + d, x * column.of_row[i], n);
      }
      pack_b<E>(scaled + d, width, 1, rows, n, packed_rows + p * panel);
    }
  }

  // dw and dbias of a block, and its E^T.
  void block_gradients(int64_t b, ThreadArrays& arrays) const {
    const int64_t v0 = b * VB, count = std::min(VB, chunk.classes - v0);
    E* e = exponentials + v0 * padded;  // (count, R padded): E, then dloss/dz^T unless `direct`
    if (out.dbias) memset(arrays.dbias, 0, VB * sizeof(double));
    if (!has_exponentials)
      recompute(b, v0, count, e, arrays);
    else if (!direct)
      turn_exponentials(v0, count, e);
    if (out.dbias) sum_columns(count, e, arrays.dbias);
    float* dw = out.dw ? out.dw + v0 * width : out.dw_narrow ? arrays.dw_wide : nullptr;
    if (dw) gemm<E>(count, width, rows, e, padded, packed_rows, dw, width, out.accumulate);
    if (direct) add_targets(v0, count, e, dw, arrays.dbias);
    if (out.dw_narrow) store_narrow(dw, count * width, out.dw_narrow + v0 * width);
    if (out.dbias)
      for (int64_t c = 0; c < count; ++c)
        out.dbias[v0 + c] = float(arrays.dbias[c] + (out.accumulate ? out.dbias[v0 + c] : 0.f));
    if (!out.dx) return;
    pack_a<E>(static_cast<const E*>(e), 1, padded, padded, count, arrays.spare);
    transposed[b] = arrays.spare, arrays.spare = e;
  }

  float weight_of(int64_t v) const { return class_weight ? class_weight[v] : 0.f; }

  // Turns E into dloss/dz^T, in place.
  void turn_exponentials(int64_t v0, int64_t count, E* e) const {
    const ColumnFactors f = column;
    const int64_t columns = padded;
    for (int64_t c = 0; c < count; ++c) {
      E* g = e + c * columns;
      const float w = weight_of(v0 + c);
      for (int64_t i = 0; i < columns; i += VL)
        store(g + i, load(g + i) * load(f.of_e + i) - load(f.on_all + i) * w);
    }
    for (int64_t i = 0; i < rows; ++i)
      if (target.is_in(i, v0, count)) {
        const int64_t v = target.class_of[i];
        e[(v - v0) * padded + i] = from_float<E>(f.target_value[i] - f.on_all[i] * weight_of(v));
      }
  }

  // Writes dloss/dz^T to g, and adds the errors of its rounding at the targets to `dbias`.
  void recompute(int64_t b, int64_t v0, int64_t count, E* g, const ThreadArrays& arrays) const {
    for (int64_t i0 = 0; i0 < padded; i0 += RC) {
      const ScoreTile t{b, v0, count, i0, std::min(RC, padded - i0), arrays.z};
      chunk.compute(t, packed, arrays.rows_of_w, i0 == 0);
      write_gradients(t, g + i0);
      write_target_gradients(t, g + i0, arrays.dbias);
    }
  }

  void write_gradients(const ScoreTile& t, E* g) const {
    const ColumnFactors f = column;  // a copy, so that stores to g change none of it
    const int64_t i0 = t.i0, n = t.n;
    for (int64_t c = 0; c < t.count; ++c) {
      const float w = weight_of(t.v0 + c);
      const float* z = t.z + c * n;
      E* row = g + c * padded;
      for (int64_t j = 0; j < n; j += VL) store(row + j, f.gradient(load(z + j), i0 + j, w));
    }
  }

  void write_target_gradients(const ScoreTile& t, E* g, double* dbias) const {
    for (int64_t i = t.i0; i < std::min(t.i0 + t.n, rows); ++i)
      if (target.is_in(i, t.v0, t.count)) {
        const int64_t v = target.class_of[i], c = v - t.v0, j = i - t.i0, first = j / VL * VL;
        const vfloat s = load(t.z + c * t.n + first);
        const int lane = int(j - first);
        const float slope = column.slope(s, lane);
        const float value =
            column.gradient(s, t.i0 + first, weight_of(v))[lane] - column.on_target[i] * slope;
        E& element = g[c * padded + j];
        element = from_float<E>(value);
        if (out.dbias) dbias[c] += double(value) - to_float(element);
      }
  }

  // dbias[c] += the sum of class c's row of dloss/dz^T = f e
  void sum_columns(int64_t count, const E* e, double* dbias) const {
    const float* f = column.of_row;
    for (int64_t c = 0; c < count; ++c) {
      vfloat sum{};
      for (int64_t i = 0; i < padded; i += VL) sum += load(e + c * padded + i) * load(f + i);
      for (int lane = 0; lane < VL; ++lane) dbias[c] += sum[lane];
    }
  }

  // Replaces the targets' share of dw and dbias, so far that of f E, by that of target_value.
  void add_targets(int64_t v0, int64_t count, const E* e, float* dw, double* dbias) const {
    const ColumnFactors& f = column;
    for (int64_t i = 0; i < rows; ++i)
      if (target.is_in(i, v0, count)) {
        const int64_t c = target.class_of[i] - v0;
        const float value = f.target_value[i], stored = to_float(e[c * padded + i]);
        f.target_e[i] = stored;
        if (out.dbias) dbias[c] += double(value) - double(f.of_row[i]) * stored;
        if (!dw) continue;
        add_scaled(dw + c * width, value, chunk.x + i * chunk.x_stride, width);
        add_scaled(dw + c * width, -stored, static_cast<const E*>(scaled) + i * width, width);
      }
  }

  static void store_narrow(const float* from, int64_t count, T* to) {
    for (int64_t k = 0; k < count; k += VL) {
      const int n = int(std::min<int64_t>(VL, count - k));
      if (n == VL)
        store(to + k, load(from + k));
      else
        store(to + k, load(from + k, n), n);
    }
  }

  // Columns are split among the threads, rows only where there are more threads than column blocks:
  // each task packs its columns of w.
  struct InputTasks {
    int64_t width, across;  // features of a task, tasks in a row
    int64_t height, down;   // rows of a task, tasks in a column
    InputTasks(int64_t rows, int64_t d, int64_t threads) {
      const int64_t min_tasks = (((d + DB - 1) / DB + threads - 1) / threads) * threads;
      width = std::min(DB, std::max<int64_t>(((d + min_tasks - 1) / min_tasks + 63) / 64 * 64, 64));
      across = (d + width - 1) / width;
      const int64_t tasks_down = (threads + across - 1) / across;
      height = std::max(RP, padded_rows((rows + tasks_down - 1) / tasks_down));
      down = (rows + height - 1) / height;
    }
  };

  // dx = f (E^T . w); inside the parallel region.
  void input_gradients(Buffer& memory) const {
    const InputTasks tasks(rows, width, omp_get_num_threads());
    float* sums = memory.take<float>(tasks.height * tasks.width);
    E* panels = memory.take<E>(packed_b_elements<E>(VB, tasks.width));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks.across * tasks.down; ++task) {
      const int64_t i0 = task / tasks.across * tasks.height, d0 = task % tasks.across * tasks.width;
      const int64_t m = std::min(tasks.height, rows - i0), n = std::min(tasks.width, width - d0);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t v0 = b * VB, count = std::min(VB, chunk.classes - v0),
                      lda = padded_k<E>(count);
        pack_b<E>(chunk.w + v0 * chunk.w_stride + d0, chunk.w_stride, 1, count, n, panels);
        gemm<E>(m, n, count, transposed[b] + i0 * lda, lda, panels, sums, tasks.width, b > 0);
      }
      for (int64_t i = i0; i < i0 + m; ++i)
        store_input_row(i, d0, n, sums + (i - i0) * tasks.width);
    }
  }

  // dx of row i, features [d0, d0 + n)
  void store_input_row(int64_t i, int64_t d0, int64_t n, float* sum) const {
    const float f = column.of_row[i];
    for (int64_t d = 0; d < n; d += VL) store(sum + d, load(sum + d) * f);
    if (direct && !target.ignored(i))
      add_scaled(sum, column.target_value[i] - f * column.target_e[i],
                 chunk.w + target.class_of[i] * chunk.w_stride + d0, n);
    for (int64_t d = 0; d < n; d += VL)
      store(out.dx + i * width + d0 + d, load(sum + d), int(std::min<int64_t>(VL, n - d)));
  }
};

// Returns the workspace's bytes as elements of E.
template <class E>
E* elements_of(const TensorView* t, const char* argument, int64_t elements) {
  if (!t) return nullptr;
  check_size(argument, "bytes:", elements * int64_t(sizeof(E)), t->numel());
  return reinterpret_cast<E*>(t->data<uint8_t>(argument));
}

inline int64_t matrix_element_bytes(const TensorView& x) {
  int64_t bytes = 0;
  with_float(x.dtype(), "x", [&](auto tag) { bytes = sizeof(Elem<decltype(tag)>); });
  return bytes;
}

inline void linear_cross_entropy_scores(const TensorView& x, const TensorView& w,
                                        const TensorView* bias, const TensorView& target,
                                        const TensorView* class_weight, int64_t ignore_index,
                                        float softcap, float scale, const TensorView* exponentials,
                                        const TensorView& stats, const TensorView& at_target,
                                        const TensorView& shift, const TensorView& log_sum,
                                        const TensorView& nll, const TensorView& smoothed,
                                        const TensorView* entropy) {
  if (exponentials) prefer_huge_pages(*exponentials);
  with_float(x.dtype(), "x", [&](auto tag) {
    using T = decltype(tag);
    const auto chunk = linear_scores<T>(x, w, bias, softcap, scale);
    const int64_t padded = chunk.padded(), blocks = chunk.blocks();
    Workspace arena(stats);
    float* of_chunk = arena.take<float>(ChunkStats::elements(blocks, padded));
    ChunkScores<T>(chunk, {target.data<int64_t>("target"), ignore_index},
                   data_or_null<float>(class_weight, "class_weight"),
                   elements_of<Elem<T>>(exponentials, "exponentials", blocks * VB * padded),
                   ChunkStats(of_chunk, blocks, padded),
                   {at_target.data<float>("at_target"), shift.data<float>("shift"),
                    log_sum.data<float>("log_sum"), nll.data<float>("nll"),
                    smoothed.data<float>("smoothed"), data_or_null<float>(entropy, "entropy")},
                   arena)
        .run();
  });
}

inline void linear_cross_entropy_gradients(
    const TensorView& on_p, const TensorView& on_target, const TensorView* on_all,
    const TensorView* on_entropy, const TensorView& x, const TensorView& w, const TensorView* bias,
    const TensorView& target, const TensorView* class_weight, const TensorView& shift,
    const TensorView& log_sum, const TensorView* entropy, int64_t ignore_index, float softcap,
    float scale, bool have_exponentials, const TensorView& exponentials, const TensorView& stats,
    const TensorView& at_target, const TensorView* dx, const TensorView* dw,
    const TensorView* dbias, bool accumulate) {
  if (dw && !accumulate) prefer_huge_pages(*dw);
  if (!have_exponentials) prefer_huge_pages(exponentials);
  with_float(x.dtype(), "x", [&](auto tag) {
    using T = decltype(tag);
    const auto chunk = linear_scores<T>(x, w, bias, softcap, scale);
    const int64_t padded = chunk.padded(), blocks = chunk.blocks();
    Workspace arena(stats);
    float* of_chunk = arena.take<float>(ChunkStats::elements(blocks, padded));
    const bool narrow = dw && dw->dtype() != DType::f32;
    if (narrow && accumulate) throw std::invalid_argument("dw: expected float32 to add to");
    const LossCoefficients loss{on_p.data<float>("on_p"),
                                on_target.data<float>("on_target"),
                                data_or_null<float>(on_all, "on_all"),
                                data_or_null<float>(on_entropy, "on_entropy"),
                                shift.data<float>("shift"),
                                log_sum.data<float>("log_sum"),
                                data_or_null<float>(entropy, "entropy")};
    ChunkGradients<T>(
        chunk, loss, {target.data<int64_t>("target"), ignore_index},
        data_or_null<float>(class_weight, "class_weight"), have_exponentials,
        elements_of<Elem<T>>(&exponentials, "exponentials", blocks * VB * padded),
        {data_or_null<T>(dx, "dx"), narrow ? nullptr : data_or_null<float>(dw, "dw"),
         narrow ? dw->data<T>("dw") : nullptr, data_or_null<float>(dbias, "dbias"), accumulate},
        arena)
        .run(loss, ChunkStats(of_chunk, blocks, padded), at_target.data<float>("at_target"));
  });
}

// out = source * factor, in out's dtype: a float32 gradient becomes the parameter's.
inline void scale_to(const TensorView& source, float factor, const TensorView& out) {
  prefer_huge_pages(out);
  const int64_t n = source.numel();
  const float* s = source.data<float>("source");
  with_float(out.dtype(), "out", [&](auto tag) {
    using T = decltype(tag);
    T* o = out.data<T>("out");
#pragma omp parallel if (n > 32768)
    {
      FlushDenormals flush;
#pragma omp for schedule(static)
      for (int64_t b = 0; b < n; b += VL) {
        const int k = int(std::min<int64_t>(VL, n - b));
        if (k == VL)
          store(o + b, load(s + b) * factor);
        else
          store(o + b, load(s + b, k) * factor, k);
      }
    }
  });
}
