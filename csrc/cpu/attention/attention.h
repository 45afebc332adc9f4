// Softmax attention, forward and backward, dense, packed and paged. Body of attention.cpp; the
// options and their order are in fastlm/ops/attention.py.
//
//   attention_sequence.h   addresses of the sequences; the keys that a row sees
//   attention_scores.h     softcap, ALiBi, bias, dropout on a row of scores
//   attention_forward.h    blocks of queries against blocks of packed keys (training, prefill)
//   attention_chunks.h     a few queries against a long cache, which is read once, in place
//   attention_backward.h   gradients
//
// Names: b batch, h query head, i query row, j key; S, T lengths of q and k; D, Dv widths of a
// head. Types: T of q, C of k and v, E of the operands of the products (gemm.h).
#include "cpu/base/gemm.h"
#include "cpu/base/simd_int8.h"
#include "cpu/base/workspace.h"

namespace attention_body {
#include "cpu/attention/attention_sequence.h"
#include "cpu/attention/attention_scores.h"
#include "cpu/attention/attention_forward.h"
#include "cpu/attention/attention_chunks.h"
#include "cpu/attention/attention_backward.h"

// Returns the floats of a workspace of `bytes`. Up to 63 more bytes are skipped to reach a cache
// line.
inline int64_t workspace_floats(int64_t bytes) { return bytes ? (bytes + 64 + 3) / 4 : 0; }

template <class T, class C>
int64_t forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                const TensorView* memory) {
  const AttentionShape s = shape_of(in, out, lse);
  const ScoreOptions o = score_options(in);
  if (s.B == 0) return 0;
  const SequenceOffsets offsets(in, s);
  const SequenceLengths lengths(s, offsets);
  const ChunkSizes chunks(s, lengths);
  const bool by_chunks = decodes(s, o, lengths.max_q);
  if (!memory) {
    const int64_t bytes = bytes_of_sequences<T, C>(s) +
                          (by_chunks ? chunks.bytes() : bytes_by_blocks<T, C>(s, lengths));
    if (bytes) return workspace_floats(bytes);
  }
  prefer_huge_pages(out);
  if (memory) prefer_huge_pages(*memory);
  Workspace workspace = memory ? Workspace(*memory) : Workspace();
  AttentionSequence<T, C> few[FEW_SEQUENCES];
  auto* sequences = s.B <= FEW_SEQUENCES ? few : workspace.take<AttentionSequence<T, C>>(s.B);
  make_sequences(in, s, offsets, sequences);
  const AttentionLayout& layout = in.layout;
  const float* k_scale = layout.k_scale ? layout.k_scale->data<float>("k_scale") : nullptr;
  const float* v_scale = layout.v_scale ? layout.v_scale->data<float>("v_scale") : nullptr;
  T* p_out = out.data<T>("out");
  float* p_lse = lse.data<float>("lse");
  if (by_chunks)
    forward_by_chunks(s, o, sequences, chunks, k_scale, v_scale, p_out, p_lse, workspace);
  else
    forward_by_blocks(s, o, sequences, lengths, k_scale, v_scale, p_out, p_lse, workspace);
  return 0;
}

// Returns 0. A call without a workspace that needs one computes nothing, and returns the float32
// elements that it needs: the caller then calls again.
inline int64_t attention_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                                 const AttentionLayout* layout, const AttentionExtras* extras,
                                 const AttentionOptions& options, const TensorView& out,
                                 const TensorView& lse, const TensorView* workspace) {
  const AttentionInputs in(q, k, v, layout, extras, options);
  int64_t floats = 0;
  with_float(q.dtype(), "q", [&](auto tag) {
    using T = decltype(tag);
    floats = k.dtype() == DType::i8 ? forward<T, int8_t>(in, out, lse, workspace)
                                    : forward<T, T>(in, out, lse, workspace);
  });
  return floats;
}

template <class T>
int64_t backward(const AttentionInputs& in, const TensorView& dout, const TensorView* dlse,
                 const TensorView& out, const TensorView& lse, const AttentionGradients& gradients,
                 const TensorView* memory) {
  const AttentionShape s = shape_of(in, out, lse);
  const ScoreOptions o = score_options(in);
  const SequenceOffsets offsets(in, s);
  const SequenceLengths lengths(s, offsets);
  const OptionalTensor& dbias = gradients.dbias;
  const bool few_rows = are_few(s, lengths) && !dbias;
  if (!memory && !few_rows)
    return workspace_floats(bytes_of_sequences<T, T>(s) + bytes_of_backward<T>(s, lengths));
  for (const TensorView* t : {&gradients.dq, &gradients.dk, &gradients.dv}) prefer_huge_pages(*t);
  if (memory) prefer_huge_pages(*memory);
  Workspace workspace = memory ? Workspace(*memory) : Workspace();
  AttentionSequence<T, T> few[FEW_SEQUENCES];
  auto* sequences = s.B <= FEW_SEQUENCES ? few : workspace.take<AttentionSequence<T, T>>(s.B);
  make_sequences(in, s, offsets, sequences);
  GradientStrides grad{};
  const auto rows = [&](const TensorView& t) {
    return s.packed ? strides_of(t, -1, 1, 0) : strides_of(t, 0, 1, 2);
  };
  grad.dout = rows(dout), grad.dq = rows(gradients.dq);
  grad.dk = rows(gradients.dk), grad.dv = rows(gradients.dv);
  if (dlse) {
    grad.dlse = s.packed ? strides_of(*dlse, -1, 0, 1) : strides_of(*dlse, 0, 1, 2);
    grad.dlse_p = dlse->data<float>("dlse");
  }
  grad.dsinks = gradients.dsinks ? gradients.dsinks->data<float>("dsinks") : nullptr;
  const T *p_dout = dout.data<T>("dout"), *p_out = out.data<T>("out");
  const float* p_lse = lse.data<float>("lse");
  T *dq = gradients.dq.data<T>("dq"), *dk = gradients.dk.data<T>("dk"),
    *dv = gradients.dv.data<T>("dv");
  if (few_rows) {
    backward_few(s, o, grad, sequences, p_dout, p_out, p_lse, dq, dk, dv);
    return 0;
  }
  backward_all(s, o, grad, sequences, p_dout, p_out, p_lse, dq, dk, dv, lengths, workspace);
  if (dbias) backward_bias(s, o, grad, sequences, p_dout, p_out, p_lse, *dbias, lengths, workspace);
  return 0;
}

// dout like out, dlse (may be absent) like lse. The result is that of attention_forward.
inline int64_t attention_backward(const TensorView& dout, const TensorView* dlse,
                                  const TensorView& q, const TensorView& k, const TensorView& v,
                                  const TensorView& out, const TensorView& lse,
                                  const AttentionLayout* layout, const AttentionExtras* extras,
                                  const AttentionOptions& options,
                                  const AttentionGradients& gradients,
                                  const TensorView* workspace) {
  const AttentionInputs in(q, k, v, layout, extras, options);
  int64_t floats = 0;
  with_float(q.dtype(), "q", [&](auto tag) {
    floats = backward<decltype(tag)>(in, dout, dlse, out, lse, gradients, workspace);
  });
  return floats;
}
}  // namespace attention_body
using attention_body::attention_backward;
using attention_body::attention_forward;
