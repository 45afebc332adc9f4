"""cross_entropy by csrc/cuda/cross_entropy.cu."""

import torch
from torch import Tensor

from fastlm.cuda import constants, extension, multiprocessors, stream
from fastlm.memory_order import dense

_WAVES = 4  # blocks per multiprocessor, below which rows are split


def _weights(class_weight: Tensor | None, smooth: bool) -> Tensor | None:
    """Return (V) float32 weights of the sum over all classes, or None where they are 1 or there is
    no sum."""
    return class_weight.float().contiguous() if smooth and class_weight is not None else None


def _parts(logits: Tensor) -> Tensor | None:
    """Allocate the sums of the parts of split rows; None where rows are not split."""
    rows, classes = logits.shape
    max_parts = classes * logits.element_size() // constants().CROSS_ENTROPY_PART_BYTES
    parts = min(max_parts, -(-_WAVES * multiprocessors(logits.device) // max(1, rows)))
    if parts <= 1:
        return None
    return torch.empty((rows, parts, 4), dtype=torch.float32, device=logits.device)


def row_statistics(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    smooth: bool,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    """Write `outputs` (shift, log_sum, nll, smoothed), each contiguous."""
    extension().cross_entropy_forward(
        dense(logits), target.contiguous(), _weights(class_weight, smooth), smooth, ignore_index,
        softcap or 0.0, logit_scale, _parts(logits), *outputs, stream(logits),
    )  # fmt: skip


def row_gradients(
    on_p: Tensor,
    on_target: Tensor,
    on_all: Tensor | None,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    d_logits: Tensor,
) -> None:
    """Write `d_logits`: contiguous, dtype of `logits`; may be `logits` where that is contiguous."""
    extension().cross_entropy_backward(
        on_p.contiguous(), on_target.contiguous(), None if on_all is None else on_all.contiguous(),
        dense(logits), target.contiguous(), _weights(class_weight, on_all is not None),
        shift, log_sum, ignore_index, softcap or 0.0, logit_scale, d_logits, stream(logits),
    )  # fmt: skip


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    smooth: bool,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    make = {"dtype": torch.float32, "device": logits.device}
    shift, log_sum, nll = torch.empty((3, *target.shape), **make).unbind(0)
    smoothed = torch.empty(target.shape if smooth else 0, **make)
    outputs = shift, log_sum, nll, smoothed if smooth else None
    options = (ignore_index, softcap, logit_scale)
    row_statistics(logits, target, class_weight, smooth, *options, outputs)
    return shift, log_sum, nll, smoothed


def cross_entropy_backward(
    on_p: Tensor,
    on_target: Tensor,
    on_all: Tensor | None,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    row_gradients(
        on_p, on_target, on_all, logits, target, class_weight, shift, log_sum, ignore_index,
        softcap, logit_scale, d_logits,
    )  # fmt: skip
    return d_logits


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    mean: bool,
    softcap: float | None,
    logit_scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    make = {"dtype": torch.float32, "device": logits.device}
    stats, loss = torch.empty((3, *target.shape), **make), torch.empty((), **make)
    shift, log_sum, nll = stats.unbind(0)
    target = target.contiguous()
    options = (ignore_index, softcap, logit_scale)
    row_statistics(logits, target, None, False, *options, (shift, log_sum, nll, None))
    extension().cross_entropy_sum(nll, target, ignore_index, mean, loss, stream(logits))
    return loss, stats if keep else stats.new_empty(0)


def cross_entropy_loss_backward(
    d_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    ignore_index: int,
    mean: bool,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    share = torch.empty(1, dtype=torch.float32, device=logits.device)
    shift, log_sum, _ = stats.unbind(0)
    extension().cross_entropy_loss_backward(
        d_loss, dense(logits), target.contiguous(), shift, log_sum, ignore_index, mean,
        softcap or 0.0, logit_scale, share, d_logits, stream(logits),
    )  # fmt: skip
    return d_logits
