// The operands of all three attention ops, which share one body (attention.h). Python passes the
// structs as tuples. Nothing here depends on the instruction set.
#pragma once

#include "tuple_caster.h"

namespace fastlm {

// `AttentionOptions` of fastlm/reference/attention.py
struct AttentionOptions {
  bool causal;
  float scale;
  int64_t window;  // 0: none
  float softcap;   // 0: none
  double dropout_p;
};

// The layout of the sequences; None: dense. The tensors that are present determine the op.
//   dense:   q (B, H, S, D), k, v (B, Hkv, T, D | Dv)
//   packed:  q (total_q, H, D), k, v (total_k, Hkv, D | Dv) and both cu_seqlens (B + 1) int32
//   paged:   q (B, S, H, D), k, v (pages, page_size, Hkv, D | Dv), block_table (B, max_pages) and
//            seq_lens (B) int32, k_scale and v_scale (Hkv) float32 with int8 pages
struct AttentionLayout {
  OptionalTensor cu_seqlens_q, cu_seqlens_k, block_table, seq_lens, k_scale, v_scale;
};

// Tensors that change scores or probabilities; None: no such tensor.
// sinks, alibi_slopes (H) float32; bias 4-D, sizes 1 or full; seed (1) int64
struct AttentionExtras {
  OptionalTensor sinks, alibi_slopes, bias, seed;
};

// dq, dk, dv like q, k, v; dsinks (B, H); dbias like the bias, filled with zeros
struct AttentionGradients {
  TensorView dq, dk, dv;
  OptionalTensor dsinks, dbias;
};

struct AttentionInputs {
  const TensorView &q, &k, &v;
  const AttentionLayout& layout;
  const AttentionExtras& extras;
  const AttentionOptions& options;

  AttentionInputs(const TensorView& q, const TensorView& k, const TensorView& v,
                  const AttentionLayout* layout, const AttentionExtras* extras,
                  const AttentionOptions& options)
      : q(q),
        k(k),
        v(v),
        layout(layout ? *layout : none<AttentionLayout>()),
        extras(extras ? *extras : none<AttentionExtras>()),
        options(options) {}

 private:
  template <class Struct>
  static const Struct& none() {
    static const Struct empty{};
    return empty;
  }
};

}  // namespace fastlm

FASTLM_TUPLE_CASTER(fastlm::AttentionOptions, causal, scale, window, softcap, dropout_p)
FASTLM_TUPLE_CASTER(fastlm::AttentionLayout, cu_seqlens_q, cu_seqlens_k, block_table, seq_lens,
                    k_scale, v_scale)
FASTLM_TUPLE_CASTER(fastlm::AttentionExtras, sinks, alibi_slopes, bias, seed)
FASTLM_TUPLE_CASTER(fastlm::AttentionGradients, dq, dk, dv, dsinks, dbias)
