"""Rotary positions (Su et al. 2021, arXiv:2104.09864): tables of cosines and sines, and how they
are scaled to longer contexts.

``rope_type`` is Hugging Face's: ``default``; ``linear`` (Chen et al. 2023, arXiv:2306.15595);
``dynamic`` (NTK, the base grows with the length); ``yarn`` (Peng et al. 2023, arXiv:2309.00071);
``llama3`` (Llama 3.1's report, arXiv:2407.21783); ``longrope`` (Ding et al. 2024,
arXiv:2402.13753; Phi-3).

Frequencies and angles are float32, as in the checkpoints' training. float64 angles would be more
accurate but would differ from every other program at position 10^5. Tables are computed once per
model and grow by doubling; a module that computes cos and sin in each forward pass costs about a
tenth of a small model's decode step.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlm.checkpoint.rope_parameters import rotary_width
from fastlm.transforms import is_traced, untraced


def frequencies(
    rope: Mapping[str, Any], head_dim: int, max_position_embeddings: int, length: int
) -> tuple[Tensor, float]:
    """Return each pair's angle per position, (width / 2) float32, and the factor on cos and sin.

    `length` is that of the context; only dynamic and longrope use it.
    """
    kind, base = rope["rope_type"], rope["rope_theta"]
    width = rotary_width(rope, head_dim)
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device="cpu").float() / width
    if kind == "dynamic":
        factor, max_length = rope["factor"], max(length, max_position_embeddings)
        stretch = factor * max_length / max_position_embeddings - (factor - 1)
        return 1.0 / (base * stretch ** (width / (width - 2))) ** exponents, 1.0
    turn = base**exponents
    if kind == "linear":
        return 1.0 / turn / rope["factor"], 1.0
    if kind == "yarn":
        return _yarn(rope, turn, width, max_position_embeddings)
    if kind == "llama3":
        return _llama3(rope, 1.0 / turn), 1.0
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or max_position_embeddings / original
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        stretch = rope["long_factor" if length > original else "short_factor"]
        stretch = torch.tensor(stretch, dtype=torch.float32, device="cpu")
        return 1.0 / (stretch * turn), rope.get("attention_factor") or scale
    return 1.0 / turn, 1.0


def _yarn(
    rope: Mapping[str, Any], turn: Tensor, width: int, max_position_embeddings: int
) -> tuple[Tensor, float]:
    """Return YaRN's frequencies: pairs that turn often in the original context are kept, those that
    turn less than once are stretched by factor, with a ramp in between."""
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or max_position_embeddings / original

    def mscale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def pair(turns: float) -> float:
        """Return the index of the pair that makes this many turns over the original context."""
        theta = math.log(rope["rope_theta"])
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * theta)

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = torch.arange(width // 2, dtype=torch.float32, device="cpu")
    keep = 1 - ((ramp - low) / (high - low)).clamp(0, 1)
    freq = 1.0 / (factor * turn) * (1 - keep) + 1.0 / turn * keep
    scale = rope.get("attention_factor")
    if scale is None:
        both = rope.get("mscale") and rope.get("mscale_all_dim")
        scale = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"]) if both else mscale()
    return freq, scale


def _llama3(rope: Mapping[str, Any], freq: Tensor) -> Tensor:
    """Return Llama 3's frequencies: wavelengths beyond original / low_freq_factor are stretched by
    factor, those below original / high_freq_factor stay, and those in between are interpolated."""
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / freq
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * freq / factor + blend * freq
    stretched = torch.where(wavelength > original / low, freq / factor, freq)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, stretched)


class RotaryTables:
    """Cosines and sines of one set of rotary parameters, cached per device and regime.

    A *regime* is a range of context lengths with the same frequencies. Most types have one regime
    for all lengths; longrope has two, and dynamic has one per length beyond the original context.
    Keys that were rotated in one regime do not match queries of another.
    """

    def __init__(self, rope: Mapping[str, Any], head_dim: int, max_position_embeddings: int):
        self.rope, self.head_dim, self.max_position = rope, head_dim, max_position_embeddings
        self._tables: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies depend on the length of the context."""
        return self.rope["rope_type"] in ("dynamic", "longrope")

    def regime(self, length: int) -> int:
        """Return the number of the regime of a context length."""
        kind = self.rope["rope_type"]
        if kind == "dynamic":
            return length if length > self.max_position else 0
        if kind == "longrope":
            return int(length > self.rope["original_max_position_embeddings"])
        return 0

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin, (>= length, width) float32 as `fastlm.ops.rope` expects, for a
        context of `length`.
        """
        if is_traced():  # a constant of the trace, for any length it may run with
            if self.depends_on_length:
                raise NotImplementedError(
                    f"torch.jit.trace: rope_type {self.rope['rope_type']} depends on the length of"
                    " the context, which a trace does not record"
                )
            with untraced():
                return self.tables(max(int(length), self.max_position), device)
        key = (device, self.regime(length))
        tables = self._tables.get(key)
        if tables is None or tables[0].shape[0] < length:
            rows = max(length, 128 if tables is None else 2 * tables[0].shape[0])
            with torch.inference_mode(False):  # tables created in generation also serve training
                freq, scale = frequencies(self.rope, self.head_dim, self.max_position, length)
                angles = torch.arange(rows, dtype=torch.float32, device="cpu")[:, None] * freq
                angles = torch.cat((angles, angles), -1)
                tables = (angles.cos() * scale).to(device), (angles.sin() * scale).to(device)
            if key[1] and self.rope["rope_type"] == "dynamic":  # keep the table of the last length
                for old in [k for k in self._tables if k[0] == device and k[1]]:
                    del self._tables[old]
            self._tables[key] = tables
        return tables
