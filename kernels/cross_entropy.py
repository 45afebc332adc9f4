"""Compute lse and nll of rows of logits, and their gradient, with two kernels.

z = softcap(logit_scale * (logits + bias)); softcap, bias, the sum over all classes and the entropy
of softmax(z) are compile-time flags. `linear_cross_entropy` and `linear_logprobs` run the same two
kernels on their chunks of logits.

Forward: a program reads a row, or one of its `splits` parts, in blocks. Every lane has a running
maximum m and s = sum of e^(z - m). That is one exponential per element (one of e^(z - m) and
e^(m - z) is 1), and threads exchange nothing before the end:

    row:      | part 0                    | part 1                    |      parts: 1 with many rows
              | BLOCK | BLOCK | BLOCK ... | BLOCK | BLOCK | BLOCK ... |
    lane j:      j       j       j           (m, s, sum of weight, sum of weight * (m - z),
                                              or sum of e^(z - m) * (z - m) for the entropy)

Few rows with many classes would leave most of the GPU idle. Such rows are split, and a second
kernel adds the parts in a fixed order. Rejected: atomics, because their order varies, and with it
the bits of the result.

Backward: a program handles one block of one row: dz = on_p * p - on_target * (v == target)
- on_all * weight - on_entropy * p * (log p + entropy), with lse given as two numbers. A row whose
coefficients are all 0 is not read.

Logits are read once in each direction, and the gradient is written once. All arithmetic is float32.
A target outside the classes is not looked up: the loss and gradient of its row are NaN. Nothing was
measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import Config, launch, multiprocessors
from fastlm.memory_order import dense

_BLOCK = 4096  # classes: 16 per thread, whose m and s stay in registers
_WAVES = 4  # programs per multiprocessor; with fewer, rows are split
# The lowest float32: below every logit except -inf and itself (a mask with finfo.min creates rows
# of it). A maximum that started at -inf would compute -inf - -inf for a masked class
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_MIN_LOG = tl.constexpr(-128.0)  # e^-128 is 0 in float32, and 0 * -128 is 0 where 0 * -inf is NaN


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _scaled_logits(logits, bias, at, mask, scale, cap, BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """Return z of some classes of a row, and dz / d(scale * logit)."""
    z = tl.load(logits + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    z *= scale
    slope = 1.0
    if CAPPED:
        t = _tanh(z / cap)
        z = cap * t
        slope = 1.0 - t * t
    return z, slope


@triton.jit
def _store_row(
    row,
    m,
    s,
    weights,
    spread,
    expected,
    logits,  # this row's
    bias,
    target,
    shift,
    log_sum,
    nll,
    smoothed,
    entropy,
    classes,
    ignore_index,
    scale,
    cap,
    BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Store a row's results, given the sums over all its classes."""
    log_s = tl.log(s)
    tl.store(shift + row, m)
    tl.store(log_sum + row, log_s)
    if SMOOTH:
        tl.store(smoothed + row, spread + log_s * weights)
    label = tl.load(target + row)
    exists = (label >= 0) & (label < classes)
    z, _ = _scaled_logits(
        logits, bias, tl.where(exists, label, 0), exists, scale, cap, BIAS, CAPPED
    )
    loss = tl.where(exists, log_s - (z - m), float("nan"))
    tl.store(nll + row, tl.where(label == ignore_index, 0.0, loss))
    if ENTROPY:
        h = log_s - expected / s
        tl.store(entropy + row, tl.where((label == ignore_index) | (h < 0.0), 0.0, h))


@triton.jit
def _combine_sums(m, s, weights, spread, expected, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr):
    """Convert sums relative to several maxima into sums relative to one."""
    top = tl.max(m, 0)
    if ENTROPY:
        expected = tl.sum((expected + s * tl.maximum(m - top, _MIN_LOG)) * tl.exp(m - top), 0)
    s = tl.sum(s * tl.exp(m - top), 0)
    if SMOOTH:
        spread = tl.sum(spread + (top - m) * weights, 0)
        weights = tl.sum(weights, 0)
    return top, s, weights, spread, expected


