"""Read GPTQ checkpoints (AutoGPTQ, GPTQModel, AutoRound) of 2, 4 and 8 bits.

Per module: ``qweight`` (K * bits / 32, N) int32, packed down the columns; ``scales`` (G, N);
``qzeros`` (G, N * bits / 32) int32; ``g_idx`` (K,), the group of each input.
``w[n, k] = scales[g, n] * (q[k, n] - zero[g, n])``.

Version 1 stores zero - 1, version 2 stores zero. Some files are mislabelled, and a model read as
the wrong version writes nonsense, so the version is inferred from the weights. Symmetric files have
one zero point throughout, which identifies the version; then no other weight is read. In other
files q - zero is about 0 on average, since weights are; for the wrong version it is about 1 off.
Some rows of some layers suffice.

A weight with ``desc_act`` (its g_idx not in order) is dequantized: its columns have no common
scale.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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

BITS = (2, 4, 8)
SAMPLE = 16  # modules from which the version is inferred
ROWS = 256  # unpacked rows of each module: in total a million weights of small models
# half of the distance between the versions, less the mean of real weights in units of their scale
MARGIN = 0.3
PARTS = ("qweight", "qzeros", "scales", "g_idx")
VERSIONS = {  # checkpoint_format or packing_format -> the version that the file names
    "gptq": 1, "gptq_v2": 2, "auto_round:auto_gptq": 1, "auto_round:gptq": 1,
    "auto_round:gptqmodel": 2,
}  # fmt: skip


def read(config: Mapping[str, Any], tensors: TensorFolder, location: str) -> Quantization:
    """Read the weights of a GPTQ folder; see the module."""
    layouts = {name: _layout(name, tensors, config) for name in tensors.modules("qweight")}
    stated = VERSIONS.get(str(config.get("checkpoint_format") or config.get("packing_format")))
    inferred = _infer_version(tensors, layouts)
    version = inferred or stated or 1
    weights, shuffled = {}, 0
    for name, (bits, group_size, shape) in layouts.items():
        parts = tensors.parts(name, *PARTS)
        if "g_idx" in parts:
            groups = -(-shape[1] // group_size)
            shuffled += not is_in_order(tensors.get(parts["g_idx"]), shape[1], group_size, groups)

        def build(stored: dict[str, Tensor], bits=bits, group_size=group_size, shape=shape) -> Any:
            words, scales = stored["qweight"].t(), stored["scales"].t()
            zeros = zero_points(stored["qzeros"], bits, version).t()
            index = stored.get("g_idx")
            if index is None or is_in_order(index, shape[1], group_size, scales.shape[1]):
                return from_words(words, bits, scales, zeros, group_size, shape)
            return dequantize_scattered(words, bits, scales, zeros, index, shape[1])

        weights[f"{name}.weight"] = PackedWeight(shape, parts, build)
    bits, groups = (
        "/".join(map(str, sorted({layout[i] for layout in layouts.values()}))) for i in (0, 1)
    )
    contradiction = f" (file says v{stated})" if stated and stated != version else ""
    text = f"GPTQ v{version} zero points{contradiction}, {bits} bits, groups of {groups}"
    if not inferred:
        text += ", version not determined by the weights"
    if shuffled:
        text += f", {shuffled} weights with desc_act dequantized"
    warning = f"{location}: {text}" if contradiction else ""
    return Quantization(weights, text, warning=warning)


def zero_points(words: Tensor, bits: int, version: int) -> Tensor:
    """Unpack (G, N * bits / 32) int32 to (G, N) uint8.

    Version 1 is undone on full words: its writers subtract one from every field at once, so a zero
    of 0 borrows from its neighbour.
    """
    if version == 1:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        wide = (words.long() + ones) & 0xFFFFFFFF
        words = torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32)
    return unpack(words, bits)


def _layout(
    name: str, tensors: TensorFolder, config: Mapping[str, Any]
) -> tuple[int, int, tuple[int, int]]:
    """Return bits, group size and shape of a module from its headers; bits may differ between
    modules.
    """
    rows, n = tensors.check(f"{name}.qweight", WORDS, (None, None))
    groups, _ = tensors.check(f"{name}.scales", SCALES, (None, n))
    _, zero_words = tensors.check(f"{name}.qzeros", WORDS, (groups, None))
    bits = zero_words * 32 // n
    if bits not in BITS or bits * n != zero_words * 32:
        raise InputError(
            f"{tensors.folder}: {name}.qzeros: expected zero points of 2, 4 or 8 bits for {n} rows,"
            f" got {zero_words} words ({zero_words * 32 / n:.3g} bits)"
        )
    k = rows * 32 // bits
    group_size = infer_group_size(k, groups, config.get("group_size"), name)
    if f"{name}.g_idx" in tensors.headers:
        tensors.check(f"{name}.g_idx", WORDS, (k,))
    return bits, group_size, (n, k)


def _infer_version(
    tensors: TensorFolder, layouts: Mapping[str, tuple[int, int, Any]]
) -> int | None:
    """Return the version according to the weights, None if they do not determine it."""
    sample = list(layouts.items())[:SAMPLE]
    zeros = {n: unpack(tensors.get(f"{n}.qzeros"), bits) for n, (bits, _, _) in sample}
    # in units of 4 bits' middle: 7 and 8 become -1 and 0 for every number of bits
    values = {int(v) - 2 ** (bits - 1) for n, (bits, _, _) in sample for v in zeros[n].unique()}
    if values in ({-1}, {0}):
        return 1 if values == {-1} else 2
    offsets = []
    for name, (bits, group_size, _) in sample:
        q = unpack(tensors.get(f"{name}.qweight")[:, :ROWS].t(), bits).float()
        sizes = [part.mean(1) for part in q.split(group_size, dim=1)]
        if len(sizes) == len(zeros[name]):
            offsets.append((torch.stack(sizes) - zeros[name][:, :ROWS]).mean().item())
    mean = sum(offsets) / max(len(offsets), 1)
    if offsets and abs(mean) < MARGIN:
        return 2
    return 1 if offsets and abs(mean - 1) < MARGIN else None
