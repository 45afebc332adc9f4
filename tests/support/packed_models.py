"""Tiny models in other programs' formats, with their weights. They are packed here field by field,
from the formats' definitions.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # columns in the order of a word's fields
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
Parts = dict[str, np.ndarray | torch.Tensor]  # of a module, by the end of their names
Stored = tuple[Parts, np.ndarray]  # and its weight


def words(fields: np.ndarray, bits: int) -> np.ndarray:
    """Pack (R, C) unsigned -> (R, ceil(C * bits / 32)) int32, first field in the lowest bits."""
    per = 32 // bits
    result = np.zeros((fields.shape[0], -(-fields.shape[1] // per)), np.uint32)
    for column in range(fields.shape[1]):
        result[:, column // per] |= fields[:, column].astype(np.uint32) << np.uint32(
            bits * (column % per)
        )
    return result.view(np.int32)


def integers(
    w: np.ndarray, bits: int, symmetric: bool, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return q (N, K), scales (N, G) float16 and zeros (N, G) of ``scale * (q - zero)``."""
    g = groups.max() + 1
    scales, zeros = np.zeros((len(w), g), np.float16), np.zeros((len(w), g), np.int64)
    for index in range(g):
        part = w[:, groups == index]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scales[:, index] = (high - low) / (2**bits - 1)
        zeros[:, index] = 2 ** (bits - 1) if symmetric else np.round(-low / scales[:, index])
    q = np.round(w / scales[:, groups].astype(np.float64)) + zeros[:, groups]
    return q.clip(0, 2**bits - 1).astype(np.int64), scales, zeros


def value(q: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return scales.astype(np.float64)[:, groups] * (q - zeros[:, groups])


def gptq(
    w: np.ndarray, *, bits: int = 4, symmetric: bool = True, version: int = 1, act_order=False
) -> Stored:
    k = w.shape[1]
    groups = np.arange(k) // GROUP
    if act_order:
        groups = np.random.default_rng(3).permutation(groups)
    q, scales, zeros = integers(w, bits, symmetric, groups)
    fields = words(zeros.T, bits)
    if version == 1:  # as GPTQModel: one from every field at once, with borrows
        ones = np.uint32(sum(1 << at for at in range(0, 32, bits)))
        fields = (fields.view(np.uint32) - ones).view(np.int32)
    parts: Parts = {
        "qweight": words(q, bits).T, "qzeros": fields, "scales": scales.T,
        "g_idx": groups.astype(np.int32), "bias": np.zeros(len(w), np.float16),
    }  # fmt: skip
    return parts, value(q, scales, zeros, groups)


def awq(w: np.ndarray) -> Stored:
    groups = np.arange(w.shape[1]) // GROUP
    q, scales, zeros = integers(w, 4, False, groups)
    order = (np.arange(len(w)).reshape(-1, 8)[:, AWQ_ORDER]).ravel()
    parts: Parts = {
        "qweight": words(q.T[:, order], 4), "qzeros": words(zeros.T[:, order], 4),
        "scales": scales.T,
    }  # fmt: skip
    return parts, value(q, scales, zeros, groups)


def pack_quantized(
    w: np.ndarray, *, bits: int = 4, symmetric: bool = True, act_order=False, group: int = GROUP
) -> Stored:
    groups = np.arange(w.shape[1]) // group
    if act_order:
        groups = np.random.default_rng(3).permutation(groups)
    q, scales, zeros = integers(w, bits, symmetric, groups)
    parts: Parts = {
        "weight_packed": words(q, bits), "weight_scale": scales,
        "weight_shape": np.array(w.shape, np.int64),
    }  # fmt: skip
    if not symmetric:
        parts["weight_zero_point"] = words(zeros.T, bits).T
    if act_order:
        parts["weight_g_idx"] = groups.astype(np.int32)
    return parts, value(q, scales, zeros, groups)


def int_quantized(w: np.ndarray) -> Stored:
    q, scales, zeros = integers(w, 8, False, np.zeros(w.shape[1], np.int64))
    parts: Parts = {
        "weight": (q - 128).astype(np.int8), "weight_scale": scales,
        "weight_zero_point": (zeros - 128).astype(np.int8),
    }  # fmt: skip
    return parts, value(q, scales, zeros, np.zeros(w.shape[1], np.int64))


def floats(w: np.ndarray, kind: str) -> Stored:
    """Pack random numbers of 4 bits. ``kind``: mxfp4, nvfp4 (compressed-tensors) or modelopt."""
    rng, n, k = np.random.default_rng(5), *w.shape
    nibbles = rng.integers(0, 16, w.shape)
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.uint8)
    values = np.array(E2M1)[nibbles]
    if kind == "mxfp4":
        exponents = rng.integers(118, 124, (n, k // 32), dtype=np.uint8)
        scales = 2.0 ** (exponents.astype(np.float64) - 127)
        parts = {"weight_packed": packed, "weight_scale": exponents}
        return parts, values * scales.repeat(32, 1)
    scale = torch.from_numpy(rng.uniform(1, 400, (n, k // 16))).to(torch.float8_e4m3fn)
    wide = scale.double().numpy().repeat(16, 1)
    if kind == "nvfp4":
        factor = np.array([4096.0], np.float32)  # a power of two: scales and weights are exact
        parts: Parts = {
            "weight_packed": packed, "weight_scale": scale, "weight_global_scale": factor,
            "input_global_scale": factor,
        }  # fmt: skip
        return parts, values * wide / 4096
    parts: Parts = {
        "weight": packed, "weight_scale": scale, "weight_scale_2": np.array(2.0**-12, np.float32),
        "input_scale": np.array(1.0, np.float32),
    }  # fmt: skip
    return parts, values * wide / 4096


def write(
    folder: Path, entry: Mapping[str, Any], pack: Callable[..., Stored], **options: Any
) -> dict[str, np.ndarray]:
    """Write the model; ``pack`` packs its layers' matrices. Return weight name -> weight."""
    from fastlm.checkpoint.architectures import expected_shapes, parse_config

    rng = np.random.default_rng(0)
    tensors: dict[str, torch.Tensor] = {}
    weights = {}
    for name, shape in expected_shapes(parse_config(CONFIG, "test")).items():
        w = rng.standard_normal(shape) * 0.1
        if "layers" in name and len(shape) == 2:
            parts, weights[name] = pack(w, **options)
            for part, array in parts.items():
                if isinstance(array, np.ndarray):
                    array = torch.from_numpy(np.array(array, order="C"))
                tensors[f"{name.removesuffix('.weight')}.{part}"] = array
        else:
            tensors[name] = torch.from_numpy(w).half()
            weights[name] = tensors[name].double().numpy()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": entry}))
    return weights
