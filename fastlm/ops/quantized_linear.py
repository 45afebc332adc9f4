"""Products x @ W^T with an int8 or int4 W: W4A16, W8A16, W4A8, W8A8."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm import reference
from fastlm.backend import Support
from fastlm.errors import InputError
from fastlm.operator import declare
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.ops.wrong_type import TYPE_FAILURES, explain


def quantized_linear(
    x: Tensor, qweight: QuantizedWeight, bias: Tensor | None = None, *, act_bits: int = 16
) -> Tensor:
    """``F.linear(x, qweight.dequantize(x.dtype), bias)``, the weight read as int8 or int4.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 on the reference).
        qweight: (N, K), see `QuantizedWeight`.
        bias: (N,), any float dtype, or None.
        act_bits: 16: x unchanged. 8: x is rounded to int8 first, ``q = round(x * (127 / absmax))``
            with one absmax per row and run. A run is a group of the weight's columns, split every
            512 columns. Products and sums within a run are exact integers. (llama.cpp and OpenVINO
            do the same. One scale per row loses 7 to 12 dB on SmolLM2's activations, which have
            outliers: perplexity +3.0 % against +0.2 % for groups of 32.) On a CPU with AMX, 64 rows
            or more and groups below 128 are rounded to bfloat16 instead, which is more accurate and
            faster there.

    Returns (..., N) in x's dtype; sums are float32. Gradients reach x (``dy @ W``; with act_bits 8
    as if x had not been rounded) and bias; the weight is frozen. With few rows, the memory traffic
    is that of `qweight`.

    Raises:
        InputError: sizes, dtypes or devices that do not fit.
    """
    try:
        if not isinstance(qweight, QuantizedWeight):
            raise InputError(f"qweight: expected a QuantizedWeight, got {type(qweight).__name__}")
        n, k = qweight.shape
        if x.dim() == 0 or x.shape[-1] != k:
            raise InputError(
                f"x: expected shape (..., {k}) for a weight of ({n}, {k}), got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise InputError(f"x: expected a float dtype, got {x.dtype}")
        if x.device != qweight.qdata.device:
            raise InputError(
                f"x: expected device {qweight.qdata.device} as qweight, got {x.device}"
            )
        if act_bits not in (8, 16):
            raise InputError(f"act_bits: expected 8 or 16, got {act_bits!r}")
        if bias is not None and (
            bias.shape != (n,) or not bias.is_floating_point() or bias.device != x.device
        ):
            raise InputError(
                f"bias: expected a float tensor ({n},) on {x.device},"
                f" got {bias.dtype} {tuple(bias.shape)} on {bias.device}"
            )
        return _forward(
            x,
            qweight.qdata,
            qweight.scales,
            qweight.zeros,
            bias,
            qweight.bits,
            qweight.group_size,
            act_bits,
        )
    except TYPE_FAILURES as error:
        raise explain(error, quantized_linear, locals()) from None


def _flops(x, qdata, *_, **__):
    return 2 * math.prod(x) * qdata[0]


def _backward_flops(dy, qdata, scales, zeros, bits, group_size, k, **_):
    return 2 * math.prod(dy) * k


def _int8_flops(q, scale, sums, qdata, scales, zeros, bias, bits, group_size, k, *_, **__):
    return 2 * q[0] * k * qdata[0]


def _derivative(
    dy: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    need_x: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dx = _backward(dy, qdata, scales, zeros, bits, group_size, k) if need_x else None
    if not need_bias:
        return dx, None
    wide = torch.promote_types(dy.dtype, torch.float32)
    rows = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])  # not -1: W may have no rows
    return dx, rows.contiguous().sum(0, dtype=wide)  # the order of a sum depends on strides


_backward = declare(reference.quantized_linear_backward, "cpu triton", flops=_backward_flops)
_forward = declare(
    reference.quantized_linear_forward,
    "cpu triton cuda",
    outputs="y",
    backward=_derivative,
    gradients=("x", "bias"),
    saves={"k": lambda x: x.shape[-1]},
    flops=_flops,
)


def _not_float64(*arguments) -> bool:
    return arguments[-1] != torch.float64


_FLOATS = Support("float32, bfloat16 and float16 results", _not_float64)
# (rows, K) of a QuantizedWeight, or of rows taken from one. Dispatched by scales, as qdata is no
# float.
dequantize = declare(
    reference.dequantize,
    "cpu triton cuda",
    dispatch_arg="scales",
    supports=dict.fromkeys(("cpu", "triton", "cuda"), _FLOATS),
)


class Int8Rows(NamedTuple):
    """Rows x rounded to int8, for products with quantized weights of one format; see
    `reference.int8_rows`."""

    q: Tensor
    scale: Tensor
    sums: Tensor
    shape: torch.Size  # of x
    dtype: torch.dtype


# The product after `rms_norm_round` and `glu_round`. Dispatched by scales, as q is no float.
rounded_linear = declare(reference.rounded_linear, "cuda", dispatch_arg="scales", flops=_int8_flops)
