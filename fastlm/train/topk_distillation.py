"""Forward KL to a teacher of which the k likeliest tokens are known, and how much is left over.

    KL = sum over the k of t (log t - log s) + t_rest (log t_rest - log s_rest)

with ``t_rest = 1 - sum t`` and ``s_rest = 1 - sum s`` over the same k tokens: the divergence after
all other tokens are made one. It is at most the divergence over the vocabulary, and equal to it
where k is the vocabulary, or where the student divides the rest as the teacher does.

Rejected: to leave the rest out, or to divide it among the k. Both teach more of the k than the
teacher gives them (Anshumann et al. 2025, "Sparse Logit Sampling", arXiv:2503.16870).
"""

from typing import Any

import torch
from torch import Tensor

from fastlm.ops import linear_logprobs

WORKSPACE = 1 << 26  # bytes of gathered rows of the head at a time
# 1 - sum s is a difference of float32 numbers near 1: below this it is rounding
LEAST_REST = 2.0**-20


def topk_forward_kl(student: Tensor, teacher: Tensor, rest: Tensor) -> Tensor:
    """The divergence (N,) of log-probabilities ``student`` and ``teacher`` (N, k) at the same
    tokens; ``rest`` (N,), the log of what the teacher leaves over, -inf for nothing.

    The student's rest counts as 2^-20 where it is less.
    """
    known = teacher.exp() * (teacher - student)
    left = torch.log((1 - student.exp().sum(-1)).clamp(min=LEAST_REST))
    over = rest.exp() * (rest - left)
    zero = known.new_zeros(())
    return torch.where(teacher > -torch.inf, known, zero).sum(-1) + torch.where(
        rest > -torch.inf, over, zero
    )


def logprobs_at(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probabilities (N, k) of the tokens ``ids`` (N, k) under the head ``weight`` (V, D) at
    ``hidden`` (N, D), with gradients to both.

    Logits exist at the k tokens alone. `linear_logprobs` of the first token knows the log of the
    normaliser: ``log p_j = log p_0 + z_j - z_0``. So of a 16-bit head the two gradients are rounded
    one by one.
    """
    first = linear_logprobs(hidden, weight, ids[:, 0], temperature=temperature, softcap=softcap)
    assert isinstance(first, Tensor)  # a pair only with return_entropy
    scores: Any = _Scores.apply(hidden, weight, ids)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores / temperature
    return first[:, None] + (scores - scores[:, :1])


class _Scores(torch.autograd.Function):
    """``hidden @ weight[ids].T`` row by row, in float32 (float64 of float64). Gathers the head's
    rows for `WORKSPACE` bytes at a time, in the backward once more.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        parts = [torch.bmm(w, h[:, :, None])[:, :, 0] for h, w, _ in _gathered(hidden, weight, ids)]
        return torch.cat(parts) if parts else hidden.new_zeros(ids.shape, dtype=_wide(hidden))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        hidden, weight, ids = ctx.saved_tensors
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            parts = [
                torch.bmm(grad[rows, None, :], w)[:, 0].to(hidden.dtype)
                for _, w, rows in _gathered(hidden, weight, ids)
            ]
            d_hidden = torch.cat(parts) if parts else torch.zeros_like(hidden)
        if ctx.needs_input_grad[1]:
            rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
            places = torch.stack([ids.reshape(-1), rows.reshape(-1)])
            sparse = torch.sparse_coo_tensor(
                places, grad.reshape(-1), (len(weight), len(hidden)), check_invariants=False
            )
            d_weight = torch.sparse.mm(sparse, hidden.to(grad.dtype)).to(weight.dtype)
        return d_hidden, d_weight, None


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype is torch.float64 else torch.float32


def _gathered(hidden: Tensor, weight: Tensor, ids: Tensor):
    """Yield (hidden (n, D), weight[ids] (n, k, D), slice of the rows), wide."""
    wide = _wide(hidden)
    step = max(1, WORKSPACE // (ids.shape[1] * weight.shape[1] * wide.itemsize))
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        yield hidden[rows].to(wide), weight[ids[rows]].to(wide), rows
