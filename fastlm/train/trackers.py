"""Mirrors of metrics.jsonl in other programs: the option ``report_to``.

    tensorboard   event files in the training's folder, tensorboard/
    trackio       a run in trackio's local store, of the project that the parent folder names

Their packages are imported when the first line arrives. A tracker that fails is given up with one
warning; the training continues. They show what metrics.jsonl has: a resumed training shows no step
twice, since its mirror is written again.
"""

import importlib
import importlib.util
import io
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import read_json, write_json
from fastlm.train.metrics import METRICS, read_metrics

Line = dict[str, Any]
# Where trackio would send the metrics to somebody's server
REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def check_report_to(names: Sequence[str]) -> None:
    """Refuse trackers that are not known, not installed, or not local. InputError says why."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"report_to: expected {' or '.join(TRACKERS)}, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"report_to: expected the package {name}, got none: pip install {name}"
            )
        for variable in REMOTE if name == "trackio" else ():
            if os.environ.get(variable):
                raise InputError(
                    f"report_to: expected {variable} unset, as metrics stay on this machine, got"
                    f" {os.environ[variable]!r:.80}"
                )


@contextmanager
def trackers(
    names: Sequence[str], run_dir: Path, on_event: Callable[[Line], None] | None
) -> Iterator[Callable[[Line], None]]:
    """Context: an ``on_event`` that passes events on, and each line of metrics to the trackers."""
    waiting, running = {*names}, {}

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            running.pop(name, None)
            if on_event is not None:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                on_event({"warning": f"report_to: {name} failed and is off: {reason}"})

    def tell(event: Line) -> None:
        if on_event is not None:
            on_event(event)
        if "step" not in event:
            return
        for name in sorted(waiting):  # each takes over the lines before this one
            waiting.remove(name)
            if tracker := attempt(name, lambda name=name: TRACKERS[name](run_dir)):
                running[name] = tracker
        for name, tracker in [*running.items()]:
            attempt(name, lambda tracker=tracker: tracker.log(event))

    try:
        yield tell
    finally:
        for name, tracker in [*running.items()]:
            attempt(name, tracker.close)


class TensorBoard:
    """Event files in ``run_dir``/tensorboard, which a resumed training writes again."""

    def __init__(self, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=0)  # hides what a viewer has read
        for line in _before(run_dir):
            self._write(line)

    def log(self, line: Line) -> None:
        self._write(line)
        self.writer.flush()

    def _write(self, line: Line) -> None:
        for name, value in _numbers(line).items():
            self.writer.add_scalar(name, value, line["step"])
        if "sample" in line:
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
        folder, path = run_dir.resolve(), run_dir / "trackio.json"
        if not path.exists():
            write_json(path, {"id": secrets.token_hex(8)})
        project = folder.parent.name or "fastlm"
        config = {"folder": str(folder), "id": str(read_json(path)["id"])}
        names = set()
        with suppress(ValueError):  # there is no such project yet
            for run in [*self.trackio.Api().runs(project)]:
                if config.items() <= (run.config or {}).items():
                    run.delete()
                else:
                    names.add(run.name)
        # trackio would draw another name for one that is taken
        name = f"{folder.name}-{config['id'][:4]}" if folder.name in names else folder.name
        with redirect_stdout(io.StringIO()):  # stdout is for results
            self.run = self.trackio.init(
                project, name, config=config, embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        for line in _before(run_dir):
            self.log(line)

    def log(self, line: Line) -> None:
        self.run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.trackio.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "trackio": Trackio}


def _before(run_dir: Path) -> list[Line]:
    """The lines of metrics.jsonl before the last one, which the loop has just written."""
    return read_metrics(run_dir / METRICS)[:-1]


def _numbers(line: Line) -> dict[str, float]:
    return {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
