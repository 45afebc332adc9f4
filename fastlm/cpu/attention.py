"""attention by csrc/cpu/attention. `varlen_attention` and `paged_attention` use parts of this file.

It allocates the results and a workspace. C++ knows the workspace's size: called without a
workspace, it runs if it needs none, and otherwise returns the size.
"""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu
from fastlm.cpu.templates import empty_float32
from fastlm.errors import InputError
from fastlm.memory_order import dense_rows, empty_output
from fastlm.reference import AttentionOptions

# cu_seqlens_q, cu_seqlens_k, block_table, seq_lens, k_scale, v_scale; None: the dense op
Layout = tuple[Tensor | None, ...] | None


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the C++ forward of all three ops, and return out and lse."""
    extras = None
    if not (sinks is alibi_slopes is bias is seed is None):
        extras = _float(sinks), _float(alibi_slopes), bias, seed
    try:
        size = _cpu.attention_forward(q, k, v, layout, extras, options, out, lse, None)
        if size:
            workspace = lse.new_empty(size)
            _cpu.attention_forward(q, k, v, layout, extras, options, out, lse, workspace)
    except ValueError as error:
        raise InputError(str(error)) from None
    return out, lse


def run_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: AttentionOptions,
    need_bias: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the C++ backward of the dense and the packed op, and return all gradients."""
    extras = dsinks = dbias = None
    if not (sinks is alibi_slopes is bias is seed is None):
        extras = _float(sinks), _float(alibi_slopes), bias, seed
        if sinks is not None:
            cu_seqlens_q = None if layout is None else layout[0]
            sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
            dsinks = lse.new_empty(sequences, q.shape[1])
        if bias is not None and need_bias:
            dbias = lse.new_zeros(bias.shape)
    arguments = dout, dlse, q, k, v, out, lse, layout, extras, options, (dq, dk, dv, dsinks, dbias)
    try:
        if size := _cpu.attention_backward(*arguments, None):
            _cpu.attention_backward(*arguments, lse.new_empty(size))
    except ValueError as error:
        raise InputError(str(error)) from None
    return (
        dq,
        dk,
        dv,
        torch.empty_like(empty_float32()) if dsinks is None else dsinks.sum(0),
        torch.empty_like(empty_float32()) if dbias is None else dbias,
    )


def attention_forward(q, k, v, sinks, alibi_slopes, bias, seed, options):
    contiguous = q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    if not contiguous:
        q, k, v = dense_rows(q, k, v)
    batch, heads, queries, width = q.shape
    # separate sizes: 0.6 us less than a torch.Size
    lse = empty_float32().new_empty(batch, heads, queries)
    v_width = v.shape[3]
    out = torch.empty_like(q) if contiguous and width == v_width else empty_output(q, v_width)
    return run_forward(q, k, v, None, sinks, alibi_slopes, bias, seed, options, out, lse)


def attention_backward(
    dout, dlse, q, k, v, out, lse, sinks, alibi_slopes, bias, seed, options, need_bias
):
    if not (
        dout.is_contiguous() and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        and out.is_contiguous()
    ):  # fmt: skip
        dout, q, k, v, out = dense_rows(dout, q, k, v, out)
    return run_backward(
        dout, dlse, q, k, v, out, lse, None, sinks, alibi_slopes, bias, seed, options, need_bias,
        # in the memory order of q, k and v (`_backward_fake` of fastlm/ops/attention.py)
        torch.empty_like(q), torch.empty_like(k), torch.empty_like(v),
    )  # fmt: skip
