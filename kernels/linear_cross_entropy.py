"""Cross-entropy of x W^T + bias in chunks of rows.

cuBLAS computes the matrix products, `cross_entropy`'s two kernels the losses and the gradients of
the logits.

    per chunk of rows:   logits   = x[chunk] W^T               float32, (chunk, V)
                         lse, nll = forward(logits + bias)     reads logits once
                         d_logits = backward(logits + bias)    reads them again, writes x's dtype
                         d_input[chunk] = d_logits W
                         d_weight      += d_logits^T x[chunk]  summed in float32 in memory

Logits are float32: cuBLAS accumulates them in float32, and 16-bit products can keep that
(``out_dtype``). Rounding them would cost the loss 2^-9 of each logit. ``addmm`` adds to d_weight in
place, reading and writing it once per chunk; that, and tiles that fill the GPU, is why chunks are
large.

Memory in addition to the results: a chunk's logits and their gradient, 6 bytes per logit (4 for
float32, whose gradient overwrites the logits). At its peak, in the backward of
`F.cross_entropy(F.linear(x, w).float())`, torch holds 12 bytes for each of all N V logits. A chunk
has N / 4 rows: from 512 rows on

    chunk * V * 6  <=  N * V * 12 / 8,      and never more than `_WORKSPACE` where 128 rows fit.

Fewer rows form one to four chunks of up to 128. One result is larger than it looks: d_weight is
float32, 4 V D bytes (2.1 GB for 128256 x 4096, whose workspace is 0.8 GB), from the forward until
the backward rounds it to 16 bits. Summed over the chunks in 16 bits, it would lose precision that
torch's own product keeps.

The host never waits for the GPU. It therefore computes ignored rows too, which the CPU leaves out:
their coefficients, and so their gradients, are 0. For d_weight their x is set to 0 too, because
0 * NaN would be NaN.

Rejected: one kernel per chunk, with one program per row, that writes the 16-bit gradient over the
float32 logits it has just summed (in ascending blocks, with barriers between loads and stores, and
a row stride of 2 V elements for the products). From an H100's figures, 3.35 TB/s and some 700
TFLOP/s:

- Time: two kernels move 4 + 4 + 4 + 2 bytes per logit (written by the product, read, read,
  written), 4.2 ps, next to 6 D FLOP, 35 ps at D = 4096, 9 at 1024. One kernel moves as much: a row
  of 128256 classes is 0.5 MB, one row on each of 132 multiprocessors 68 MB, and the L2 has 50. If
  all second reads were hits, as they may be below 90 thousand classes, it would save 4 bytes,
  1.2 ps: 3 % at D = 4096, 9 % at 1024.
- Memory: 4 bytes per logit instead of 6; chunks with two thirds as many rows would save the same.
- Against it: rows are its only parallelism (the 128 of a chunk are less than one per
  multiprocessor), and a forgotten barrier is a race that no interpreter finds.

So it is worth a try once its gain can be measured on a GPU; nothing was measured on one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels.cross_entropy import row_gradients, row_outputs, row_statistics
from fastlm.row_losses import row_losses

_TILE = 128  # rows of a product's tile
_WORKSPACE = 1 << 30  # bytes: 1300 rows of 128 thousand classes


def _chunk_rows(rows: int, classes: int, itemsize: int) -> int:
    bytes_per_row = classes * (4 if itemsize == 4 else 4 + itemsize)
    max_rows = min(rows // 4, _WORKSPACE // bytes_per_row)
    return min(rows, max(_TILE, max_rows // _TILE * _TILE))


class TritonLogitChunks:
    """Iterates over chunks of rows and their logits; holds the workspace and the gradients."""

    def __init__(self, input, linear_weight, linear_bias, target, class_weight, *options):
        self.x, self.w, self.target, self.options = input, linear_weight, target, options
        self.bias = None if linear_bias is None else linear_bias.contiguous()
        self.class_weight = None if class_weight is None else class_weight.contiguous()
        classes = len(linear_weight)
        self.rows = max(1, _chunk_rows(len(input), classes, input.element_size()))
        make = {"dtype": torch.float32, "device": input.device}
        self.logits = torch.empty(self.rows, classes, **make)
        self.d_logits = self.logits  # in place, element by element
        self.make = make

    def __iter__(self):
        for i in range(0, len(self.x), self.rows):
            part = slice(i, min(i + self.rows, len(self.x)))
            x, logits = self.x[part], self.logits[: part.stop - i]
            if x.dtype == torch.float32:
                torch.mm(x, self.w.t(), out=logits)
            elif x.device.type == "cpu":
                logits.copy_(F.linear(x.float(), self.w.float()))
            else:
                torch.mm(x, self.w.t(), out_dtype=torch.float32, out=logits)
            yield part, logits

    def statistics(self, part: slice, logits: Tensor, smooth: bool, outputs, entropy=None) -> None:
        shift, log_sum, nll, smoothed = outputs
        chunk = (shift[part], log_sum[part], nll[part], smoothed[part] if smooth else smoothed)
        row_statistics(
            logits, self.bias, self.target[part], self.class_weight, smooth, *self.options, chunk,
            None if entropy is None else entropy[part],
        )  # fmt: skip

    def outputs(self, linear_bias: Tensor | None, need_input: bool, need_weight: bool) -> None:
        """Allocate the gradients, those of weight and bias in float32; empty where not needed."""
        x, w, make = self.x, self.w, self.make
        if x.dtype != torch.float32:
            self.d_logits = torch.empty(self.logits.shape, dtype=x.dtype, device=x.device)
        self.d_input = torch.empty(x.shape if need_input else 0, dtype=x.dtype, device=x.device)
        self.d_weight = torch.empty(w.shape if need_weight else 0, **make)
        self.d_bias = torch.zeros(0 if linear_bias is None else len(w), **make)
        if not len(x):
            self.d_weight.zero_()

    def gradients(
        self, part: slice, logits: Tensor, on_p, on_target, on_all, stats, on_entropy=None,
        entropy=None,
    ) -> None:  # fmt: skip
        x, target = self.x[part], self.target[part]
        d_logits = self.d_logits[: len(x)]
        shift, log_sum = (t[part] for t in stats)
        row_gradients(
            on_p, on_target, on_all, logits, self.bias, target, self.class_weight, shift, log_sum,
            *self.options, d_logits, on_entropy, None if entropy is None else entropy[part],
        )  # fmt: skip
        if self.d_input.numel():
            torch.mm(d_logits, self.w, out=self.d_input[part])
        if self.d_weight.numel():
            used = (on_p != 0) | (on_target != 0)
            for on in (on_all, on_entropy):
                if on is not None:
                    used |= on != 0
            self._add_to_weight(d_logits.t(), x.masked_fill(~used[:, None], 0), part.start == 0)
        if self.bias is not None:
            self.d_bias += d_logits.sum(0, dtype=torch.float32)

    def _add_to_weight(self, d_logits: Tensor, x: Tensor, first: bool) -> None:
        d_weight = self.d_weight
        if x.device.type == "cpu":  # torch's 16-bit products have 16-bit results there
            d_logits, x = d_logits.float(), x.float()
        mixed = {} if x.dtype == torch.float32 else {"out_dtype": torch.float32}
        if first:
            torch.mm(d_logits, x, **mixed, out=d_weight)
        else:
            torch.addmm(d_weight, d_logits, x, **mixed, out=d_weight)


def linear_cross_entropy_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    smooth: bool,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (ignore_index, softcap, logit_scale)
    chunks = TritonLogitChunks(input, linear_weight, linear_bias, target, class_weight, *options)
    outputs = row_outputs(target, smooth)
    for part, logits in chunks:
        chunks.statistics(part, logits, smooth, outputs)
    return outputs


def linear_cross_entropy_backward(
    on_p: Tensor,
    on_target: Tensor,
    on_all: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (ignore_index, softcap, logit_scale)
    chunks = TritonLogitChunks(input, linear_weight, linear_bias, target, class_weight, *options)
    chunks.outputs(linear_bias, need_input, need_weight)
    for part, logits in chunks:
        on_all_part = None if on_all is None else on_all[part]
        chunks.gradients(part, logits, on_p[part], on_target[part], on_all_part, (shift, log_sum))
    bias_dtype = input.dtype if linear_bias is None else linear_bias.dtype
    return chunks.d_input, chunks.d_weight.to(input.dtype), chunks.d_bias.to(bias_dtype)


def linear_cross_entropy_loss(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    on_nll: Tensor,
    on_smoothed: Tensor | None,
    on_square: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    smooth, valid = on_smoothed is not None, target != ignore_index
    options = (ignore_index, softcap, logit_scale)
    chunks = TritonLogitChunks(input, linear_weight, linear_bias, target, class_weight, *options)
    chunks.outputs(linear_bias, need_input, need_weight)
    shift, log_sum, nll, smoothed = outputs = row_outputs(target, smooth)
    total = len(linear_weight) if class_weight is None else class_weight.float().sum()
    # `where`, not a factor of 0: a mean over zero rows has a factor of NaN
    on_target = torch.where(valid, on_nll, 0.0)
    on_all = None if on_smoothed is None else torch.where(valid, on_smoothed, 0.0)
    for part, logits in chunks:
        chunks.statistics(part, logits, smooth, outputs)
        on_p = on_target[part]
        if on_all is not None:
            on_p = on_p + on_all[part] * total
        if on_square is not None:
            lse_part = shift[part] + log_sum[part]
            on_p = on_p + torch.where(valid[part], 2 * on_square[part] * lse_part, 0.0)
        on_all_part = None if on_all is None else on_all[part]
        chunks.gradients(part, logits, on_p, on_target[part], on_all_part, (shift, log_sum))
    lse = shift + log_sum
    loss = row_losses(on_nll, on_smoothed, on_square, nll, smoothed, lse, valid)
    return loss.sum(), chunks.d_input, chunks.d_weight, chunks.d_bias


def linear_cross_entropy_loss_backward(
    d_loss: Tensor,
    d_input: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale the gradients by d_loss. The float32 product is rounded once, which is how torch
    multiplies a 16-bit tensor by a 0-dim one."""
    gradients = ((d_input, d_input.dtype), (d_weight, weight_dtype), (d_bias, bias_dtype))
    scaled = [torch.empty(t.shape, dtype=dtype, device=t.device) for t, dtype in gradients]
    for (t, _), out in zip(gradients, scaled):
        torch.mul(t, d_loss, out=out)
    return scaled[0], scaled[1], scaled[2]
