// Samples the next token of each row of logits, with the row's options: penalties, a grammar's
// mask, temperature, top-k, top-p, min-p, one uniform number. Body of sample.cpp, compiled per
// instruction set. The definition is fastlm/inference/sampling.py (torch), in the same order and
// with the same rounding, except for exponentials: where no top-k limits the sum over the
// vocabulary, both are float32, but by different polynomials.
//
//   x       logits; a copy where penalties, mask or temperature change them        V floats
//   tops    the largest x of each block of SAMPLE_BLOCK tokens
//   sums    sum of exp(x - largest) of each block, float64; only where a probability is needed
//
//   greedy       the first x that is the largest, in the first block that has it as its top
//   no filter    the block, then the token, at which the running sum exceeds u times the total
//   filters      candidates sorted by x, as many as the filters need; then as without a filter
//
// The logits are read once from the L2 or L3 for `tops`, and again for each of the others: exp, and
// the collection of candidates, which skips blocks below its threshold.
#include "cpu/base/parallel.h"

constexpr int64_t SAMPLE_BLOCK = 256;

struct Candidate {
  float x;
  int32_t id;
  bool operator<(const Candidate& other) const {  // the likeliest first; equal ones by id
    return x > other.x || (x == other.x && id < other.id);
  }
};

struct SampleScratch {
  double* sums;
  float *x, *tops;
  Candidate* candidates;
};

