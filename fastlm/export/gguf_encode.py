"""Encode weights as GGUF's block formats, without quantizing again.

    QuantizedWeight              block format
    4 bits, symmetric            Q4_0   d = scale
    4 bits, with offsets         Q4_1   d = scale, m = offset - 8 * scale
    8 bits, symmetric            Q8_0   d = scale

A block has 32 columns, so a group must be a multiple of 32 (its blocks repeat the scale) and 32
must divide a row. d and m are float16. A scale that float16 cannot represent is rounded, which
`rounded` counts; the bfloat16 scales of usual weights are all exact. Scales below 2^-14 lose bits.
If this changes weights, the matrix is refused.
"""

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from fastlm.errors import InputError
from fastlm.ops.quantized_weight import QuantizedWeight

BLOCK = 32
MAX_ERROR = 2**-8  # as a share of a scale: bfloat16's rounding error
# smaller errors, as a share of a matrix's largest scale, are ignored: those of dead rows
IGNORED_ERROR = 2**-16
DENSE = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


def block_format(name: str, weight: Tensor | QuantizedWeight) -> GGMLQuantizationType:
    """Return the format of ``weight``. InputError: no format can store it; the message names the
    group size that would work.
    """
    if isinstance(weight, Tensor):  # llama.cpp needs vectors in float32
        return GGMLQuantizationType.F32 if weight.dim() == 1 else DENSE[weight.dtype]
    _, k = weight.shape
    if k % BLOCK:
        raise InputError(
            f"{name}: expected rows of a multiple of {BLOCK} columns for GGUF, got {k}: quantize"
            " without this layer"
        )
    if weight.group_size % BLOCK and weight.group_size < k:
        raise InputError(
            f"{name}: expected groups of a multiple of {BLOCK} for GGUF (quantize with --group-size"
            f" {BLOCK}), got {weight.group_size}"
        )
    if weight.bits == 8 and weight.zeros is not None:
        raise InputError(
            f"{name}: expected 4 bits, or 8 without offsets, for GGUF, got 8 bits with offsets"
        )
    if weight.bits == 8:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.Q4_0 if weight.zeros is None else GGMLQuantizationType.Q4_1


def row_bytes(kind: GGMLQuantizationType, k: int) -> int:
    """Return the bytes of a row of ``k`` values."""
    block, size = GGML_QUANT_SIZES[kind]
    return k // block * size


def encode_tensor(name: str, weight: Tensor | QuantizedWeight) -> tuple[np.ndarray, int]:
    """Return ``(data, rounded)``: the tensor as GGUF stores it (bytes (N, bytes of a row), or
    float32 and float16 arrays), and the number of scales and offsets that float16 rounds.
    InputError: float16 changes scales by more than `MAX_ERROR`.
    """
    kind = block_format(name, weight)
    if isinstance(weight, Tensor):
        data = weight.detach().cpu().contiguous()
        if kind is GGMLQuantizationType.BF16:
            return data.view(torch.uint8).numpy(), 0
        return data.to(torch.float32 if data.dim() == 1 else data.dtype).numpy(), 0
    n, k = weight.shape
    first = torch.arange(0, k, BLOCK) // weight.group_size  # the group of each block
    fields = [weight.scales.double()]
    if weight.zeros is not None:
        fields.append(weight.zeros.double() - 8 * fields[0])
    head, rounded = [], 0
    for field in fields:
        half = field.half()
        if not bool(half.isfinite().all()):
            raise InputError(f"{name}: expected scales up to 65504, got {field.abs().max():.3g}")
        error, steps = (half.double() - field).abs(), fields[0].abs()
        size = torch.maximum(field.abs(), steps)  # an offset may be near 0
        if bool((error > MAX_ERROR * size + IGNORED_ERROR * steps.max()).any()):
            raise InputError(
                f"{name}: expected scales that float16 holds within {100 * MAX_ERROR:.2g} %, got"
                f" {steps[steps > 0].min():.3g}"
            )
        rounded += int((error > 0).sum())
        head.append(half[:, first].reshape(-1, 1).view(torch.uint8))
    if weight.bits == 8:
        body = weight.qdata.reshape(-1, BLOCK).view(torch.uint8)
    else:
        nibbles = torch.stack((weight.qdata & 15, weight.qdata >> 4), dim=-1).reshape(-1, BLOCK)
        body = nibbles[:, : BLOCK // 2] | nibbles[:, BLOCK // 2 :] << 4
    return torch.cat((*head, body), dim=1).reshape(n, -1).numpy(), rounded
