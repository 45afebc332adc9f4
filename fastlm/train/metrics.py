"""metrics.jsonl, the record of a training's steps, validations and samples, one line each; and the
trackers that mirror it (the option ``report_to``).
"""

import importlib
import importlib.util
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.files import read_text
from fastlm.schema import parse

Line = dict[str, Any]
METRICS = "metrics.jsonl"
MAX_METRICS = 2**33  # bytes; a step's line takes 225
# key of a line -> the keys that the line must have, too
REQUIRED_KEYS = {"loss": ("lr", "tokens", "seconds"), "sample": ("progress",)}
# Environment variables that make trackio send the metrics to a server
REMOTE_VARIABLES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class MetricsLine(TypedDict):
    """The keys of metrics.jsonl that all trainings use. Numbers need not be finite."""

    step: int
    loss: NotRequired[float]
    lr: NotRequired[float]
    tokens: NotRequired[int]
    seconds: NotRequired[float]
    val_loss: NotRequired[float]
    bits_per_byte: NotRequired[float]
    sample: NotRequired[str]
    progress: NotRequired[float]


def read_metrics(path: Path) -> list[Line]:
    """Read and check the lines of steps ("loss"), validations ("val_loss") and samples.

    InputError names the line.
    """
    lines, steps = [], {0}
    # not splitlines: a sample may contain U+2028
    for number, text in enumerate(read_text(path, MAX_METRICS).split("\n"), 1):
        if not text:
            continue
        location = f"{path}:{number}"
        line = parse(text, MetricsLine, location, extra="allow")
        for key, required in REQUIRED_KEYS.items():
            for name in required if key in line else ():
                if name not in line:
                    raise InputError(f"{location}: {name}: expected this field, got nothing")
        steps |= {line["step"]} if "loss" in line else set()
        if line["step"] not in steps:
            raise InputError(f"{location}: expected a step that was trained, got {line['step']}")
        lines.append(line)
    return lines


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None where one side is constant."""
    import numpy as np

    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else None


class TensorBoard:
    """Writes event files to ``run_dir``/tensorboard. A resumed training rewrites them."""

    def __init__(self, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=0)  # hides earlier events

    def log(self, numbers: dict[str, float], line: Line) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, line["step"])
        if "sample" in line:
            self.writer.add_text("sample", line["sample"], line["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """Logs to a run in trackio's local store, named after ``run_dir``, in a project named after its
    parent folder. A resumed training replaces its run.
    """

    def __init__(self, run_dir: Path):
        self.trackio: Any = importlib.import_module("trackio")
        folder = run_dir.resolve()
        project, config = folder.parent.name or "fastlm", {"folder": str(folder)}
        with suppress(ValueError):  # the project does not exist yet
            for run in [*self.trackio.Api().runs(project)]:
                if config.items() <= (run.config or {}).items():
                    run.delete()
        with redirect_stdout(io.StringIO()):  # stdout is for results
            self.run = self.trackio.init(
                project, folder.name, config=config, embed=False, auto_log_gpu=False,
                auto_log_cpu=False,
            )  # fmt: skip

    def log(self, numbers: dict[str, float], line: Line) -> None:
        self.run.log(numbers, step=line["step"])

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.trackio.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "trackio": Trackio}


def check_report_to(names: Sequence[str]) -> None:
    """Raise InputError for trackers that are unknown, not installed, or not local."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"report_to: expected {' or '.join(TRACKERS)}, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"report_to: expected the package {name}, got none: pip install {name}"
            )
        for variable in REMOTE_VARIABLES if name == "trackio" else ():
            if os.environ.get(variable):
                raise InputError(
                    f"report_to: expected {variable} unset, because metrics stay on this machine,"
                    f" got {os.environ[variable]!r:.80}"
                )


@contextmanager
def trackers(
    names: Sequence[str], run_dir: Path, on_event: Callable[[Line], None] | None
) -> Iterator[Callable[[Line], None]]:
    """Yield an ``on_event`` that forwards events, and logs the lines of metrics to the trackers. A
    tracker that fails is disabled with one warning.
    """
    running: dict[str, Any] = {}
    failed: set[str] = set()

    def disable(name: str, error: Exception) -> None:
        running.pop(name, None)
        failed.add(name)
        if on_event is not None:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            on_event({"warning": f"report_to: {name} failed and is disabled: {reason}"})

    def forward(event: Line) -> None:
        if on_event is not None:
            on_event(event)
        if "step" not in event:
            return
        for name in sorted({*names} - failed):
            try:
                lines = [event]
                if name not in running:
                    running[name] = TRACKERS[name](run_dir)
                    lines = read_metrics(run_dir / METRICS)  # with the earlier lines
                for line in lines:
                    numbers = {
                        k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)
                    }
                    running[name].log(numbers, line)
            except Exception as error:
                disable(name, error)

    try:
        yield forward
    finally:
        for name, tracker in [*running.items()]:
            try:
                tracker.close()
            except Exception as error:
                disable(name, error)
