"""The definition of `quantized_linear`, of its weight's codes and of its int8 activations."""

import torch
from torch import Tensor

from fastlm.reference.precision import widen


def unpack_rows(qdata: Tensor, bits: int, k: int) -> Tensor:
    """Return q as int8 (N, K)."""
    if bits == 8:
        return qdata
    nibbles = torch.stack((qdata & 15, qdata >> 4), -1).flatten(-2)
    return nibbles[..., :k].to(torch.int8) - 8


def dequantize(
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return (..., K) of these rows, which may be any selection, as in an embedding look-up."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q = unpack_rows(qdata, bits, k).to(wide)

    def expand(t: Tensor) -> Tensor:
        return (
            t.to(wide).repeat_interleave(group_size, -1)[..., :k] if t.shape[-1] > 1 else t.to(wide)
        )

    w = q * expand(scales)
    return (w if zeros is None else w + expand(zeros)).to(dtype)


RUN_MAX = 512  # most columns of int8 activations that share a scale


def round_rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round activations to int8: q = round(x * (127 / absmax)), scale = absmax / 127 per run.

    (N, K) -> q, scale, both (N, K). A run is the part of a row in a group of the weight's columns,
    split every 512 columns.
    """
    wide = widen(x)
    q, scale = torch.empty_like(wide), torch.empty_like(wide)
    for begin in range(0, x.shape[-1], group_size):
        group = slice(begin, begin + group_size)
        parts = zip(*(t[..., group].split(RUN_MAX, -1) for t in (wide, q, scale)))
        for values, rounded, scales in parts:
            # an all-zero run divides by 1e-30, which keeps 127 / absmax finite
            absmax = values.abs().amax(-1, keepdim=True).clamp_min(1e-30)
            # not 127.0 / absmax: torch computes a reciprocal and a product, which rounds twice
            inverse = torch.full_like(absmax, 127.0) / absmax
            rounded.copy_((values * inverse).round())
            scales.copy_(absmax / 127.0)
    return q, scale


def int8_rows(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round x (..., K) by `round_rows`, and store it in the order that `rounded_linear` reads.

    These are the results of `rms_norm_round` and `glu_round`.

    Returns, for N rows and R runs, (K's groups) x (runs in a group):

    - q, (N, K rounded up to 16) int8, 0 behind K. For int4 weights the columns of an octet are in
      the order 0 2 4 6 1 3 5 7: their codes lie so in a word.
    - scale and sums, (R, N rounded up to 64) float32: per run its scale, and scale * (sum of q).
      Behind N they are undefined, here 0.

    A run with NaN or infinity has the scale NaN, and q = 0. A run without columns (K ends before it
    does) has the scale of zeros.
    """
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    q, scale = round_rows(rows, group_size)
    broken = ~torch.isfinite(scale)
    q, scale = q.masked_fill(broken, 0), scale.masked_fill(broken, torch.nan)
    run, runs = _runs(k, group_size, x.device)
    empty = torch.full_like(rows[:, :1], 1e-30, dtype=scale.dtype) / 127.0
    by_run = empty.expand(-1, runs).scatter(1, run.expand_as(scale), scale)
    sums = torch.zeros_like(by_run).index_add(1, run, q) * by_run
    q = torch.nn.functional.pad(q, (0, -k % 16)).to(torch.int8)
    if bits == 4:
        q = q.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-3)
    behind = (0, -rows.shape[0] % 64)
    scale, sums = (torch.nn.functional.pad(t.t(), behind).contiguous() for t in (by_run, sums))
    return q.contiguous(), scale, sums


def _runs(k: int, group_size: int, device: torch.device) -> tuple[Tensor, int]:
    """Return the run of each of k columns, and the number of runs."""
    group = min(group_size, k)
    runs_per_group = -(-group // RUN_MAX)
    column = torch.arange(k, device=device)
    return column // group * runs_per_group + column % group // RUN_MAX, -(
        -k // group
    ) * runs_per_group


def rounded_linear(
    q: Tensor,
    scale: Tensor,
    sums: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute ``quantized_linear(x, ..., act_bits=8)`` from `int8_rows` of x.

    The result is (N, out features) in x's dtype. Kernels multiply `sums` with a weight's offsets.
    """
    if bits == 4:
        q = q.unflatten(-1, (-1, 2, 4)).transpose(-1, -2).flatten(-3)
    run, _ = _runs(k, group_size, q.device)
    x = q[:, :k] * scale[:, : q.shape[0]].t().index_select(1, run)
    y = x @ dequantize(qdata, scales, zeros, bits, group_size, k, x.dtype).t()
    return (y if bias is None else y + bias.to(x.dtype)).to(dtype)


def quantized_linear_forward(
    x: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    act_bits: int,
) -> Tensor:
    """Compute y = x . W^T + bias; with act_bits 8, x is rounded to int8 first (`round_rows`)."""
    wide = widen(x)
    if act_bits == 8:  # its derivative is that of x: wide - wide.detach() is 0
        q, scale = round_rows(x.detach(), group_size)
        wide = q * scale + (wide - wide.detach())
    w = dequantize(qdata, scales, zeros, bits, group_size, x.shape[-1], wide.dtype)
    y = wide @ w.t()
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


def quantized_linear_backward(
    dy: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
) -> Tensor:
    """Compute dx = dy . W."""
    wide = widen(dy)
    w = dequantize(qdata, scales, zeros, bits, group_size, k, wide.dtype)
    return (wide @ w).to(dy.dtype)
