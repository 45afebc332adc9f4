"""quantized_linear and dequantize by csrc/cuda/quantized_*.cu and dequantize.cu.

The kernel depends on the number of rows of x:

    vector kernel    up to QUANTIZED_VECTOR_ROWS_<bits of x> of csrc/cuda/ops.h; int8: any number
                     where groups are not a multiple of 32
    matrix kernel    16 bits: up to FUSED_ROWS; int8: any number; float32: never
    dequantize, and torch's matmul: everything else

The limits are from instruction counts and an H100's rates, not measured on a GPU.

A decode step rounds rows to int8 where it computes their values: `rms_norm_round` and `glu_round`
each save a launch and a round trip to memory.
"""

import torch
from torch import Tensor

from fastlm import reference
from fastlm.cuda import constants, extension, multiprocessors, stream
from fastlm.memory_order import matrix

# The matrix kernel takes 3.5 us for 64 rows of a 4096 x 4096 W at best. dequantize takes 13 us
# before torch's matmul, which is about as fast per row as that kernel can be: at half of the
# kernel's best speed they break even at 250 rows.
FUSED_ROWS = 256
# weights dequantized at a time for torch's matmul: 32 MB in 16 bits stay in an H100's 50 MB of L2
_BLOCK_WEIGHTS = 1 << 24


def _contiguous(
    qdata: Tensor, scales: Tensor, zeros: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a weight as the kernels take it: contiguous, scales and offsets of one dtype. Reading
    two dtypes takes three more registers of the matrix kernels."""
    if zeros is None:
        return qdata.contiguous(), scales.contiguous(), None
    dtype = torch.promote_types(scales.dtype, zeros.dtype)
    return qdata.contiguous(), scales.to(dtype).contiguous(), zeros.to(dtype).contiguous()


def dequantize(
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty((qdata.shape[0], k), dtype=dtype, device=qdata.device)
    w = _contiguous(qdata, scales, zeros)
    extension().dequantize(*w, bits, group_size, out, stream(qdata))
    return out


def _dequantized_matmul(
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


def empty_int8_rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of rounding x: q, scale and sums of `reference.int8_rows`."""
    k = x.shape[-1]
    rows, group = x.numel() // k, min(group_size, k)
    runs = -(-k // group) * -(-group // reference.RUN_MAX)
    columns, padded = constants().ROUNDED_COLUMNS, constants().ROUNDED_ROWS
    q = torch.empty((rows, -(-k // columns) * columns), dtype=torch.int8, device=x.device)
    size = (2, runs, -(-rows // padded) * padded)
    scale, sums = torch.empty(size, dtype=torch.float32, device=x.device)
    return q, scale, sums


def int8_rows(
    x: Tensor, qdata: Tensor, scales: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `reference.int8_rows`, for a weight."""
    buffers = empty_int8_rows(x, group_size)
    extension().quantized_linear_round(
        matrix(x), qdata.contiguous(), scales.contiguous(), bits, group_size, *buffers, stream(x)
    )
    return buffers


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
    if act_bits == 8:
        rows = int8_rows(x, qdata, scales, bits, group_size)
        weight, k = (qdata, scales, zeros), x.shape[-1]
        _multiply_int8(*rows, weight, bias, bits, group_size, k, out.view(-1, out.shape[-1]))
        return out
    x, y = matrix(x), out.view(-1, out.shape[-1])
    weight = _contiguous(qdata, scales, zeros)
    is_float32, limits = x.dtype == torch.float32, constants()
    by_vectors = len(x) <= (
        limits.QUANTIZED_VECTOR_ROWS_32 if is_float32 else limits.QUANTIZED_VECTOR_ROWS_16
    )
    if not by_vectors and (len(x) > FUSED_ROWS or is_float32):
        _dequantized_matmul(x, weight, bias, bits, group_size, y)
    else:
        k = x.shape[1]
        _multiply(
            x, None, None, weight, _contiguous_float(bias), bits, group_size, k, y, by_vectors
        )
    return out


def rounded_linear(
    q: Tensor,
    scale: Tensor,
    sums: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    y = torch.empty((q.shape[0], qdata.shape[0]), dtype=dtype, device=q.device)
    if y.numel():
        _multiply_int8(q, scale, sums, (qdata, scales, zeros), bias, bits, group_size, k, y)
    return y


def _multiply_int8(
    q: Tensor,
    scale: Tensor,
    sums: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    y: Tensor,
) -> None:
    weight = _contiguous(*weight)
    limits = constants()
    max_rows = (
        limits.QUANTIZED_VECTOR_ROWS_32
        if y.dtype == torch.float32
        else limits.QUANTIZED_VECTOR_ROWS_8
    )
    # an instruction multiplies 32 columns: they must share a scale
    by_vectors = len(y) <= max_rows or (group_size < k and group_size % 32 != 0)
    _multiply(q, scale, sums, weight, _contiguous_float(bias), bits, group_size, k, y, by_vectors)


def _contiguous_float(bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    return (bias if bias.dtype != torch.float64 else bias.float()).contiguous()


def _multiply(
    x: Tensor,
    x_scale: Tensor | None,
    x_sums: Tensor | None,
    weight: tuple,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    y: Tensor,
    by_vectors: bool,
) -> None:
    kernels = extension()
    if by_vectors:
        kernels.quantized_linear_vector(
            x, x_scale, *weight, bias, bits, group_size, k, y, stream(x)
        )
        return
    stripe, count = kernels.quantized_linear_stripe(
        x, weight[0], bits, k, multiprocessors(x.device)
    )
    parts = None
    if count > 1:
        parts = torch.empty((count, *y.shape), dtype=torch.float32, device=x.device)
    kernels.quantized_linear_matrix(
        x, x_scale, x_sums, *weight, bias, bits, group_size, k, y, stripe, parts, stream(x)
    )
