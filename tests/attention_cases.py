"""What the tests of the three attention ops share: a run with gradients, a three-way comparison."""

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


def assert_kernel_near(function, leaves, names, what):
    """The kernel against the reference in float64: no worse than 2x (gradients 3x) the reference
    that computes in float32 on inputs and outputs of the same dtype, plus what rounding P and dS to
    the dtype costs.
    """
    mine = run(function, leaves)
    with backend.use_backend("reference"):
        plain = run(function, leaves)
        truth = run(function, [t.double() for t in leaves])
    dtype = leaves[0].dtype
    for i, (name, a, p, t) in enumerate(zip(["out", "lse", *names], mine, plain, truth)):
        seen = torch.isfinite(t)
        assert torch.equal(torch.isfinite(a), seen), f"{what} {name}: not finite where it should"
        # P and dS are rounded to the dtype, as torch does and the reference does not: 2 ulp
        slack = 2 * ULP[dtype]
        if name == "lse" or dtype == torch.float32:
            # fp32 sums in another order, of terms whose size is not the result's: dP = dO v is
            # about sqrt(Dv) and cancels in dP - delta; and P = exp2(s log2e - lse log2e) has the
            # rounding of both arguments, about 8 ulp where |s| is 5 to 10
            terms = 1.0 if i < 2 else leaves[2].shape[-1] ** 0.5
            scale = t[seen].abs().max().item() if seen.any() else 1.0
            slack = 16 * ULP[torch.float32] * max(2.0, terms / max(scale, 1e-30))
        assert_near(
            a[seen], p[seen], t[seen], factor=2 if i < 2 else 3, floor=slack, what=f"{what} {name}"
        )  # fmt: skip
