"""metrics.jsonl: what a training records of its steps, validations and samples, one line each."""

from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import parse_json, read_text
from fastlm.typed import check

METRICS = "metrics.jsonl"
MAX_METRICS = 2**33  # bytes; a step's line takes 225


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read and check the lines of steps ("loss"), validations ("val_loss") and samples.

    InputError names the line.
    """
    schemas = {
        "loss": {"loss": float, "lr": float, "tokens": int, "seconds": float},
        "val_loss": {"val_loss": float},
        "bits_per_byte": {"bits_per_byte": float},
        "sample": {"sample": str, "progress": float},
    }
    lines, steps = [], {0}
    # not by splitlines: a sample may hold U+2028
    for number, text in enumerate(read_text(path, MAX_METRICS).split("\n"), 1):
        if not text:
            continue
        where = f"{path}: line {number}"
        line = parse_json(text, where)
        check(line, {"step": int}, where)
        for kind, schema in schemas.items():
            if kind in line:
                check(line, schema, where)
        steps |= {line["step"]} if "loss" in line else set()
        if line["step"] not in steps:
            raise InputError(f"{where}: wanted a step that was trained, got {line['step']}")
        lines.append(line)
    return lines
