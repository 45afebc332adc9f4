"""Mirrors of metrics.jsonl in other programs: the option ``report_to``.

    tensorboard   event files in the training's folder, tensorboard/
    trackio       a run in trackio's local store, of the project that the parent folder names

Their packages are imported when the first line arrives. A tracker that fails is given up with one
warning; the training continues. They show what metrics.jsonl has: a resumed training shows no step
twice.
"""

import importlib
import importlib.util
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Protocol

from fastlm.errors import InputError
from fastlm.files import read_json, save_atomic
from fastlm.train.metrics import METRICS, read_metrics

Line = dict[str, Any]
PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio"}
# Where trackio would send the metrics to somebody's server
REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Tracker(Protocol):
    def __init__(self, run_dir: Path) -> None:
        """Begin, or continue, when a line has been written to metrics.jsonl; take over the lines
        before it.
        """

    def log(self, line: Line) -> None: ...

    def close(self) -> None: ...


def check_report_to(names: Sequence[str]) -> None:
    """Refuse trackers that are not known, not installed, or not local. InputError says why."""
    for name in names:
        if name not in PACKAGES:
            raise InputError(f"report_to: wanted of {', '.join(PACKAGES)}, got {name!r}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(
                f"report_to: {name} wants the package {PACKAGES[name]}, got none: pip install"
                f" {PACKAGES[name]}"
            )
        for variable in REMOTE if name == "trackio" else ():
            if os.environ.get(variable):
                raise InputError(
                    f"report_to: wanted {variable} unset, as metrics stay on this machine, got"
                    f" {os.environ[variable]!r:.80}"
                )


@contextmanager
def trackers(
    names: Sequence[str], run_dir: Path, on_event: Callable[[Line], None] | None
) -> Iterator[Callable[[Line], None]]:
    """Context: an ``on_event`` that passes events on, and each line of metrics to the trackers."""
    mirrors = [_Mirror(name, run_dir, on_event) for name in names]

    def tell(event: Line) -> None:
        if on_event is not None:
            on_event(event)
        if "step" in event:
            for mirror in mirrors:
                mirror.tell(event)

    try:
        yield tell
    finally:
        for mirror in mirrors:
            mirror.close()


class _Mirror:
    """A tracker that is made when the first line arrives, and given up when it fails."""

    def __init__(self, name: str, run_dir: Path, on_event: Callable[[Line], None] | None):
        self.name, self.run_dir, self.on_event = name, run_dir, on_event
        self.tracker: Tracker | None = None
        self.failed = False

    def tell(self, line: Line) -> None:
        if self.failed:
            return
        with self._guarded():
            if self.tracker is None:
                self.tracker = TRACKERS[self.name](self.run_dir)
            self.tracker.log(line)

    def close(self) -> None:
        if self.tracker is not None and not self.failed:
            with self._guarded():
                self.tracker.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failed = True
            if self.on_event is not None:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                self.on_event({"warning": f"report_to: {self.name} failed and is off: {reason}"})


class TensorBoard:
    """Event files in ``run_dir``/tensorboard. A resumed training purges what is there and writes
    all steps again: some may be of after its checkpoint, or missing, as report_to was off.
    TensorBoard shows each step once.
    """

    def __init__(self, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        before = [*folder.glob("events.out.tfevents.*")]
        self.texts = _steps_with_text(folder) if before else set()
        # TensorBoard reads files in the order of the seconds in their names
        newest = max((int(file.name.split(".")[3]) for file in before), default=0)
        time.sleep(min(max(newest + 1 - time.time(), 0.0), 1.0))
        self.writer = SummaryWriter(str(folder), purge_step=0 if before else None)
        for line in _before(run_dir):
            self._write(line)

    def log(self, line: Line) -> None:
        self._write(line)
        self.writer.flush()

    def _write(self, line: Line) -> None:
        for name, value in _numbers(line).items():
            self.writer.add_scalar(name, value, line["step"])
        if "sample" in line and line["step"] not in self.texts:
            self.writer.add_text("sample", line["sample"], line["step"])

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A run of trackio's local store, named as ``run_dir``, in the project that the folder above
    names. A resumed training replaces its run by a new one, with the steps so far. It knows its run
    by the id in ``run_dir``/trackio.json: that of an earlier training there is kept.
    """

    def __init__(self, run_dir: Path):
        self.trackio: Any = importlib.import_module("trackio")
        here = run_dir.resolve()
        project = here.parent.name or "fastlm"
        mine = {"folder": str(here), "id": _own_id(run_dir / "trackio.json")}
        taken = set()
        with suppress(ValueError):  # there is no such project yet
            for run in [*self.trackio.Api().runs(project)]:
                if mine.items() <= (run.config or {}).items():
                    run.delete()
                else:
                    taken.add(run.name)
        # trackio would draw another name for one that is taken
        name = f"{here.name}-{mine['id'][:4]}" if here.name in taken else here.name
        with redirect_stdout(io.StringIO()):  # stdout is for results
            self.run = self.trackio.init(
                project, name, config=mine, embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        for line in _before(run_dir):
            self.log(line)

    def log(self, line: Line) -> None:
        self.run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio}


def _own_id(path: Path) -> str:
    """The id in ``path``, which the first start of a training writes."""
    if not path.exists():
        save_atomic(path, lambda part: part.write_text(json.dumps({"id": secrets.token_hex(8)})))
    return str(read_json(path)["id"])


def _steps_with_text(folder: Path) -> set[int]:
    """The steps of the texts in TensorBoard's files: a purge hides numbers, but no texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder), size_guidance={"scalars": 1, "tensors": 0})
    board.Reload()
    return {event.step for tag in board.Tags()["tensors"] for event in board.Tensors(tag)}


def _before(run_dir: Path) -> list[Line]:
    """The lines of metrics.jsonl before the last one, which the loop has just written."""
    return read_metrics(run_dir / METRICS)[:-1]


def _numbers(line: Line) -> dict[str, float]:
    return {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
