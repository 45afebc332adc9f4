"""Weights in 4-bit floats (e2m1) with a scale per group: MXFP4 and NVFP4.

Twice an e2m1 value is an integer from -12 to 12. So the weights are stored in int8 with half the
scale, which is exact. Two values share a byte, the first in its low nibble.

    MXFP4   groups of 32, scale 2^(e - 127), e a byte
    NVFP4   groups of 16, scale e4m3 times one float32 for the whole weight
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.checkpoint.tensor_folder import PackedWeight, Quantization, TensorFolder
from fastlm.errors import InputError
from fastlm.files import read_json
from fastlm.ops.quantized_weight import QuantizedWeight

DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # nibble -> 2 * value


def from_nibbles(packed: Tensor, scales: Tensor) -> QuantizedWeight:
    """Build a weight in groups of K / G from packed (N, K / 2) uint8 and scales (N, G) float32."""
    table = torch.tensor(DOUBLED, dtype=torch.int8)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    n, k = nibbles.shape
    qdata = table[nibbles.int()]
    return QuantizedWeight(qdata, scales / 2, None, 8, k // scales.shape[1], (n, k))


def decode_exponents(exponents: Tensor) -> Tensor:
    """Return 2^(e - 127) as float32, for bytes or float8_e8m0fnu. InputError: 255, not a number."""
    e = exponents.view(torch.uint8).int()
    if bool((e == 255).any()):
        raise InputError("weight_scale: expected exponents below 255, got 255 (not a number)")
    # the byte is float32's exponent; 2^-127 is half of its smallest normal number
    return torch.where(e == 0, 1 << 22, e << 23).view(torch.float32)


def check_layout(
    name: str, packed: str, tensors: TensorFolder, scales: tuple[str, ...]
) -> tuple[int, int]:
    """Check ``packed`` and ``weight_scale`` of a module, and return the weight's shape (N, K)."""
    n, half = tensors.check(f"{name}.{packed}", ("U8",), (None, None))
    _, groups = tensors.check(f"{name}.weight_scale", scales, (n, None))
    if 2 * half % groups or (2 * half // groups) % 8:
        raise InputError(
            f"{tensors.folder}: {name}.weight_scale: expected scales of groups of 16 or 32 of"
            f" {2 * half} columns, got {groups}"
        )
    return n, 2 * half


def read_modelopt_config(file: Path) -> dict[str, Any]:
    """Read ModelOpt's own file as a quantization_config."""
    entry = read_json(file).get("quantization")
    if not isinstance(entry, dict):
        raise InputError(f"{file}: quantization: expected an object, got {entry!r:.60}")
    return {**entry, "quant_method": "modelopt"}


def read_modelopt(config: Mapping[str, Any], tensors: TensorFolder, location: str) -> Quantization:
    """Read ModelOpt's NVFP4: ``weight``, ``weight_scale`` and the factor ``weight_scale_2``."""
    algorithm = config.get("quant_algo")
    if algorithm != "NVFP4":
        raise InputError(
            f"{location}: quant_algo: expected NVFP4 for modelopt, got {algorithm!r:.60}"
        )
    weights = {}
    for name in tensors.modules("weight_scale_2"):
        shape = check_layout(name, "weight", tensors, ("F8_E4M3",))
        factor = tensors.headers[f"{name}.weight_scale_2"].shape
        tensors.check(f"{name}.weight_scale_2", ("F32",), (1,) * len(factor))

        def build(stored: dict[str, Tensor]) -> QuantizedWeight:
            scales = stored["weight_scale"].float() * stored["weight_scale_2"].reshape(())
            return from_nibbles(stored["weight"], scales)

        parts = tensors.parts(name, "weight", "weight_scale", "weight_scale_2")
        weights[f"{name}.weight"] = PackedWeight(shape, parts, build)
    unused = [n for n in tensors.headers if n.endswith((".input_scale", ".k_scale", ".v_scale"))]
    return Quantization(weights, "ModelOpt NVFP4, stored in int8", frozenset(unused))
