"""Read and describe fastlm's quantized weights: ``X.qdata``, ``X.scales``, ``X.zeros``, with
layouts in config.json. The format is that of `QuantizedWeight`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastlm.checkpoint.tensor_folder import PackedWeight, Quantization, TensorFolder
from fastlm.errors import InputError
from fastlm.ops.quantized_weight import QuantizedWeight

PARTS = ("qdata", "scales", "zeros")
_DTYPES = ("U8", "I8")  # of qdata


def read(config: Mapping[str, Any], tensors: TensorFolder, location: str) -> Quantization:
    """Read the weights of ``modules`` in a fastlm ``quantization_config``."""
    for module in tensors.modules("qdata"):
        header = tensors.headers[f"{module}.qdata"]
        if header.dtype not in _DTYPES:
            raise InputError(
                f"{tensors.folder / header.file}: {module}.qdata: expected one of"
                f" {', '.join(_DTYPES)}, got {header.dtype}"
            )
    modules = config.get("modules")
    weights, formats = {}, set()
    for module, entry in modules.items() if isinstance(modules, dict) else ():
        bits, group_size, shape = _layout(entry, f"{location}: {module}")
        formats.add(f"w{bits} group {group_size}")
        parts = tensors.parts(module, *PARTS)
        if "qdata" not in parts:  # a head tied to the embedding
            continue
        if "scales" not in parts:
            raise InputError(
                f"{tensors.folder}: {module}: expected qdata and scales, got one of them"
            )

        def build(
            stored: dict[str, Tensor], bits=bits, group_size=group_size, shape=shape
        ) -> QuantizedWeight:
            zeros = stored.get("zeros")
            return QuantizedWeight(
                stored["qdata"], stored["scales"], zeros, bits, group_size, shape
            )

        weights[f"{module}.weight"] = PackedWeight(shape, parts, build)
    # Parts without an entry are unused: only the config has the number of columns, so the weight is
    # missing.
    unused = {f"{module}.{part}" for part in PARTS for module in tensors.modules(part)}
    return Quantization(weights, f"fastlm, {', '.join(sorted(formats))}", frozenset(unused))


def _layout(entry: Any, location: str) -> tuple[int, int, tuple[int, int]]:
    """Return bits, group size and shape as quantization_config states them."""
    try:
        numbers = [entry["bits"], entry["group_size"], *entry["shape"], entry.get("act_bits", 16)]
    except (TypeError, KeyError, AttributeError):
        numbers = []
    if len(numbers) != 5 or not all(type(number) is int for number in numbers):
        raise InputError(
            f"{location}: expected bits, group_size and a shape of two integers, got {entry!r:.100}"
        )
    bits, group_size, n, k, _ = numbers
    return bits, group_size, (n, k)


def describe_layer(kind: str, weight: QuantizedWeight) -> dict[str, Any]:
    """Return the entry of a ``quantization_config`` for one "linear" or "embedding"."""
    return {
        "kind": kind,
        "bits": weight.bits,
        "group_size": weight.group_size,
        "shape": list(weight.shape),
        "scale_dtype": str(weight.scales.dtype).removeprefix("torch."),
        "zeros": weight.zeros is not None,
    }
