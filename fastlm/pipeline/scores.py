"""The figures in a stage's result: which count as scores, and the one that stands for all."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from fastlm.pipeline.record import Entry
from fastlm.pipeline.text import figure

# the first of these that a result has stands for it
HEADLINES = (
    "bits_per_byte", "val_accuracy", "accuracy", "win_rate", "mean_reward", "reward", "score",
    "val_loss", "best_loss", "loss", "quality_loss", "kl", "bytes", "train_tokens", "train_bytes",
    "vocab_size",
)  # fmt: skip
# what says how fast or how long, not how good
TIMES = ("seconds", "per_second", "load")
DEPTH = 4


def models_in(entry: Entry) -> Mapping[str, Any]:
    """The models that a stage measured -> their results."""
    models = (entry.result or {}).get("models")
    return models if isinstance(models, Mapping) else {}


def scores(entry: Entry, models: Iterable[str] | None = None) -> dict[str, float]:
    """Every finite figure of a result -> its value, without times; tables inside are joined by
    dots. ``models``: of several that were measured only these, without their names.
    """
    result = entry.result or {}
    if models is not None and (measured := models_in(entry)):
        result = {key: value for key, value in result.items() if key != "models"}
        for name in models:
            result |= table if isinstance(table := measured.get(name), Mapping) else {}
    return dict(_figures(result, "", DEPTH))


def _figures(table: Mapping[str, Any], before: str, depth: int) -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        if any(word in str(key) for word in TIMES):
            continue
        if isinstance(value, Mapping) and depth:
            yield from _figures(value, f"{before}{key}.", depth - 1)
        elif is_figure(value):
            yield f"{before}{key}", value


def is_figure(value: Any) -> TypeGuard[float]:
    """Whether a value is a number: neither NaN, nor infinite, nor beyond all floats."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def headline(entry: Entry) -> str:
    """The figure that stands for a result, as text: "loss 4.321"; "" if it has none."""
    figures = [(key.split("."), value) for key, value in scores(entry).items()]
    for name in HEADLINES:
        found = [(path, value) for path, value in figures if path[-1] == name]
        if found:
            names = [f"{path[-2]} {name}" if path[0] == "models" else name for path, _ in found[:3]]
            return ", ".join(f"{n} {figure(value)}" for n, (_, value) in zip(names, found))
    return ""
