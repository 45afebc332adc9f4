"""Read the safetensors files of a model folder by tensor name, and weights stored in parts.

Every header is checked when the folder is opened. A tensor's bytes are read only by `get`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlm.errors import InputError
from fastlm.files import read_json, reason
from fastlm.ops.quantized_weight import QuantizedWeight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16", "F64")  # dtypes of weights, in safetensors' spelling


class TensorHeader(NamedTuple):
    """The header of a tensor in a safetensors file."""

    dtype: str  # in safetensors' spelling
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is stored in several tensors.

    parts: part -> tensor name. build: makes the weight from part -> Tensor; may raise InputError.
    """

    shape: tuple[int, int]
    parts: Mapping[str, str]
    build: Callable[[dict[str, Tensor]], Tensor | QuantizedWeight]


@dataclass(frozen=True)
class Quantization:
    """The quantized weights according to a ``quantization_config`` and the headers.

    weights: weight name -> PackedWeight. unused: tensors that weights do not need, such as
    scales of activations. description: one line for the user. act_bits: module -> 8 if its
    activations are rounded, too. warning: a contradiction to the config, or "".
    """

    weights: Mapping[str, PackedWeight]
    description: str = ""
    unused: frozenset[str] = frozenset()
    act_bits: Mapping[str, int] = field(default_factory=dict)
    warning: str = ""


class TensorFolder:
    """``headers``: tensor name -> `TensorHeader` of all safetensors files of ``folder``.

    Raises InputError: a file is missing or cut short, or the index does not fit its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = _weight_map(folder)
        self.headers: dict[str, TensorHeader] = {}
        for file in sorted(set(names.values())):
            with open_tensors(folder / file) as handle:
                for name in handle.keys():
                    if names.get(name) == file:
                        view = handle.get_slice(name)
                        shape = tuple(view.get_shape())
                        self.headers[name] = TensorHeader(view.get_dtype(), shape, file)

    def modules(self, part: str) -> list[str]:
        """Return the modules that have a tensor ``part``."""
        return [n.removesuffix(f".{part}") for n in self.headers if n.endswith(f".{part}")]

    def parts(self, module: str, *names: str) -> dict[str, str]:
        """Return part -> tensor name of those parts that the module has."""
        parts = {part: f"{module}.{part}" for part in names}
        return {part: name for part, name in parts.items() if name in self.headers}

    def check(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
    ) -> tuple[int, ...]:
        """Return the shape of the tensor ``name``. InputError: it is missing, or has another dtype
        or shape (None: any size of at least 1).
        """
        if name not in self.headers:
            raise InputError(f"{self.folder}: expected a tensor {name}, got none of that name")
        header = self.headers[name]
        fits = len(header.shape) == len(shape) and all(
            actual == size or (size is None and actual > 0)
            for actual, size in zip(header.shape, shape)
        )
        if header.dtype not in dtypes or not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise InputError(
                f"{self.folder / header.file}: {name}: expected {' or '.join(dtypes)} ({sizes}),"
                f" got {header.dtype} {header.shape}"
            )
        return header.shape

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        file = self.folder / self.headers[name].file
        with open_tensors(file) as handle:
            return _get(handle, file, name)

    def load(self, name: str, packed: PackedWeight) -> Tensor | QuantizedWeight:
        """Read the parts of the weight ``name`` and put them together."""
        try:
            return packed.build({part: self.get(tensor) for part, tensor in packed.parts.items()})
        except InputError as error:
            if str(error).startswith(str(self.folder)):
                raise
            raise InputError(f"{self.folder}: {name}: {error}") from error

    def read_tensors(self, names: set[str]) -> Any:
        """Yield (name, tensor) of ``names``, file by file."""
        for file in sorted({self.headers[name].file for name in names}):
            with open_tensors(self.folder / file) as handle:
                for name, header in self.headers.items():
                    if header.file == file and name in names:
                        yield name, _get(handle, self.folder / file, name)


def open_tensors(file: Path) -> Any:
    """Open a safetensors file."""
    if not file.is_file():
        raise InputError(f"{file}: expected a safetensors file, got none")
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file}: expected a complete safetensors file: {reason(error)}"
        ) from error


def _weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name -> file name, checked against the headers of the files."""
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file() and list(folder.glob("*.bin")):
            raise InputError(f"{folder}: expected {SINGLE}, got a pickle (convert it first)")
        with open_tensors(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map: expected tensor names to file names, got none")
    for name in weight_map.values():
        # a bare name: an index must not point outside its folder
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(
                f"{index}: weight_map: expected names of files in the same folder, got {name!r}"
            )
    for name in sorted(set(weight_map.values())):
        with open_tensors(folder / name) as file:
            tensors = set(file.keys())
        for tensor, file_name in weight_map.items():
            if file_name == name and tensor not in tensors:
                raise InputError(
                    f"{folder / name}: expected a tensor {tensor} by the index, got none"
                )
    return weight_map


def _get(file: Any, path: Path, name: str) -> Tensor:
    try:
        return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {name}: cannot be read: {reason(error)}") from error
