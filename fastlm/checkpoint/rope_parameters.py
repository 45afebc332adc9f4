"""Check ``rope_parameters`` of config.json for each ``rope_type`` (`fastlm.model.rotary`)."""

import math
from collections.abc import Mapping
from typing import Any

from fastlm.errors import InputError

ROPE_TYPES = {  # -> the entries each needs besides rope_theta
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("original_max_position_embeddings",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "longrope": ("long_factor", "short_factor", "original_max_position_embeddings"),
}
_NUMBERS = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "attention_factor", "partial_rotary_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)


def rotary_width(rope: Mapping[str, Any], head_dim: int) -> int:
    """Return the number of a head's rotated features."""
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def check_rope(rope: Any, head_dim: int, location: str) -> None:
    """Raise InputError for an unknown rope_type, a missing entry or an impossible number."""
    if not isinstance(rope, Mapping):
        raise InputError(f"{location}: expected a dict, got {rope!r}")
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise InputError(
            f"{location}: rope_type: expected one of {', '.join(ROPE_TYPES)}, got {kind!r}"
        )
    for name in ("rope_theta", *ROPE_TYPES[kind]):
        if rope.get(name) is None:
            raise InputError(f"{location}: {name}: expected for rope_type {kind}, got none")
    for name in _NUMBERS:
        value = rope.get(name)
        if value is not None and not (type(value) in (int, float) and 0 < value < math.inf):
            raise InputError(f"{location}: {name}: expected a positive number, got {value!r}")
    if rope["rope_theta"] <= 1:
        raise InputError(
            f"{location}: rope_theta: expected more than 1, got {rope['rope_theta']!r}"
        )
    width = rotary_width(rope, head_dim)
    if width < 2 or width % 2 or width > head_dim:
        raise InputError(
            f"{location}: expected an even number of rotated features up to head_dim {head_dim},"
            f" got {width}"
        )
    if kind == "dynamic" and width == 2:
        raise InputError(
            f"{location}: rope_type dynamic: expected more than 2 rotated features, got 2"
        )
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(
            f"{location}: low_freq_factor: expected less than high_freq_factor"
            f" {rope['high_freq_factor']}, got {rope['low_freq_factor']}"
        )
    if kind == "longrope":
        for name in ("long_factor", "short_factor"):
            factors, count = rope[name], width // 2
            has_length = isinstance(factors, list | tuple) and len(factors) == count
            if not has_length or not all(isinstance(f, int | float) and f > 0 for f in factors):
                raise InputError(
                    f"{location}: {name}: expected {count} positive numbers, got {factors!r}"
                )
