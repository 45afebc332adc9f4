"""attention through csrc/cpu/attention. `varlen_attention` and `paged_attention` use parts of it.

Allocates the results and one workspace for all threads. The sizes of its parts are computed here
(forward) or in C++ (backward).
"""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu
from fastlm.cpu.templates import nothing
from fastlm.errors import InputError
from fastlm.memory_order import elements_last, empty_out
from fastlm.reference import AttentionOptions


def _all_contiguous(*tensors: Tensor) -> bool:
    for t in tensors:
        if not t.is_contiguous():
            return False
    return True


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _padded(n: int, step: int) -> int:
    return (n + step - 1) // step * step


_APART = 256  # floats per thread: its arrays begin at cache lines, with gaps under a sanitizer
_DENSE = (None,) * 6  # the layout of the dense op


def forward_any_layout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: tuple[Tensor | None, ...],
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: AttentionOptions,
    lse_shape: tuple[int, ...],
    sequences: int,
    key_rows: int,
    longest_keys: int,
) -> tuple[Tensor, Tensor]:
    """Run the C++ forward of all three ops.

    `layout` is (cu_seqlens_q, cu_seqlens_k, block_table, seq_lens, k_scale, v_scale), `key_rows` is
    an upper bound on the keys of all sequences together, `longest_keys` on those of one sequence.
    """
    if not _all_contiguous(q, k, v):
        q, k, v = elements_last(q, k, v)
    v_width = v.shape[-1]
    dense = layout[0] is None and layout[2] is None
    out = empty_out(q, v_width) if dense else q.new_empty(*q.shape[:-1], v_width)
    lse = nothing().new_empty(*lse_shape)  # unpacked: 0.6 us less than a torch.Size
    q_shape, k_shape = q.shape, k.shape
    rows_at, heads_at = (2, 1) if layout[2] is None else (1, 2)
    queries, kv_heads = q_shape[rows_at], k_shape[heads_at]
    group = q_shape[heads_at] // kv_heads
    # 48 floats of pointers and sizes per sequence, for more than 16 sequences
    floats, wide = 48 * sequences if sequences > 16 else 0, max(q_shape[-1], v_width)
    if layout[0] is None and seed is None and (queries == 1 or queries * group <= 8):
        if longest_keys > 512:
            # partial results of 512 keys each, 2 + Dv floats per row, rows padded to eights
            # (attention_chunks.h)
            rows = sequences * kv_heads * _padded(queries * group, 8)
            floats += rows * ((longest_keys + 511) // 512) * (2 + _padded(v_width, 16))
        if wide > 256:  # per thread: eight rows of q, of 512 scores, twice of out
            floats += torch.get_num_threads() * (8 * (3 * _padded(wide, 32) + 514) + _APART)
    else:
        # a copy of keys and values, padded to 32 rows per sequence and 32 columns; per thread 96
        # rows of q and out, twice 96 x 256 scores, 256 keys (attention_forward.h)
        widths = _padded(q_shape[-1], 32) + _padded(v_width, 32)
        floats += kv_heads * (key_rows + 32 * sequences) * widths
        each = 96 * (widths + 2 * 256) + 256 * (wide + 1)
        floats += torch.get_num_threads() * (each + _APART)
    workspace = lse.new_empty(floats + 64) if floats else lse
    if sinks is not None:
        sinks = _float(sinks)
    if alibi_slopes is not None:
        alibi_slopes = _float(alibi_slopes)
    try:
        _cpu.attention_forward(
            q, k, v, *layout, sinks, alibi_slopes, bias, seed, *options, out, lse, workspace
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    return out, lse


def _empty_contiguous(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def backward_any_layout(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: AttentionOptions,
    need_bias: bool,
    sequences: int,
    longest_queries: int,
    longest_keys: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the C++ backward of the dense and the packed op."""
    if not _all_contiguous(dout, q, k, v, out):
        dout, q, k, v, out = elements_last(dout, q, k, v, out)
    # the dense op's gradients have the memory order of q, k and v (`_backward_fake` of
    # fastlm/ops/attention.py)
    empty = torch.empty_like if cu_seqlens[0] is None else _empty_contiguous
    dq, dk, dv = empty(q), empty(k), empty(v)
    heads, kv_heads = q.shape[1], k.shape[1]
    dsinks = None if sinks is None else lse.new_empty(sequences, heads)
    dbias = lse.new_zeros(bias.shape) if bias is not None and need_bias else None
    rows = q.numel() // (heads * q.shape[-1]) if heads else 0
    floats = _cpu.attention_backward_workspace(
        q, sequences, heads, kv_heads, v.shape[-1], longest_queries, longest_keys, rows,
        dbias is not None,
    )  # fmt: skip
    workspace = lse.new_empty(floats) if floats else lse
    _cpu.attention_backward(
        dout, dlse, q, k, v, out, lse, *cu_seqlens, _float(sinks), _float(alibi_slopes), bias, seed,
        *options, dq, dk, dv, dsinks, dbias, workspace,
    )  # fmt: skip
    return (
        dq,
        dk,
        dv,
        torch.empty_like(nothing()) if dsinks is None else dsinks.sum(0),
        torch.empty_like(nothing()) if dbias is None else dbias,
    )


# Up to these sizes the C++ body needs no workspace, and finding that out would cost 1 us of a
# single token's 7. In order: sequences; D and Dv; rows per key head and keys in the forward
# (attention_chunks.h); queries and keys in the backward (attention_backward.h).
_FEW_SEQUENCES, _FEW_WIDE, _FEW_ROWS, _FEW_KEYS, _FEW = 16, 256, 8, 512, 8
_FEW_WORK = 1 << 17  # products in the backward where D = Dv


def attention_forward(q, k, v, sinks, alibi_slopes, bias, seed, options):
    batch, heads, queries, width = q.shape
    _, kv_heads, keys, _ = k.shape
    if (
        seed is sinks is alibi_slopes is None
        and keys <= _FEW_KEYS
        and queries * heads <= _FEW_ROWS * kv_heads
        and batch <= _FEW_SEQUENCES
        and width <= _FEW_WIDE
        and v.shape == k.shape
        and _all_contiguous(q, k, v)
    ):
        out, lse = torch.empty_like(q), nothing().new_empty(batch, heads, queries)
        try:
            _cpu.attention_forward(
                q, k, v, *_DENSE, None, None, bias, None, *options, out, lse, lse
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        return out, lse
    return forward_any_layout(
        q, k, v, _DENSE, sinks, alibi_slopes, bias, seed, options, (batch, heads, queries), batch,
        batch * keys, keys,
    )  # fmt: skip


def attention_backward(
    dout, dlse, q, k, v, out, lse, sinks, alibi_slopes, bias, seed, options, need_bias
):
    batch, _, queries, width = q.shape
    keys = k.shape[2]
    if (
        keys <= _FEW
        and queries <= _FEW
        and batch <= _FEW_SEQUENCES
        and width <= _FEW_WIDE
        and q.numel() * keys <= _FEW_WORK
        and sinks is alibi_slopes is bias is None
        and v.shape == k.shape
        and _all_contiguous(dout, q, k, v, out)
    ):
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _cpu.attention_backward(
            dout, dlse, q, k, v, out, lse, None, None, None, None, None, seed,
            *options, dq, dk, dv, None, None, lse,
        )  # fmt: skip
        return dq, dk, dv, torch.empty_like(nothing()), torch.empty_like(nothing())
    return backward_any_layout(
        dout, dlse, q, k, v, out, lse, (None, None), sinks, alibi_slopes, bias, seed,
        options, need_bias, batch, queries, keys,
    )  # fmt: skip
