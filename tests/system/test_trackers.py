"""Mirrors of metrics.jsonl: TensorBoard's files, trackio's runs, resuming, and what may fail."""

import importlib
import importlib.util
import json
import multiprocessing
import signal
import socket
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import OPTIONS, start

from fastlm.errors import InputError
from fastlm.train import metrics as module
from fastlm.train.metrics import trackers
from fastlm.train.sft import SFT

pytestmark = pytest.mark.usefixtures("one_thread")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "fastlm.train.pretrain"])
BOARD = replace(OPTIONS, report_to=("tensorboard",))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_run.shards(folder)
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def expected(run: Path) -> list[tuple[int, str, float]]:
    """The numbers of metrics.jsonl, rounded as TensorBoard rounds them."""
    return sorted(
        (line["step"], name, struct.unpack("f", struct.pack("f", value))[0])
        for line in lines(run)
        for name, value in line.items()
        if name not in ("step", "sample")
    )


def events_of(folder: Path) -> tuple[list[tuple[int, str, float]], list[str]]:
    """Return the numbers and texts that TensorBoard reads from its files."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    numbers = [
        (event.step, tag, event.value)
        for tag in board.Tags()["scalars"]
        for event in board.Scalars(tag)
    ]
    texts = [
        event.tensor_proto.string_val[0].decode()
        for tag in board.Tags()["tensors"]
        for event in board.Tensors(tag)
    ]
    return sorted(numbers), texts


def die(data: Path, run: Path) -> None:
    """A training that is killed in step 8, after the checkpoint of step 5."""
    child = FORKS.Process(target=tiny_run.start_and_die, args=(data, run, "step", 16, BOARD))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL


def test_tensorboard_shows_each_step_once_after_a_kill(data, tmp_path) -> None:
    die(data, tmp_path)
    before = events_of(tmp_path / "tensorboard")[0]
    assert {step for step, name, _ in before if name == "loss"} == set(range(1, 8))
    start(data, tmp_path, BOARD)
    numbers, texts = events_of(tmp_path / "tensorboard")
    assert numbers == expected(tmp_path)
    assert texts == [line["sample"] for line in lines(tmp_path) if "sample" in line]
    files = {p.name for p in (tmp_path / "tensorboard").iterdir()}
    start(data, tmp_path, BOARD)  # nothing is left to do: no empty file
    assert {p.name for p in (tmp_path / "tensorboard").iterdir()} == files and len(files) == 1


def test_a_tracker_can_join_later(data, tmp_path) -> None:
    start(data, tmp_path, replace(OPTIONS, max_steps=8))
    start(data, tmp_path, replace(BOARD, max_steps=12))
    assert events_of(tmp_path / "tensorboard")[0] == expected(tmp_path)
    # and be off for a while
    start(data, tmp_path, replace(OPTIONS, max_steps=16))
    start(data, tmp_path, replace(BOARD, max_steps=20))
    numbers, texts = events_of(tmp_path / "tensorboard")
    assert numbers == expected(tmp_path)
    assert texts == [line["sample"] for line in lines(tmp_path) if "sample" in line]


class FakeTrackio(ModuleType):
    """What `fastlm.train.metrics` uses of trackio, in memory."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.__spec__ = importlib.util.spec_from_loader("trackio", None)
        self.projects: dict[str, list[Any]] = {}
        self.begun = 0

    def Api(self) -> Any:
        return SimpleNamespace(runs=self._runs)

    def _runs(self, project: str) -> list[Any]:
        if project not in self.projects:
            raise ValueError(f"Project '{project}' does not exist")
        return self.projects[project]

    def init(self, project: str, name: str, config: dict[str, Any], **options: Any) -> Any:
        assert options == {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        print("* Trackio project initialized")
        self.begun += 1
        runs = self.projects.setdefault(project, [])
        run = SimpleNamespace(id=self.begun, name=name, config=config, logs=[])
        run.log = lambda numbers, step: run.logs.append({**numbers, "step": step})
        run.delete = lambda: runs.remove(run)
        runs.append(run)
        return run

    def finish(self) -> None:
        print("* Run finished")


@pytest.fixture
def fake(monkeypatch) -> FakeTrackio:
    for variable in module.REMOTE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    runs = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", runs)
    return runs


@pytest.fixture
def real(monkeypatch, tmp_path_factory) -> Any:
    """The package, on a store of the test's own."""
    for variable in module.REMOTE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the variable when it is imported
    return pytest.importorskip("trackio", reason="trackio brings Gradio: no test dependency")


def logs_of(trackio: Any, project: str) -> dict[str, list[dict[str, Any]]]:
    runs = list(trackio.Api().runs(project))
    assert len({run.name for run in runs}) == len(runs)
    if isinstance(trackio, FakeTrackio):
        return {run.name: run.logs for run in runs}
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    lines = {run.name: storage.get_logs(project, run.name) for run in runs}
    return {
        name: [{k: v for k, v in log.items() if k != "timestamp"} for log in logs]
        for name, logs in lines.items()
    }


def mirror_twice(data: Path, tmp_path: Path, trackio: Any) -> None:
    """Each folder has one run in trackio, with all its steps, after a kill and after a resume."""
    run, other = tmp_path / "project" / "sft", tmp_path / "project" / "dpo"
    die(data, run)
    messages: list[dict[str, Any]] = []
    start(data, other, replace(OPTIONS, max_steps=3, report_to=("trackio",)))
    for steps in (12, 24):
        options = replace(OPTIONS, max_steps=steps, report_to=("trackio",))
        start(data, run, options, on_event=messages.append)
        logs = logs_of(trackio, "project")
        assert logs.keys() == {"sft", "dpo"}
        numbers = [{k: v for k, v in line.items() if k != "sample"} for line in lines(run)]
        assert [log for log in logs["sft"] if len(log) > 1] == [n for n in numbers if len(n) > 1]
    assert not [event for event in messages if "warning" in event]


def test_trackio_has_one_run_per_folder(data, tmp_path, fake, capsys) -> None:
    mirror_twice(data, tmp_path, fake)
    assert capsys.readouterr().out == ""


def test_the_real_trackio_has_one_run_per_folder_and_calls_nobody(
    data, tmp_path, real, monkeypatch, capsys
) -> None:
    calls = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: calls.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: calls.append(a))
    mirror_twice(data, tmp_path, real)
    assert calls == [] and capsys.readouterr().out == ""


