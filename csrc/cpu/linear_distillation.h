// Divergence of the softmaxes of two heads, student and teacher, for one chunk of R rows. The
// caller loops over chunks. Body of linear_distillation.cpp, compiled per instruction set.
//
//            R columns (rows of x)
//          +------------------------+    scores      z^T block = w block . x^T, stored in float32;
//   VB rows|  block of z^T, one     |                maximum and sum of e^z per column while the
//   of w   |  thread's work         |                block is in the L2. Once per head
//          +------------------------+    divergence  reads both heads' blocks: the loss's terms, and
//          |  ...                   |                dloss/dz^T of the student overwrites them
//
// Scores are transposed, as in linear_scores.h, which has the index legend; here j is a column.
// dloss/dz^T has the layout of the exponentials of linear_cross_entropy.h, which computes dx and dw
// from it.
//
// With s and t the probabilities:
//
//   forward  loss = sum t log(t / s)                  dloss/dz = s - t
//   reverse  loss = sum s log(s / t)                  dloss/dz = s (log(s / t) - loss)
//   jsd      loss = beta sum t log(t / m)             dloss/dz = (1 - beta) s (log(s / m) - mean)
//                   + (1 - beta) mean                 mean = sum s log(s / m)
//
// A mean is known only after all blocks, so reverse and jsd store s (...) and s, and a second pass
// over the blocks combines them.
#include "cpu/linear_scores.h"

enum class Divergence { forward, reverse, jsd };

// log x of 0 < x < infinity, to 1 ulp of the larger of 1 and the result; NaN stays. x = 2^e m, and
// log m is the odd series of y = (m - 1) / (m + 1), |y| < 0.172, to y^9 (error 1e-9).
FASTLM_INLINE vfloat vlog(vfloat x) {
  const vint shifted = as_int(x) - 0x3f3504f3;  // sqrt 1/2: m is in [sqrt 1/2, sqrt 2)
  const vint e = shifted >> 23;
  const vfloat m = as_float((shifted & 0x7fffff) + 0x3f3504f3), y = (m - 1.f) / (m + 1.f),
               s = y * y;
  vfloat p = splat(2.f / 9);
  p = p * s + splat(2.f / 7);
  p = p * s + splat(2.f / 5);
  p = p * s + splat(2.f / 3);
  p = p * s + splat(2.f);
  return y * p + __builtin_convertvector(e, vfloat) * 0.693147180559945f + (x - x);
}

// Per column: the log of the sum of e^z in two parts. A padded column's is infinite, so that its
// probabilities are 0.
struct LogSums {
  float *shift, *log_sum;
  LogSums(float* p, int64_t padded) : shift(p), log_sum(p + padded) {}
  FASTLM_INLINE vfloat log_probability(vfloat z, int64_t j) const {
    return z - load(shift + j) - load(log_sum + j);
  }
};

// scores: (V rounded up to VB, R padded) float32; the first V rows are written. lse: (2, R)
// float32, the log of the sum of e^z as its nearest float and the rest.
template <class T>
void linear_distillation_scores_of(const LinearScores<T>& chunk, float* scores, float* lse,
                                   Workspace arena) {
  using E = Elem<T>;
  const int64_t rp = chunk.padded(), rows = chunk.rows, blocks = vocabulary_blocks(chunk.classes);
  E* packed = arena.take<E>(chunk.packed_elements());
  chunk.pack_x(packed);
  float *maxima = arena.take<float>(blocks * rp), *sum = arena.take<float>(blocks * rp);
  arena.divide(Buffer::size_of<E>(VB * padded_k<E>(chunk.width)));
#pragma omp parallel num_threads(arena.threads)
  {
    Buffer memory(arena.thread_part());
    E* rows_of_w = memory.take<E>(VB * padded_k<E>(chunk.width));
    TileScope tiles;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t v0 = b * VB, count = std::min(VB, chunk.classes - v0);
      float *z = scores + v0 * rp, *top = maxima + b * rp;
      chunk.compute({b, v0, count, 0, rp, z}, packed, rows_of_w, true);
      column_maxima(z, count, rp, top);
      for (int64_t j = 0; j < rp; ++j) top[j] = finite_max(top[j]);
      constexpr int P = RP / VL;
      for (int64_t j = 0; j < rp; j += RP)
        exponentials_of<P, E>(chunk.score, z + j, count, rp, top + j, sum + b * rp + j, nullptr, 0);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    float top = maxima[i];
    for (int64_t b = 1; b < blocks; ++b) top = std::max(top, maxima[b * rp + i]);
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b)
      if (const float s = sum[b * rp + i]; s != 0)
        total += s * std::exp(double(maxima[b * rp + i]) - top);
    const double log_of_sum = top + std::log(total);
    lse[i] = float(log_of_sum);
    lse[rows + i] = std::isfinite(log_of_sum) ? float(log_of_sum - lse[i]) : 0.f;
  }
}