@triton.jit
def _forward(
    logits,  # (rows, classes), row stride `stride`
    bias,  # (classes,), or any tensor if not BIAS
    target,  # (rows,) int64
    class_weight,  # (classes,), or (rows, classes), or None: weights of 1
    parts,  # (4, rows, splits) float32: m, s, sum of weights, sum of weight * (m - z);
    # (3, rows, splits) for the entropy: m, s, sum of e^(z - m) * (z - m)
    shift,  # (rows,) float32
    log_sum,  # (rows,) float32
    nll,  # (rows,) float32
    smoothed,  # (rows,) float32, or empty
    entropy,  # (rows,) float32, or None if not ENTROPY
    classes,
    stride,
    ignore_index,
    scale,
    cap,
    weight_stride,  # between the rows of class_weight; 0: the same weights for all
    width,  # classes per part, a multiple of BLOCK
    splits,
    BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr,  # not with SMOOTH
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    logits += row * stride
    m = tl.full([BLOCK], _LOWEST, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    expected = tl.zeros([BLOCK], tl.float32)
    for start in range(part * width, tl.minimum((part + 1) * width, classes), BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < classes
        z, _ = _scaled_logits(logits, bias, at, mask, scale, cap, BIAS, CAPPED)
        z = tl.where(mask, z, float("-inf"))
        new_max = tl.maximum(m, z)
        if SMOOTH:
            w = tl.where(mask, 1.0, 0.0)
            if WEIGHTED:
                w = tl.load(class_weight + row * weight_stride + at, mask=mask, other=0.0)
                w = w.to(tl.float32)
            spread += (new_max - m) * weights + tl.where(mask, w * (new_max - z), 0.0)
            weights += w
        e = tl.exp(-tl.abs(z - m))
        if ENTROPY:
            rise = tl.minimum(tl.maximum(z - m, _MIN_LOG), -_MIN_LOG)
            expected = tl.where(z > m, (expected - s * rise) * e, expected + rise * e)
        s = tl.where(z > m, s * e + 1.0, s + e)
        m = new_max
    m, s, weights, spread, expected = _combine_sums(
        m, s, weights, spread, expected, SMOOTH, ENTROPY
    )  # fmt: skip
    if SPLIT:
        part_sums = parts + row * splits + part
        step = tl.num_programs(0).to(tl.int64) * splits
        tl.store(part_sums, m)
        tl.store(part_sums + step, s)
        if SMOOTH:
            tl.store(part_sums + 2 * step, weights)
            tl.store(part_sums + 3 * step, spread)
        if ENTROPY:
            tl.store(part_sums + 2 * step, expected)
    else:
        _store_row(
            row, m, s, weights, spread, expected, logits, bias, target, shift, log_sum, nll,
            smoothed, entropy, classes, ignore_index, scale, cap, BIAS, CAPPED, SMOOTH, ENTROPY,
        )  # fmt: skip


@triton.jit
def _add_parts(
    logits,  # as in _forward
    bias,
    target,
    parts,
    shift,
    log_sum,
    nll,
    smoothed,
    entropy,
    classes,
    stride,
    ignore_index,
    scale,
    cap,
    splits,
    BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < splits
    step = tl.num_programs(0).to(tl.int64) * splits
    parts += row * splits + at
    m = tl.load(parts, mask=mask, other=_LOWEST)
    s = tl.load(parts + step, mask=mask, other=0.0)
    weights = tl.zeros([BLOCK], tl.float32)
    spread = weights
    expected = weights
    if SMOOTH:
        weights = tl.load(parts + 2 * step, mask=mask, other=0.0)
        spread = tl.load(parts + 3 * step, mask=mask, other=0.0)
    if ENTROPY:
        expected = tl.load(parts + 2 * step, mask=mask, other=0.0)
    m, s, weights, spread, expected = _combine_sums(
        m, s, weights, spread, expected, SMOOTH, ENTROPY
    )  # fmt: skip
    _store_row(
        row, m, s, weights, spread, expected, logits + row * stride, bias, target, shift, log_sum,
        nll, smoothed, entropy, classes, ignore_index, scale, cap, BIAS, CAPPED, SMOOTH, ENTROPY,
    )  # fmt: skip


@triton.jit
def _backward(
    on_p,  # (rows,) float32
    on_target,  # (rows,) float32
    on_all,  # (rows,) float32, or any tensor if not SMOOTH
    on_entropy,  # (rows,) float32, or None if not ENTROPY
    logits,  # (rows, classes), row stride `stride`
    bias,  # (classes,), or any tensor if not BIAS
    target,  # (rows,) int64
    class_weight,  # (classes,), or (rows, classes), or None: weights of 1
    shift,  # (rows,) float32
    log_sum,  # (rows,) float32
    entropy,  # (rows,) float32, or None if not ENTROPY
    d_logits,  # (rows, classes), contiguous; may be logits
    classes,
    stride,
    ignore_index,
    scale,
    cap,
    weight_stride,
    BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < classes
    label = tl.load(target + row)
    valid = label != ignore_index
    missing = valid & ((label < 0) | (label >= classes))
    on_class = tl.where(valid, tl.load(on_target + row), 0.0)
    on_prob = tl.where(missing, float("nan"), tl.load(on_p + row))
    # a row that does not contribute to the loss has a gradient of 0, even where a logit is NaN
    used = (on_prob != 0.0) | (on_class != 0.0)
    if SMOOTH:
        all_classes = tl.load(on_all + row)
        used |= all_classes != 0.0
    if ENTROPY:
        on_row_entropy = tl.load(on_entropy + row)
        used |= on_row_entropy != 0.0
    read = at < tl.where(used, classes, 0)
    z, slope = _scaled_logits(logits + row * stride, bias, at, read, scale, cap, BIAS, CAPPED)
    logp = z - tl.load(shift + row) - tl.load(log_sum + row)
    if ENTROPY:
        on_prob -= on_row_entropy * (tl.maximum(logp, _MIN_LOG) + tl.load(entropy + row))
    dz = on_prob * tl.exp(logp)
    dz = tl.where(on_prob == 0.0, 0.0, dz)
    less = tl.where(at == label, on_class, 0.0)
    if SMOOTH:
        w = all_classes
        if WEIGHTED:
            of_row = tl.load(class_weight + row * weight_stride + at, mask=mask, other=0.0)
            w *= of_row.to(tl.float32)
        less += w
    dz -= less  # as one sum: with a single class on_p equals it, and the difference is 0
    grad = tl.where(read, dz * slope * scale, 0.0)
    tl.store(d_logits + row * classes + at, grad.to(d_logits.dtype.element_ty), mask=mask)


def _config(classes: int) -> Config:
    block = min(_BLOCK, triton.next_power_of_2(classes))
    return Config({"BLOCK": block}, num_warps=max(1, min(8, block // 128)))


def _weight_stride(class_weight: Tensor | None) -> int:
    return 0 if class_weight is None or class_weight.dim() == 1 else class_weight.stride(0)


def row_statistics(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    smooth: bool,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    entropy: Tensor | None = None,
) -> None:
    """Fill `outputs` (shift, log_sum, nll, smoothed; contiguous) for the rows of logits + bias.

    `entropy` is filled too if it is not None; it cannot be combined with `smooth`.
    """
    rows, classes = logits.shape
    logits, config = dense(logits), _config(classes)
    blocks = triton.cdiv(classes, config.sizes["BLOCK"])
    max_splits = triton.cdiv(_WAVES * multiprocessors(logits.device), max(1, rows))
    blocks_per_part = triton.cdiv(blocks, min(blocks, max_splits))
    splits = triton.cdiv(blocks, blocks_per_part)
    parts = outputs[0]
    if splits > 1:
        make = {"dtype": torch.float32, "device": logits.device}
        sums = 4 if smooth else 2 if entropy is None else 3
        parts = torch.empty(sums, rows, splits, **make)
    width = blocks_per_part * config.sizes["BLOCK"]
    operands = (logits, bias if bias is not None else logits, target.contiguous())
    sizes = (classes, logits.stride(0), ignore_index, logit_scale, softcap or 1.0)
    flags = {"BIAS": bias is not None, "CAPPED": softcap is not None, "SMOOTH": smooth}
    flags["ENTROPY"] = entropy is not None
    launch(
        _forward, (rows, splits), *operands, class_weight, parts, *outputs, entropy, *sizes,
        _weight_stride(class_weight), width, splits, config=config,
        WEIGHTED=class_weight is not None, SPLIT=splits > 1, **flags,
    )  # fmt: skip
    if splits > 1:
        adding = Config({"BLOCK": triton.next_power_of_2(splits)}, num_warps=1)
        launch(
            _add_parts, (rows,), *operands, parts, *outputs, entropy, *sizes, splits,
            config=adding, **flags,
        )  # fmt: skip


def row_gradients(
    on_p: Tensor,
    on_target: Tensor,
    on_all: Tensor | None,
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    d_logits: Tensor,
    on_entropy: Tensor | None = None,
    entropy: Tensor | None = None,
) -> None:
    """Fill `d_logits`: contiguous, any float dtype. It may be `logits` where that is contiguous."""
    rows, classes = logits.shape
    logits, config = dense(logits), _config(classes)
    on_p, on_target = on_p.contiguous(), on_target.contiguous()
    launch(
        _backward,
        (rows, triton.cdiv(classes, config.sizes["BLOCK"])),
        on_p,
        on_target,
        on_p if on_all is None else on_all.contiguous(),
        None if on_entropy is None else on_entropy.contiguous(),
        logits,
        logits if bias is None else bias,
        target.contiguous(),
        class_weight,
        shift,
        log_sum,
        entropy,
        d_logits,
        classes,
        logits.stride(0),
        ignore_index,
        logit_scale,
        softcap or 1.0,
        _weight_stride(class_weight),
        config=config,
        BIAS=bias is not None,
        CAPPED=softcap is not None,
        SMOOTH=on_all is not None,
        WEIGHTED=class_weight is not None,
        ENTROPY=on_entropy is not None,
    )


def row_outputs(target: Tensor, smooth: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate shift, log_sum, nll and smoothed (empty unless `smooth`)."""
    make = {"dtype": torch.float32, "device": target.device}
    shift, log_sum, nll = (torch.empty(target.shape, **make) for _ in range(3))
    return shift, log_sum, nll, torch.empty(target.shape if smooth else 0, **make)


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    smooth: bool,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = row_outputs(target, smooth)
    weight = class_weight.contiguous() if smooth and class_weight is not None else None
    options = (ignore_index, softcap, logit_scale)
    row_statistics(logits, None, target, weight, smooth, *options, outputs)
    return outputs


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
    weight = class_weight.contiguous() if on_all is not None and class_weight is not None else None
    row_gradients(
        on_p, on_target, on_all, logits, None, target, weight, shift, log_sum, ignore_index,
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
    stats = torch.empty(3, len(target), dtype=torch.float32, device=logits.device)
    shift, log_sum, nll = stats.unbind(0)
    outputs = (shift, log_sum, nll, nll)
    row_statistics(
        logits, None, target, None, False, ignore_index, softcap, logit_scale, outputs
    )  # fmt: skip
    loss = nll.sum()
    if mean:
        loss = loss / (target != ignore_index).sum()
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
    valid = target != ignore_index
    on_row = torch.where(valid, d_loss / valid.sum() if mean else d_loss, 0.0)
    shift, log_sum, _ = stats.unbind(0)
    return cross_entropy_backward(
        on_row, on_row, None, logits, target, None, shift, log_sum, ignore_index, softcap,
        logit_scale,
    )  # fmt: skip