def test_a_tracker_that_fails_ends_nothing_and_warns_once(data, tmp_path, monkeypatch) -> None:
    messages: list[dict[str, Any]] = []

    class Failing:
        def __init__(self, run_dir: Path):
            self.logged = 0

        def log(self, *line: Any) -> None:
            self.logged += 1
            if self.logged == 3:
                raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise AssertionError("of a tracker that was given up")

    monkeypatch.setitem(module.TRACKERS, "tensorboard", Failing)
    assert start(data, tmp_path, BOARD, on_event=messages.append).steps == 24
    (warning,) = [event["warning"] for event in messages if "warning" in event]
    assert warning == (
        "report_to: tensorboard failed and is disabled: OSError: [Errno 28] No space left on device"
    )
    # also one that cannot begin, without anybody who listens
    monkeypatch.setitem(module.TRACKERS, "tensorboard", lambda *a: 1 / 0)
    with trackers(("tensorboard",), tmp_path, None) as tell:
        tell({"step": 1, "loss": 1.0})
        tell({"step": 2, "loss": 1.0})


def test_what_cannot_be_reported_to(monkeypatch) -> None:
    def refused(*names: str) -> str:
        with pytest.raises(InputError) as error:
            SFT(data=("x.jsonl",), report_to=names).check()
        return str(error.value)

    assert refused("wandb") == "report_to: expected tensorboard or trackio, got 'wandb'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused("tensorboard") == (
        "report_to: expected the package tensorboard, got none: pip install tensorboard"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/board")
    assert refused("tensorboard", "trackio") == (
        "report_to: expected TRACKIO_SPACE_ID unset, because metrics stay on this machine,"
        " got 'me/board'"
    )
    SFT(data=("x.jsonl",), report_to=("tensorboard",)).check()


def test_what_is_reported_to_reruns_nothing() -> None:
    assert BOARD.identity() == OPTIONS.identity()
