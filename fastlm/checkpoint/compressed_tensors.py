"""Read checkpoints of compressed-tensors (llm-compressor, vLLM): pack-quantized integers of 4 and 8
bits, int-quantized, NVFP4 and MXFP4. Its writer is `fastlm.export.compressed_tensors_write`.

    weight_packed (N, K * bits / 32) int32    q + 2^(bits - 1), packed along the row
    weight_scale (N, G), weight_shape (2,)    w = scale * (q - zero)
    weight_zero_point (N * bits / 32, G)      packed down the column, + 2^(bits - 1); or none
    weight_g_idx (K,)                         the group of each column; or none
    weight_packed (N, K / 2) uint8            4-bit floats (`fastlm.checkpoint.fp4`)
    weight_global_scale (1,)                  NVFP4: scales are divided by it

The format of a module follows from its tensors. Activations are rounded to int8 if the file says
so, but never to floats of 4 bits (weights only). Rotations (``transform_config``) are refused. So
are int8 weights of which only some have rounded activations, since the targets' patterns are not
matched.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlm.checkpoint import fp4
from fastlm.checkpoint.packed_words import (
    SCALES,
    WORDS,
    dequantize_scattered,
    from_words,
    infer_group_size,
    is_in_order,
    unpack,
)
from fastlm.checkpoint.tensor_folder import PackedWeight, Quantization, TensorFolder
from fastlm.errors import InputError
from fastlm.ops.quantized_weight import QuantizedWeight

INTS = ("I64", "I32")
FORMATS = (
    *("pack-quantized", "int-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"),
    "mixed-precision",
)
# read with the header, or for activations and the KV cache
UNUSED = (
    "weight_shape",
    *("input_scale", "input_zero_point", "input_global_scale"),
    *("output_scale", "output_zero_point", "k_scale", "v_scale"),
)


def read(config: Mapping[str, Any], tensors: TensorFolder, location: str) -> Quantization:
    """Read the weights of a compressed-tensors folder; see the module."""
    format_name = config.get("format")
    if format_name not in FORMATS:
        raise InputError(
            f"{location}: format: expected one of {', '.join(FORMATS)}, got {format_name!r:.60}"
        )
    if config.get("transform_config"):
        raise InputError(
            f"{location}: transform_config: expected none (weights without rotations), got some"
        )
    groups = config.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    groups = [group for group in groups if isinstance(group, dict)]
    weights, formats = {}, set()
    sizes = [g["weights"].get("group_size") for g in groups if isinstance(g.get("weights"), dict)]
    stated = sizes[0] if len(sizes) == 1 else None
    for name in tensors.modules("weight_packed"):
        if tensors.headers[f"{name}.weight_packed"].dtype == "U8":
            packed, format_text = _read_floats(name, tensors)
        else:
            packed, format_text = _read_words(name, tensors, stated)
        weights[f"{name}.weight"] = packed
        formats.add(format_text)
    act_bits = {}
    for name in tensors.modules("weight_scale"):
        if (header := tensors.headers.get(f"{name}.weight")) and header.dtype == "I8":
            weights[f"{name}.weight"] = _read_int8(name, tensors)
            act_bits[name] = _activation_bits(groups, location)
            formats.add("int-quantized 8 bits")
    unused = [n for n in tensors.headers if n.rpartition(".")[2] in UNUSED]
    text = f"compressed-tensors {', '.join(sorted(formats))}"
    return Quantization(weights, text, frozenset(unused), act_bits)


def _activation_bits(groups: list[dict[str, Any]], location: str) -> int:
    """Return 8 if the inputs of all 8-bit weights are rounded to int8, 16 if none are. InputError:
    only some are.
    """

    def is_int8(arguments: Any) -> bool:
        stated = arguments if isinstance(arguments, dict) else {}
        return stated.get("type") == "int" and stated.get("num_bits") == 8

    eight = [group for group in groups if is_int8(group.get("weights"))]
    rounded = {is_int8(group.get("input_activations")) for group in eight or groups}
    if len(rounded) > 1:
        raise InputError(
            f"{location}: config_groups: expected input_activations of 8 bits for all 8-bit "
            "weights or"
            " for none, got some"
        )
    return 8 if True in rounded else 16


def _read_words(name: str, tensors: TensorFolder, stated: Any) -> tuple[PackedWeight, str]:
    n, words = tensors.check(f"{name}.weight_packed", WORDS, (None, None))
    tensors.check(f"{name}.weight_shape", INTS, (2,))
    _, groups = tensors.check(f"{name}.weight_scale", SCALES, (n, None))
    rows, k = tensors.get(f"{name}.weight_shape").tolist()
    bits = next((b for b in (4, 8) if k > 0 and -(-k * b // 32) == words), None)
    if rows != n or bits is None:
        raise InputError(
            f"{tensors.folder}: {name}.weight_shape: expected ({n}, K) of 4 or 8 bits in {words}"
            f" words, got ({rows}, {k})"
        )
    group_size = infer_group_size(k, groups, stated, name)
    names = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
    parts = tensors.parts(name, *names)
    if "weight_zero_point" in parts:
        tensors.check(parts["weight_zero_point"], WORDS, (-(-n * bits // 32), groups))
    if "weight_g_idx" in parts:
        tensors.check(parts["weight_g_idx"], INTS, (k,))

    def build(stored: dict[str, Tensor]) -> Tensor | QuantizedWeight:
        scales, packed = stored["weight_scale"], stored["weight_packed"]
        zeros = stored.get("weight_zero_point")
        if zeros is not None:
            zeros = unpack(zeros.t(), bits)[:, :n].t()
        index = stored.get("weight_g_idx")
        if index is not None and bool((index == -1).all()):  # not used
            index = None
        if is_in_order(index, k, group_size, groups):
            return from_words(packed, bits, scales, zeros, group_size, (n, k))
        if zeros is None:
            zeros = torch.full(scales.shape, 2 ** (bits - 1))
        assert index is not None
        return dequantize_scattered(packed, bits, scales, zeros, index, k)

    return PackedWeight((n, k), parts, build), f"pack-quantized {bits} bits, groups of {group_size}"


def _read_int8(name: str, tensors: TensorFolder) -> PackedWeight:
    n, k = tensors.check(f"{name}.weight", ("I8",), (None, None))
    _, groups = tensors.check(f"{name}.weight_scale", SCALES, (n, None))
    group_size = infer_group_size(k, groups, None, name)
    parts = tensors.parts(name, "weight", "weight_scale", "weight_zero_point")
    if "weight_zero_point" in parts:
        tensors.check(parts["weight_zero_point"], ("I8",), (n, groups))

    def build(stored: dict[str, Tensor]) -> QuantizedWeight:
        scales, zeros = stored["weight_scale"], stored.get("weight_zero_point")
        if zeros is not None and not bool(zeros.any()):
            zeros = None
        if zeros is not None:
            zeros = scales.float() * -zeros.float()
        return QuantizedWeight(stored["weight"], scales, zeros, 8, group_size, (n, k))

    return PackedWeight((n, k), parts, build)


def _read_floats(name: str, tensors: TensorFolder) -> tuple[PackedWeight, str]:
    nv = f"{name}.weight_global_scale" in tensors.headers
    shape = fp4.check_layout(
        name, "weight_packed", tensors, ("F8_E4M3",) if nv else ("U8", "F8_E8M0")
    )
    parts = tensors.parts(name, "weight_packed", "weight_scale", "weight_global_scale")
    if nv:
        tensors.check(parts["weight_global_scale"], ("F32",), (1,))

    def build(stored: dict[str, Tensor]) -> QuantizedWeight:
        scales = stored["weight_scale"]
        scales = (
            scales.float() / stored["weight_global_scale"] if nv else fp4.decode_exponents(scales)
        )
        return fp4.from_nibbles(stored["weight_packed"], scales)

    return PackedWeight(shape, parts, build), f"{'NVFP4' if nv else 'MXFP4'}, stored in int8"
