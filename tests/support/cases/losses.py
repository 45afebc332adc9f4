"""The options, targets and definition of losses over classes, for their tables of cases."""

from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cases.base import Case, Terms, choice_or_none, drop_unset


def options_of(case: Case) -> dict:
    return case["options"] | {"ignore_index": case["ignore_index"]}


def draw(r: Random, classes: int) -> Case:
    reduction = r.choice(["none", "mean", "sum"])
    return {
        "ignored": r.choice([0.0, 0.0, 0.3, 1.0]),
        "ignore_index": r.choice([-100, -100, -1, 0, classes - 1]),
        "weight": r.random() < 0.3,
        "spread": r.choice([0.1, 1.0, 3.0, 20.0]),
        "options": drop_unset(
            label_smoothing=choice_or_none(r, 0.1, 1.0),
            z_loss=choice_or_none(r, 1e-3, 0.1),
            softcap=choice_or_none(r, 2.0, 30.0),
            logit_scale=choice_or_none(r, 0.3),
            reduction=reduction,
            num_items=choice_or_none(r, 77) if reduction == "mean" else None,
            return_lse=r.random() < 0.3,
        ),
    }


def case(*, ignored=0.25, ignore_index=-100, weight=False, spread=3.0, **options) -> Case:
    return {
        "ignored": ignored, "ignore_index": ignore_index, "weight": weight, "spread": spread,
        "options": options,
    }  # fmt: skip


def targets(case: Case, rows: int, classes: int) -> tuple[Tensor, list[Tensor], dict]:
    """Return the target, the weights of the classes if there are any, and the options."""
    ignored, ignore_index = case["ignored"], case["ignore_index"]
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < ignored] = ignore_index
    if rows and ignored < 1:
        target[0] = max(0, classes - 1 - (ignore_index == classes - 1))  # the last that may be one
    if rows > 1 and 0 < ignored < 1:
        target[-1] = ignore_index
    options = options_of(case)
    if (target == ignore_index).all() and "num_items" not in options:
        options["reduction"] = "sum"  # the mean over zero rows is NaN
    return target, [torch.rand(classes) + 0.1] if case["weight"] else [], options


def has_loss(target: Tensor, ignore_index: int) -> Tensor:
    """Return which rows have a loss. All do if the target is a probability for each class."""
    if target.is_floating_point():
        return torch.ones(target.shape[:-1], dtype=torch.bool, device=target.device)
    return target != ignore_index


def definition(
    logits,
    target,
    weight=None,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    reduction="mean",
    num_items=None,
    return_lse=False,
):
    """Compute the loss with torch's own functions, in float32 or wider."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    w = None if weight is None else weight.to(z.dtype)
    soft = target.is_floating_point()
    target = target.to(z.dtype) if soft else target
    rows = F.cross_entropy(
        z, target, w, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    # its gradient has the precision of the logits' differences, not that of a rounded lse
    shift = z.detach().amax(-1, keepdim=True)
    lse = (shift + torch.logsumexp(z - shift, -1, keepdim=True))[..., 0]
    valid = has_loss(target, ignore_index)
    loss = rows + torch.where(valid, z_loss * lse**2, 0.0)
    if reduction == "mean":
        count = valid.sum() if w is None or soft else w[target[valid]].sum()
        loss = loss.sum() / (count if num_items is None else num_items)
    elif reduction == "sum":
        loss = loss.sum()
    return (loss, lse) if return_lse else loss


class LossScores(NamedTuple):
    """Logits in float64 as a kernel sees them: by how much each is below its row's largest."""

    below: Tensor
    log_sum: Tensor  # of e^-below, (N, 1); lse is the largest plus this
    lse: Tensor  # (N, 1)
    p: Tensor
    p_size: Tensor  # where p is less than the smallest float32, it is 0 there: four roundings
    slope: Tensor  # of softcap
    size: Tensor  # of the terms of a logit, whose rounding is its error


def scores(z: Tensor, size: Tensor | None, *, softcap=None, scale=1.0) -> LossScores:
    """Softcap and scale logits. `size`: of their terms; None if they are exact."""
    slope = torch.ones_like(z)
    if softcap is not None:
        slope = 1 - torch.tanh(z / softcap) ** 2
        z = softcap * torch.tanh(z / softcap)
    z = z * scale
    if size is not None:
        size = size * scale
    elif softcap is not None or scale != 1:
        size = z.abs()
    else:  # a common offset costs nothing
        size = torch.zeros_like(z)
    shift = z.amax(-1, keepdim=True)
    below = shift - z
    log_sum = (-below).exp().sum(-1, keepdim=True).log()
    p = (-below - log_sum).exp()
    return LossScores(below, log_sum, shift + log_sum, p, p.clamp_min(2**-104), slope, size)


