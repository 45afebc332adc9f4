"""Read AWQ checkpoints in the GEMM layout, 4 bits.

Per module: ``qweight`` (K, N / 8) int32; ``scales`` (G, N); ``qzeros`` (G, N / 8) int32.
``w[n, k] = scales[g, n] * (q[k, n] - zero[g, n])``. The eight fields of a word, the lowest first,
are columns 0 2 4 6 1 3 5 7.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlm.checkpoint.packed_words import SCALES, WORDS, from_words, infer_group_size, unpack
from fastlm.checkpoint.tensor_folder import PackedWeight, Quantization, TensorFolder
from fastlm.errors import InputError

FIELD_OF = (0, 4, 1, 5, 2, 6, 3, 7)  # column in a word -> its field


def read(config: Mapping[str, Any], tensors: TensorFolder, location: str) -> Quantization:
    """Read the weights of an AWQ folder; see the module."""
    version = config.get("version", "gemm")
    if str(version).lower() != "gemm":
        raise InputError(f"{location}: version: expected gemm for AWQ, got {version!r:.60}")
    weights, sizes = {}, set()
    for name in tensors.modules("qweight"):
        k, words = tensors.check(f"{name}.qweight", WORDS, (None, None))
        shape = (words * 8, k)
        groups, _ = tensors.check(f"{name}.scales", SCALES, (None, words * 8))
        tensors.check(f"{name}.qzeros", WORDS, (groups, words))
        stated = config.get("group_size", config.get("q_group_size"))
        group_size = infer_group_size(k, groups, stated, name)
        sizes.add(group_size)

        def build(stored: dict[str, Tensor], group_size=group_size, shape=shape) -> Any:
            q = columns(stored["qweight"]).t()  # (N, K)
            q = torch.nn.functional.pad(q, (0, -shape[1] % 8), value=8)
            packed = (q[:, 0::2] | q[:, 1::2] << 4).contiguous().view(torch.int32)
            zeros = columns(stored["qzeros"]).t()
            return from_words(packed, 4, stored["scales"].t(), zeros, group_size, shape)

        parts = tensors.parts(name, "qweight", "scales", "qzeros")
        weights[f"{name}.weight"] = PackedWeight(shape, parts, build)
    text = f"AWQ gemm, 4 bits, groups of {'/'.join(map(str, sorted(sizes)))}"
    return Quantization(weights, text)


def columns(words: Tensor) -> Tensor:
    """Unpack (R, W) int32 to (R, W * 8) uint8 in the order of the columns."""
    fields = unpack(words, 4).view(*words.shape, 8)
    return fields[..., list(FIELD_OF)].flatten(-2)
