"""Convert integers packed into 32-bit words (GPTQ, AWQ, compressed-tensors) to a `QuantizedWeight`:
``w = scale * (q - zero)`` with q and zero unsigned.
"""

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.ops.quantized_weight import QuantizedWeight, pack_rows

WORDS, SCALES = ("I32",), ("F16", "BF16", "F32")  # dtypes, in safetensors' spelling


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack (R, W) int32 to (R, W * 32 / bits) uint8, lowest bits first. bits: 1, 2, 4 or 8."""
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (data[..., None] >> shifts & 2**bits - 1).flatten(-2)


def from_words(
    words: Tensor,
    bits: int,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    shape: tuple[int, int],
) -> QuantizedWeight:
    """Build a weight from ``words`` (N, ceil(K * bits / 32)) int32, ``scales`` (N, G) and ``zeros``
    (N, G), unsigned integers of any dtype, or None for 2^(bits - 1).

    2 and 4 bits become 4, 8 stay 8. Nothing is rounded: scales keep their dtype, and offsets are
    float32, in which their products are exact.
    """
    n, k = shape
    width = 8 if bits == 8 else 4
    if bits == 2:
        qdata = pack_rows(unpack(words, 2)[:, :k].to(torch.int16) - 8, 4)
    elif bits == 4:  # the bytes of the words are those of qdata
        qdata = words.contiguous().view(torch.uint8)[:, : (k + 1) // 2].contiguous()
    else:
        qdata = (words.contiguous().view(torch.uint8)[:, :k] ^ 128).view(torch.int8).contiguous()
    if zeros is None:
        zeros = torch.full(scales.shape, 2 ** (bits - 1))
    half, offset = 2 ** (width - 1), None
    if not bool((zeros == half).all()):
        offset = (scales.float() * (half - zeros.float())).contiguous()
    return QuantizedWeight(qdata, scales.contiguous(), offset, width, group_size, (n, k))


def infer_group_size(k: int, groups: int, stated: object, name: str) -> int:
    """Return the columns per scale: as stated if it fits the number of scales, else K / groups."""
    if type(stated) is int and stated > 0 and -(-k // stated) == groups:
        return stated
    if k % groups:
        raise InputError(
            f"{name}: expected a group size that yields {groups} groups of {k} columns, got"
            f" {stated!r:.40}"
        )
    return k // groups


def is_in_order(index: Tensor | None, k: int, group_size: int, groups: int) -> bool:
    """Return True if column c uses the scale of group c // group_size. InputError: a group that
    does not exist.
    """
    if index is None:
        return True
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise InputError(
            f"g_idx: expected groups from 0 to {groups - 1}, got {int(index.min())} to"
            f" {int(index.max())}"
        )
    return torch.equal(index.long(), torch.arange(k) // group_size)


def dequantize_scattered(
    words: Tensor, bits: int, scales: Tensor, zeros: Tensor, index: Tensor, k: int
) -> Tensor:
    """Dequantize a matrix (N, K) in which column c uses the scale of group ``index[c]``.

    The result has the dtype of the scales. The exact product is rounded to it once, as in the
    formats' own readers.
    """
    q = unpack(words, bits)[:, :k].float() - zeros.float()[:, index.long()]
    return (q * scales.float()[:, index.long()]).to(scales.dtype)