def sizes(
    logits,
    target,
    weight=None,
    upstream=(),
    *,
    size=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    reduction="mean",
    num_items=None,
    return_lse=False,
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Return the sizes of the terms of loss and lse, of the terms of the logits' gradient, and of
    the latter's terms in float32. `size`: of the logits' terms; None if they are exact.

    The gradient of a logit is a difference of p and 1. A logit's own error makes one of p.
    """
    below, log_sum, lse, p, p_size, _, size = scores(
        logits * logit_scale, None if size is None else size * logit_scale, softcap=softcap
    )
    if logit_scale != 1:
        size = torch.maximum(size, logits.abs() * logit_scale)
    slope = 1 if softcap is None else 1 - torch.tanh(logits * logit_scale / softcap) ** 2
    valid = has_loss(target, ignore_index)
    class_weight = logits.new_ones(logits.shape[-1]) if weight is None else weight
    if target.is_floating_point():
        of, items = target, len(target)
    else:
        at = target.where(valid, 0)
        of, items = (
            F.one_hot(at, logits.shape[-1]) * valid[..., None],
            class_weight[at][valid].sum(),
        )
    of = (1 - label_smoothing) * of + label_smoothing / logits.shape[-1] * valid[..., None]
    of = of * class_weight  # the weight of each class's nll
    of_lse = (z_loss * valid)[..., None]
    error = size + (p * size).sum(-1, keepdim=True)  # of a logit and of lse
    nll = below + log_sum + error
    lse_size = log_sum + (lse - log_sum).abs() + (p * size).sum(-1, keepdim=True)
    rows = (of * nll).sum(-1) + (of_lse * lse_size**2)[..., 0]
    items = 1.0 if reduction != "mean" else items if num_items is None else num_items
    results = {"loss": rows if reduction == "none" else rows.sum() / items, "lse": lse_size[..., 0]}
    if not upstream:
        return results, None, None
    on = (upstream[0].abs() / items)[..., None]
    of_p = on * (of.sum(-1, keepdim=True) + 2 * of_lse * lse_size)
    if return_lse:
        of_p = of_p + upstream[1].abs()[..., None]
    rest = on * of
    gradient = logit_scale * slope * (of_p * p + rest)
    # slope is 1 - t^2; tanh's quotient and sum, t cap and z / cap are rounded: 9 roundings of t^2
    of_slope = slope + 9 / 4 * (1 - slope)
    in_float32 = logit_scale * of_slope * (of_p * p_size * (1 + below + log_sum + error) + rest)
    return results, gradient, in_float32


def tensors(case: Case, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the input and the weight of a product of logits and, if there is one, the bias."""
    rows, classes = case["shape"][0], case["shape"][-1]
    x = torch.randn(rows, width)
    w = torch.randn(classes, width) * case["spread"] / width**0.5
    bias = torch.randn(classes)
    match case.get("values"):
        case "peaked":
            x = x * 8
        case "all negative":  # a maximum that starts at 0 gives lse = -inf
            bias = bias - 200
        case "common offset":  # representable in all dtypes
            bias = torch.full_like(bias, 8192.0)
        case "far above the first":  # e^(z - base) overflows if base is a score of the first
            w[:64] /= 64
            w[64:] *= 8
    return x.to(dtype), w.to(dtype), [bias.to(dtype)] if case.get("bias") else []


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the logits in float32 or wider, as kernels do."""
    tensors = [t for t in (x, w, bias) if t is not None]
    return F.linear(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors))


def logit_size(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the size of the terms of each logit."""
    return F.linear(x.abs(), w.abs(), None if bias is None else bias.abs())


def product_sizes(
    x: Tensor, w: Tensor, scale: Tensor, float32: Tensor, dtype: torch.dtype
) -> dict[str, Terms]:
    """Return the terms of the gradients of a product, computed from the terms of the logits'
    gradient. That gradient is rounded to the dtype, and so is the exponential from which it is
    computed. Below the dtype's smallest normal number the spacing of numbers does not shrink
    further. Each addition rounds the sum of the terms: these errors are a random walk, and four of
    its deviations are sqrt(n / 3) times four roundings.
    """
    x, w = x.abs(), w.abs()
    square = scale.clamp_min(torch.finfo(dtype).smallest_normal).where(scale > 0, 0).square()
    of_rows, of_classes = (float32 + (n / 3) ** 0.5 * scale for n in scale.shape)

    def rounded(a: Tensor, of_a: Tensor, b: Tensor) -> Tensor:
        root = (a @ b.square()).sqrt()
        # of one or two features a gradient is a function: half an ulp of each term, of one sign
        return torch.maximum(root, of_a @ b / 4) if b.shape[1] < 3 else root

    return {
        "dx": Terms(scale @ w, of_classes @ w, rounded(square, scale, w)),
        "dw": Terms(scale.mT @ x, of_rows.mT @ x, rounded(square.mT, scale.mT, x)),
        "dbias": Terms(scale.sum(0), of_rows.sum(0), square.sum(0).sqrt()),
    }
