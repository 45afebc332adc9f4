"""The definition of `attention`.

`varlen_attention` and `paged_attention` are the same (`attend`), one sequence at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.memory_order import dense_rows, match_memory_order
from fastlm.reference.blocks import SCORES
from fastlm.reference.dropout import dropout_factor
from fastlm.reference.precision import widen


class AttentionOptions(NamedTuple):
    """The options that are numbers, as every implementation gets them; 0: none.

    A new option is a field here, and its lines in each backend.
    """

    causal: bool
    scale: float
    window: int = 0
    softcap: float = 0.0
    dropout_p: float = 0.0


def _scores(
    q: Tensor,
    k: Tensor,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    rows: Tensor,
    query_length: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor | None]:
    """Return the scores (B, H, R, T) of these rows; q (B, Hkv, G, R, D), k (B, Hkv, T, D), wide.

    With a softcap, also return their derivative with respect to scale q k.
    """
    s = options.scale * (q @ k[:, :, None].transpose(-1, -2)).flatten(1, 2)
    slope = None
    if options.softcap > 0:
        t = torch.tanh(s / options.softcap)
        s, slope = options.softcap * t, 1 - t.square()
    keys = k.shape[2]
    i = rows[:, None] + (keys - query_length)
    j = torch.arange(keys, device=q.device)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype)[:, None, None] * (i - j).abs()
    if bias is not None:
        s = s + (bias if bias.shape[2] == 1 else bias[:, :, rows]).to(s.dtype)
    if options.causal or options.window > 0:
        hidden = j > i
        if options.window > 0:
            hidden = hidden | (j <= i - options.window)
        s = s.masked_fill(hidden, -torch.inf)
    return s, slope


def _query_blocks(q: Tensor, keys: int):
    step = max(1, SCORES // max(1, q.shape[0] * q.shape[1] * keys))
    for start in range(0, q.shape[2], step):
        yield torch.arange(start, min(start + step, q.shape[2]), device=q.device)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Map q (B, H, S, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv) to out (B, H, S, Dv), lse (B, H, S).

    out has q's memory order. bias is 4-D.
    """
    out, lse = attend(q, k, v, sinks, alibi_slopes, bias, seed, options)
    return match_memory_order(q, out), lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: AttentionOptions,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run `attention_forward` in any memory order, one block of queries at a time.

    first_batch is the index of the first sequence, for dropout.
    """
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    wide_k, wide_v = widen(k), widen(v)
    batch = torch.arange(first_batch, first_batch + q.shape[0], device=q.device)
    # an empty block, in case there are no rows at all
    outs, lses = [q.new_zeros(*q.shape[:2], 0, v.shape[3])], [wide_k.new_zeros(*q.shape[:2], 0)]
    for rows in _query_blocks(q, k.shape[2]):
        block = widen(q[:, :, rows]).unflatten(1, groups)
        s, _ = _scores(block, wide_k, alibi_slopes, bias, rows, q.shape[2], options)
        terms = s
        if sinks is not None:
            extra = sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)
            terms = torch.cat([s, extra], -1)
        no_key = (terms == -torch.inf).all(-1)  # logsumexp's derivative there is NaN
        total = torch.logsumexp(terms.masked_fill(no_key[..., None], 0), -1)
        p = torch.exp(s - total.masked_fill(no_key, 0)[..., None])
        if seed is not None:
            keep = dropout_factor(seed, options.dropout_p, batch, q.shape[1], rows, k.shape[2])
            p = p * keep.to(p.dtype)
        outs.append((p.unflatten(1, groups) @ wide_v[:, :, None]).flatten(1, 2).to(q.dtype))
        lses.append(total.masked_fill(no_key, -torch.inf))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: AttentionOptions,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv like q, k, v, in their memory orders; dsinks (H) and dbias (shaped like
    bias) in the wide dtype, or empty."""
    *grads, dsinks, dbias = attend_backward(
        dout, dlse, q, k, v, out, lse, sinks, alibi_slopes, bias, seed, options, need_bias
    )
    dq, dk, dv = (torch.empty_like(t).copy_(g) for t, g in zip(dense_rows(q, k, v), grads))
    return dq, dk, dv, dsinks, dbias


def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: AttentionOptions,
    need_bias: bool,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run `attention_backward` in any memory order, one block of queries at a time.

    P = exp(s - lse), dP = dout v^T (through dropout), delta = sum(dout out) - dlse,
    ds = P (dP - delta).
    """
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    wide_k, wide_v = widen(k), widen(v)
    batch = torch.arange(first_batch, first_batch + q.shape[0], device=q.device)
    dqs = [q.new_zeros(*q.shape[:2], 0, q.shape[3])]
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    dsinks = lse.new_zeros(0 if sinks is None else sinks.shape[0])
    dbias = lse.new_zeros(bias.shape if bias is not None and need_bias else 0)
    dbiases = []
    for rows in _query_blocks(q, k.shape[2]):
        block = widen(q[:, :, rows]).unflatten(1, groups)
        s, slope = _scores(block, wide_k, alibi_slopes, bias, rows, q.shape[2], options)
        total = lse[:, :, rows]
        offset = total.masked_fill(total == -torch.inf, 0)
        p = torch.exp(s - offset[..., None])
        g = widen(dout[:, :, rows])
        delta = (g * widen(out[:, :, rows])).sum(-1)
        if dlse is not None:
            delta = delta - dlse[:, :, rows]
        grouped = g.unflatten(1, groups)
        dp = (grouped @ wide_v[:, :, None].transpose(-1, -2)).flatten(1, 2)
        dropped = p
        if seed is not None:
            keep = dropout_factor(seed, options.dropout_p, batch, q.shape[1], rows, k.shape[2])
            keep = keep.to(p.dtype)
            dropped, dp = p * keep, dp * keep
        dv = dv + (dropped.unflatten(1, groups).transpose(-1, -2) @ grouped).sum(2)
        ds = p * (dp - delta[..., None])
        if bias is not None and need_bias:
            part = ds.sum_to_size(*[d if d == 1 else n for d, n in zip(bias.shape, ds.shape)])
            if bias.shape[2] == 1:
                dbias = dbias + part
            else:
                dbiases.append(part)
        if sinks is not None:
            weight = torch.exp(sinks.to(s.dtype)[:, None] - offset)
            dsinks = dsinks - torch.where(total == -torch.inf, 0, weight * delta).sum((0, 2))
        ds = (ds if slope is None else ds * slope).unflatten(1, groups) * options.scale
        dqs.append((ds @ wide_k[:, :, None]).flatten(1, 2).to(q.dtype))
        dk = dk + (ds.transpose(-1, -2) @ block).sum(2)
    if dbiases:
        dbias = torch.cat(dbiases, 2)
    return torch.cat(dqs, 2), dk.to(k.dtype), dv.to(v.dtype), dsinks, dbias
