// The operands of all three attention ops, which share one body (attention.h). Which of the
// optional ones are present tells the ops apart. Nothing here depends on the instruction set.
#pragma once

#include <optional>

#include "tensor.h"

namespace fastlm {

struct AttentionInputs {
  // dense:   q (B, H, S, D), k, v (B, Hkv, T, D | Dv)
  // packed:  q (total_q, H, D), k, v (total_k, Hkv, D | Dv) and both cu_seqlens (B + 1) int32
  // paged:   q (B, S, H, D), k, v (pages, page_size, Hkv, D | Dv), block_table (B, max_pages) and
  //          seq_lens (B) int32, k_scale and v_scale (Hkv) float32 with int8 pages
  TensorView q, k, v;
  std::optional<TensorView> cu_seqlens_q, cu_seqlens_k, block_table, seq_lens, k_scale, v_scale;
  // sinks, alibi_slopes (H) float32; bias 4-D, sizes 1 or full; seed (1) int64
  std::optional<TensorView> sinks, alibi_slopes, bias, seed;
  bool causal;
  float scale;
  int64_t window;  // 0: none
  float softcap;   // 0: none
  double dropout_p;
};

}  // namespace fastlm
