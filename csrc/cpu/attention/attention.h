// Softmax attention, forward and backward, dense, packed and paged. Body of attention.cpp; the
// options and their order are in fastlm/ops/attention.py.
//
//   attention_problem.h   where the sequences lie; which keys a row sees
//   attention_scores.h    softcap, ALiBi, bias, dropout on a row of scores
//   attention_forward.h   blocks of queries against blocks of packed keys (training, prefill)
//   attention_chunks.h    a few queries against a long cache, which is read once, in place
//   attention_backward.h  gradients
//
// Names: b batch, h query head, i query row, j key; S, T lengths of q and k; D, Dv widths of a
// head. Types: T of q, C of k and v, E of the operands of the products (gemm.h).
#include "cpu/base/gemm.h"
#include "cpu/base/simd_int8.h"
#include "cpu/base/workspace.h"

namespace attention_body {
#include "cpu/attention/attention_problem.h"
#include "cpu/attention/attention_scores.h"
#include "cpu/attention/attention_forward.h"
#include "cpu/attention/attention_chunks.h"
#include "cpu/attention/attention_backward.h"

template <class T, class C>
void forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
             Workspace workspace) {
  static_assert(sizeof(Problem<T, C>) <= 192);  // 48 floats: the workspace's size counts on it
  const Shape s = shape_of(in, out, lse);
  const Options o = options_of(in);
  if (s.B == 0) return;
  Problem<T, C> few[FEW_SEQUENCES];
  auto* problems = s.B <= FEW_SEQUENCES ? few : workspace.take<Problem<T, C>>(s.B);
  const int64_t packed_rows = make_problems(in, s, problems);
  const float* k_scale = in.k_scale ? in.k_scale->data<float>("k_scale") : nullptr;
  const float* v_scale = in.v_scale ? in.v_scale->data<float>("v_scale") : nullptr;
  T* p_out = out.data<T>("out");
  float* p_lse = lse.data<float>("lse");
  if (decodes(s, o, problems[0].queries))
    forward_by_chunks(s, o, problems, k_scale, v_scale, p_out, p_lse, workspace);
  else
    forward_by_blocks(s, o, problems, packed_rows, k_scale, v_scale, p_out, p_lse, workspace);
}

// workspace: float32; `forward`, forward_by_blocks and forward_by_chunks divide it up, and
// fastlm/cpu/attention.py computes its size
inline void attention_forward(const AttentionInputs& in, const TensorView& out,
                              const TensorView& lse, const TensorView& workspace) {
  with_float(in.q.dtype(), "q", [&](auto tag) {
    using T = decltype(tag);
    if (in.k.dtype() == DType::i8)
      forward<T, int8_t>(in, out, lse, Workspace(workspace));
    else
      forward<T, T>(in, out, lse, Workspace(workspace));
  });
}

template <class T>
Lengths lengths_of(const Shape& s, const Problem<T, T>* problems) {
  Lengths of;
  for (int64_t b = 0; b < s.B; ++b) {
    of.most_q = std::max(of.most_q, problems[b].queries), of.all_rows += problems[b].queries;
    of.most_k = std::max(of.most_k, problems[b].keys);
  }
  of.spans = spans_of(s, of.most_k);
  return of;
}

// Floats of attention_backward's workspace with the current number of threads; 0: it needs none.
// `most_q`, `most_k`: lengths of the longest sequence; `all_rows`: queries of all sequences.
inline int64_t attention_backward_workspace(const TensorView& q, int64_t sequences, int64_t heads,
                                            int64_t kv_heads, int64_t v_width, int64_t most_q,
                                            int64_t most_k, int64_t all_rows, bool bias_grad) {
  Shape s{};
  s.B = sequences, s.H = heads, s.Hkv = kv_heads, s.D = q.size(-1), s.Dv = v_width;
  if (are_few(s, most_q, most_k) && !bias_grad) return 0;
  int64_t bytes = 64 + round_up(s.B * int64_t(sizeof(Problem<float, float>)), 64);
  with_float(q.dtype(), "q", [&](auto tag) {
    using T = decltype(tag);
    const Lengths lengths{most_q, most_k, all_rows, spans_of(s, most_k)};
    const BackwardSizes<Elem<T>> of_bias(s, most_q, BK, std::is_same_v<Elem<T>, T>);
    bytes += round_up(lengths.parts(s) * 4, 64) +
             omp_get_max_threads() * std::max(sizes_of<T>(s, lengths).bytes(s), of_bias.bytes(s));
  });
  return (bytes + 3) / 4;
}

// dout like out, dlse (may be absent) like lse; dq, dk, dv like q, k, v; dsinks (B, H); dbias like
// the bias, filled with zeros; workspace: attention_backward_workspace float32 elements
inline void attention_backward(const AttentionInputs& in, const TensorView& dout,
                               const TensorView* dlse, const TensorView& out, const TensorView& lse,
                               const TensorView& dq, const TensorView& dk, const TensorView& dv,
                               const TensorView* dsinks, const TensorView* dbias,
                               const TensorView& workspace) {
  with_float(in.q.dtype(), "q", [&](auto tag) {
    using T = decltype(tag);
    const Shape s = shape_of(in, out, lse);
    const Options o = options_of(in);
    Workspace room(workspace);
    Problem<T, T> few[FEW_SEQUENCES];
    auto* problems = s.B <= FEW_SEQUENCES ? few : room.take<Problem<T, T>>(s.B);
    make_problems(in, s, problems);
    const Lengths lengths = lengths_of(s, problems);
    Gradients grad{};
    const bool packed = bool(in.cu_seqlens_q);
    const auto rows = [&](const TensorView& t) {
      return packed ? strides_of(t, -1, 1, 0) : strides_of(t, 0, 1, 2);
    };
    grad.dout = rows(dout), grad.dq = rows(dq), grad.dk = rows(dk), grad.dv = rows(dv);
    if (dlse) {
      grad.dlse = packed ? strides_of(*dlse, -1, 0, 1) : strides_of(*dlse, 0, 1, 2);
      grad.dlse_p = dlse->data<float>("dlse");
    }
    grad.dsinks = dsinks ? dsinks->data<float>("dsinks") : nullptr;
    const T *p_dout = dout.data<T>("dout"), *p_out = out.data<T>("out");
    const float* p_lse = lse.data<float>("lse");
    if (are_few(s, lengths.most_q, lengths.most_k) && !dbias)
      return backward_few(s, o, grad, problems, p_dout, p_out, p_lse, dq.data<T>("dq"),
                          dk.data<T>("dk"), dv.data<T>("dv"));
    backward_all(s, o, grad, problems, p_dout, p_out, p_lse, dq.data<T>("dq"), dk.data<T>("dk"),
                 dv.data<T>("dv"), lengths, room);
    if (dbias) backward_bias(s, o, grad, problems, p_dout, p_out, p_lse, *dbias, lengths, room);
  });
}
}  // namespace attention_body
using attention_body::attention_backward;
using attention_body::attention_backward_workspace;
using attention_body::attention_forward;
