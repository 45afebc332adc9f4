"""Tolerances: the error against float64, compared element by element with the error of plain torch
in the same dtype.

An element of a result may be wrong by

- `factor` times the worst relative error of plain torch, which a user has without the kernel;
- half an ulp of the element itself: the one rounding of a result, also where plain torch is exact;
- four roundings of float32, as between the loads and the store of a kernel;
- the smallest number of the dtype, below which it has no digits (kernels flush denormals).

An error is relative to the element's `scale`. This is the element's own size, or where terms cancel
the size of its terms: a sum of +1 and -1 keeps the rounding of 1. Float32 may have larger terms
(`float32`): the tail of an activation is a difference there, and is rounded once in the dtype. No
bound is relative to a tensor's maximum: it would pass a kernel that is wrong in small elements.
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
    label: str = "",
) -> None:
    """Compare `actual` with `naive`, both in the low precision, and with `truth` in float64. All
    have one shape. `scale`, `float32`: the size of each element's terms, where it is larger than
    the element. `rounded`: the root of the sum of the squares of terms that are rounded to the
    dtype before they are added.

    NaN anywhere in `actual` fails, and so does an infinity that is not one in `truth`.
    """
    assert actual.shape == naive.shape == truth.shape, (
        f"{label}: shapes {tuple(actual.shape)}, {tuple(naive.shape)}, {tuple(truth.shape)}"
    )
    if actual.numel() == 0:
        return
    infinite = truth.isinf()
    if infinite.any():
        same = actual.double()[infinite] == truth[infinite]
        assert same.all(), f"{label}: {int((~same).sum())} of {same.numel()} infinities are wrong"
        actual, naive, truth = (t.where(~infinite, 0) for t in (actual, naive, truth))
    assert naive.isfinite().all(), f"{label}: plain torch's result: expected finite numbers"
    scale = truth.abs() if scale is None else torch.maximum(scale, truth.abs())
    float32 = scale if float32 is None else torch.maximum(scale, float32)
    floor = FOUR_ROUNDINGS * float32 + SMALLEST[actual.dtype]
    if rounded is not None:  # twice; a random walk of errors of a third of an ulp, by its tail
        floor = floor + 2 * ULP[actual.dtype] * rounded
    naive_error = ((naive.double() - truth).abs() - floor).clamp_min(0) / scale
    naive_error = naive_error[scale >= torch.finfo(actual.dtype).smallest_normal]
    worst = naive_error.max().item() if naive_error.numel() else 0.0
    allowed = factor * worst * scale + ULP[actual.dtype] / 2 * truth.abs() + floor
    resolved = truth.abs() > floor  # not all that is left of larger terms
    assert not resolved.any() or (truth.abs()[resolved] > allowed[resolved]).any(), (
        f"{label}: zeros would pass; plain torch's error is {worst:.1e} of the terms"
    )
    error = (actual.double() - truth).abs()
    wrong = ~(error <= allowed)
    if wrong.any():
        i = (error / allowed).nan_to_num(torch.inf).argmax().item()
        a, t, s, e, m = (x.flatten()[i].item() for x in (actual, truth, scale, error, allowed))
        raise AssertionError(
            f"{label}: error {e:.3e} > {m:.3e} in element {i} of {tuple(actual.shape)}: {a:.6e} for"
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
    label: str = "",
) -> None:
    """Compare the largest errors of `actual` and `naive`. An ulp of the largest number is allowed,
    or `floor` of it.

    NaN anywhere in `actual` fails.
    """
    assert actual.shape == naive.shape == truth.shape, (
        f"{label}: shapes {tuple(actual.shape)}, {tuple(naive.shape)}, {tuple(truth.shape)}"
    )
    if actual.numel() == 0:
        return
    scale = truth.abs().max().item()
    floor = (ULP[actual.dtype] if floor is None else floor) * max(
        scale, torch.finfo(actual.dtype).tiny
    )
    error = (actual.double() - truth).abs().max().item()
    naive_error = (naive.double() - truth).abs().max().item()
    assert error <= factor * naive_error + floor, (
        f"{label}: error {error:.3e} > {factor} * {naive_error:.3e} (naive) + {floor:.1e};"
        f" scale {scale:.3e}"
    )
