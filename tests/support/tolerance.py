"""How near is near enough: the error against float64, compared with plain torch's in the same
dtype, element by element.

An element of a result may be wrong by

- `factor` times the worst relative error of plain torch: what a user has without the kernel;
- half an ulp of the element itself: the one rounding of a result, also where plain torch is exact;
- four roundings of float32, as between the loads and the store of a kernel;
- the smallest number of the dtype, below which it has no digits (kernels flush denormals).

An error is relative to the element's `scale`. This is its own size, or where terms cancel the size
of its terms: a sum of +1 and -1 keeps the rounding of 1. Float32 may have larger terms (`float32`):
the tail of an activation is a difference there, and is rounded once in the dtype. A tensor's
maximum says nothing about its other elements: a bound by it passes a kernel that is wrong in every
small one.
"""

import torch
from torch import Tensor

ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 2**-52}
# half of float16's smallest number; float32 and bfloat16: kernels flush denormals
SMALLEST = {torch.float32: 2**-126, torch.bfloat16: 2**-126, torch.float16: 2**-25}
FOUR_ROUNDINGS = 4 * 2**-24


def assert_accurate(
    actual: Tensor,
    naive: Tensor,
    truth: Tensor,
    *,
    scale: Tensor | None = None,
    float32: Tensor | None = None,
    rounded: Tensor | None = None,
    factor: float = 2.0,
    what: str = "",
) -> None:
    """Compare `actual` with `naive`, both in the low precision, and with `truth` in float64. All
    have one shape. `scale`, `float32`: the size of each element's terms, where it is more than the
    element's own. `rounded`: the root of the sum of the squares of terms that are rounded to the
    dtype before they are added.

    NaN anywhere in `actual` fails, and so does an infinity that is not one in `truth`.
    """
    assert actual.shape == naive.shape == truth.shape, (
        f"{what}: shapes {tuple(actual.shape)}, {tuple(naive.shape)}, {tuple(truth.shape)}"
    )
    if actual.numel() == 0:
        return
    infinite = truth.isinf()
    if infinite.any():
        same = actual.double()[infinite] == truth[infinite]
        assert same.all(), f"{what}: {int((~same).sum())} of {same.numel()} infinities are others"
        actual, naive, truth = (t.where(~infinite, 0) for t in (actual, naive, truth))
    assert naive.isfinite().all(), f"{what}: plain torch's is not finite, so nothing is compared"
    scale = truth.abs() if scale is None else torch.maximum(scale, truth.abs())
    float32 = scale if float32 is None else torch.maximum(scale, float32)
    least = FOUR_ROUNDINGS * float32 + SMALLEST[actual.dtype]
    if rounded is not None:  # twice; a random walk of errors of a third of an ulp, by its tail
        least = least + 2 * ULP[actual.dtype] * rounded
    theirs = ((naive.double() - truth).abs() - least).clamp_min(0) / scale
    theirs = theirs[scale >= torch.finfo(actual.dtype).smallest_normal]
    worst = theirs.max().item() if theirs.numel() else 0.0
    allowed = factor * worst * scale + ULP[actual.dtype] / 2 * truth.abs() + least
    some = truth.abs() > least  # not all that is left of larger terms
    assert not some.any() or (truth.abs()[some] > allowed[some]).any(), (
        f"{what}: zeros would pass; plain torch's error is {worst:.1e} of the terms"
    )
    error = (actual.double() - truth).abs()
    wrong = ~(error <= allowed)
    if wrong.any():
        i = (error / allowed).nan_to_num(torch.inf).argmax().item()
        a, t, s, e, m = (x.flatten()[i].item() for x in (actual, truth, scale, error, allowed))
        raise AssertionError(
            f"{what}: error {e:.3e} > {m:.3e} in element {i} of {tuple(actual.shape)}: {a:.6e} for"
            f" {t:.6e} with terms of {s:.1e}; plain torch's error is {worst:.1e} of the terms;"
            f" {int(wrong.sum())} of {wrong.numel()} elements are wrong"
        )


def assert_near(
    actual: Tensor,
    naive: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    floor: float | None = None,
    what: str = "",
) -> None:
    """Compare the largest errors of `actual` and `naive`. An ulp of the largest number is allowed,
    or `floor` of it.

    NaN anywhere in `actual` fails.
    """
    assert actual.shape == naive.shape == truth.shape, (
        f"{what}: shapes {tuple(actual.shape)}, {tuple(naive.shape)}, {tuple(truth.shape)}"
    )
    if actual.numel() == 0:
        return
    scale = truth.abs().max().item()
    floor = (ULP[actual.dtype] if floor is None else floor) * max(
        scale, torch.finfo(actual.dtype).tiny
    )
    mine = (actual.double() - truth).abs().max().item()
    theirs = (naive.double() - truth).abs().max().item()
    assert mine <= factor * theirs + floor, (
        f"{what}: error {mine:.3e} > {factor} * {theirs:.3e} (naive) + {floor:.1e};"
        f" scale {scale:.3e}"
    )
