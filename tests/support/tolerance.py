"""How near is near enough: the error against float64, compared with plain torch's in the same
dtype.

A kernel passes if its largest error is at most `factor` times that of the naive computation in the
same low precision, plus `floor` times the truth's scale. The floor covers the case where the naive
error happens to be (nearly) zero: one rounding of the result, i.e. half an ulp of the dtype, is
always allowed.
"""

import torch
from torch import Tensor

ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 2**-52}


def assert_near(
    actual: Tensor,
    naive: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    floor: float | None = None,
    what: str = "",
) -> None:
    """Compare `actual` with `naive`, both in the low precision, and with `truth` in float64. All
    have one shape.

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
