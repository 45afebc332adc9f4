// Cross-entropy statistics of rows of logits (shift, log_sum, nll and, for label smoothing, the sum
// of the nll of all classes), and the gradient; fastlm/ops/cross_entropy.py builds every option on
// these.
//
//     z = softcap(scale * logit);  lse = shift + log_sum;  nll = lse - z[target]
//     dz[v] = on_p * p[v] - on_target * (v == target) - on_all * weight[v]
//
//     row of logits:     head | vector | vector | ..  | vector | tail      vectors are aligned
//     forward, block     part 0 of the row | part 1 | ..                   1 part with many rows
//     a thread           (m, s, weights, spread) of its vectors -> the block's -> the part's
//
// A row may begin at any address (with a vocabulary of 50257 every second row is unaligned).
// Aligned vectors of 16 bytes are read at once, head and tail element by element. m is the largest
// z so far, s the sum of e^(z - m), by powers of 2: one exponential per element and one per vector.
// A few rows leave most of the GPU idle, so they are split into parts, which a second kernel adds
// in a fixed order (rejected: atomics, since their order varies, and with it the bits). A thread
// has kUnroll vectors in flight.
//
// Forward and backward each read the logits once. The gradient is written once, in place where
// d_logits is logits. The backward's vectors are aligned to d_logits, since an unaligned write
// costs more than an unaligned read. A row is not read if all its coefficients are 0. A target that
// is not a class is not looked up: its row's loss and gradient are NaN. Not measured on a GPU.
#include <cfloat>

#include "cuda/launch.h"
#include "cuda/ops.h"

namespace fastlm {
namespace {

constexpr int kThreads = 256;
// vectors in flight: 64 bytes per thread, 128 KB per multiprocessor
constexpr int kUnroll = CROSS_ENTROPY_PART_BYTES / (kThreads * 16);
constexpr int kReduceThreads = 1024;  // in the one block that adds up the rows
constexpr int kRowsOfBlock = 4;       // rows per block of the kernel that adds parts: a warp each
constexpr float kLog2e = 1.4426950408889634f;
// The initial m: with -inf, a masked class would give -inf - -inf
constexpr float kLowest = -FLT_MAX;

struct LogitTransform {
  float scale, cap;  // cap 0: none
  float inverse;     // 1 / cap
};

// z of one logit; slope is dz / d(scale * logit). PLAIN: scale is 1, and no cap.
template <bool PLAIN>
DEVICE float score(const LogitTransform& transform, float x, float& slope) {
  slope = 1.0f;
  if constexpr (PLAIN) return x;
  float z = __fmul_rn(x, transform.scale);  // rounded, so that z - shift is 0 at the largest
  if (transform.cap != 0.0f) {
    // not 1 - 2 / (e^2x + 1), which cancels for small x
    const float t = tanhf(z * transform.inverse);
    z = transform.cap * t;
    slope = 1.0f - t * t;
  }
  return z;
}

// The vectors of a row that begins at `p`, aligned to 16 bytes. The first may begin before the row,
// the last may end after it.
template <class T>
struct RowVectors {
  static constexpr int VEC = 16 / sizeof(T);
  int before, classes, count;  // elements of vector 0 before the row; vectors

  DEVICE RowVectors(const T* p, int classes)
      : before(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T)),
        classes(classes),
        count((before + classes + VEC - 1) / VEC) {}
  DEVICE int begin(int vector) const { return vector * VEC - before; }
  DEVICE bool is_full(int vector) const {
    return begin(vector) >= 0 && begin(vector) + VEC <= classes;
  }
  // Returns this thread's element of a partial vector, within from..end - 1, or -1. The first VEC
  // threads take the elements of the first vector, the next VEC those of the last.
  DEVICE int edge(int from, int end) const {
    const int thread = threadIdx.x, vector = thread < VEC ? 0 : count - 1;
    if (thread >= (count > 1 ? 2 : 1) * VEC || vector < from || vector >= end || is_full(vector))
      return -1;
    const int at = begin(vector) + thread % VEC;
    return at < classes ? at : -1;
  }
};

// ---- forward -----------------------------------------------------------------------------------

// Statistics of some classes: largest z, sum of e^(z - m), sums of weight and of weight * (m - z)
struct ClassSums {
  float m = kLowest, s = 0, weights = 0, spread = 0;
};

DEVICE float power(float difference) { return exp2_approximate(difference * kLog2e); }

template <bool SMOOTH>
DEVICE void raise(ClassSums& a, float top) {
  a.s *= power(a.m - top);
  if (SMOOTH && a.weights != 0.0f) a.spread += (top - a.m) * a.weights;
  a.m = top;
}

template <bool SMOOTH, int N>
DEVICE void add(ClassSums& a, const float (&z)[N], const float (&weight)[N]) {
  float top = a.m, s = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) top = fmaxf(top, z[j]);
  raise<SMOOTH>(a, top);
#pragma unroll
  for (int j = 0; j < N; ++j) s += power(z[j] - top);
  a.s += s;
  if constexpr (SMOOTH) {
#pragma unroll
    for (int j = 0; j < N; ++j) a.weights += weight[j], a.spread += weight[j] * (top - z[j]);
  }
}

