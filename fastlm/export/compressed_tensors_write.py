"""Write a quantized model for vLLM and transformers: compressed-tensors, pack-quantized.

`fastlm.checkpoint.compressed_tensors` describes the layout. The layers' matrices keep their
integers and scales. Embedding and head are written as floats, because vLLM reads no others.
Rounding of activations is not written: the files contain only weights.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.checkpoint.folder import save_hf
from fastlm.errors import InputError
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.quant.targets import check_layers

GROUPS = (128, 64, 32)  # of vLLM's kernels
FLOAT_WEIGHTS = ("model.embed_tokens.weight", "lm_head.weight")
# matrices that vLLM multiplies as one; they need the same scheme
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def save_compressed_tensors(
    folder: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor | QuantizedWeight],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Write the folder. ``dtype``: of embedding and head if they are quantized.

    Returns {"formats": format -> weights, "dequantized": names written as floats}.

    InputError, before anything is written: nothing is quantized; a group size that vLLM lacks or
    that does not divide a row (the message names one that works); offsets that are not a whole
    number of steps; layers that vLLM fuses but with different schemes.
    """
    layers = check_compressed_tensors(state)
    zeros = {name: _zero_points(name, weight) for name, weight in layers.items()}
    matrices = _matrices(state)
    for names in _fused(matrices):  # layers that vLLM fuses have zero points if one of them has
        if any(zeros.get(name) is not None for name in names):
            for name in (name for name in names if zeros[name] is None):
                middle = 2 ** (layers[name].bits - 1)
                zeros[name] = torch.full(layers[name].scales.shape, middle)
    tensors: dict[str, Tensor] = {}
    dequantized = []
    for name, weight in state.items():
        module = name.removesuffix(".weight")
        if module in layers:
            parts = _parts(layers[module], zeros[module])
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        elif isinstance(weight, QuantizedWeight):
            tensors[name] = weight.dequantize(dtype)
            dequantized.append(name)
        else:
            tensors[name] = weight
    schemes: dict[tuple[int, int | None, bool], list[str]] = {}
    for name, weight in layers.items():
        bits, group = _layout(weight)
        schemes.setdefault((bits, group, zeros[name] is None), []).append(name)
    # readers expect weight_packed in every linear layer that is not in "ignore"
    excluded = {name.removesuffix(".weight") for name in FLOAT_WEIGHTS}
    floats = [name for name in matrices if name not in layers and name not in excluded]
    entry = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *floats],
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(schemes) == 1 else names,
                "weights": {
                    **{"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False},
                    "strategy": "group" if group else "channel",
                    "group_size": group,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for i, ((bits, group, symmetric), names) in enumerate(schemes.items())
        },
    }
    save_hf(folder, config, tensors, quantization_config=entry)
    formats = Counter(_layout_text(_layout(weight)) for weight in layers.values())
    return {"formats": dict(formats), "dequantized": dequantized}


def check_compressed_tensors(
    state: Mapping[str, Tensor | QuantizedWeight],
) -> dict[str, QuantizedWeight]:
    """Return the layers that are written quantized, after a check of their shapes and groups.
    InputError: as `save_compressed_tensors`, except for offsets.
    """
    layers = {
        name.removesuffix(".weight"): weight
        for name, weight in state.items()
        if isinstance(weight, QuantizedWeight) and name not in FLOAT_WEIGHTS
    }
    if not layers:
        raise InputError("model: expected quantized layers for compressed-tensors, got none")
    widths = {name: weight.shape[1] for name, weight in layers.items()}
    check_layers(widths, lambda name: _check_layout(name, layers[name], list(widths.values())))
    for names in _fused(_matrices(state)):
        layouts = [_layout(layers[name]) if name in layers else None for name in names]
        if len(set(layouts)) > 1:
            parts = [name.rpartition(".")[2] for name in names]
            got = ", ".join(
                f"{part} {_layout_text(layout)}" for part, layout in zip(parts, layouts)
            )
            raise InputError(
                f"{names[0].rpartition('.')[0]}: expected one format for {', '.join(parts)}, which"
                f" vLLM fuses, for compressed-tensors, got {got}"
            )
    return layers


def _matrices(state: Mapping[str, Tensor | QuantizedWeight]) -> list[str]:
    return [name.removesuffix(".weight") for name, w in state.items() if len(w.shape) == 2]


def _fused(matrices: Sequence[str]) -> Iterator[list[str]]:
    """Yield the names of layers that vLLM multiplies as one."""
    for parts in FUSED:
        for first in (name for name in matrices if name.endswith(f".{parts[0]}")):
            parent = first.rpartition(".")[0]
            yield [f"{parent}.{part}" for part in parts if f"{parent}.{part}" in matrices]


def _layout(weight: QuantizedWeight) -> tuple[int, int | None]:
    """Return bits and group size; None: one scale per row."""
    return weight.bits, weight.group_size if weight.group_size < weight.shape[1] else None


def _layout_text(layout: tuple[int, int | None] | None) -> str:
    return "float" if layout is None else f"w{layout[0]} group {layout[1] or 'row'}"


def _check_layout(name: str, weight: QuantizedWeight, widths: list[int]) -> None:
    k, group = weight.shape[1], weight.group_size
    if group < k and (group not in GROUPS or k % group):
        fits = [g for g in GROUPS if all(width % g == 0 for width in widths)]
        hint = f"--group-size {fits[0]} would work" if fits else "--group-size -1 would work"
        raise InputError(
            f"{name}: expected groups of 32, 64 or 128 that divide its {k} columns for"
            f" compressed-tensors, got {group}: {hint}"
        )
    if k * weight.bits % 32:
        raise InputError(
            f"{name}: expected rows of a multiple of {32 // weight.bits} columns for"
            f" compressed-tensors, got {k}"
        )


def _zero_points(name: str, weight: QuantizedWeight) -> Tensor | None:
    """Return the zero points (N, G), None if symmetric. InputError: offsets of fractional steps."""
    if weight.zeros is None:
        return None
    half = 2 ** (weight.bits - 1)
    scales, offsets = weight.scales.double(), weight.zeros.double()
    zeros = (half - offsets / torch.where(scales == 0, 1.0, scales)).round()
    # the offset may be rounded to its dtype, by a share of 2^-8
    same = (scales * (half - zeros) - offsets).abs() <= 2**-8 * offsets.abs()
    if not bool((same & (zeros >= 0) & (zeros < 2 * half)).all()):
        raise InputError(
            f"{name}: expected offsets of whole steps for compressed-tensors, got others: quantize"
            " symmetrically"
        )
    return zeros.to(torch.int64)


def _parts(weight: QuantizedWeight, zeros: Tensor | None) -> dict[str, Tensor]:
    n, k = weight.shape
    data = weight.qdata if weight.bits == 4 else weight.qdata.view(torch.uint8) ^ 128
    parts = {
        "weight_packed": data.contiguous().view(torch.int32),
        "weight_scale": _shortest(weight.scales),
        "weight_shape": torch.tensor([n, k]),
    }
    if zeros is not None:
        fields_per_word = 32 // weight.bits
        fields = torch.nn.functional.pad(zeros.t(), (0, -n % fields_per_word))
        fields = fields.unflatten(1, (-1, fields_per_word))
        words = (fields << torch.arange(0, 32, weight.bits)).sum(-1)
        signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        parts["weight_zero_point"] = signed.t().contiguous()
    return parts


def _shortest(scales: Tensor) -> Tensor:
    """Return the scales in the first exact dtype of bfloat16, float16 and float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if bool((scales.to(dtype).double() == scales.double()).all()):
            return scales.to(dtype)
    return scales.float()
