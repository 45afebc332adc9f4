"""The definition of every op in plain PyTorch: what all others are tested against, never optimised.

The functions have the signatures of the operators (`fastlm.ops`), backward included, so that
`use_backend("reference")` runs a whole model on them. They compute in float32, or in float64 when
given float64, and return the input's dtype.
"""

import math

import torch
from torch import Tensor

from fastlm.errors import InputError


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- rms_norm ------------------------------------------------------------------------------------
def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h = x + residual, rstd = 1 / sqrt(mean(h^2) + eps), y = h * rstd * (offset + weight).

    x (N, H) -> y (N, H), h (N, H; empty without residual), rstd (N).
    """
    h = x if residual is None else x + residual
    wide = _wide(h)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd[:, None] * (offset + _wide(weight))).to(x.dtype)
    return y, (x.new_empty(0) if residual is None else h), rstd


def rms_norm_backward(
    dy: Tensor, dh_above: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients of h and of the weight; `dh_above` reaches h from the residual stream."""
    g, wide, r = _wide(dy), _wide(h), rstd[:, None]
    gw = g * (offset + _wide(weight))
    dh = r * (gw - wide * r.square() * (gw * wide).mean(-1, keepdim=True))
    if dh_above is not None:
        dh = dh + _wide(dh_above)
    return dh.to(h.dtype), (g * wide * r).sum(0)


# ---- rope ----------------------------------------------------------------------------------------
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y = x * cos + rotate(x) * sin on the first R = cos.shape[-1] of D elements, for q and k;
    `inverse` is the transposed map x * cos + rotate^T(x * sin) with rotate^T = -rotate.

    q (B, H, S, D), k (B, Hkv, S, D), cos and sin (S, R), (1, S, R) or (B, S, R).
    """

    def rotate(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    def apply(x: Tensor) -> Tensor:
        wide, y = _wide(x), torch.empty_like(x)
        c, s = (t.to(wide.dtype).unsqueeze(-3) for t in (cos, sin))
        part, rest = wide.tensor_split((cos.shape[-1],), -1)
        turned = part * c - rotate(part * s) if inverse else part * c + rotate(part) * s
        return y.copy_(torch.cat((turned, rest), -1))

    return apply(q), apply(k)


# ---- glu -----------------------------------------------------------------------------------------
def _activation(x: Tensor, act: str) -> Tensor:
    if act == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def glu_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """y = act(gate) * up, elementwise."""
    return (_activation(_wide(gate), act) * _wide(up)).to(gate.dtype).contiguous()


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """dgate = dy * up * act'(gate), dup = dy * act(gate)."""
    g, x, u = _wide(dy), _wide(gate), _wide(up)
    if act == "silu":
        s = torch.sigmoid(x)
        value, slope = x * s, s * (1 + x * (1 - s))
    elif act == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        value = x * cdf
        slope = cdf + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    else:
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (x + 0.044715 * x**3))
        value = 0.5 * x * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * c * (1 + 3 * 0.044715 * x.square())
    return (g * u * slope).to(gate.dtype).contiguous(), (g * value).to(gate.dtype).contiguous()


