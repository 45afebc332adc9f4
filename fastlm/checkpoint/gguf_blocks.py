"""Convert the block formats of GGUF files to `QuantizedWeight`.

The result of each format (``d``, ``m``: the block's scale and offset):

    file             values               here              scale, offset
    F32 F16 BF16     w                    the same dtype
    Q4_0             d * (q - 8)          4 bits, group 32  d
    Q4_1             d * q + m            4 bits, group 32  d, m + 8 d
    Q2_K             d * q - m            4 bits, group 16  d, -m
    Q3_K             d * (q - 4)          4 bits, group 16  d
    Q4_K             d * q - m            4 bits, group 32  d, 8 d - m
    Q5_0 Q8_0        d * q                8 bits, group 32  d
    Q5_1 Q5_K        d * q +- m           8 bits, group 32  d, +- m
    Q6_K             d * q                8 bits, group 16  d
    IQ4_NL IQ4_XS    d * table[q]         8 bits, group 32  d
    MXFP4            2^e * e2m1           8 bits, group 32  2^(e - 1)
    NVFP4            e4m3 * e2m1          8 bits, group 16  e4m3 / 2

All products are exact in float32, so the result equals ``gguf.dequantize`` bit for bit, with one
exception. For Q4_1 and Q4_K the sum of the offset and 8 d is rounded when their magnitudes differ
by a factor of more than about 2^7 (Q4_K) or 2^13 (Q4_1). The weight is then off by at most one
float32 ulp of the weight or the offset, whichever is larger.
"""

from collections.abc import Callable

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from fastlm.backend import cpu_extension
from fastlm.ops.quantized_weight import QuantizedWeight

UNQUANTIZED = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

# whose scales are stored as float16: they stay in it
_FLOAT16_SCALES = (
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.IQ4_NL,
)

# Each unpacker: blocks (B, bytes) uint8 -> q (B, values), scale and offset (B, groups) float32; the
# offset is None where the format has none. For 4 bits q is the stored nibble 0..15 and the weight
# is scale * (q - 8) + offset; for 8 bits it is scale * q + offset.
Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _half(blocks: np.ndarray, offset: int) -> np.ndarray:
    """Return the float16 at byte ``offset`` of every block, as float32 (B, 1)."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Unpack (..., n) bytes to (..., 2n): the low nibbles, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q4_0(blocks: np.ndarray) -> Unpacked:
    return _nibbles(blocks[:, 2:]), _half(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> Unpacked:
    d = _half(blocks, 0)
    return _nibbles(blocks[:, 4:]), d, _half(blocks, 2) + 8 * d


def _q8_0(blocks: np.ndarray) -> Unpacked:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None


def _five_bits(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Unpack 32 values from 4 bytes of fifth bits and 16 bytes of nibbles."""
    return _nibbles(low) | np.unpackbits(high, axis=-1, bitorder="little") << 4


