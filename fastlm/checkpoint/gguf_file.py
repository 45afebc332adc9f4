"""Read GGUF files: header, metadata and tensors. Quantized tensors stay quantized.

The header is parsed here, and bounds are checked before anything is allocated, because model files
come from strangers. The alternative was the reader of the ``gguf`` package: it trusts every count
in the file and creates one numpy array per array element (1.4 s for the 135M model, against 0.1 s
here). Its tables of types and block sizes are used, and tests compare this module with it.

What each block format becomes (``d``, ``m``: the block's scale and offset):

    file             values               here              scale, offset
    F32 F16 BF16     w                    the same dtype
    Q4_0             d * (q - 8)          4 bits, group 32  d
    Q4_1             d * q + m            4 bits, group 32  d, m + 8 d
    Q4_K             d * q - m            4 bits, group 32  d, 8 d - m
    Q5_0 Q8_0        d * q                8 bits, group 32  d
    Q5_1 Q5_K        d * q +- m           8 bits, group 32  d, +- m
    Q6_K             d * q                8 bits, group 16  d

All products are exact in float32, so the result equals ``gguf.dequantize`` bit for bit, with one
exception. For Q4_1 and Q4_K the sum of the offset and 8 d is rounded when their magnitudes differ
by a factor of more than about 2^7 (Q4_K) or 2^13 (Q4_1). The weight is then off by at most one
float32 ulp of the weight or the offset, whichever is larger.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from fastlm.errors import InputError
from fastlm.files import open_regular, reason
from fastlm.ops.quantized_weight import QuantizedWeight

MAX_DIMS = 4  # ggml's own limit
MAX_NAME = 255  # ggml's is 63 for tensors; the longest key in use is under 60
# type of a metadata value in the file -> struct code, bytes
SCALARS = {
    0: ("B", 1),
    1: ("b", 1),
    2: ("H", 2),
    3: ("h", 2),
    4: ("I", 4),
    5: ("i", 4),
    6: ("f", 4),
    7: ("?", 1),
    10: ("Q", 8),
    11: ("q", 8),
    12: ("d", 8),
}
STRING, ARRAY = 8, 9
KINDS = {  # Python type of a metadata value -> its name in a message
    int: "one int",
    float: "one float",
    bool: "one bool",
    str: "one text",
    list: "a list of texts",
    np.ndarray: "a list of numbers",
}
T = TypeVar("T", int, float, bool, str, list, np.ndarray)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # as in torch: rows first, the packed dimension last
    start: int  # byte offset in the file
    size: int  # bytes


class _Cursor:
    """Reads little-endian values from a buffer, never past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.pos = data, path, 0

    def take(self, size: int) -> int:
        start = self.pos
        if size > len(self.data) - start:
            raise InputError(
                f"{self.path}: cut short: wanted {size} bytes at {start}, "
                f"the file has {len(self.data)}"
            )
        self.pos = start + size
        return start

    def number(self, code: str, size: int) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(size))[0]

    def count(self, what: str, least: int) -> int:
        """Read a 64-bit count of items, which fit in the rest at ``least`` bytes or more each."""
        n = self.number("Q", 8)
        if n > (len(self.data) - self.pos) // least:
            raise InputError(f"{self.path}: {what}: wanted at most what the file can hold, got {n}")
        return n

    def string(self) -> str:
        size = self.number("Q", 8)
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8", errors="replace")

    def name(self) -> str:
        """Read a key or a tensor's name. Messages quote it, so it must be short and printable."""
        name = self.string()
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise InputError(
                f"{self.path}: wanted a printable name of 1 to {MAX_NAME} characters, "
                f"got {name!r:.60}"
            )
        return name

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.number(*SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise InputError(f"{self.path}: {key}: wanted a value type from 0 to 12, got {kind}")
        item = self.number("I", 4)
        if item == STRING:
            return [self.string() for _ in range(self.count(key, 8))]
        if item not in SCALARS:
            raise InputError(
                f"{self.path}: {key}: wanted an array of scalars or strings, got {item}"
            )
        code, size = SCALARS[item]
        n = self.count(key, size)
        return np.frombuffer(self.data, "<" + code, n, self.take(n * size)).copy()


class GGUFFile:
    """A GGUF file. ``metadata`` (str -> value; arrays of numbers are numpy) and ``tensors`` (name
    -> TensorInfo) are read at once; tensor data stays in the memory-mapped file until ``load``.

    Raises InputError for a file that is not GGUF 2 or 3, is cut short, or has counts and offsets
    that exceed it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open_regular(self.path) as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: mmap refuses an empty file
            raise InputError(f"{self.path}: cannot be read: {reason(error)}") from error
        cursor = _Cursor(self._data, self.path)
        magic = self._data[cursor.take(4) : 4]
        if magic != b"GGUF":
            raise InputError(f"{self.path}: wanted a GGUF file, got one that begins with {magic!r}")
        version = cursor.number("I", 4)
        if version not in (2, 3):
            raise InputError(
                f"{self.path}: wanted little-endian GGUF version 2 or 3, got {version}"
            )
        # least bytes per entry: an empty name and no dimensions; an empty key and a one-byte value
        n_tensors = cursor.count("tensor count", 8 + 4 + 4 + 8)
        n_metadata = cursor.count("metadata count", 8 + 4 + 1)

        self.metadata: dict[str, Any] = {}
        for _ in range(n_metadata):
            key = cursor.name()
            if key in self.metadata:
                raise InputError(f"{self.path}: wanted each metadata key once, got {key!r} twice")
            self.metadata[key] = cursor.value(cursor.number("I", 4), key)
        entries = [self._entry(cursor) for _ in range(n_tensors)]

        align = self.get("general.alignment", int, 32)
        if align < 1 or align & (align - 1):
            raise InputError(f"{self.path}: general.alignment: wanted a power of two, got {align}")
        base = -(-cursor.pos // align) * align
        self.tensors: dict[str, TensorInfo] = {}
        for name, kind, shape, offset in entries:
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise InputError(
                    f"{self.path}: {name}: wanted a row of a multiple of {block} values "
                    f"for {kind.name}, got {shape}"
                )
            info = TensorInfo(kind, shape, base + offset, math.prod(shape) // block * block_bytes)
            if info.start + info.size > len(self._data):
                raise InputError(
                    f"{self.path}: {name}: wanted bytes {info.start} to {info.start + info.size}, "
                    f"the file has {len(self._data)} (cut short?)"
                )
            if offset % align or name in self.tensors:
                raise InputError(
                    f"{self.path}: {name}: wanted one tensor at an aligned offset, got {offset}"
                )
            self.tensors[name] = info

    def get(self, key: str, kind: type[T], default: Any = None) -> Any:
        """Return ``metadata[key]``, which must be of ``kind`` (one of `KINDS`), or ``default``."""
        if key not in self.metadata:
            return default
        value = self.metadata[key]
        if type(value) is not kind:
            raise InputError(
                f"{self.path}: {key}: wanted {KINDS[kind]}, got {KINDS[type(value)]}: {value!r:.60}"
            )
        return value

    def need(self, key: str, kind: type[T]) -> T:
        """``get`` for a key that must be present."""
        if key not in self.metadata:
            raise InputError(f"{self.path}: {key}: wanted {KINDS[kind]}, got None")
        return self.get(key, kind)

    def _entry(self, cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = cursor.name()
        dims = cursor.number("I", 4)
        if not 1 <= dims <= MAX_DIMS:
            raise InputError(f"{self.path}: {name}: wanted 1 to {MAX_DIMS} dimensions, got {dims}")
        shape = tuple(cursor.number("Q", 8) for _ in range(dims))[::-1]
        raw = cursor.number("I", 4)
        try:
            kind = GGMLQuantizationType(raw)
        except ValueError:
            raise InputError(
                f"{self.path}: {name}: wanted a known tensor type, got {raw}"
            ) from None
        return name, kind, shape, cursor.number("Q", 8)

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes (rows, bytes per row), uint8, a read-only view of the file."""
        info = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, info.size, info.start)
        return flat.reshape(math.prod(info.shape[:-1]), -1) if info.size else flat.reshape(0, 0)

    def load(self, name: str) -> Tensor | QuantizedWeight:
        """Copy the tensor into memory, in its dtype or (2-D block formats) as a QuantizedWeight."""
        info = self.tensors[name]
        if info.kind in PLAIN:
            data = torch.from_numpy(self.raw(name).copy())
            return data.view(PLAIN[info.kind]).reshape(info.shape)
        if info.kind not in UNPACK:
            known = ", ".join(k.name for k in [*PLAIN, *UNPACK])
            raise InputError(
                f"{self.path}: {name}: wanted one of the types {known}, got {info.kind.name}"
            )
        if len(info.shape) != 2:
            raise InputError(
                f"{self.path}: {name}: wanted 2 dimensions for {info.kind.name}, got {info.shape}"
            )
        return unpack(self.raw(name), info.kind)


PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

# Each unpacker: blocks (B, bytes) uint8 -> q (B, values), scale and offset (B, groups) float32; the
# offset is None where the format has none. For 4 bits q is the stored nibble 0..15 and the weight
# is scale * (q - 8) + offset; for 8 bits it is scale * q + offset.
Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte ``at`` of every block, as float32 (B, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """(..., n) bytes -> (..., 2n): the low nibbles, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q4_0(blocks: np.ndarray) -> Unpacked:
    return _nibbles(blocks[:, 2:]), _half(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> Unpacked:
    d = _half(blocks, 0)
    return _nibbles(blocks[:, 4:]), d, _half(blocks, 2) + 8 * d


def _q8_0(blocks: np.ndarray) -> Unpacked:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None


def _five_bits(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """32 values from 4 bytes of fifth bits and 16 bytes of nibbles."""
    return _nibbles(low) | np.unpackbits(high, axis=-1, bitorder="little") << 4


def _q5_0(blocks: np.ndarray) -> Unpacked:
    q = _five_bits(blocks[:, 2:6], blocks[:, 6:])
    return q.view(np.int8) - np.int8(16), _half(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> Unpacked:
    q = _five_bits(blocks[:, 4:8], blocks[:, 8:])
    return q.view(np.int8), _half(blocks, 0), _half(blocks, 2)


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum (B, 8) of Q4_K and Q5_K: two float16 times 8 + 8 six-bit integers.

    The integers are stored in the twelve bytes from byte 4 on. The first four of each kind are the
    low 6 bits of bytes 0-3 and 4-7. The last four have their low nibbles in bytes 8-11 (scale low,
    minimum high) and their top 2 bits in the top of bytes 0-7.
    """
    first, second, rest = (blocks[:, a : a + 4] for a in (4, 8, 12))
    scale = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], axis=1)
    minimum = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], axis=1)
    return _half(blocks, 0) * scale, _half(blocks, 2) * minimum


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