template <bool SMOOTH>
DEVICE void add(ClassSums& a, ClassSums b) {
  const float top = fmaxf(a.m, b.m);
  raise<SMOOTH>(a, top);
  raise<SMOOTH>(b, top);
  a.s += b.s, a.weights += b.weights, a.spread += b.spread;
}

template <bool SMOOTH>
DEVICE ClassSums of_warp(ClassSums a) {
  raise<SMOOTH>(a, max_of_warp(a.m));
  a.s = sum_of_warp(a.s);
  if (SMOOTH) a.weights = sum_of_warp(a.weights), a.spread = sum_of_warp(a.spread);
  return a;
}

struct RowStatistics {
  float *shift, *log_sum, *nll, *smoothed;  // (rows); smoothed only for label smoothing
};

struct CrossEntropyProblem {
  const int64_t* target;               // (rows)
  const float* weight;                 // (classes), or null: weights of 1
  int64_t ignore_index, stride, rows;  // stride: elements between rows of logits
  int classes;
  LogitTransform scores;
};

template <bool SMOOTH, bool PLAIN, class T>
DEVICE void store_row(const CrossEntropyProblem& p, const T* logits, int64_t row,
                      const ClassSums& a, const RowStatistics& out) {
  const float log_sum = logf(a.s);
  store(out.shift + row, a.m);
  store(out.log_sum + row, log_sum);
  if (SMOOTH) store(out.smoothed + row, a.spread + log_sum * a.weights);
  const int64_t label = load(p.target + row);
  float nll = label == p.ignore_index ? 0.0f : __int_as_float(0x7fc00000);
  if (label != p.ignore_index && label >= 0 && label < p.classes) {
    float slope;
    const float x = to_float(load(logits + row * p.stride + label));
    nll = log_sum - (score<PLAIN>(p.scores, x, slope) - a.m);
  }
  store(out.nll + row, nll);
}

template <bool SMOOTH, bool PLAIN, int N, class T>
DEVICE void add_logits(const CrossEntropyProblem& p, ClassSums& a, const Vector<T, N>& x, int at) {
  float z[N], weight[N], slope;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    z[j] = score<PLAIN>(p.scores, to_float(x.at[j]), slope);
    if (SMOOTH) weight[j] = p.weight ? load(p.weight + at + j) : 1.0f;
  }
  add<SMOOTH>(a, z, weight);
}

template <bool SMOOTH, bool PLAIN, class T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_kernel(CrossEntropyProblem p, const T* logits, int parts, RowStatistics out,
                         ClassSums* partial) {
  const int64_t row = blockIdx.x / parts;
  const int part = blockIdx.x % parts;
  const T* x = logits + row * p.stride;
  const RowVectors<T> vectors(x, p.classes);
  const int each = (vectors.count + parts - 1) / parts;
  const int from = part * each, end = min(vectors.count, from + each);
  using V = Vector<T, RowVectors<T>::VEC>;
  ClassSums a;
  for (int first = from + threadIdx.x; first < end; first += kThreads * kUnroll) {
    V v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = first + u * kThreads;
      if (k < end && vectors.is_full(k))
        v[u] = load(reinterpret_cast<const V*>(x + vectors.begin(k)));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = first + u * kThreads;
      if (k < end && vectors.is_full(k)) add_logits<SMOOTH, PLAIN>(p, a, v[u], vectors.begin(k));
    }
  }
  if (const int at = vectors.edge(from, end); at >= 0)
    add_logits<SMOOTH, PLAIN>(p, a, Vector<T, 1>{load(x + at)}, at);
  raise<SMOOTH>(a, max_of_block<kThreads>(a.m));
  a.s = sum_of_block<kThreads>(a.s);
  if (SMOOTH) {
    a.weights = sum_of_block<kThreads>(a.weights);
    a.spread = sum_of_block<kThreads>(a.spread);
  }
  if (threadIdx.x != 0) return;
  if (partial)
    store(reinterpret_cast<Vector<ClassSums, 1>*>(partial) + blockIdx.x, Vector<ClassSums, 1>{a});
  else
    store_row<SMOOTH, PLAIN>(p, logits, row, a, out);
}

