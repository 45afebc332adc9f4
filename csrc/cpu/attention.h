// Softmax attention, forward and backward, dense, packed and paged. Body of attention.cpp; the
// options and their order are in fastlm/ops/attention.py.
//
//   attention_problem.h   where the sequences lie; which keys a row sees
//   attention_scores.h    softcap, ALiBi, bias, dropout on a row of scores
//   attention_forward.h   blocks of queries against blocks of packed keys (training, prefill)
//   attention_decode.h    a few queries against a long cache, read once where it lies
//   attention_backward.h  gradients
//
// Names: b batch, h query head, i query row, j key; S, T lengths; D, Dv widths; E what is
// multiplied (gemm.h), T the dtype of q, C that of k and v.
#include "cpu/gemm.h"

namespace attention_body {
#include "cpu/attention_problem.h"
#include "cpu/attention_scores.h"
#include "cpu/attention_forward.h"
#include "cpu/attention_decode.h"
#include "cpu/attention_backward.h"

template <class T, class C>
void forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
             const TensorView& workspace) {
  const Shape s = shape_of(in, out, lse);
  const Options o = options_of(in);
  Buffer memory(Buffer::size_of<Problem<T, C>>(s.B));
  auto* problems = memory.take<Problem<T, C>>(s.B);
  const int64_t packed_rows = make_problems(in, s, problems);
  const float* k_scale = in.k_scale ? in.k_scale->data<float>("k_scale") : nullptr;
  const float* v_scale = in.v_scale ? in.v_scale->data<float>("v_scale") : nullptr;
  T* p_out = out.data<T>("out");
  float *p_lse = lse.data<float>("lse"), *p_workspace = workspace.data<float>("workspace");
  const auto check_room = [&](int64_t bytes) {
    if (workspace.numel() * 4 < bytes)
      check_size("workspace", "bytes", bytes, workspace.numel() * 4);
  };
  if (!in.cu_seqlens_q && !in.seed && s.B > 0 && decodes(s, problems[0].queries)) {
    int64_t most = 0;
    for (int64_t b = 0; b < s.B; ++b) most = std::max(most, problems[b].keys);
    const int64_t chunks = (most + CHUNK - 1) / CHUNK,
                  rows = round_up(s.H / s.Hkv * problems[0].queries, MAX_ROWS);
    if (chunks > 1) check_room(s.B * s.Hkv * chunks * rows * (2 + round_up(s.Dv, VL)) * 4);
    forward_by_chunks(s, o, problems, k_scale, v_scale, p_out, p_lse, p_workspace);
  } else {
    check_room(PackedShape<Elem<T>>(s).elements(packed_rows) * s.Hkv * int64_t(sizeof(Elem<T>)));
    forward_by_blocks(s, o, problems, packed_rows, k_scale, v_scale, p_out, p_lse, p_workspace);
  }
}

// workspace: float32, see forward_by_blocks and forward_by_chunks
inline void attention_forward(const AttentionInputs& in, const TensorView& out,
                              const TensorView& lse, const TensorView& workspace) {
  with_float(in.q.dtype(), "q", [&](auto tag) {
    using T = decltype(tag);
    if (in.k.dtype() == DType::i8)
      forward<T, int8_t>(in, out, lse, workspace);
    else
      forward<T, T>(in, out, lse, workspace);
  });
}

// dout like out, dlse (may be absent) like lse; dq, dk, dv like q, k, v; dsinks (B, H); dbias like
// the bias, zero; workspace: spans x queries of all sequences x H x padded D floats when there are
// several spans
inline void attention_backward(const AttentionInputs& in, const TensorView& dout,
                               const TensorView* dlse, const TensorView& out, const TensorView& lse,
                               const TensorView& dq, const TensorView& dk, const TensorView& dv,
                               const TensorView* dsinks, const TensorView* dbias,
                               const TensorView& workspace) {
  with_float(in.q.dtype(), "q", [&](auto tag) {
    using T = decltype(tag);
    const Shape s = shape_of(in, out, lse);
    const Options o = options_of(in);
    Buffer memory(Buffer::size_of<Problem<T, T>>(s.B));
    auto* problems = memory.take<Problem<T, T>>(s.B);
    make_problems(in, s, problems);
    int64_t all_rows = 0, most_k = 0;
    for (int64_t b = 0; b < s.B; ++b)
      all_rows += problems[b].queries, most_k = std::max(most_k, problems[b].keys);
    const int64_t spans = spans_of(s, most_k);
    const int64_t floats = spans > 1 ? spans * all_rows * s.H * round_up(s.D, VL) : 0;
    if (workspace.numel() < floats) check_size("workspace", "floats", floats, workspace.numel());
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
    backward_all(s, o, grad, problems, p_dout, p_out, p_lse, dq.data<T>("dq"), dk.data<T>("dk"),
                 dv.data<T>("dv"), workspace.data<float>("workspace"), all_rows);
    if (dbias) backward_bias(s, o, grad, problems, p_dout, p_out, p_lse, *dbias);
  });
}
}  // namespace attention_body
using attention_body::attention_backward;
using attention_body::attention_forward;
