"""quantized_linear and dequantize by csrc/cuda/quantized_*.cu and dequantize.cu.

By the rows of x:

    vector kernel    16 bits: 1 or 2; float32: to 4; rounded to int8: to 4, or any number where
                     groups are no multiple of 32
    matrix kernel    16 bits: to FUSED_ROWS; int8: any number; float32: never
    dequantize, and torch's matmul: the others

The limits are from instructions counted and an H100's rates, not measured on a GPU.
"""

import torch
from torch import Tensor

from fastlm import reference
from fastlm.cuda import extension, multiprocessors, stream

# A code of a 4096 x 4096 W costs a lane 4.3 instructions at 2 rows, 2.4 us in all and as long as
# its bytes take, 6.2 at 4 rows; the matrix kernel 2.4 at up to 8 rows. (int8: 1.5 at 4 rows.)
VECTOR_ROWS = {16: 2, 8: 4}  # by act_bits
VECTOR_ROWS_FLOAT32 = 4
# The matrix kernel takes 3.5 us for 64 rows of such a W at best, dequantize 13 us before torch's
# matmul, which is about as fast by rows as it can be: at half its speed they meet at 250 rows.
FUSED_ROWS = 256
# weights dequantized at a time for torch's matmul: 32 MB of 16 bits stay in an H100's L2 of 50 MB
_BLOCK_WEIGHTS = 1 << 24


def _rows(t: Tensor) -> Tensor:
    """(rows, width), the elements of a row side by side."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def dequantize(
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    if dtype == torch.float64:  # a reference's business
        return reference.dequantize_rows(qdata, scales, zeros, bits, group_size, k, dtype)
    out = torch.empty((qdata.shape[0], k), dtype=dtype, device=qdata.device)
    w = (t if t is None else t.contiguous() for t in (qdata, scales, zeros))
    extension().dequantize(*w, bits, group_size, out, stream(qdata))
    return out


def _many_rows(
    x: Tensor, weight: tuple, bias: Tensor | None, bits: int, group_size: int, y: Tensor
):
    qdata, scales, zeros = weight
    if bias is not None:
        bias = bias.to(y.dtype)
    k = x.shape[1]
    step = max(1, _BLOCK_WEIGHTS // k)
    for begin in range(0, qdata.shape[0], step):
        rows = slice(begin, begin + step)
        block = dequantize(
            qdata[rows], scales[rows], None if zeros is None else zeros[rows], bits, group_size, k,
            x.dtype,
        ).t()  # fmt: skip
        if bias is None:
            torch.mm(x, block, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, block, out=y[:, rows])


def quantized_linear_forward(
    x: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    act_bits: int,
) -> Tensor:
    out = torch.empty((*x.shape[:-1], qdata.shape[0]), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, y, k = _rows(x), out.view(-1, out.shape[-1]), x.shape[-1]
    weight = qdata.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype != torch.float64 else bias.float()).contiguous()
    rows, x_scale, x_sums = x.shape[0], None, None
    by_vectors = rows <= (
        VECTOR_ROWS_FLOAT32 if x.dtype == torch.float32 else VECTOR_ROWS[act_bits]
    )
    if act_bits == 8:
        # an instruction multiplies 32 columns: they must have one scale
        by_vectors = by_vectors or (group_size < k and group_size % 32 != 0)
        x, x_scale, x_sums = _rounded(x, weight, bits, group_size)
    elif not by_vectors and (rows > FUSED_ROWS or x.dtype == torch.float32):
        _many_rows(x, weight, bias, bits, group_size, y)
        return out
    kernels = extension()
    if by_vectors:
        kernels.quantized_linear_vector(
            x, x_scale, *weight, bias, bits, group_size, k, y, stream(x)
        )
        return out
    stripe, count = kernels.quantized_linear_stripe(
        x, weight[0], bits, k, multiprocessors(x.device)
    )
    parts = None
    if count > 1:
        parts = torch.empty((count, *y.shape), dtype=torch.float32, device=x.device)
    kernels.quantized_linear_matrix(
        x, x_scale, x_sums, *weight, bias, bits, group_size, k, y, stripe, parts, stream(x)
    )
    return out


def _rounded(x: Tensor, weight: tuple, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x in int8; the scale of each run, (runs, rows), and scale * sum; rows of whole tiles."""
    rows, k = x.shape
    group = min(group_size, k)
    runs = weight[1].shape[1] * -(-group // reference.RUN_MAX)
    q = torch.empty((rows, -(-k // 16) * 16), dtype=torch.int8, device=x.device)
    scale, sums = torch.empty((2, runs, -(-rows // 64) * 64), dtype=torch.float32, device=x.device)
    extension().quantized_linear_round(x, *weight[:2], bits, group_size, q, scale, sums, stream(x))
    return q, scale, sums