template <bool SMOOTH, bool PLAIN, class T>
__global__ void __launch_bounds__(32 * kRowsOfBlock)
    add_parts_kernel(CrossEntropyProblem p, const T* logits, int parts, RowStatistics out,
                     const ClassSums* partial) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  if (row >= p.rows) return;
  const auto* of_row = reinterpret_cast<const Vector<ClassSums, 1>*>(partial) + row * parts;
  ClassSums a;
  for (int part = threadIdx.x % 32; part < parts; part += 32)
    add<SMOOTH>(a, load(of_row + part).at[0]);
  a = of_warp<SMOOTH>(a);
  if (threadIdx.x % 32 == 0) store_row<SMOOTH, PLAIN>(p, logits, row, a, out);
}

// ---- loss of all rows --------------------------------------------------------------------------

// Returns the number of rows that count (float32: exact up to 2^24) to all threads.
DEVICE float counted_rows(const CrossEntropyProblem& p) {
  float count = 0;
  for (int64_t row = threadIdx.x; row < p.rows; row += kReduceThreads)
    count += load(p.target + row) != p.ignore_index ? 1.0f : 0.0f;
  return sum_of_block<kReduceThreads>(count);
}

__global__ void __launch_bounds__(kReduceThreads)
    cross_entropy_sum_kernel(CrossEntropyProblem p, const float* nll, bool mean, float* loss) {
  float sum = 0;
  for (int64_t row = threadIdx.x; row < p.rows; row += kReduceThreads) sum += load(nll + row);
  sum = sum_of_block<kReduceThreads>(sum);
  if (mean) sum /= counted_rows(p);
  if (threadIdx.x == 0) store(loss, sum);
}

__global__ void __launch_bounds__(kReduceThreads)
    cross_entropy_share_kernel(CrossEntropyProblem p, const float* d_loss, bool mean,
                               float* share) {
  const float count = mean ? counted_rows(p) : 1.0f;
  if (threadIdx.x == 0) store(share, load(d_loss) / count);
}

// ---- backward ----------------------------------------------------------------------------------

struct GradientFactors {
  const float *on_p, *on_target, *on_all;  // (rows); on_all only for label smoothing
  bool uniform;                  // all rows that count have the same on_p and the same on_target
  const float *shift, *log_sum;  // (rows)
};

struct RowFactors {
  float on_p, on_target, on_all, shift, log_sum;
  int label;  // the target, -1: none
};

// False where the row does not count: its gradient is 0, even where a logit is NaN.
template <bool SMOOTH>
DEVICE bool read_factors(const CrossEntropyProblem& p, const GradientFactors& factors, int64_t row,
                         RowFactors& f) {
  const int64_t label = load(p.target + row);
  const bool valid = label != p.ignore_index, exists = label >= 0 && label < p.classes;
  f.label = valid && exists ? static_cast<int>(label) : -1;
  f.on_p = !factors.uniform ? load(factors.on_p + row) : valid ? load(factors.on_p) : 0.0f;
  f.on_target = !valid ? 0.0f : factors.uniform ? f.on_p : load(factors.on_target + row);
  f.on_all = SMOOTH ? load(factors.on_all + row) : 0.0f;
  if (valid && !exists) f.on_p = __int_as_float(0x7fc00000);
  f.shift = load(factors.shift + row), f.log_sum = load(factors.log_sum + row);
  return f.on_p != 0.0f || f.on_target != 0.0f || f.on_all != 0.0f;
}

template <bool SMOOTH, bool PLAIN>
DEVICE float gradient(const CrossEntropyProblem& p, const RowFactors& f, float x, int at) {
  float slope;
  const float z = score<PLAIN>(p.scores, x, slope);
  float less = at == f.label ? f.on_target : 0.0f;
  if (SMOOTH) less += f.on_all * (p.weight ? load(p.weight + at) : 1.0f);
  const float on_p = f.on_p * power(z - f.shift - f.log_sum);
  // on_p - on_target at once: where on_p is their sum, with one class, the difference is 0
  const float dz = (f.on_p == 0.0f ? 0.0f : on_p) - less;
  return PLAIN ? dz : dz * slope * p.scores.scale;
}

