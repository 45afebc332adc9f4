"""The figures in a stage's result: which count as scores, and the one that stands for all."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from fastlm.pipeline.record import Entry

# the first of these that a result has stands for it
HEADLINES = (
    "bits_per_byte", "val_accuracy", "accuracy", "win_rate", "mean_reward", "reward", "score",
    "val_loss", "best_loss", "loss", "quality_loss", "kl", "bytes", "train_tokens", "train_bytes",
    "vocab_size",
)  # fmt: skip
# what says how fast or how long, not how good
TIMES = ("seconds", "per_second", "load")
DEPTH = 4


def scores(entry: Entry) -> dict[str, float]:
    """Every finite figure of a result -> its value, without times; tables inside are joined by
    dots.
    """
    return dict(_figures(entry.result or {}, "", DEPTH))


def _figures(table: Mapping[str, Any], before: str, depth: int) -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        name = f"{before}{key}"
        if any(word in str(key) for word in TIMES):
            continue
        if isinstance(value, Mapping):
            if depth:
                yield from _figures(value, f"{name}.", depth - 1)
        elif is_figure(value):
            yield name, value


def is_figure(value: Any) -> bool:
    """Whether a value is a number: neither NaN, nor infinite, nor beyond all floats."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def headline(entry: Entry) -> str:
    """The figure that stands for a result, as text: "loss 4.321"; "" if it has none."""
    found = scores(entry)
    for wanted in HEADLINES:
        named = {k: v for k, v in found.items() if k.rpartition(".")[2] == wanted}
        if named:
            return ", ".join(f"{_name(k)} {figure(v)}" for k, v in list(named.items())[:3])
    return ""


def _name(key: str) -> str:
    parts = key.split(".")
    return f"{parts[-2]} {parts[-1]}" if len(parts) > 1 and parts[0] == "models" else parts[-1]


def figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
