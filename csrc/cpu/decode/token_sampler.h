// The sampling options of one sequence (sample.h), with pointers; it owns no memory. Python
// (fastlm/inference/sampler.py) builds one per sequence and keeps the tensors alive.
#pragma once

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tensor.h"

namespace fastlm {

// Options of fastlm.inference.sampling.Sampling; an absent filter is 0 (top_k) or negative.
struct TokenSampler {
  int64_t vocab;  // ids from it on are not drawn
  float temperature, repetition_penalty, presence_penalty, frequency_penalty;
  int64_t top_k;
  double top_p, min_p;
  std::vector<int64_t> ends;  // may not come next where `may_end` is false
  const bool* repetition_mask =
      nullptr;                    // (vocab): in the prompt or the answer; may be null, as all below
  const float* counts = nullptr;  // (vocab): how often in the answer
  const float* bias = nullptr;    // (vocab)

  TokenSampler(int64_t vocab, double temperature, int64_t top_k, double top_p, double min_p,
               double repetition_penalty, double presence_penalty, double frequency_penalty,
               std::vector<int64_t> ends, OptionalTensor repetition_mask, OptionalTensor counts,
               OptionalTensor bias);

  bool filters() const { return top_k > 0 || top_p >= 0 || min_p >= 0; }
  bool adjusts() const { return repetition_mask || counts || bias; }
};

// row of the logits; options; uniform number in [0, 1); mask of allowed tokens (bool, any size;
// tokens beyond it are not allowed); whether an end is allowed; the number of likeliest tokens to
// report, -1: nothing
using SampleRow = std::tuple<int64_t, const TokenSampler*, double, OptionalTensor, bool, int64_t>;
// token, -1 where the logits are not finite; its logprob; the likeliest tokens and their logprobs
using SampledToken = std::tuple<int64_t, double, std::vector<std::pair<int64_t, double>>>;

}  // namespace fastlm
