#include "cpu/attention/attention_inputs.h"
#define FASTLM_BODY "cpu/attention/attention.h"
#include "cpu/base/each_isa.h"

namespace fastlm {

void attention_forward(TensorView q, TensorView k, TensorView v, OptionalTensor cu_seqlens_q,
                       OptionalTensor cu_seqlens_k, OptionalTensor block_table,
                       OptionalTensor seq_lens, OptionalTensor k_scale, OptionalTensor v_scale,
                       OptionalTensor sinks, OptionalTensor alibi_slopes, OptionalTensor bias,
                       OptionalTensor seed, bool causal, float scale, int64_t window, float softcap,
                       double dropout_p, TensorView out, TensorView lse, TensorView workspace) {
  const AttentionInputs in{q,        k,       v,       cu_seqlens_q, cu_seqlens_k, block_table,
                           seq_lens, k_scale, v_scale, sinks,        alibi_slopes, bias,
                           seed,     causal,  scale,   window,       softcap,      dropout_p};
  prefer_huge_pages(out), prefer_huge_pages(workspace);
  FASTLM_RUN(attention_forward, in, out, lse, workspace);
}

void attention_backward(TensorView dout, OptionalTensor dlse, TensorView q, TensorView k,
                        TensorView v, TensorView out, TensorView lse, OptionalTensor cu_seqlens_q,
                        OptionalTensor cu_seqlens_k, OptionalTensor sinks,
                        OptionalTensor alibi_slopes, OptionalTensor bias, OptionalTensor seed,
                        bool causal, float scale, int64_t window, float softcap, double dropout_p,
                        TensorView dq, TensorView dk, TensorView dv, OptionalTensor dsinks,
                        OptionalTensor dbias, TensorView workspace) {
  const AttentionInputs in{q,    k,      v,     cu_seqlens_q, cu_seqlens_k, {},
                           {},   {},     {},    sinks,        alibi_slopes, bias,
                           seed, causal, scale, window,       softcap,      dropout_p};
  for (const TensorView* t : {&dq, &dk, &dv, &workspace}) prefer_huge_pages(*t);
  FASTLM_RUN(attention_backward, in, dout, dlse ? &*dlse : nullptr, out, lse, dq, dk, dv,
             dsinks ? &*dsinks : nullptr, dbias ? &*dbias : nullptr, workspace);
}

int64_t attention_backward_workspace(TensorView q, int64_t sequences, int64_t heads,
                                     int64_t kv_heads, int64_t v_width, int64_t most_q,
                                     int64_t most_k, int64_t all_rows, bool bias_grad) {
  FASTLM_RUN(attention_backward_workspace, q, sequences, heads, kv_heads, v_width, most_q, most_k,
             all_rows, bias_grad);
  return 0;
}

}  // namespace fastlm

FASTLM_BIND(attention_forward,
            "q k v cu_seqlens_q cu_seqlens_k block_table seq_lens k_scale v_scale sinks"
            " alibi_slopes bias seed causal scale window softcap dropout_p out lse workspace")
FASTLM_BIND(attention_backward,
            "dout dlse q k v out lse cu_seqlens_q cu_seqlens_k sinks alibi_slopes bias seed causal"
            " scale window softcap dropout_p dq dk dv dsinks dbias workspace")
FASTLM_BIND(attention_backward_workspace,
            "q sequences heads kv_heads v_width most_q most_k all_rows bias_grad")
