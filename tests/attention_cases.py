"""What the tests of the three attention ops share: a run with gradients, a three-way comparison."""

import math

import torch
from tolerance import ULP, assert_near

from fastlm import backend


def run(function, leaves):
    """out, lse and the gradients of the leaves; upstream gradients and dropout seed are fixed."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    torch.manual_seed(5)
    out, lse = function(*leaves)
    draw = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=draw).to(t.dtype) for t in (out, lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, upstream)]


def lse_size(lse, keys):
    """Size of what lse is the sum of: lse = m + log l, where 1 <= l <= keys (+ 1 with a sink)."""
    return (lse.abs().max().item() if lse.numel() else 0.0) + math.log(keys + 1)


def count(k):
    """Keys in (B, heads, keys, D) or packed (keys, heads, D)."""
    return k.shape[0 if k.dim() == 3 else 2]


def roots(function, leaves, names, lse):
    """For each leaf, how far the rounding errors of dS add up in its gradient: sqrt(sum P^2).

    dS = P (dP - delta), and dP - delta may cancel to nothing, so one row errs by P times the
    rounding of dP whatever dS is. The gradient of a key sums this over the rows that see it, that
    of a broadcast bias over what it is broadcast over; errors that are independent add up as
    the root of the sum of their squares (Higham and Mary 2019). P is the output where v is the
    identity. A query's gradient sums over keys, where sum P^2 <= 1, and dv does not cancel: 1.
    """
    q, k, v, *_ = leaves
    packed = q.dim() == 3
    eye = torch.eye(count(k), dtype=torch.float64)
    eye = eye[:, None].expand(-1, k.shape[1], -1) if packed else eye.expand(*k.shape[:2], -1, -1)
    torch.manual_seed(5)
    p, _ = function(*(eye if t is v else t.double() for t in leaves))
    p = (p.movedim(1, 0)[None] if packed else p).square()  # (B, heads, rows, keys)
    result = []
    for name, leaf in zip(names, leaves):
        if name == "dk":
            total = p.sum(2).unflatten(1, (k.shape[1], -1)).sum(2)
        elif name == "dbias":
            size = (1,) * (4 - leaf.dim()) + leaf.shape
            total = p.sum_to_size((1, size[1], *p.shape[2:]) if packed else size)
        elif name == "dsinks":  # P of the sink: exp(sink - lse)
            total = (2 * (leaf.double()[:, None] - lse)).exp().movedim(-2, 0).flatten(1).sum(1)
        else:
            total = p.new_zeros(0)
        result.append(max(1.0, total.max().item() ** 0.5 if total.numel() else 0.0))
    return result


def assert_kernel_near(function, leaves, names, what):
    """The kernel against the reference in float64: no worse than 2x (gradients 3x) the reference
    that computes in float32 on inputs and outputs of the same dtype, plus what rounding P and dS to
    the dtype costs.
    """
    mine = run(function, leaves)
    with backend.use_backend("reference"):
        plain = run(function, leaves)
        truth = run(function, [t.double() for t in leaves])
        spread = roots(function, leaves, names, truth[1])
    dtype = leaves[0].dtype
    for i, (name, a, p, t) in enumerate(zip(["out", "lse", *names], mine, plain, truth)):
        seen = torch.isfinite(t)
        assert torch.equal(torch.isfinite(a), seen), f"{what} {name}: not finite where it should"
        # P and dS are rounded to the dtype, as torch does and the reference does not: 2 ulp
        slack = 2 * ULP[dtype]
        if name == "lse" or dtype == torch.float32:
            # fp32 sums in another order, of terms whose size is not the result's: dP = dO v is
            # about sqrt(Dv) and cancels in dP - delta
            scale = t[seen].abs().max().item() if seen.any() else 1.0
            if name == "out":
                terms = 1.0
            elif name == "lse":
                terms = lse_size(t[seen], count(leaves[1]))
            else:
                terms = leaves[2].shape[-1] ** 0.5 * spread[i - 2]
            slack = 4 * ULP[torch.float32] * max(2.0, terms / max(scale, 1e-30))
        assert_near(
            a[seen], p[seen], t[seen], factor=2 if i < 2 else 3, floor=slack, what=f"{what} {name}"
        )  # fmt: skip