// Both probabilities, and log(s / m) and log(t / m) of m = beta t + (1 - beta) s, by e^-|d|:
// m / s = 1 + beta (e^d - 1), m / t = 1 + (1 - beta) (e^-d - 1), and the smaller probability is the
// larger one times e^-|d|.
struct Mixture {
  vfloat s, t, of_s, of_t;
};
FASTLM_INLINE Mixture mixture_of(vfloat log_s, vfloat log_t, float beta) {
  const vfloat d = log_t - log_s, none{}, ratio = vexp(-vabs(d));
  const vint teacher = d > none;
  const vfloat larger = vexp(teacher ? log_t : log_s),
               smaller = larger == none ? none : larger * ratio;
  const vfloat g = vlog(1.f + (teacher ? splat(1.f - beta) : splat(beta)) * (ratio - 1.f));
  return {teacher ? smaller : larger, teacher ? larger : smaller, teacher ? -d - g : -g,
          teacher ? -g : d - g};
}

// The terms of a block's P vectors of columns; `of_teacher` and `of_student` receive the sums of
// t log(t / .) and s log(s / .). With `g`, dloss/dz is stored there (forward), or its two parts
// overwrite the scores.
template <Divergence D, int P, class E>
void divergence_of(int64_t count, int64_t stride, float* zs, float* zt, const LogSums& student,
                   const LogSums& teacher, int64_t j0, const ScoreFunction& score, float beta, E* g,
                   float* of_student, float* of_teacher) {
  vfloat first[P], second[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) first[p] = second[p] = vfloat{};
  for (int64_t r = 0; r < count; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const int64_t at = r * stride + j0 + p * VL;
      const vfloat z = load(zs + at), log_s = student.log_probability(z, j0 + p * VL),
                   log_t = teacher.log_probability(load(zt + at), j0 + p * VL);
      const vfloat slope = score.cap ? score.slope(z) : splat(1.f);
      // a probability of 0 contributes 0, also where the other's logarithm is infinite
      const auto times = [](vfloat p, vfloat log) __attribute__((always_inline)) {
        return p == vfloat{} ? vfloat{} : p * log;
      };
      vfloat s, part;
      if constexpr (D == Divergence::forward) {
        const vfloat t = vexp(log_t);
        second[p] += times(t, log_t - log_s);
        if (g) store(g + at, (vexp(log_s) - t) * slope);
        continue;
      } else if constexpr (D == Divergence::reverse) {
        s = vexp(log_s), part = times(s, log_s - log_t);
      } else {
        const Mixture mixture = mixture_of(log_s, log_t, beta);
        s = mixture.s, part = times(s, mixture.of_s);
        second[p] += times(mixture.t, mixture.of_t);
      }
      first[p] += part;
      if (g) store(zs + at, part * slope), store(zt + at, s * slope);
    }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
    store(of_student + j0 + p * VL, first[p]), store(of_teacher + j0 + p * VL, second[p]);
}