template <bool SMOOTH, bool PLAIN, class T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_backward_kernel(CrossEntropyProblem p, GradientFactors factors, const T* logits,
                                  T* d_logits, int parts) {
  const int64_t row = blockIdx.x / parts;
  const T* x = logits + row * p.stride;
  T* dx = d_logits + row * p.classes;
  const RowVectors<T> vectors(dx, p.classes);
  const bool together = RowVectors<T>(x, p.classes).before == vectors.before;
  constexpr int VEC = RowVectors<T>::VEC;
  using V = Vector<T, VEC>;
  const int from = blockIdx.x % parts * kThreads * kUnroll, first = from + threadIdx.x;
  const int edge = vectors.edge(from, from + kThreads * kUnroll);
  RowFactors f;
  if (!read_factors<SMOOTH>(p, factors, row, f)) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (const int k = first + u * kThreads; vectors.is_full(k))
        store(reinterpret_cast<V*>(dx + vectors.begin(k)), V{});
    if (edge >= 0) store(dx + edge, T{});
    return;
  }
  V v[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int k = first + u * kThreads, at = vectors.begin(k);
    if (!vectors.is_full(k)) continue;
    if (together)
      v[u] = load(reinterpret_cast<const V*>(x + at));
    else
#pragma unroll
      for (int j = 0; j < VEC; ++j) v[u].at[j] = load(x + at + j);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int k = first + u * kThreads, at = vectors.begin(k);
    if (!vectors.is_full(k)) continue;
    V result;
#pragma unroll
    for (int j = 0; j < VEC; ++j)
      result.at[j] = from_float<T>(gradient<SMOOTH, PLAIN>(p, f, to_float(v[u].at[j]), at + j));
    store_global(reinterpret_cast<V*>(dx + at), result);
  }
  if (edge >= 0)
    store(dx + edge, from_float<T>(gradient<SMOOTH, PLAIN>(p, f, to_float(load(x + edge)), edge)));
}

// ---- host --------------------------------------------------------------------------------------

CrossEntropyProblem problem_of(const TensorView& logits, const TensorView& target,
                               const OptionalTensor& class_weight, int64_t ignore_index,
                               float softcap, float scale) {
  check_contiguous("target", target);
  check_size("target", "rows", logits.size(0), target.numel());
  if (logits.size(1) > 1 && logits.size(0) && logits.stride(1) != 1)
    throw std::invalid_argument("logits: expected classes side by side, got stride " +
                                std::to_string(logits.stride(1)));
  if (logits.size(1) > INT32_MAX / 2)
    throw std::invalid_argument("logits: expected at most 2^30 classes, got " +
                                std::to_string(logits.size(1)));
  if (class_weight) check_size("class_weight", "classes", logits.size(1), class_weight->numel());
  return {input<int64_t>(target, "target"),
          input<float>(class_weight, "class_weight"),
          ignore_index,
          logits.stride(0),
          logits.size(0),
          static_cast<int>(logits.size(1)),
          {scale, softcap, softcap != 0.0f ? 1.0f / softcap : 0.0f}};
}

// Calls f with two std::bool_constant and the device type of the logits.
template <class F>
void with_kind(bool smooth, const CrossEntropyProblem& p, DType dtype, F&& f) {
  const bool plain = p.scores.scale == 1.0f && p.scores.cap == 0.0f;
  with_device_float(dtype, "logits", [&](auto element) {
    const auto with_smooth = [&](auto smoothing) {
      if (plain)
        f(smoothing, std::true_type{}, element);
      else
        f(smoothing, std::false_type{}, element);
    };
    if (smooth)
      with_smooth(std::true_type{});
    else
      with_smooth(std::false_type{});
  });
}

Launch grid_of(const char* name, int64_t blocks, int threads, Stream stream) {
  if (blocks > INT32_MAX)
    throw std::invalid_argument("logits: expected fewer rows, got a grid of " +
                                std::to_string(blocks) + " blocks");
  return {name, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0,
          reinterpret_cast<cudaStream_t>(stream)};
}

