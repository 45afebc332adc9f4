"""The definition of `linear_logprobs`."""

import torch
from torch import Tensor

from fastlm.reference.blocks import row_blocks
from fastlm.reference.precision import widen
from fastlm.reference.target import check_target


def linear_logprobs_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    with_entropy: bool,
    ignore_index: int,
    softcap: float | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probabilities, entropy and the parts of lse of each row.

    With z = softcap(input @ linear_weight^T + linear_bias) / temperature (N, V):

    logprob (N) = z[target] - lse;  entropy (N; empty unless `with_entropy`) = -sum of p log p,
    p = softmax(z);  shift (N) = max z;  log_sum (N) = log sum exp(z - shift), so
    lse = shift + log_sum. logprob and entropy are 0 where the target is ignored.
    """
    check_target(target, linear_weight.shape[0], ignore_index)
    parts = []
    for b in row_blocks(input.shape[0], linear_weight.shape[0]):
        z = _scores(input[b], linear_weight, linear_bias, softcap, temperature)
        ignored = target[b] == ignore_index
        shift = z.amax(1).detach()  # any constant will do: the backward has no gradient for it
        z = z - shift[:, None]
        log_sum = z.exp().sum(1).log()
        logp = z - log_sum[:, None]
        at_target = logp.gather(1, target[b].masked_fill(ignored, 0)[:, None])[:, 0]
        p = logp.exp()
        entropy = -_zero_where_impossible(p, p * logp).sum(1)
        parts.append([t.masked_fill(ignored, 0) for t in (at_target, entropy, shift, log_sum)])
    logprob, entropy, shift, log_sum = (torch.cat(part) for part in zip(*parts))
    return logprob, entropy if with_entropy else entropy.new_empty(0), shift, log_sum


def linear_logprobs_backward(
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    entropy: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    temperature: float,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, linear_weight and linear_bias, empty where not needed.

    They follow from

        dz[v] = d_logprob * ((v == target) - p[v]) - d_entropy * p[v] * (log p[v] + entropy)

    A row with an ignored target has no gradient.
    """
    x, w, none = widen(input), widen(linear_weight), input.new_empty(0)
    d_inputs, d_weight, d_bias = [], torch.zeros_like(w), w.new_zeros(w.shape[0])
    for b in row_blocks(input.shape[0], linear_weight.shape[0]):
        ignored = (target[b] == ignore_index)[:, None]
        rows = x[b].masked_fill(ignored, 0)  # NaN there must not reach the weight
        z = _scores(rows, w, linear_bias, softcap, temperature)
        logp = z - shift[b, None] - log_sum[b, None]
        p, on = logp.exp(), d_logprob[b, None]
        dz = (-on * p).scatter_add(1, target[b, None].masked_fill(ignored, 0), on)
        if d_entropy is not None:
            dz = dz - d_entropy[b, None] * _zero_where_impossible(p, p * (logp + entropy[b, None]))
        if softcap is not None:
            dz = dz * (1 - (z * (temperature / softcap)).square())
        d_logits = (dz / temperature).masked_fill(ignored, 0)
        d_inputs.append(d_logits @ w)
        d_weight = d_weight + d_logits.t() @ rows
        d_bias = d_bias + d_logits.sum(0)
    return (
        torch.cat(d_inputs).to(input.dtype) if need_input else none,
        d_weight.to(linear_weight.dtype) if need_weight else none,
        none if linear_bias is None else d_bias.to(linear_bias.dtype),
    )


def _scores(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    bias = None if linear_bias is None else widen(linear_bias)
    z = torch.nn.functional.linear(widen(input), widen(linear_weight), bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def _zero_where_impossible(p: Tensor, x: Tensor) -> Tensor:
    """Return x, but 0 for a class of probability 0, where log p may be -inf."""
    return torch.where(p == 0, 0.0, x)