// scores and lse as linear_distillation_scores wrote them; loss (R) float32; g: dloss/dz^T of the
// student, (V rounded up to VB, R padded) elements of E, or null. The student's scores and g may be
// the same memory. `score.cap` is the student's.
template <Divergence D, class E>
void linear_distillation_rows_of(int64_t classes, int64_t rows, int64_t rp, float* zs, float* zt,
                                 const float* lse_s, const float* lse_t, const ScoreFunction& score,
                                 float beta, float* loss, E* g, Workspace arena) {
  const int64_t blocks = vocabulary_blocks(classes);
  const LogSums student(arena.take<float>(2 * rp), rp), teacher(arena.take<float>(2 * rp), rp);
  for (int64_t i = 0; i < rp; ++i) {
    const bool real = i < rows;
    student.shift[i] = real ? lse_s[i] : INFINITE;
    teacher.shift[i] = real ? lse_t[i] : INFINITE;
    student.log_sum[i] = real ? lse_s[rows + i] : 0.f;
    teacher.log_sum[i] = real ? lse_t[rows + i] : 0.f;
  }
  float *of_student = arena.take<float>(blocks * rp), *of_teacher = arena.take<float>(blocks * rp),
        *mean = arena.take<float>(rp);
#pragma omp parallel
  {
    FlushDenormals flush;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * VB * rp, count = std::min(VB, classes - b * VB);
      constexpr int P =
          VL == 16 ? 1 : 8 / VL;  // a cache line or half of one: all sums in registers
      for (int64_t j = 0; j < rp; j += P * VL)
        divergence_of<D, P>(count, rp, zs + first, zt + first, student, teacher, j, score, beta,
                            g ? g + first : nullptr, of_student + b * rp, of_teacher + b * rp);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rp; ++i) {
      double of_s = 0, of_t = 0;
      for (int64_t b = 0; b < blocks; ++b)
        of_s += of_student[b * rp + i], of_t += of_teacher[b * rp + i];
      mean[i] = i < rows ? float(of_s) : 0.f;
      if (i < rows)
        loss[i] = float(D == Divergence::forward   ? of_t
                        : D == Divergence::reverse ? of_s
                                                   : beta * of_t + (1 - double(beta)) * of_s);
    }
    if (g && D != Divergence::forward) {
      const float factor = D == Divergence::jsd ? 1.f - beta : 1.f;
#pragma omp for schedule(static)
      for (int64_t v = 0; v < classes; ++v)
        for (int64_t j = 0; j < rp; j += VL) {
          const int64_t at = v * rp + j;
          store(g + at, (load(zs + at) - load(mean + j) * load(zt + at)) * factor);
        }
    }
  }
}

inline void linear_distillation_scores(const TensorView& x, const TensorView& w, float softcap,
                                       float scale, const TensorView& scores, const TensorView& lse,
                                       const TensorView& workspace) {
  prefer_huge_pages(scores);
  with_float(x.dtype(), "x", [&](auto tag) {
    using T = decltype(tag);
    const auto chunk = linear_scores<T>(x, w, nullptr, softcap, scale);
    check_size("scores", "elements:", vocabulary_blocks(chunk.classes) * VB * chunk.padded(),
               scores.numel());
    check_size("lse", "elements:", 2 * chunk.rows, lse.numel());
    linear_distillation_scores_of<T>(chunk, scores.data<float>("scores"), lse.data<float>("lse"),
                                     Workspace(workspace));
  });
}

inline void linear_distillation_rows(const std::string& kind, float beta, float softcap,
                                     int64_t classes, const TensorView& student_scores,
                                     const TensorView& student_lse,
                                     const TensorView& teacher_scores,
                                     const TensorView& teacher_lse, const TensorView& loss,
                                     const TensorView* d_scores, const TensorView& workspace) {
  const int64_t rows = loss.numel(), rp = padded_rows(rows),
                elements = vocabulary_blocks(classes) * VB * rp;
  check_size("student_scores", "elements:", elements, student_scores.numel());
  check_size("teacher_scores", "elements:", elements, teacher_scores.numel());
  check_size("student_lse", "elements:", 2 * rows, student_lse.numel());
  check_size("teacher_lse", "elements:", 2 * rows, teacher_lse.numel());
  if (d_scores) check_size("d_scores", "elements:", elements, d_scores->numel());
  const auto run = [&](auto which, auto* g) {
    linear_distillation_rows_of<decltype(which)::value>(
        classes, rows, rp, student_scores.data<float>("student_scores"),
        teacher_scores.data<float>("teacher_scores"), student_lse.data<float>("student_lse"),
        teacher_lse.data<float>("teacher_lse"), ScoreFunction{1.f, softcap}, beta,
        loss.data<float>("loss"), g, Workspace(workspace));
  };
  const auto as = [&](auto which) {
    if (d_scores && d_scores->dtype() == DType::bf16)
      run(which, d_scores->data<bf16>("d_scores"));
    else
      run(which, data_or_null<float>(d_scores, "d_scores"));
  };
  if (kind == "forward")
    as(std::integral_constant<Divergence, Divergence::forward>{});
  else if (kind == "reverse")
    as(std::integral_constant<Divergence, Divergence::reverse>{});
  else
    as(std::integral_constant<Divergence, Divergence::jsd>{});
}