UNPACK: dict[GGMLQuantizationType, tuple[Callable[[np.ndarray], Unpacked], int, int]] = {
    # unpacker, bits of the container, group size
    GGMLQuantizationType.Q4_0: (_q4_0, 4, 32),
    GGMLQuantizationType.Q4_1: (_q4_1, 4, 32),
    GGMLQuantizationType.Q5_0: (_q5_0, 8, 32),
    GGMLQuantizationType.Q5_1: (_q5_1, 8, 32),
    GGMLQuantizationType.Q8_0: (_q8_0, 8, 32),
    GGMLQuantizationType.Q4_K: (_q4_k, 4, 32),
    GGMLQuantizationType.Q5_K: (_q5_k, 8, 32),
    GGMLQuantizationType.Q6_K: (_q6_k, 8, 16),
}


def unpack(rows: np.ndarray, kind: GGMLQuantizationType) -> QuantizedWeight:
    """``rows`` (N, bytes per row) uint8 in block format ``kind`` as a QuantizedWeight."""
    function, bits, group_size = UNPACK[kind]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n, k = rows.shape[0], rows.shape[1] // block_bytes * block
    q, scales, zeros = function(rows.reshape(-1, block_bytes))
    q = q.reshape(n, k)
    if bits == 4:
        q = q[:, 0::2] | q[:, 1::2] << 4
    groups = (n, k // group_size)

    def own(array: np.ndarray, shape: tuple[int, int]) -> Tensor:
        # np.array: never a view of the read-only file
        return torch.from_numpy(np.array(array.reshape(shape), order="C"))

    return QuantizedWeight(
        qdata=own(q, q.shape),
        scales=own(scales, groups),
        zeros=None if zeros is None else own(zeros, groups),
        bits=bits,
        group_size=group_size,
        shape=(n, k),
    )
