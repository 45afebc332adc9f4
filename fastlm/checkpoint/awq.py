"""Read AWQ checkpoints in the GEMM layout, 4 bits.

Per module: ``qweight`` (K, N / 8) int32; ``scales`` (G, N); ``qzeros`` (G, N / 8) int32.
``w[n, k] = scales[g, n] * (q[k, n] - zero[g, n])``. The eight fields of a word, the lowest first,
are columns 0 2 4 6 1 3 5 7 of its eight.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.checkpoint.packed_words import from_words, group_of, unpack
from fastlm.checkpoint.tensor_folder import Packed, Quantization, TensorFolder
from fastlm.errors import InputError

FIELD_OF = (0, 4, 1, 5, 2, 6, 3, 7)  # column in a word -> its field
PARTS = ("qweight", "scales", "qzeros")


def read(config: Mapping[str, Any], tensors: TensorFolder, where: Path) -> Quantization:
    """The weights of an AWQ folder; see the module."""
    version = config.get("version", "gemm")
    if str(version).lower() != "gemm":
        raise InputError(
            f"{where}: quantization_config: version: wanted gemm for AWQ, got {version!r:.60}"
        )
    weights, groups_found = {}, set()
    for name in tensors.modules("qweight"):
        k, words = tensors.check(f"{name}.qweight", ("I32",), (None, None))
        n = words * 8
        groups, _ = tensors.check(f"{name}.scales", ("F16", "BF16", "F32"), (None, n))
        tensors.check(f"{name}.qzeros", ("I32",), (groups, words))
        stated = config.get("group_size", config.get("q_group_size"))
        group_size = group_of(k, groups, stated, name)
        groups_found.add(group_size)

        def build(stored: dict[str, Tensor], group_size=group_size, shape=(n, k)) -> Any:
            q = columns(stored["qweight"]).t().contiguous()  # (N, K)
            if shape[1] % 2:
                q = torch.nn.functional.pad(q, (0, 1), value=8)
            packed = q[:, 0::2] | q[:, 1::2] << 4
            if spare := -packed.shape[1] % 4:
                packed = torch.nn.functional.pad(packed, (0, spare))
            zeros = columns(stored["qzeros"]).t()
            words = packed.contiguous().view(torch.int32)
            return from_words(words, 4, stored["scales"].t(), zeros, group_size, shape)

        parts = {part: f"{name}.{part}" for part in PARTS}
        weights[f"{name}.weight"] = Packed((n, k), parts, build)
    if not weights:
        raise InputError(f"{where}: quantization_config: wanted AWQ tensors (qweight), got none")
    text = f"AWQ gemm, 4 bits, groups of {'/'.join(map(str, sorted(groups_found)))}"
    return Quantization(weights, text)


def columns(words: Tensor) -> Tensor:
    """(R, W) int32 -> (R, W * 8) uint8 in the order of the columns."""
    fields = unpack(words, 4).view(*words.shape, 8)
    return fields[..., list(FIELD_OF)].flatten(-2)