def _q5_0(blocks: np.ndarray) -> Unpacked:
    q = _five_bits(blocks[:, 2:6], blocks[:, 6:])
    return q.view(np.int8) - np.int8(16), _half(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> Unpacked:
    q = _five_bits(blocks[:, 4:8], blocks[:, 8:])
    return q.view(np.int8), _half(blocks, 0), _half(blocks, 2)


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and minimum (B, 8) of Q4_K and Q5_K: two float16 times 8 + 8 six-bit integers.

    The integers are stored in the twelve bytes from byte 4 on. The first four of each kind are the
    low 6 bits of bytes 0-3 and 4-7. The last four have their low nibbles in bytes 8-11 (scale low,
    minimum high) and their top 2 bits in the top of bytes 0-7.
    """
    first, second, rest = (blocks[:, a : a + 4] for a in (4, 8, 12))
    scale = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], axis=1)
    minimum = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], axis=1)
    return _half(blocks, 0) * scale, _half(blocks, 2) * minimum


def _q2_k(blocks: np.ndarray) -> Unpacked:
    pair = blocks[:, :16]
    d, m = _half(blocks, 80) * (pair & 15), _half(blocks, 82) * (pair >> 4)
    return _pairs(blocks[:, 16:80]) + 8, d, -m


def _q3_k(blocks: np.ndarray) -> Unpacked:
    bit = np.arange(8, dtype=np.uint8)[:, None]
    high = (blocks[:, None, :32] >> bit & 1).reshape(-1, 256)  # bit g of byte i: value i of run g
    packed, shift = blocks[:, 96:104], np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    low = np.concatenate([packed & 15, packed >> 4], axis=1)
    top = (blocks[:, None, 104:108] >> shift & 3).reshape(-1, 16)
    scale = (low | top << 4).astype(np.int8) - np.int8(32)
    return _pairs(blocks[:, 32:96]) + 4 * high + 4, _half(blocks, 108) * scale, None


def _pairs(packed: np.ndarray) -> np.ndarray:
    """Unpack (B, 64) bytes to (B, 256) values of 2 bits: per 32 bytes, four runs of 32 values."""
    shift = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    return (packed.reshape(-1, 2, 1, 32) >> shift & 3).reshape(-1, 256)


def _q4_k(blocks: np.ndarray) -> Unpacked:
    d, m = _k_scales(blocks)
    q = _nibbles(blocks[:, 16:].reshape(-1, 4, 32))  # each 32 bytes hold two groups of 32
    return q.reshape(-1, 256), d, 8 * d - m


def _q5_k(blocks: np.ndarray) -> Unpacked:
    d, m = _k_scales(blocks)
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    group = np.arange(8, dtype=np.uint8)[:, None]
    high = blocks[:, None, 16:48] >> group & 1  # bit g of byte i belongs to value i of group g
    return (low | high << 4).reshape(-1, 256).view(np.int8), d, -m


def _q6_k(blocks: np.ndarray) -> Unpacked:
    # halves of 128 values: 64 bytes of low nibbles, 32 bytes of high bit pairs
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shift = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shift & 3
    q = (low | high << 4).reshape(-1, 256).view(np.int8) - np.int8(32)
    return q, _half(blocks, 208) * blocks[:, 192:208].view(np.int8), None


# the values of a nibble; those of e2m1 are doubled
_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8
)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int8)


def _iq4_nl(blocks: np.ndarray) -> Unpacked:
    return _IQ4[_nibbles(blocks[:, 2:])], _half(blocks, 0), None


def _iq4_xs(blocks: np.ndarray) -> Unpacked:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    shift = np.array([0, 2, 4, 6], dtype=np.uint8)
    high = (blocks[:, 2:4, None] >> shift & 3).reshape(-1, 8)
    scale = (low | high << 4).astype(np.int8) - np.int8(32)
    q = _nibbles(blocks[:, 8:].reshape(-1, 8, 16)).reshape(-1, 256)
    return _IQ4[q], _half(blocks, 0) * scale, None


def _mxfp4(blocks: np.ndarray) -> Unpacked:
    scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return _E2M1[_nibbles(blocks[:, 1:])], scale, None


def _nvfp4(blocks: np.ndarray) -> Unpacked:
    byte = blocks[:, :4]
    exponent, mantissa = byte.astype(np.int32) >> 3 & 15, (byte & 7).astype(np.float32)
    # e4m3 without a sign: 2^(e - 7) * (1 + m / 8), 2^-6 * m / 8 where e is 0; half of it
    mantissa = np.where(exponent == 0, mantissa, mantissa + 8)
    scale = np.ldexp(mantissa, np.maximum(exponent, 1) - 11)
    scale = np.where(byte == 127, np.float32(0), scale)
    return _E2M1[_nibbles(blocks[:, 4:].reshape(-1, 4, 8)).reshape(-1, 64)], scale, None


UNPACK: dict[GGMLQuantizationType, tuple[Callable[[np.ndarray], Unpacked], int, int]] = {
    # unpacker, bits of the container, group size
    GGMLQuantizationType.Q4_0: (_q4_0, 4, 32),
    GGMLQuantizationType.Q4_1: (_q4_1, 4, 32),
    GGMLQuantizationType.Q5_0: (_q5_0, 8, 32),
    GGMLQuantizationType.Q5_1: (_q5_1, 8, 32),
    GGMLQuantizationType.Q8_0: (_q8_0, 8, 32),
    GGMLQuantizationType.Q2_K: (_q2_k, 4, 16),
    GGMLQuantizationType.Q3_K: (_q3_k, 4, 16),
    GGMLQuantizationType.Q4_K: (_q4_k, 4, 32),
    GGMLQuantizationType.Q5_K: (_q5_k, 8, 32),
    GGMLQuantizationType.Q6_K: (_q6_k, 8, 16),
    GGMLQuantizationType.IQ4_NL: (_iq4_nl, 8, 32),
    GGMLQuantizationType.IQ4_XS: (_iq4_xs, 8, 32),
    GGMLQuantizationType.MXFP4: (_mxfp4, 8, 32),
    GGMLQuantizationType.NVFP4: (_nvfp4, 8, 16),
}


# The extension reads the file's pages in place. numpy below 2.1 exports no read-only array.
EXPORTS_READ_ONLY = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 1)
# formats that the extension unpacks, in one pass; numpy needs ten
COMPILED = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0)


def unpack(rows: np.ndarray, kind: GGMLQuantizationType) -> QuantizedWeight:
    """Convert ``rows`` (N, bytes per row) uint8 of block format ``kind`` to a QuantizedWeight."""
    if kind in COMPILED and cpu_extension is not None and EXPORTS_READ_ONLY:
        return _unpack_by_extension(rows, kind)
    return unpack_by_numpy(rows, kind)


def _unpack_by_extension(rows: np.ndarray, kind: GGMLQuantizationType) -> QuantizedWeight:
    _, bits, group_size = UNPACK[kind]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n, k = rows.shape[0], rows.shape[1] // block_bytes * block
    qdata = torch.empty(n, k * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(n, k // group_size, dtype=torch.float16)
    zeros = torch.empty(scales.shape) if kind is GGMLQuantizationType.Q4_1 else None
    cpu_extension.unpack_blocks(rows, kind.name, qdata, scales, zeros)
    return QuantizedWeight(qdata, scales, zeros, bits, group_size, (n, k))


def unpack_by_numpy(rows: np.ndarray, kind: GGMLQuantizationType) -> QuantizedWeight:
    """Unpack any format, as `unpack` does."""
    function, bits, group_size = UNPACK[kind]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n, k = rows.shape[0], rows.shape[1] // block_bytes * block
    q, scales, zeros = function(rows.reshape(-1, block_bytes))
    if kind in _FLOAT16_SCALES:
        scales = scales.astype(np.float16)
    q = q.reshape(n, k)
    if bits == 4:
        q = q[:, 0::2] | q[:, 1::2] << 4
    groups = (n, k // group_size)

    def to_tensor(array: np.ndarray, shape: tuple[int, int]) -> Tensor:
        # np.array: never a view of the read-only file
        return torch.from_numpy(np.array(array.reshape(shape), order="C"))

    return QuantizedWeight(
        qdata=to_tensor(q, q.shape),
        scales=to_tensor(scales, groups),
        zeros=None if zeros is None else to_tensor(zeros, groups),
        bits=bits,
        group_size=group_size,
        shape=(n, k),
    )
