"""GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds columns one after another. The columns that
follow compensate for each error.

Order: groups by descending activation (the sum of their diagonal of the Hessian), and columns
likewise within each group. The most important columns are rounded while most others can still
compensate. A group's columns stay together, so the stored weight needs no permutation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.ops.quantize_weight import code_range, quantize_weight, round_groups
from fastlm.ops.quantized_weight import QuantizedWeight, check_group_size, pack_rows
from fastlm.quant.step_result import output_error
from fastlm.quant.targets import Scheme

# Shares of the Hessian's mean diagonal that are added to it in turn, until its Cholesky factor
# exists. The first is GPTQ's.
DAMPING = (0.01, 0.1, 1.0)
# columns of a block; its errors reach the later blocks in one product
_BLOCK = 128


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    name: str = "weight",
    warn: Callable[[str], None] = lambda line: None,
) -> QuantizedWeight:
    """Quantize weight (N, K) so that ``trace(D hessian D^T)``, D the error, is small.

    Args:
        weight: any float dtype. The computation is in the dtype of `hessian`, float32 or float64.
        hessian: (K, K), the sum of ``x x^T`` over inputs x of the layer.
        scheme: of the result.
        name: of the layer, for warnings.
        warn: receives a line if the Hessian has no Cholesky factor.

    Returns the better, by that trace, of GPTQ and of rounding to nearest weighted by the Hessian's
    diagonal. If no damping of `DAMPING` helps, it returns rounding to nearest.
    """
    w = weight.detach().to(hessian.dtype)
    nearest = quantize_weight(w, **vars(scheme), importance=hessian.diagonal())
    groups = column_order(hessian.diagonal(), check_group_size(scheme.group_size, w.shape[1]))
    order = torch.cat(groups)
    factor = inverse_factor(hessian[order][:, order], name, warn)
    if factor is None:
        return nearest
    compensated = _round_columns(w, factor.to(w.dtype), groups, scheme)
    return min(nearest, compensated, key=lambda q: output_error(w, q, hessian))


def column_order(diagonal: Tensor, size: int) -> list[Tensor]:
    """Return the columns of each group: groups by descending mean of the diagonal, columns by
    descending diagonal.
    """
    groups = torch.arange(len(diagonal), device=diagonal.device).split(size)
    means = torch.stack([diagonal[g].mean() for g in groups])
    order = means.argsort(descending=True, stable=True).tolist()
    return [groups[i][diagonal[groups[i]].argsort(descending=True, stable=True)] for i in order]


def inverse_factor(hessian: Tensor, name: str, warn: Callable[[str], None]) -> Tensor | None:
    """Return the upper Cholesky factor of the inverse of the damped Hessian, float64; None, after a
    warning, if no damping yields one.

    A feature that was always 0 gets the diagonal 1: its column is rounded to nearest.
    """
    h = hessian.double()
    h = h + torch.diag((h.diagonal() == 0).to(h.dtype))
    size = h.diagonal().mean()
    for damping in DAMPING:
        damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * size)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed or not lower.isfinite().all():
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if failed or not upper.isfinite().all():
            continue
        if damping != DAMPING[0]:
            warn(f"{name}: the Hessian needed a damping of {damping:g} of its mean diagonal")
        return upper
    tried = ", ".join(f"{d:g}" for d in DAMPING)
    warn(f"{name}: rounded to nearest: the Hessian has no Cholesky factor, damped by {tried}")
    return None


def _round_columns(w: Tensor, u: Tensor, groups: list[Tensor], scheme: Scheme) -> QuantizedWeight:
    """Round column by column. `u`: from `inverse_factor`, in the order of `groups`."""
    n, k = w.shape
    size = check_group_size(scheme.group_size, k)
    order = torch.cat(groups)
    residual = w[:, order].contiguous()  # in this order; updated with each column's error
    q = torch.empty_like(residual)
    scales = residual.new_empty(n, len(groups))
    zeros = None if scheme.symmetric else torch.empty_like(scales)
    low, high = code_range(scheme.bits, scheme.symmetric)
    begin = 0
    for group in groups:
        end, index = begin + len(group), int(group.min()) // size
        # (w - q)^2 / u^2 is the cost of a column's error after the later columns compensated for it
        costs = u.diagonal()[begin:end].square().reciprocal()
        _, s, z = round_groups(
            residual[:, begin:end], costs, scheme.bits, scheme.symmetric, scheme.scale_dtype
        )
        scales[:, index] = s
        if z is not None and zeros is not None:
            zeros[:, index] = z
        for first in range(begin, end, _BLOCK):
            last = min(first + _BLOCK, end)
            errors = residual.new_empty(n, last - first)
            for i in range(first, last):
                column = residual[:, i]
                code = ((column if z is None else column - z) / s).round_().clamp_(low, high)
                q[:, i] = code
                error = (column - (code * s if z is None else code * s + z)) / u[i, i]
                errors[:, i - first] = error
                residual[:, i + 1 : last].addr_(error, u[i, i + 1 : last], alpha=-1)
            residual[:, last:].addmm_(errors, u[first:last, last:], alpha=-1)
        begin = end
    unsorted = torch.empty_like(q)
    unsorted[:, order] = q
    dtype = scheme.scale_dtype
    return QuantizedWeight(
        pack_rows(unsorted, scheme.bits), scales.to(dtype),
        None if zeros is None else zeros.to(dtype), scheme.bits, size, (n, k),
    )  # fmt: skip
