"""Rotary embedding of q and k in one launch: y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2.

x1 and x2 are the two halves of a head's first R elements, or their even and odd ones (interleaved).
The inverse is the same with (sin1, sin2) := (-sin2, -sin1). Elements past R are copied.

    program (t, g, b):   TOKENS positions from t * TOKENS  x  HEADS heads of q, or of k: the groups
                         of q's heads come first, then those of k
    the tables of its positions stay in registers for all heads; x is read once and y written once

Any strides are accepted, but the elements of a head are contiguous. Results have the memory order
of the operands. Products and sums are float32. With many positions a program handles several heads,
so that the tables are read from the L2 cache once per group of heads. With few positions it handles
one head, so that all heads run at the same time. Nothing was measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import Config, launch, multiprocessors
from fastlm.memory_order import dense

_PAIRS = 1024  # per program and head: 8 per thread, so that a 16-bit half is one 128-bit access
# Maximum of batch entries per launch: the limit of a grid's third dimension. Rejected: tiles of all
# entries in the first dimension, because the division took registers (64 -> 71 on sm_90)
_BATCH = 65535
_HEADS = 4  # per program: 4 loads in flight per thread, with tables in 32 registers


@triton.jit
def _pairs(at, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr):
    """Load x1 and x2 (TOKENS, PAIRS), float32, from rows that start at `at` (TOKENS, 1)."""
    if INTERLEAVED:
        e = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(at + e, mask=inside & (e < 2 * HALF), other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, [x.shape[0], PAIRS, 2]))
    else:
        e = tl.arange(0, PAIRS)[None, :]
        mask = inside & (e < HALF)
        x1 = tl.load(at + e, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(at + HALF + e, mask=mask, other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def _rotate_heads(
    x,  # (heads, tokens, width) of one batch entry
    y,  # likewise
    heads,
    first,
    token,  # (TOKENS, 1) int64
    length,
    tables,
    x_head,
    x_token,
    y_head,
    y_token,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    TAIL: tl.constexpr,
):
    cos1, cos2, sin1, sin2 = tables
    for i in tl.static_range(HEADS):
        head = first + i
        inside = token < tl.where(head < heads, length, 0)
        x_at = x + head * x_head + token * x_token
        y_at = y + head * y_head + token * y_token
        if HALF > 0:
            x1, x2 = _pairs(x_at, inside, HALF, INTERLEAVED, PAIRS)
            y1 = (x1 * cos1 - x2 * sin1).to(y.dtype.element_ty)
            y2 = (x2 * cos2 + x1 * sin2).to(y.dtype.element_ty)
            if INTERLEAVED:
                e = tl.arange(0, 2 * PAIRS)[None, :]
                both = tl.reshape(tl.join(y1, y2), [y1.shape[0], 2 * PAIRS])
                tl.store(y_at + e, both, mask=inside & (e < 2 * HALF))
            else:
                e = tl.arange(0, PAIRS)[None, :]
                tl.store(y_at + e, y1, mask=inside & (e < HALF))
                tl.store(y_at + HALF + e, y2, mask=inside & (e < HALF))
        if REST > 0:
            e = tl.arange(0, TAIL)[None, :]
            mask = inside & (e < REST)
            tl.store(
                y_at + 2 * HALF + e, tl.load(x_at + 2 * HALF + e, mask=mask, other=0.0), mask=mask
            )


@triton.jit
def _rope(
    q,  # (batch, q_heads, length, 2 HALF + REST)
    k,  # (batch, k_heads, length, 2 HALF + REST)
    cos,  # (batch, length, 2 HALF); batch stride 0: shared by all entries
    sin,
    q_out,
    k_out,
    q_heads,
    k_heads,
    length,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_batch,
    k_out_head,
    k_out_token,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    TAIL: tl.constexpr,
):
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    inside = token < length
    group = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    tables = (0.0, 0.0, 0.0, 0.0)
    if HALF > 0:
        at = cos + batch * cos_batch + token * cos_token
        cos1, cos2 = _pairs(at, inside, HALF, INTERLEAVED, PAIRS)
        at = sin + batch * sin_batch + token * sin_token
        sin1, sin2 = _pairs(at, inside, HALF, INTERLEAVED, PAIRS)
        tables = (cos1, cos2, -sin2, -sin1) if INVERSE else (cos1, cos2, sin1, sin2)
    groups = tl.cdiv(q_heads, HEADS)
    if group < groups:
        _rotate_heads(
            q + batch * q_batch, q_out + batch * q_out_batch, q_heads, group * HEADS, token, length,
            tables, q_head, q_token, q_out_head, q_out_token,
            HALF, REST, INTERLEAVED, HEADS, PAIRS, TAIL,
        )  # fmt: skip
    else:
        _rotate_heads(
            k + batch * k_batch, k_out + batch * k_out_batch, k_heads, (group - groups) * HEADS,
            token, length, tables, k_head, k_token, k_out_head, k_out_token,
            HALF, REST, INTERLEAVED, HEADS, PAIRS, TAIL,
        )  # fmt: skip


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (dense(t) for t in (q, k, cos, sin))
    out = torch.empty_like(q), torch.empty_like(k)
    if q.shape[-1] == 0:
        return out
    if q.shape[0] <= _BATCH:
        _launch(q, k, cos, sin, *out, interleaved, inverse)
        return out
    for first in range(0, q.shape[0], _BATCH):
        part = slice(first, first + _BATCH)
        tables = (t if t.dim() == 2 or t.shape[0] == 1 else t[part] for t in (cos, sin))
        _launch(q[part], k[part], *tables, *(t[part] for t in out), interleaved, inverse)
    return out


def _launch(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    interleaved: bool,
    inverse: bool,
) -> None:
    batch, _, length, width = q.shape
    rotated = cos.shape[-1]
    # a table without a batch, or with a batch of one, serves all entries
    shared = [0 if t.dim() == 2 or t.shape[0] == 1 else t.stride(0) for t in (cos, sin)]
    pairs = triton.next_power_of_2(max(1, rotated // 2))
    tail = triton.next_power_of_2(max(1, width - rotated))
    max_tokens = max(1, _PAIRS // max(pairs, tail // 2))
    tokens = min(max_tokens, triton.next_power_of_2(max(1, length)))
    tiles = triton.cdiv(length, tokens)
    heads = q.shape[1] + k.shape[1]
    many_programs = batch * tiles * heads >= _HEADS * 4 * multiprocessors(q.device)
    heads_per_program = _HEADS if many_programs else 1
    sizes = {"TOKENS": tokens, "HEADS": heads_per_program, "PAIRS": pairs, "TAIL": tail}
    groups = triton.cdiv(q.shape[1], heads_per_program) + triton.cdiv(k.shape[1], heads_per_program)
    launch(
        _rope,
        (tiles, groups, batch),
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        q.shape[1],
        k.shape[1],
        length,
        *q.stride()[:3],
        *k.stride()[:3],
        shared[0],
        cos.stride(-2),
        shared[1],
        sin.stride(-2),
        *q_out.stride()[:3],
        *k_out.stride()[:3],
        config=Config(sizes, num_warps=max(1, min(4, tokens * pairs // 256))),
        HALF=rotated // 2,
        REST=width - rotated,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
    )