void backward(const CrossEntropyProblem& p, const GradientFactors& factors, bool smooth,
              const TensorView& logits, const TensorView& d_logits, Stream stream) {
  check_contiguous("d_logits", d_logits);
  check_size("d_logits", "elements", logits.numel(), d_logits.numel());
  with_kind(smooth, p, logits.dtype(), [&](auto smoothed, auto plain, auto element) {
    using T = decltype(element);
    // one vector more than the classes fill, for a row that begins within a vector
    const int parts =
        ceil_div(p.classes + RowVectors<T>::VEC - 1, kThreads * kUnroll * RowVectors<T>::VEC);
    launch(grid_of("cross_entropy_backward", p.rows * parts, kThreads, stream),
           cross_entropy_backward_kernel<smoothed, plain, T>, p, factors,
           input<T>(logits, "logits"), output<T>(d_logits, "d_logits"), parts);
  });
}

}  // namespace

void cross_entropy_forward(TensorView logits, TensorView target, OptionalTensor class_weight,
                           bool smooth, int64_t ignore_index, float softcap, float scale,
                           OptionalTensor partial, TensorView shift, TensorView log_sum,
                           TensorView nll, OptionalTensor smoothed, Stream stream) {
  const CrossEntropyProblem p =
      problem_of(logits, target, class_weight, ignore_index, softcap, scale);
  const RowStatistics out{output<float>(shift, "shift"), output<float>(log_sum, "log_sum"),
                          output<float>(nll, "nll"), output<float>(smoothed, "smoothed")};
  if (!p.rows) return;
  const int parts = partial ? static_cast<int>(partial->numel() / 4 / p.rows) : 1;
  auto* sums = reinterpret_cast<ClassSums*>(output<float>(partial, "partial"));
  with_kind(smooth, p, logits.dtype(), [&](auto smoothing, auto plain, auto element) {
    using T = decltype(element);
    const T* x = input<T>(logits, "logits");
    launch(grid_of("cross_entropy", p.rows * parts, kThreads, stream),
           cross_entropy_kernel<smoothing, plain, T>, p, x, parts, out, sums);
    if (sums)
      launch(grid_of("add_parts", ceil_div(p.rows, kRowsOfBlock), 32 * kRowsOfBlock, stream),
             add_parts_kernel<smoothing, plain, T>, p, x, parts, out, sums);
  });
}

void cross_entropy_sum(TensorView nll, TensorView target, int64_t ignore_index, bool mean,
                       TensorView loss, Stream stream) {
  CrossEntropyProblem p{};
  p.target = input<int64_t>(target, "target"), p.ignore_index = ignore_index;
  p.rows = target.numel();
  launch(grid_of("cross_entropy_sum", 1, kReduceThreads, stream), cross_entropy_sum_kernel, p,
         input<float>(nll, "nll"), mean, output<float>(loss, "loss"));
}

void cross_entropy_backward(TensorView on_p, TensorView on_target, OptionalTensor on_all,
                            TensorView logits, TensorView target, OptionalTensor class_weight,
                            TensorView shift, TensorView log_sum, int64_t ignore_index,
                            float softcap, float scale, TensorView d_logits, Stream stream) {
  const CrossEntropyProblem p =
      problem_of(logits, target, class_weight, ignore_index, softcap, scale);
  const GradientFactors factors{
      input<float>(on_p, "on_p"),     input<float>(on_target, "on_target"),
      input<float>(on_all, "on_all"), false,
      input<float>(shift, "shift"),   input<float>(log_sum, "log_sum")};
  backward(p, factors, on_all.has_value(), logits, d_logits, stream);
}

void cross_entropy_loss_backward(TensorView d_loss, TensorView logits, TensorView target,
                                 TensorView shift, TensorView log_sum, int64_t ignore_index,
                                 bool mean, float softcap, float scale, TensorView share,
                                 TensorView d_logits, Stream stream) {
  const CrossEntropyProblem p =
      problem_of(logits, target, std::nullopt, ignore_index, softcap, scale);
  float* each = output<float>(share, "share");
  launch(grid_of("cross_entropy_share", 1, kReduceThreads, stream), cross_entropy_share_kernel, p,
         input<float>(d_loss, "d_loss"), mean, each);
  const GradientFactors factors{
      each, each, nullptr, true, input<float>(shift, "shift"), input<float>(log_sum, "log_sum")};
  backward(p, factors, false, logits, d_logits, stream);
}

}  // namespace fastlm
