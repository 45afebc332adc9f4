"""fastlm's own quantized weights: ``X.qdata``, ``X.scales``, ``X.zeros``, and their layouts in
config.json. The format is that of `QuantizedWeight`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlm.checkpoint.tensor_folder import Packed, Quantization, TensorFolder
from fastlm.errors import InputError
from fastlm.ops.quantized_weight import QuantizedWeight

PARTS = ("qdata", "scales", "zeros")
_DTYPES = ("U8", "I8")  # of qdata


def read(config: Mapping[str, Any], tensors: TensorFolder, where: Path) -> Quantization:
    """The weights of ``modules`` in a fastlm ``quantization_config``."""
    modules = config.get("modules", {})
    layouts = {
        name: _layout(name, entry, where)
        for name, entry in (modules.items() if isinstance(modules, dict) else ())
    }
    for module in tensors.modules(PARTS[0]):
        header = tensors.headers[f"{module}.{PARTS[0]}"]
        if header.dtype not in _DTYPES:
            raise InputError(
                f"{tensors.folder / header.file}: {module}.{PARTS[0]}: wanted one of"
                f" {', '.join(_DTYPES)}, got {header.dtype}"
            )
    weights = {}
    for module, (bits, group_size, shape) in layouts.items():
        names = {part: f"{module}.{part}" for part in PARTS}
        parts = {part: name for part, name in names.items() if name in tensors.headers}
        if PARTS[0] not in parts:  # a head tied to the embedding
            continue
        if PARTS[1] not in parts:
            raise InputError(
                f"{tensors.folder}: {module}: wanted qdata and scales, got one of them"
            )

        def build(
            stored: dict[str, Tensor], bits=bits, group_size=group_size, shape=shape
        ) -> QuantizedWeight:
            qdata, scales, zeros = (stored.get(part) for part in PARTS)
            assert qdata is not None and scales is not None  # in `parts`, or refused
            return QuantizedWeight(qdata, scales, zeros, bits, group_size, shape)

        weights[f"{module}.weight"] = Packed(shape, parts, build)
    # parts without an entry: only the config has the number of columns, so the weight is missing
    unused = {f"{module}.{part}" for part in PARTS for module in tensors.modules(part)}
    kinds = sorted({f"w{bits} group {group}" for bits, group, _ in layouts.values()})
    return Quantization(weights, f"fastlm, {', '.join(kinds)}", frozenset(unused))


def _layout(name: str, entry: Any, where: Path) -> tuple[int, int, tuple[int, int]]:
    """Bits, group size and shape as quantization_config states them."""
    try:
        numbers = [entry["bits"], entry["group_size"], *entry["shape"], entry.get("act_bits", 16)]
    except (TypeError, KeyError, AttributeError):
        numbers = []
    if len(numbers) != 5 or not all(type(number) is int for number in numbers):
        raise InputError(
            f"{where}: quantization_config: {name}: wanted bits, group_size and a shape of two "
            f"integers, got {entry!r:.100}"
        )
    bits, group_size, n, k, _ = numbers
    return bits, group_size, (n, k)


def describe(kind: str, weight: QuantizedWeight) -> dict[str, Any]:
    """Return the entry of a ``quantization_config`` for one "linear" or "embedding"."""
    return {
        "kind": kind,
        "bits": weight.bits,
        "group_size": weight.group_size,
        "shape": list(weight.shape),
        "scale_dtype": str(weight.scales.dtype).removeprefix("torch."),
        "zeros": weight.zeros is not None,
    }
