"""Shared by the tests of the three attention ops: a run with gradients, a three-way comparison."""

import math
import mmap

import torch
from tolerance import ULP, assert_near

from fastlm import backend


def run(function, leaves):
    """out, lse and the gradients of the leaves, for fixed upstream gradients and dropout seed."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    torch.manual_seed(5)
    out, lse = function(*leaves)
    return [
        out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, upstream(out, lse))
    ]  # fmt: skip


def far_apart(shape, step, dtype):
    """Random rows `step` elements apart along the first dimension; only the rows occupy memory."""
    size = ((shape[0] - 1) * step + math.prod(shape[1:])) * dtype.itemsize
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    inner = torch.empty(shape[1:]).stride()
    t = torch.frombuffer(memory, dtype=dtype).as_strided(shape, (step, *inner))
    return t.copy_((torch.randn(shape) * (40 if dtype == torch.int8 else 1)).to(dtype))


def upstream(out, lse):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=draw).to(t.dtype) for t in (out, lse)]


def lse_size(lse, keys):
    """The magnitude of the terms of lse = m + log l, where 1 <= l <= keys (+ 1 with a sink)."""
    return (lse.abs().max().item() if lse.numel() else 0.0) + math.log(keys + 1)


def count(k):
    """The number of keys in (B, heads, keys, D) or packed (keys, heads, D)."""
    return k.shape[0 if k.dim() == 3 else 2]


def dense_lse(lse, packed):
    return (lse[None] if packed else lse).double()


def rounding_sizes(function, leaves, names, out, lse):
    """Return the sizes whose ulps bound the errors of out and each gradient: the root of the sum of
    the squared rounding errors of their terms.

    dS = P (dP - delta + dlse), and the difference may cancel to nothing. So the error of a row is P
    times the rounding of dP = dO v and of delta = dO out, whatever dS is. Independent errors add up
    as the root of the sum of their squares (Higham and Mary 2019): within the two products, whose
    partial sums have the size of the root of their squared terms, and over the rows or keys that a
    gradient sums. Only the error of delta is the same for all keys of a row. Everything is computed
    in float64. P is the output where v is the identity, before and after dropout.
    """
    packed = leaves[0].dim() == 3

    def dense(t):  # (B, heads, length, width)
        return (t.movedim(1, 0)[None] if packed else t).double()

    (q, k, v), heads = (dense(t.detach()) for t in leaves[:3]), leaves[0].shape[1]
    eye = torch.eye(count(leaves[1]), dtype=torch.float64)
    eye = eye[:, None].expand(-1, k.shape[1], -1) if packed else eye.expand(*k.shape[:2], -1, -1)
    given = [leaves[0].double(), leaves[1].double(), eye, *(t.double() for t in leaves[3:])]
    torch.manual_seed(5)
    kept = dense(function(*given)[0])
    p = dense(function(*given, dropout_p=0.0)[0])
    up, up_lse = upstream(out, lse)
    up, out = dense(up), dense(out)
    values, keys = (t.repeat_interleave(heads // k.shape[1], 1) for t in (v, k))
    product = (up @ values.mT).abs() + (up.square() @ values.mT.square()).sqrt()
    terms = up * out
    delta = terms.sum(-1).abs() + terms.square().sum(-1).sqrt() + up_lse.double().abs()
    of_product, of_delta = (kept * product).square(), p * delta[..., None]
    error = of_product + of_delta.square()
    scale = getattr(function, "scale", None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def over_groups(t):
        return t.unflatten(1, (k.shape[1], -1)).sum(2)

    if leaves[0].dtype == torch.float32:  # P also has the error of its score: products, tanh, exp
        score = torch.where(p > 0, p.log() + dense_lse(lse, packed)[..., None], 0.0)
        kept = kept * (1 + score.square()).sqrt()
    squares = {
        "out": kept.square() @ values.square(),
        "dq": scale**2 * (of_product @ keys.square() + (of_delta @ keys).square()),
        "dk": scale**2 * over_groups(error.mT @ q.square()),
        "dv": over_groups(kept.mT.square() @ up.square()),
    }
    for name, leaf in zip(names[3:], leaves[3:]):
        if name == "dbias":
            size = (1,) * (4 - leaf.dim()) + leaf.shape
            size = (1, size[1], *p.shape[2:]) if packed else size
            if size[-1] == 1:
                error = of_product.sum(-1, True) + of_delta.sum(-1, True).square()
            squares[name] = error.sum_to_size(size)
        else:  # P of the sink is exp(sink - lse)
            sink = (leaf.double()[:, None] - lse).exp() * delta
            # also the error of lse: half an ulp of it (an eighth of the 4 that sums are allowed),
            # and of its scores
            scores = scale**2 * (p * (q.square() @ keys.square().mT)).sum(-1)
            sink = sink.square() * (1 + (lse / 8).square() + scores)
            squares[name] = sink.movedim(-2, 0).flatten(1).sum(1)
    return {n: squares[n].max().sqrt().item() if squares[n].numel() else 0.0 for n in squares}


def assert_kernel_near(function, leaves, names, what):
    """Compare the kernel with the reference in float64. Its error is at most 2x (gradients 3x) that
    of the reference that computes in float32 on inputs and outputs of the same dtype, plus the cost
    of rounding P and dS to the dtype.
    """
    mine = run(function, leaves)
    with backend.use_backend("reference"):
        plain = run(function, leaves)
        truth = run(function, [t.double() for t in leaves])
        sizes = rounding_sizes(function, leaves, names, *truth[:2])
    dtype = leaves[0].dtype
    for i, (name, a, p, t) in enumerate(zip(["out", "lse", *names], mine, plain, truth)):
        seen = torch.isfinite(t)
        assert torch.equal(torch.isfinite(a), seen), f"{what} {name}: not finite where it should"
        # P and dS are rounded to the dtype, as in torch but not in the reference: 2 ulp
        slack = 2 * ULP[dtype]
        if name == "lse" or dtype == torch.float32:
            # fp32 sums in another order, whose terms differ in size from the result
            scale = t[seen].abs().max().item() if seen.any() else 1.0
            terms = lse_size(t[seen], count(leaves[1])) if name == "lse" else sizes[name]
            slack = 4 * ULP[torch.float32] * max(2.0, terms / max(scale, 1e-30))
        elif seen.any():
            # sums of terms of either sign, each rounded to the dtype on the way (half an ulp): P in
            # P v and P dO, out in dO out. The worst of dv's thousands of elements counts.
            ulps = 1 if name == "dv" else 0.5
            terms = ulps * sizes[name] / max(t[seen].abs().max().item(), 1e-30)
            slack = max(slack, ULP[dtype] * terms)
        assert_near(
            a[seen], p[seen], t[seen], factor=2 if i < 2 else 3, floor=slack, what=f"{what} {name}"
        )  # fmt: skip
