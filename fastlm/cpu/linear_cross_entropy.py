"""linear_cross_entropy by csrc/cpu/linear_cross_entropy.h, one chunk of rows at a time.

This file allocates the gradients, three or four float32 per row, and the workspaces of one chunk.

`on_p`, `on_target`, `on_all` and `on_entropy` are each row's coefficients of its probabilities, its
target, all classes and its entropy in the gradient (fastlm/ops/cross_entropy.py).

The weight's gradient is summed over chunks in float32. Rejected: slabs of the vocabulary, which
need no such sum for a 16-bit weight but cost 5 products; torch's matrix products on chunks, which
sum 16-bit gradients in 16 bits.
"""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu
from fastlm.cpu.cross_entropy import check_target, contiguous_rows, expand_weights
from fastlm.row_losses import row_losses

_MAX_CHUNK_ROWS = 512  # per chunk: the weight's float32 gradient is read and written once per chunk
# Bytes for a chunk's exponentials. Half of this where the float32 gradient of a 16-bit weight needs
# memory as well; more where an eighth of that gradient is more.
_WORKSPACE = 64 << 20


class CpuLogitChunks:
    """Iterates over chunks of rows; holds the arguments and workspaces that all chunks share."""

    def __init__(self, input, linear_weight, linear_bias, target, class_weight, smooth, *options):
        ignore_index, softcap, scale = options
        self.input, self.weight = contiguous_rows(input), contiguous_rows(linear_weight)
        self.bias = None if linear_bias is None else linear_bias.float().contiguous()
        self.target = check_target(target, len(linear_weight), ignore_index)
        self.class_weight = expand_weights(class_weight, smooth, len(linear_weight))
        self.options = (ignore_index, softcap or 0.0, scale)
        step = _cpu.CHUNK_ROW_STEP
        self.row_bytes = self.sizes(step)[0] // step  # of the exponentials
        budget = _WORKSPACE if input.dtype.itemsize == 4 else _WORKSPACE // 2
        budget = max(budget, linear_weight.numel() * 4 // 8)
        self.rows = min(_MAX_CHUNK_ROWS, max(budget // self.row_bytes // step * step, step))
        sizes = (*(len(input),) * 3, len(input) if smooth else 0)
        outputs = [input.new_empty(size, dtype=torch.float32) for size in sizes]
        self.shift, self.log_sum, self.nll, self.smoothed = outputs
        self.entropy = None
        self.workspaces = {}

    def __iter__(self):
        for i in range(0, len(self.input), self.rows):
            yield slice(i, min(i + self.rows, len(self.input)))

    def sizes(self, rows: int) -> tuple[int, int]:
        """Return the bytes of a chunk's exponentials and the float32 elements of its statistics."""
        return _cpu.linear_cross_entropy_workspace(self.input, len(self.weight), rows)

    def workspace(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return exponentials, stats and at_target of a chunk. Only the last chunk differs in
        size."""
        rows = part.stop - part.start
        if rows not in self.workspaces:
            self.workspaces.clear()
            exponentials, stats = self.sizes(rows)
            self.workspaces[rows] = (
                self.shift.new_empty(exponentials if self.row_bytes else 0, dtype=torch.uint8),
                self.shift.new_empty(stats),
                self.shift.new_empty(rows),
            )
        return self.workspaces[rows]

    def scores(self, part: slice, exponentials, stats, at_target) -> None:
        _cpu.linear_cross_entropy_scores(
            self.input[part],
            self.weight,
            self.bias,
            self.target[part],
            self.class_weight,
            *self.options,
            exponentials,
            stats,
            at_target,
            self.shift[part],
            self.log_sum[part],
            self.nll[part],
            self.smoothed[part],
            None if self.entropy is None else self.entropy[part],
        )

    def statistics(self) -> None:
        """Compute only the scores' statistics, without keeping exponentials."""
        self.rows, self.row_bytes = _MAX_CHUNK_ROWS, 0
        for part in self:
            _, stats, at_target = self.workspace(part)
            self.scores(part, None, stats, at_target)

    def gradients(
        self,
        part,
        on_p,
        on_target,
        on_all,
        have_exponentials,
        d_input,
        d_weight,
        d_bias,
        on_entropy=None,
        entropy=None,
    ) -> None:
        _cpu.linear_cross_entropy_gradients(
            on_p,
            on_target,
            on_all,
            on_entropy,
            self.input[part],
            self.weight,
            self.bias,
            self.target[part],
            self.class_weight,
            self.shift[part],
            self.log_sum[part],
            entropy,
            *self.options,
            have_exponentials,
            *self.workspace(part),
            None if d_input is None else d_input[part],
            d_weight,
            d_bias,
            part.start > 0,
        )

    def outputs(self, linear_bias, need_input, need_weight, weight_dtype=torch.float32):
        """Allocate the gradients, that of the bias in float32; None where not needed."""
        rows = len(self.input)
        return (
            self.input.new_empty(self.input.shape) if need_input else None,
            _accumulator(self.weight.shape, rows, weight_dtype) if need_weight else None,
            None if linear_bias is None else _accumulator(linear_bias.shape, rows),
        )


def _accumulator(shape: torch.Size, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate a gradient: the first chunk writes it, the others add. Without rows it is zero."""
    make = torch.empty if rows else torch.zeros
    return make(shape, dtype=dtype, device="cpu")


def _or_empty(t: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device="cpu") if t is None else t


def linear_cross_entropy_forward(
    input,
    linear_weight,
    linear_bias,
    target,
    class_weight,
    smooth,
    ignore_index,
    softcap,
    logit_scale,
):
    chunks = CpuLogitChunks(
        input,
        linear_weight,
        linear_bias,
        target,
        class_weight,
        smooth,
        ignore_index,
        softcap,
        logit_scale,
    )
    chunks.statistics()
    return chunks.shift, chunks.log_sum, chunks.nll, chunks.smoothed


def linear_cross_entropy_backward(
    on_p,
    on_target,
    on_all,
    input,
    linear_weight,
    linear_bias,
    target,
    class_weight,
    shift,
    log_sum,
    ignore_index,
    softcap,
    logit_scale,
    need_input,
    need_weight,
    on_entropy=None,
    entropy=None,
):
    """Return the gradients of `linear_cross_entropy`, or of `linear_logprobs` with the last two
    arguments."""
    used = (on_p != 0) | (on_target != 0)
    for on in (on_all, on_entropy):
        if on is not None:
            used |= on != 0
    if not used.all():  # as in `linear_cross_entropy_loss`
        rows = used.nonzero()[:, 0]
        d_input, *rest = linear_cross_entropy_backward(
            on_p[rows],
            on_target[rows],
            None if on_all is None else on_all[rows],
            input[rows],
            linear_weight,
            linear_bias,
            target[rows],
            class_weight,
            shift[rows],
            log_sum[rows],
            ignore_index,
            softcap,
            logit_scale,
            need_input,
            need_weight,
            None if on_entropy is None else on_entropy[rows],
            None if entropy is None else entropy[rows],
        )
        if need_input:
            d_input = input.new_zeros(input.shape).index_copy_(0, rows, d_input)
        return d_input, *rest
    chunks = CpuLogitChunks(
        input,
        linear_weight,
        linear_bias,
        target,
        class_weight,
        on_all is not None,
        ignore_index,
        softcap,
        logit_scale,
    )
    chunks.shift, chunks.log_sum = shift, log_sum
    single_chunk = len(input) <= chunks.rows
    dtype = input.dtype if single_chunk else torch.float32
    gradients = chunks.outputs(linear_bias, need_input, need_weight, dtype)
    on_p, on_target = on_p.contiguous(), on_target.contiguous()
    on_all = None if on_all is None else on_all.contiguous()
    on_entropy = None if on_entropy is None else on_entropy.contiguous()
    for part in chunks:
        chunks.gradients(
            part,
            on_p[part],
            on_target[part],
            None if on_all is None else on_all[part],
            False,
            *gradients,
            None if on_entropy is None else on_entropy[part],
            None if entropy is None else entropy[part],
        )
    bias_dtype = input.dtype if linear_bias is None else linear_bias.dtype
    return (
        _or_empty(gradients[0], input.dtype),
        _or_empty(gradients[1], input.dtype).to(input.dtype),
        _or_empty(gradients[2], bias_dtype).to(bias_dtype),
    )


def linear_cross_entropy_loss(
    input,
    linear_weight,
    linear_bias,
    target,
    class_weight,
    on_nll,
    on_smoothed,
    on_square,
    ignore_index,
    softcap,
    logit_scale,
    need_input,
    need_weight,
):
    smooth, valid = on_smoothed is not None, target != ignore_index
    if not valid.all():  # leave out the ignored rows: in fine-tuning they are most of a batch
        rows = valid.nonzero()[:, 0]
        loss, d_input, *rest = linear_cross_entropy_loss(
            input[rows],
            linear_weight,
            linear_bias,
            target[rows],
            class_weight,
            on_nll[rows],
            None if on_smoothed is None else on_smoothed[rows],
            None if on_square is None else on_square[rows],
            ignore_index,
            softcap,
            logit_scale,
            need_input,
            need_weight,
        )
        # NaN where the mean is over no rows, as in torch
        loss = loss + (0 * on_nll[~valid]).sum()
        if need_input:
            d_input = input.new_zeros(input.shape).index_copy_(0, rows, d_input)
        return loss, d_input, *rest
    chunks = CpuLogitChunks(
        input,
        linear_weight,
        linear_bias,
        target,
        class_weight,
        smooth,
        ignore_index,
        softcap,
        logit_scale,
    )
    gradients = chunks.outputs(linear_bias, need_input, need_weight)
    total = 0.0 if chunks.class_weight is None else chunks.class_weight.sum()
    for part in chunks:
        chunks.scores(part, *chunks.workspace(part))
        on_p = on_nll[part]
        if on_smoothed is not None:
            on_p = on_p + on_smoothed[part] * total
        if on_square is not None:
            lse = chunks.shift[part] + chunks.log_sum[part]
            on_p = on_p + 2 * on_square[part] * lse
        on_all = None if on_smoothed is None else on_smoothed[part]
        chunks.gradients(part, on_p, on_nll[part], on_all, True, *gradients)
    lse = chunks.shift + chunks.log_sum
    losses = row_losses(on_nll, on_smoothed, on_square, chunks.nll, chunks.smoothed, lse, valid)
    return (
        losses.sum(),
        _or_empty(gradients[0], input.dtype),
        *(_or_empty(g, torch.float32) for g in gradients[1:]),
    )


def linear_cross_entropy_loss_backward(d_loss, d_input, d_weight, d_bias, weight_dtype, bias_dtype):
    factor = d_loss.item()  # a CPU tensor: nothing to wait for
    d_weight_out = d_weight.new_empty(d_weight.shape, dtype=weight_dtype)
    _cpu.scale_to(d_weight, factor, d_weight_out)
    return d_input * d_loss, d_weight_out, (d_bias * d_loss).to(bias_dtype)
