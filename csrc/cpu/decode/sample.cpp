#include "cpu/decode/token_sampler.h"

#define FASTLM_BODY "cpu/decode/sample.h"
#include "cpu/base/each_isa.h"

namespace fastlm {
namespace {

template <class T>
const T* of_vocab(const char* argument, const OptionalTensor& t, int64_t vocab) {
  if (!t) return nullptr;
  check_contiguous(argument, *t);
  check_size(argument, "elements:", vocab, t->numel());
  return t->data<T>(argument);
}

}  // namespace

TokenSampler::TokenSampler(int64_t vocab, double temperature, int64_t top_k, double top_p,
                           double min_p, double repetition_penalty, double presence_penalty,
                           double frequency_penalty, std::vector<int64_t> ends,
                           OptionalTensor repetition_mask, OptionalTensor counts,
                           OptionalTensor bias)
    : vocab(vocab),
      temperature(float(temperature)),
      repetition_penalty(float(repetition_penalty)),
      presence_penalty(float(presence_penalty)),
      frequency_penalty(float(frequency_penalty)),
      top_k(top_k),
      top_p(top_p),
      min_p(min_p),
      ends(std::move(ends)),
      repetition_mask(of_vocab<bool>("repetition_mask", repetition_mask, vocab)),
      counts(of_vocab<float>("counts", counts, vocab)),
      bias(of_vocab<float>("bias", bias, vocab)) {
  if (vocab < 1)
    throw std::invalid_argument("vocab: expected at least 1, got " + std::to_string(vocab));
}

// bytes
int64_t sample_workspace(int64_t vocab) {
  FASTLM_RUN(sample_workspace, vocab, omp_get_max_threads());
  return 0;  // not reached
}

}  // namespace fastlm

FASTLM_MODULE(m) {
  using namespace fastlm;
  using namespace pybind11::literals;
  pybind11::class_<TokenSampler>(m, "TokenSampler")
      .def(pybind11::init<int64_t, double, int64_t, double, double, double, double, double,
                          std::vector<int64_t>, OptionalTensor, OptionalTensor, OptionalTensor>(),
           "vocab"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a,
           "presence_penalty"_a, "frequency_penalty"_a, "ends"_a, "repetition_mask"_a, "counts"_a,
           "bias"_a);
}
FASTLM_BIND(sample_workspace, "vocab")
FASTLM_OP(sample, "logits rows workspace")