# ---- attention -----------------------------------------------------------------------------------
_ATTENTION_SCORES = 1 << 22  # that exist at a time: 32 MB of each tensor in float64


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words per counter, in int64 tensors."""
    c, k0, k1 = list(counter), seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        high_a, high_b = (a >> 32) & 0xFFFFFFFF, (b >> 32) & 0xFFFFFFFF
        c = [high_b ^ c[1] ^ k0, b & 0xFFFFFFFF, high_a ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def dropout_factor(
    seed: Tensor, p: float, batch: Tensor, heads: int, rows: Tensor, keys: int
) -> Tensor:
    """0 or 1 / (1 - p) for each score: a function of batch, head, row, key and seed, and of nothing
    else, so that every backend and block size draws the same.

    Key j takes word (j // 16) % 4 of counter ((j // 64) * 16 + j % 16, row, head, batch): 16 lanes
    of a vector are 16 neighbouring keys. It is dropped when the word is below p * 2^32.
    """
    groups = (keys + 63) // 64
    device = seed.device
    x = torch.arange(groups * 16, device=device)
    head = torch.arange(heads, device=device)[:, None, None]
    counter = torch.broadcast_tensors(x, rows[:, None], head, batch[:, None, None, None])
    words = torch.stack([w.unflatten(-1, (groups, 16)) for w in philox(counter, seed)], -2)
    kept = words.flatten(-3)[..., :keys] >= int(p * 2**32)
    return kept * (1 / (1 - p) if p < 1 else 0.0)


def _scores(
    q: Tensor,
    k: Tensor,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    rows: Tensor,
    query_length: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """q (B, Hkv, G, R, D), k (B, Hkv, T, D) wide -> scores (B, H, R, T) of these rows, and under a
    softcap their derivative by scale q k.
    """
    s = scale * (q @ k[:, :, None].transpose(-1, -2)).flatten(1, 2)
    slope = None
    if softcap > 0:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t.square()
    keys = k.shape[2]
    i = rows[:, None] + (keys - query_length)
    j = torch.arange(keys, device=q.device)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype)[:, None, None] * (i - j).abs()
    if bias is not None:
        s = s + (bias if bias.shape[2] == 1 else bias[:, :, rows]).to(s.dtype)
    if causal or window > 0:
        hidden = j > i
        if window > 0:
            hidden = hidden | (j <= i - window)
        s = s.masked_fill(hidden, -torch.inf)
    return s, slope


def _query_blocks(q: Tensor, keys: int):
    step = max(1, _ATTENTION_SCORES // max(1, q.shape[0] * q.shape[1] * keys))
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
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    dropout_p: float,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """q (B, H, S, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv) -> out (B, H, S, Dv), lse (B, H, S), a
    block of queries at a time. window 0 and softcap 0 mean none; bias is 4-D; first_batch numbers
    the sequences for dropout.
    """
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    wide_k, wide_v = _wide(k), _wide(v)
    batch = torch.arange(first_batch, first_batch + q.shape[0], device=q.device)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = torch.full(q.shape[:3], -torch.inf, dtype=wide_k.dtype, device=q.device)
    for rows in _query_blocks(q, k.shape[2]):
        block = _wide(q[:, :, rows]).unflatten(1, groups)
        s, _ = _scores(
            block, wide_k, alibi_slopes, bias, rows, q.shape[2], causal, scale, window, softcap
        )
        if sinks is not None:
            extra = sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)
            total = torch.logsumexp(torch.cat([s, extra], -1), -1)
        else:
            total = torch.logsumexp(s, -1)
        p = torch.exp(s - total.masked_fill(total == -torch.inf, 0)[..., None])
        if seed is not None:
            p = p * dropout_factor(seed, dropout_p, batch, q.shape[1], rows, k.shape[2]).to(p.dtype)
        out[:, :, rows] = (p.unflatten(1, groups) @ wide_v[:, :, None]).flatten(1, 2).to(out.dtype)
        lse[:, :, rows] = total
    return out, lse


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
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    dropout_p: float,
    bias_grad: bool,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v; dsinks (H) and dbias (as bias) wide, or empty.

    P = exp(s - lse), dP = dout v^T (through dropout), delta = sum(dout out) - dlse,
    ds = P (dP - delta).
    """
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    wide_k, wide_v = _wide(k), _wide(v)
    batch = torch.arange(first_batch, first_batch + q.shape[0], device=q.device)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    dsinks = lse.new_zeros(0 if sinks is None else sinks.shape[0])
    dbias = lse.new_zeros(bias.shape if bias is not None and bias_grad else 0)
    for rows in _query_blocks(q, k.shape[2]):
        block = _wide(q[:, :, rows]).unflatten(1, groups)
        s, slope = _scores(
            block, wide_k, alibi_slopes, bias, rows, q.shape[2], causal, scale, window, softcap
        )
        total = lse[:, :, rows]
        offset = total.masked_fill(total == -torch.inf, 0)
        p = torch.exp(s - offset[..., None])
        g = _wide(dout[:, :, rows])
        delta = (g * _wide(out[:, :, rows])).sum(-1)
        if dlse is not None:
            delta = delta - dlse[:, :, rows]
        grouped = g.unflatten(1, groups)
        dp = (grouped @ wide_v[:, :, None].transpose(-1, -2)).flatten(1, 2)
        dropped = p
        if seed is not None:
            keep = dropout_factor(seed, dropout_p, batch, q.shape[1], rows, k.shape[2]).to(p.dtype)
            dropped, dp = p * keep, dp * keep
        dv += (dropped.unflatten(1, groups).transpose(-1, -2) @ grouped).sum(2)
        ds = p * (dp - delta[..., None])
        if dbias.dim() == 4:
            part = ds.sum_to_size(*[d if d == 1 else n for d, n in zip(dbias.shape, ds.shape)])
            dbias[:, :, [0] if dbias.shape[2] == 1 else rows] += part
        if sinks is not None:
            weight = torch.exp(sinks.to(s.dtype)[:, None] - offset)
            dsinks -= torch.where(total == -torch.inf, 0, weight * delta).sum((0, 2))
        ds = (ds if slope is None else ds * slope).unflatten(1, groups) * scale
        dq[:, :, rows] = (ds @ wide_k[:, :, None]).flatten(1, 2).to(dq.dtype)
        dk += (ds.transpose(-1, -2) @ block).sum(2)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks, dbias


# ---- varlen_attention ----------------------------------------------------------------------------
def _offsets(cu_seqlens: Tensor, total: int, name: str) -> list[int]:
    offsets = cu_seqlens.tolist()
    rising = offsets == sorted(offsets)
    if not offsets or offsets[0] != 0 or offsets[-1] != total or not rising:
        raise InputError(f"{name}: wanted offsets that rise from 0 to {total}, got {offsets[:8]}")
    return offsets


def _bias_of(bias: Tensor | None, b: int, rows: int, keys: int) -> Tensor | None:
    """The part of a bias over (B, H, longest S, longest T) that belongs to sequence b."""
    if bias is None:
        return None
    bias = bias[b : b + 1] if bias.shape[0] > 1 else bias
    bias = bias[:, :, :rows] if bias.shape[2] > 1 else bias
    return bias[..., :keys] if bias.shape[3] > 1 else bias


def varlen_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """`attention_forward` of each sequence: q (total_q, H, D) -> out (total_q, H, Dv),
    lse (H, total_q).
    """
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=_wide(q[:0]).dtype).to(q.device)
    ends_q = _offsets(cu_seqlens_q, q.shape[0], "cu_seqlens_q")
    ends_k = _offsets(cu_seqlens_k, k.shape[0], "cu_seqlens_k")
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:])):
        o, one_lse = attention_forward(
            q[q0:q1].transpose(0, 1)[None],
            k[k0:k1].transpose(0, 1)[None],
            v[k0:k1].transpose(0, 1)[None],
            sinks,
            alibi_slopes,
            _bias_of(bias, b, q1 - q0, k1 - k0),
            seed,
            causal,
            scale,
            window,
            softcap,
            dropout_p,
            first_batch=b,
        )
        out[q0:q1], lse[:, q0:q1] = o[0].transpose(0, 1), one_lse[0]
    return out, lse