inline int64_t sample_blocks(int64_t vocab) { return (vocab + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK; }
// Bytes of one thread, whole cache lines
inline int64_t sample_bytes(int64_t vocab) {
  const int64_t bytes = sample_blocks(vocab) * int64_t(sizeof(double) + sizeof(float)) +
                        vocab * int64_t(sizeof(float) + sizeof(Candidate));
  return (bytes + 63) / 64 * 64;
}
inline int64_t sample_workspace(int64_t vocab, int threads) {
  return threads * sample_bytes(vocab) + 64;
}
inline SampleScratch scratch_at(char* base, int64_t vocab) {
  SampleScratch s;
  s.sums = reinterpret_cast<double*>(base);
  s.candidates = reinterpret_cast<Candidate*>(s.sums + sample_blocks(vocab));
  s.x = reinterpret_cast<float*>(s.candidates + vocab);
  s.tops = s.x + vocab;
  return s;
}

// One row: x (vocab), its largest element and the sum of its exponentials.
struct SampledRow {
  const TokenSampler& options;
  const SampleScratch& scratch;
  const float* x;
  float largest = 0;
  double total = 0;  // of `sums`

  int64_t vocab() const { return options.vocab; }
  int64_t blocks() const { return sample_blocks(vocab()); }
  int64_t block_end(int64_t b) const { return std::min(vocab(), (b + 1) * SAMPLE_BLOCK); }

  // Penalties, biases, mask, ends, temperature: x becomes a copy if one of them changes anything.
  void adjust(const bool* mask, int64_t mask_size, bool may_end) {
    const TokenSampler& o = options;
    const bool divides = o.temperature != 0.f && o.temperature != 1.f;
    if (!o.adjusts() && !mask && (may_end || o.ends.empty()) && !divides) return;
    const int64_t n = vocab();
    float* y = scratch.x;
    memcpy(y, x, size_t(n) * sizeof(float));
    x = y;
    if (o.repetition_mask)
      for (int64_t i = 0; i < n; ++i)
        if (o.repetition_mask[i])
          y[i] = y[i] > 0 ? y[i] / o.repetition_penalty : y[i] * o.repetition_penalty;
    if (o.counts)
      for (int64_t i = 0; i < n; ++i)
        if (o.counts[i] != 0) {
          volatile float of_count = o.counts[i] * o.frequency_penalty;  // rounded, not fused
          y[i] = y[i] - of_count - o.presence_penalty;
        }
    if (o.bias)
      for (int64_t i = 0; i < n; ++i) y[i] += o.bias[i];
    const float minus_infinity = -std::numeric_limits<float>::infinity();
    if (mask) {
      const int64_t masked = std::min(n, mask_size);
      for (int64_t i = 0; i < masked; ++i) y[i] = mask[i] ? y[i] : minus_infinity;
      std::fill(y + masked, y + n, minus_infinity);
    }
    if (!may_end)
      for (int64_t token : o.ends)
        if (token >= 0 && token < n) y[token] = minus_infinity;
    if (divides) {
      int64_t i = 0;
      for (; i + VL <= n; i += VL) store(y + i, load(y + i) / o.temperature);
      for (; i < n; ++i) y[i] /= o.temperature;
    }
  }

  // Fills `tops` and `largest`. Returns whether that is finite, and no x is NaN.
  bool find_largest() {
    vint nan{};
    bool nan_in_tail = false;
    largest = -std::numeric_limits<float>::infinity();
    for (int64_t b = 0; b < blocks(); ++b) {
      int64_t i = b * SAMPLE_BLOCK;
      const int64_t end = block_end(b);
      float top = -std::numeric_limits<float>::infinity();
      if (i + VL <= end) {
        vfloat block_max = splat(top);
        for (; i + VL <= end; i += VL) {
          const vfloat v = load(x + i);
          block_max = vmax(block_max, v), nan |= v != v;
        }
        top = hmax(block_max);
      }
      for (; i < end; ++i) top = std::max(top, x[i]), nan_in_tail |= std::isnan(x[i]);
      scratch.tops[b] = top;
      largest = std::max(largest, top);
    }
    return !nan_in_tail && hmax(as_float(nan & 0x3f800000)) == 0.f && std::isfinite(largest);
  }

  int64_t first_largest() const {
    const int64_t b = std::find(scratch.tops, scratch.tops + blocks(), largest) - scratch.tops;
    return std::find(x + b * SAMPLE_BLOCK, x + block_end(b), largest) - x;
  }

  // p[0 .. count) = exp(x - largest) of block b
  int64_t exponentials(int64_t b, float* p) const {
    const int64_t begin = b * SAMPLE_BLOCK, count = block_end(b) - begin;
    int64_t i = 0;
    for (; i + VL <= count; i += VL) store(p + i, vexp(load(x + begin + i) - largest));
    if (i < count) {
      const int n = int(count - i);
      store(p + i, vexp(load(x + begin + i, n) - largest), n);
    }
    return count;
  }

  void add_up() {
    float p[SAMPLE_BLOCK];
    total = 0;
    for (int64_t b = 0; b < blocks(); ++b) {
      const int64_t count = exponentials(b, p);
      vfloat lanes{};
      int64_t i = 0;
      for (; i + VL <= count; i += VL) lanes += load(p + i);
      double sum = hsum(lanes);
      for (; i < count; ++i) sum += p[i];
      total += scratch.sums[b] = sum;
    }
  }
  double log_total() const { return double(largest) + std::log(total); }

  int64_t draw(double u) const {
    const double bound = u * total;
    double before = 0;
    int64_t b = 0, last = 0;  // last: the last block that has a probability
    for (; b < blocks() && before + scratch.sums[b] <= bound; ++b) {
      if (scratch.sums[b] > 0) last = b;
      before += scratch.sums[b];
    }
    double rest = bound - before;
    if (b == blocks()) b = last, rest = scratch.sums[last];
    float p[SAMPLE_BLOCK];
    const int64_t count = exponentials(b, p);
    double cumulative = 0;
    int64_t likely = 0;  // the last token that has a probability, where rounding exceeds them all
    for (int64_t i = 0; i < count; ++i) {
      cumulative += p[i];
      if (p[i] > 0) likely = i;
      if (cumulative > rest) break;
    }
    return b * SAMPLE_BLOCK + likely;
  }

  // The tokens with x >= threshold, in no order. Returns their number.
  int64_t collect(float threshold) const {
    int64_t count = 0;
    for (int64_t b = 0; b < blocks(); ++b) {
      if (scratch.tops[b] < threshold) continue;
      const int64_t end = block_end(b);
      for (int64_t i = b * SAMPLE_BLOCK; i < end; ++i)
        if (x[i] >= threshold) scratch.candidates[count++] = {x[i], int32_t(i)};
    }
    return count;
  }

  // Calls f(candidate) in order until it returns false, for at most `most` of the likeliest.
  template <class F>
  void visit_likeliest(int64_t max_count, F f) const {
    int64_t visited = 0;
    // nats below the largest: most rows need few candidates
    for (float nats : {5.f, 10.f, std::numeric_limits<float>::infinity()}) {
      const int64_t count = collect(largest - nats);
      Candidate* c = scratch.candidates;
      int64_t sorted = 0;
      for (int64_t i = 0; i < std::min(count, max_count); ++i) {
        if (i == sorted) {
          sorted = std::min(count, std::max<int64_t>({64, 2 * sorted, visited}));
          if (sorted < count) std::nth_element(c + i, c + sorted, c + count);
          std::sort(c + i, c + sorted);
        }
        if (i < visited) continue;  // with the threshold before
        if (!f(c[i])) return;
        ++visited;
      }
      if (visited == max_count || count == vocab()) return;
    }
  }

  int64_t draw_filtered(double u) const {
    const TokenSampler& o = options;
    const int64_t max_count = o.top_k > 0 ? std::min(o.top_k, vocab()) : vocab();
    double log_sum = 0;
    if (o.top_k > 0) {
      double sum = 0;
      visit_likeliest(max_count, [&](const Candidate& c) {
        sum += std::exp(double(c.x) - double(largest));
        return true;
      });
      log_sum = std::log(sum) + double(largest);
    } else {
      log_sum = log_total();
    }
    std::vector<double> cumulative;  // sums of probabilities
    std::vector<int32_t> ids;
    double sum = 0, first = 0;
    visit_likeliest(max_count, [&](const Candidate& c) {
      const double p = std::exp(double(c.x) - log_sum);
      if (ids.empty()) {  // the first is never filtered: a denormal top_p is flushed to 0
        first = p;
      } else {
        if (o.top_p >= 0 && o.top_p < 1 && (sum + p) - p >= o.top_p) return false;
        if (o.min_p >= 0 && p < o.min_p * first) return false;
      }
      sum += p;
      cumulative.push_back(sum), ids.push_back(c.id);
      return true;
    });
    const auto position = std::upper_bound(cumulative.begin(), cumulative.end(), u * sum);
    return ids[size_t(std::min<int64_t>(position - cumulative.begin(), int64_t(ids.size()) - 1))];
  }

  SampledToken choose(double u, int64_t logprobs) {
    SampledToken result{-1, 0.0, {}};
    auto& [token, logprob, top] = result;
    if (!find_largest()) return result;
    const bool draws = options.temperature != 0.f;
    if (logprobs >= 0 || (draws && options.top_k <= 0)) add_up();
    if (!draws)
      token = first_largest();
    else
      token = options.filters() ? draw_filtered(u) : draw(u);
    if (logprobs < 0) return result;
    const double log_sum = log_total();
    logprob = double(x[token]) - log_sum;
    if (logprobs > 0)
      visit_likeliest(std::min(logprobs, vocab()), [&](const Candidate& c) {
        if (std::isfinite(c.x)) top.emplace_back(c.id, double(c.x) - log_sum);
        return true;
      });
    return result;
  }
};

// logits (L, V) float32, rows of any stride; workspace (sample_workspace(V)) uint8
inline std::vector<SampledToken> sample(const TensorView& logits,
                                        const std::vector<SampleRow>& rows,
                                        const TensorView& workspace) {
  if (logits.ndim() != 2 || logits.stride(1) != 1)
    throw std::invalid_argument("logits: expected a matrix with contiguous rows");
  const float* data = logits.data<float>("logits");
  const int64_t stride = logits.stride(0), width = logits.size(1), count = int64_t(rows.size());
  std::vector<std::pair<const bool*, int64_t>> masks(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto& [row, options, u, mask, may_end, logprobs] = rows[i];
    if (row < 0 || row >= logits.size(0))
      throw std::invalid_argument("rows: expected rows in [0, " + std::to_string(logits.size(0)) +
                                  "), got " + std::to_string(row));
    if (options->vocab > width)
      throw std::invalid_argument("vocab: expected at most " + std::to_string(width) + ", got " +
                                  std::to_string(options->vocab));
    if (!mask) continue;
    check_contiguous("mask", *mask);
    masks[i] = {mask->data<bool>("mask"), mask->numel()};
  }
  char* base = reinterpret_cast<char*>(workspace.data<uint8_t>("workspace"));
  char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(base) + 63) / 64 * 64);
  const int64_t bytes = sample_bytes(width);
  if (aligned - base + omp_get_max_threads() * bytes > workspace.numel())
    throw std::invalid_argument("workspace: expected " +
                                std::to_string(sample_workspace(width, omp_get_max_threads())) +
                                " bytes, got " + std::to_string(workspace.numel()));
  std::vector<SampledToken> results(rows.size());
  const SampleRow* inputs = rows.data();
  const std::pair<const bool*, int64_t>* mask_of = masks.data();
  SampledToken* outputs = results.data();
  // a parallel region pays from 0.1 ms a thread on, which is the time to read 2^17 logits
  const bool worthwhile = count > 1 && count * width >= 1 << 18;
  parallel_for(count, worthwhile, [=](int64_t i) {
    const auto& [row, options, u, mask, may_end, logprobs] = inputs[i];
    const SampleScratch scratch = scratch_at(aligned + omp_get_thread_num() * bytes, width);
    SampledRow sampled{*options, scratch, data + row * stride};
    sampled.adjust(mask_of[i].first, mask_of[i].second, may_end);
    outputs[i] = sampled.choose(u, logprobs);
  });
  return results;
}
