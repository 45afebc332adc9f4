// The tables of an AdamW step: the pointers and scalars of every tensor, and its chunks.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace fastlm {

// Elements that a thread processes at a time. It is a multiple of the 8-bit block, and fixed, so
// that sums and random numbers do not depend on the thread count. 28 B x 32768 = 0.9 MB: about 30
// us of memory time.
constexpr int64_t ADAMW_CHUNK = 32768;
constexpr int64_t ADAMW_BLOCK = 256;  // elements that share one scale of an 8-bit state

struct AdamwTensor {
  float* step;
  void* param;
  const void* grad;
  DType param_type, grad_type;
  float* master;               // float32 copy of a float16 parameter, or null
  int16_t* master_low;         // low halves of the float32 masters of bfloat16 parameters, or null
  void *exp_avg, *exp_avg_sq;  // float32; uint8 codes when the scales are not null
  float *exp_avg_scale, *exp_avg_sq_scale;
  int64_t n;
  float step_size, decay;  // lr / (1 - beta1^t), lr * weight_decay
  float beta1, rest1, beta2, rest2, eps;
  float root_scale;  // 1 / sqrt(1 - beta2^t)
  float sign;        // -1 to maximize
  bool stochastic;
  uint32_t key;  // of the random numbers: one per tensor and step
};

struct AdamwChunk {
  int64_t tensor, start, n;
};

// Keys of random numbers: a bijection of 32-bit integers that looks random
inline uint32_t mix32(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

}  // namespace fastlm
