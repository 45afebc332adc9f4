// How the next token of one sequence is chosen (sample.h): options and pointers; it owns no memory.
// Python (fastlm/inference/sampler.py) builds one per sequence and keeps the tensors alive.
#pragma once

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tensor.h"

namespace fastlm {

// Options as in fastlm.inference.sampling.Sampling; a filter that is absent is 0 (top_k) or below 0.
struct TokenSampler {
  int64_t vocab;  // ids from it on are not drawn
  float temperature, repetition_penalty, presence_penalty, frequency_penalty;
  int64_t top_k;
  double top_p, min_p;
  std::vector<int64_t> ends;      // may not come next where `may_end` is false
  const bool* seen = nullptr;     // (vocab): in the prompt or the answer; may be null, as all below
  const float* counts = nullptr;  // (vocab): how often in the answer
  const float* bias = nullptr;    // (vocab)

  TokenSampler(int64_t vocab, double temperature, int64_t top_k, double top_p, double min_p,
               double repetition_penalty, double presence_penalty, double frequency_penalty,
               std::vector<int64_t> ends, OptionalTensor seen, OptionalTensor counts,
               OptionalTensor bias);

  bool filters() const { return top_k > 0 || top_p >= 0 || min_p >= 0; }
  bool adjusts() const { return seen || counts || bias; }
};

// row of the logits; how; uniform number in [0, 1); which tokens may come next (any size, bool;
// those beyond it may not); whether an end may; how many of the likeliest are reported, -1: nothing
using SampleRow = std::tuple<int64_t, const TokenSampler*, double, OptionalTensor, bool, int64_t>;
// token, -1 where the logits are not finite; its log-probability; the likeliest with theirs
using SampledToken = std::tuple<int64_t, double, std::vector<std::pair<int64_t, double>>>;

}  // namespace fastlm