def varlen_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    dropout_p: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`attention_backward` of each sequence."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dsinks = lse.new_zeros(0 if sinks is None else sinks.shape[0])
    dbias = lse.new_zeros(bias.shape if bias is not None and bias_grad else 0)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:])):
        one_dq, one_dk, one_dv, one_dsinks, one_dbias = attention_backward(
            dout[q0:q1].transpose(0, 1)[None],
            None if dlse is None else dlse[None, :, q0:q1],
            q[q0:q1].transpose(0, 1)[None],
            k[k0:k1].transpose(0, 1)[None],
            v[k0:k1].transpose(0, 1)[None],
            out[q0:q1].transpose(0, 1)[None],
            lse[None, :, q0:q1],
            sinks,
            alibi_slopes,
            _bias_of(bias, b, q1 - q0, k1 - k0),
            seed,
            causal,
            scale,
            window,
            softcap,
            dropout_p,
            bias_grad,
            first_batch=b,
        )
        dq[q0:q1], dk[k0:k1], dv[k0:k1] = (t[0].transpose(0, 1) for t in (one_dq, one_dk, one_dv))
        dsinks += one_dsinks
        if dbias.dim() == 4:
            part = _bias_of(dbias, b, q1 - q0, k1 - k0)
            assert part is not None
            part += one_dbias
    return dq, dk, dv, dsinks, dbias


# ---- paged_attention -----------------------------------------------------------------------------
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`attention_forward` of each sequence on its pages: q (B, S, H, D) -> out (B, S, H, Dv),
    lse (B, H, S).
    """
    pages, page_size = k_cache.shape[:2]
    out = q.new_zeros(*q.shape[:3], v_cache.shape[3])
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=_wide(q[:0]).dtype)
    lse = lse.to(q.device)

    def gather(cache: Tensor, table: Tensor, keys: int, scales: Tensor | None) -> Tensor:
        rows = _wide(cache[table].flatten(0, 1)[:keys].transpose(0, 1)[None])
        return rows if scales is None else rows * scales.to(rows.dtype)[:, None, None]

    for b, keys in enumerate(seq_lens.tolist()):
        if not 0 <= keys <= block_table.shape[1] * page_size:
            raise InputError(
                f"seq_lens: wanted 0 to {block_table.shape[1] * page_size}"
                f" (pages a sequence x page size), got {keys} for sequence {b}"
            )
        table = block_table[b, : (keys + page_size - 1) // page_size].long()
        if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < pages:
            raise InputError(
                f"block_table: wanted pages 0 to {pages - 1},"
                f" got {int(table.min())} to {int(table.max())} for sequence {b}"
            )
        o, one_lse = attention_forward(
            _wide(q[b : b + 1].transpose(1, 2)),
            gather(k_cache, table, keys, k_scale),
            gather(v_cache, table, keys, v_scale),
            sinks,
            alibi_slopes,
            _bias_of(bias, b, q.shape[1], keys),
            None,
            causal,
            scale,
            window,
            softcap,
            0.0,
        )
        out[b], lse[b] = o[0].transpose(0, 1).to(out.dtype), one_lse[0]
    return out, lse
