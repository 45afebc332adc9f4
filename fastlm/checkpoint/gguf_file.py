"""Read GGUF files: header, metadata and tensors. Quantized tensors stay quantized.

The header is parsed here, and bounds are checked before anything is allocated, because model files
come from strangers. Rejected: the reader of the ``gguf`` package. It trusts every count in the file
and creates one numpy array per array element (1.4 s for the 135M model, against 0.1 s here). Its
tables of types and block sizes are used, and tests compare this module with it.
"""

import contextlib
import math
import mmap
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from fastlm.checkpoint.gguf_blocks import UNPACK, UNQUANTIZED, unpack
from fastlm.errors import InputError
from fastlm.files import open_regular, reason
from fastlm.ops.quantized_weight import QuantizedWeight

MAX_DIMS = 4  # ggml's own limit
MAX_NAME = 255  # ggml's is 63 for tensors; the longest key in use is under 60
# type of a metadata value in the file -> struct code, bytes
SCALARS = {i: (code, struct.calcsize(f"<{code}")) for i, code in enumerate("BbHhIif?")}
SCALARS |= {10: ("Q", 8), 11: ("q", 8), 12: ("d", 8)}  # 8 and 9: below
STRING, ARRAY = 8, 9
KINDS = {  # Python type of a metadata value -> its name in a message
    int: "one int",
    float: "one float",
    bool: "one bool",
    str: "one text",
    list: "a list of texts",
    np.ndarray: "a list of numbers",
}
_SIZE = struct.Struct("<Q")
_open_files: "weakref.WeakValueDictionary[tuple[int, ...], GGUFFile]" = (
    weakref.WeakValueDictionary()
)
T = TypeVar("T", int, float, bool, str, list, np.ndarray)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The header of a tensor in a GGUF file."""

    ggml_type: GGMLQuantizationType
    shape: tuple[int, ...]  # as in torch: rows first, the packed dimension last
    start: int  # byte offset in the file
    size: int  # bytes


class _Cursor:
    """A reader of little-endian values from a buffer, never past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.pos = data, path, 0

    def take(self, size: int) -> int:
        start = self.pos
        if size > len(self.data) - start:
            raise InputError(
                f"{self.path}: cut short: expected {size} bytes at {start}, "
                f"the file has {len(self.data)}"
            )
        self.pos = start + size
        return start

    def number(self, code: str, size: int) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(size))[0]

    def count(self, name: str, min_bytes: int) -> int:
        """Read a 64-bit count of items, which fit in the rest at ``min_bytes`` or more each."""
        n = self.number("Q", 8)
        if n > (len(self.data) - self.pos) // min_bytes:
            raise InputError(
                f"{self.path}: {name}: expected a count that fits in the file, got {n}"
            )
        return n

    def string(self) -> str:
        size = self.number("Q", 8)
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8", errors="replace")

    def strings(self, n: int) -> list[str]:
        """Read ``n`` texts, as `string` does; a vocabulary has 10^5 of them."""
        data, pos, end, size_at = self.data, self.pos, len(self.data), _SIZE.unpack_from
        texts = []
        for _ in range(n):
            if end - pos < 8 or (stop := pos + 8 + size_at(data, pos)[0]) > end:
                break
            texts.append(data[pos + 8 : stop].decode("utf-8", "replace"))
            pos = stop
        self.pos = pos
        return texts if len(texts) == n else [*texts, self.string()]  # it raises

    def name(self) -> str:
        """Read a key or a tensor's name. Messages quote it, so it must be short and printable."""
        name = self.string()
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise InputError(
                f"{self.path}: expected a printable name of 1 to {MAX_NAME} characters, "
                f"got {name!r:.60}"
            )
        return name

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.number(*SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise InputError(f"{self.path}: {key}: expected a value type from 0 to 12, got {kind}")
        item = self.number("I", 4)
        if item == STRING:
            return self.strings(self.count(key, 8))
        if item not in SCALARS:
            raise InputError(
                f"{self.path}: {key}: expected an array of scalars or strings, got {item}"
            )
        code, size = SCALARS[item]
        n = self.count(key, size)
        return np.frombuffer(self.data, "<" + code, n, self.take(n * size)).copy()


def open_gguf(path: Path) -> "GGUFFile":
    """Open the file at ``path``. A file that is still open is not parsed again: its vocabulary is
    large, and a model and its tokenizer are read one after the other.
    """
    try:
        stat = path.stat()
    except OSError:
        return GGUFFile(path)  # it raises the error
    key = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
    file = _open_files.get(key)
    if file is None or file.path != path:
        file = _open_files[key] = GGUFFile(path)
    return file


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
            raise InputError(
                f"{self.path}: expected a GGUF file, got one that begins with {magic!r}"
            )
        version = cursor.number("I", 4)
        if version not in (2, 3):
            raise InputError(
                f"{self.path}: expected little-endian GGUF of version 2 or 3, got {version}"
            )
        # minimum bytes per entry: an empty name and no dimensions; an empty key and a one-byte
        # value
        n_tensors = cursor.count("tensor count", 8 + 4 + 4 + 8)
        n_metadata = cursor.count("metadata count", 8 + 4 + 1)

        self.metadata: dict[str, Any] = {}
        for _ in range(n_metadata):
            key = cursor.name()
            if key in self.metadata:
                raise InputError(f"{self.path}: expected each metadata key once, got {key!r} twice")
            self.metadata[key] = cursor.value(cursor.number("I", 4), key)
        entries = [self._entry(cursor) for _ in range(n_tensors)]

        align = self.get("general.alignment", int, 32)
        if align < 1 or align & (align - 1):
            raise InputError(
                f"{self.path}: general.alignment: expected a power of two, got {align}"
            )
        base = -(-cursor.pos // align) * align
        self.tensors: dict[str, TensorInfo] = {}
        for name, kind, shape, offset in entries:
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise InputError(
                    f"{self.path}: {name}: expected a row of a multiple of {block} values "
                    f"for {kind.name}, got {shape}"
                )
            info = TensorInfo(kind, shape, base + offset, math.prod(shape) // block * block_bytes)
            if info.start + info.size > len(self._data):
                raise InputError(
                    f"{self.path}: {name}: expected bytes {info.start} to "
                    f"{info.start + info.size}, "
                    f"the file has {len(self._data)} (cut short?)"
                )
            if offset % align or name in self.tensors:
                raise InputError(
                    f"{self.path}: {name}: expected one tensor at an aligned offset, got {offset}"
                )
            self.tensors[name] = info

    def get(self, key: str, kind: type[T], default: Any = None) -> Any:
        """Return ``metadata[key]``, which must be of ``kind`` (one of `KINDS`), or ``default``."""
        if key not in self.metadata:
            return default
        value = self.metadata[key]
        if type(value) is not kind:
            raise InputError(
                f"{self.path}: {key}: expected {KINDS[kind]}, got {KINDS[type(value)]}: "
                f"{value!r:.60}"
            )
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """Return ``metadata[key]`` as `get` does; the key must be present."""
        if key not in self.metadata:
            raise InputError(f"{self.path}: {key}: expected {KINDS[kind]}, got None")
        return self.get(key, kind)

    def _entry(self, cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = cursor.name()
        dims = cursor.number("I", 4)
        if not 1 <= dims <= MAX_DIMS:
            raise InputError(
                f"{self.path}: {name}: expected 1 to {MAX_DIMS} dimensions, got {dims}"
            )
        shape = tuple(cursor.number("Q", 8) for _ in range(dims))[::-1]
        raw = cursor.number("I", 4)
        if raw not in iter(GGMLQuantizationType):
            raise InputError(f"{self.path}: {name}: expected a known tensor type, got {raw}")
        return name, GGMLQuantizationType(raw), shape, cursor.number("Q", 8)

    def raw(self, name: str) -> np.ndarray:
        """Return the tensor's bytes (rows, bytes per row), uint8, a read-only view of the file."""
        info = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, info.size, info.start)
        return flat.reshape(math.prod(info.shape[:-1]), -1) if info.size else flat.reshape(0, 0)

    def load(self, name: str) -> Tensor | QuantizedWeight:
        """Copy the tensor into memory, in its dtype or (2-D block formats) as a QuantizedWeight."""
        try:
            return self._copy(name)
        finally:
            self._release(self.tensors[name])

    def _release(self, info: TensorInfo) -> None:
        """Give the tensor's pages back: the process would hold the whole file beside its copy."""
        if info.size and hasattr(mmap, "MADV_DONTNEED"):
            start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):  # a hint: locked pages stay
                self._data.madvise(mmap.MADV_DONTNEED, start, info.start + info.size - start)

    def _copy(self, name: str) -> Tensor | QuantizedWeight:
        info = self.tensors[name]
        if info.ggml_type in UNQUANTIZED:
            data = torch.from_numpy(self.raw(name).copy())
            return data.view(UNQUANTIZED[info.ggml_type]).reshape(info.shape)
        if info.ggml_type not in UNPACK:
            types = ", ".join(k.name for k in [*UNQUANTIZED, *UNPACK])
            raise InputError(
                f"{self.path}: {name}: expected one of the types {types}, got {info.ggml_type.name}"
            )
        if len(info.shape) != 2:
            raise InputError(
                f"{self.path}: {name}: expected 2 dimensions for {info.ggml_type.name}, got "
                f"{info.shape}"
            )
        return unpack(self.raw(name), info.ggml_type)
