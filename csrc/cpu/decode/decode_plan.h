// The description of a model for decode steps: pointers and sizes; it owns no memory. Python
// (fastlm/model/cpu_decode.py) builds it once per model and keeps the tensors alive.
#pragma once

#include <string>
#include <vector>

#include "tensor.h"

namespace fastlm {

constexpr int64_t DECODE_TILE = 16;   // rows of W per unit of work: one AVX-512 vector of outputs
constexpr int64_t DECODE_KEYS = 128;  // per attention task: 16 KiB of 16-bit keys at D 64, in L1

// y = x W^T + bias. A quantized W has a table of its scales (and offsets) in the order in which the
// kernel reads them, [ceil(n / 16)][groups][1 or 2][16], where
//   4 bits   w = scale * nibble + offset   (offset absent: -8 scale)
//   8 bits   w = scale * q + offset        (offset absent: 0)
struct DecodeLinear {
  const char* weight = nullptr;
  DType dtype = DType::f32;  // of W if it is dense, else of the table
  int bits = 16;             // 4, 8, or 16: dense
  bool offsets = false, int8_activations = false;
  int64_t n = 0, k = 0, row_bytes = 0, group_size = 0, groups = 0;
  const char* table = nullptr;
  const float* bias = nullptr;
  const uint8_t* tiles = nullptr;  // a transposed copy of the codes
  int tile_lanes = 0;              // vector length that `tiles` is for; other kernels read `weight`

  DecodeLinear() = default;
  DecodeLinear(TensorView weight, OptionalTensor table, OptionalTensor bias, int bits, int64_t k,
               int64_t group_size, int act_bits);
  int64_t lanes() const { return (k * bits + 31) / 32; }  // 4 bytes of a row each
  int64_t tile_bytes() const {
    return (n + DECODE_TILE - 1) / DECODE_TILE * DECODE_TILE * lanes() * 4;
  }
  void pack(TensorView tiles);  // fills `tiles`, (tile_bytes) uint8; later steps read it
};

struct DecodeLayer {
  const float* norms[4] = {};  // before and after attention, before and after the MLP; may be null
  std::vector<DecodeLinear> qkv;  // in order: q, k, v, or one linear that joins them
  DecodeLinear out, gate, up, down;
  const float *q_norm = nullptr, *k_norm = nullptr;
  bool norm_all_heads = false;  // q_norm over all heads at once, not over each
  int64_t window = 0;           // keys a query sees; 0: all
  int rotary = -1;              // index of the cos and sin tables; -1: no rotary embedding

  int parts(const DecodeLinear** of_qkv) const {  // their number
    for (size_t i = 0; i < qkv.size(); ++i) of_qkv[i] = &qkv[i];
    return int(qkv.size());
  }
};

struct DecodePlan {
  int64_t hidden, heads, kv_heads, head_dim, inner;
  float eps, scale, softcap, embedding_scale, logit_softcap;
  std::string act;
  DecodeLinear embedding, head;
  const float* norm;
  std::vector<DecodeLayer> layers;

  DecodePlan(const DecodeLinear& embedding, const DecodeLinear& head, TensorView norm,
             int64_t heads, int64_t kv_heads, int64_t head_dim, const std::string& act, float eps,
             float scale, float softcap, float embedding_scale, float logit_softcap);
  void add_layer(const std::vector<OptionalTensor>& norms, const std::vector<DecodeLinear>& qkv,
                 const DecodeLinear& out, const DecodeLinear& gate, const DecodeLinear& up,
                 const DecodeLinear& down, OptionalTensor q_norm, OptionalTensor k_norm,
                 int64_t window, int rotary);
  // bytes of workspace that `decode_step` needs for this many rows, the longest with this many
  // tokens, the new one included
  int64_t workspace_bytes(int64_t rows, int64_t longest) const;
};

// decode_step.h
void decode_step(const DecodePlan& plan, TensorView tokens, TensorView lengths, TensorView table,
                 TensorView cache, OptionalTensor scales, const std::vector<TensorView>& rotary,
                 TensorView workspace, TensorView logits_indices, TensorView logits);

}  // namespace fastlm
