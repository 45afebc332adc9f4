"""metrics.jsonl: what a training records of its steps, validations and samples, one line each."""

from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.files import read_text
from fastlm.schema import parse

METRICS = "metrics.jsonl"
MAX_METRICS = 2**33  # bytes; a step's line takes 225


# a line that has the key has these, too
COMPLETE = {"loss": ("lr", "tokens", "seconds"), "sample": ("progress",)}


class MetricsLine(TypedDict):
    """The keys that all trainings use. Numbers need not be finite."""

    step: int
    loss: NotRequired[float]
    lr: NotRequired[float]
    tokens: NotRequired[int]
    seconds: NotRequired[float]
    val_loss: NotRequired[float]
    bits_per_byte: NotRequired[float]
    sample: NotRequired[str]
    progress: NotRequired[float]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read and check the lines of steps ("loss"), validations ("val_loss") and samples.

    InputError names the line.
    """
    lines, steps = [], {0}
    # not by splitlines: a sample may hold U+2028
    for number, text in enumerate(read_text(path, MAX_METRICS).split("\n"), 1):
        if not text:
            continue
        where = f"{path}:{number}"
        line = parse(text, MetricsLine, where, extra="allow")
        for kind, others in COMPLETE.items():
            for name in others if kind in line else ():
                if name not in line:
                    raise InputError(f"{where}: {name}: expected this field, got nothing")
        steps |= {line["step"]} if "loss" in line else set()
        if line["step"] not in steps:
            raise InputError(f"{where}: wanted a step that was trained, got {line['step']}")
        lines.append(line)
    return lines
