"""Asynchronous checkpoints: the same files, complete at any moment, and no lost errors."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import tiny_run
import torch
from tiny_run import start

from fastlm.checkpoint import folder
from fastlm.errors import InputError
from fastlm.train.checkpoints import CheckpointWriter, list_checkpoints
from fastlm.train.loop import NonFiniteError, TrainingInterrupted

PLAIN = replace(tiny_run.OPTIONS, save_best=True)
OPTIONS = replace(PLAIN, async_checkpoints=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_run.shards(folder)
    return folder


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """A run that writes in its own thread."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole")
    start(data, run, PLAIN)
    return run


def tensors(run):
    return {
        path.name: (path / "tensors.safetensors").read_bytes()
        for path in (run / "checkpoints").iterdir()
    }


def slow(monkeypatch, seconds=0.2, fail=0):
    """Slow down every write, and count those under way. The `fail`-th meets a full disk."""
    save_file, lock = folder.save_file, threading.Lock()
    calls = {"now": 0, "most": 0, "all": 0, "threads": set()}

    def patched(*args, **kwargs):
        with lock:
            calls["now"] += 1
            calls["all"] += 1
            calls["most"] = max(calls["most"], calls["now"])
            calls["threads"].add(threading.current_thread().name)
            number = calls["all"]
        time.sleep(seconds)
        with lock:
            calls["now"] -= 1
        if number == fail:
            raise OSError(28, "No space left on device")
        return save_file(*args, **kwargs)

    monkeypatch.setattr(folder, "save_file", patched)
    return calls


def test_a_background_thread_writes_the_same_checkpoints(
    data, tmp_path, uninterrupted, monkeypatch
):
    """The weights change while a checkpoint is written: it holds those of its step."""
    threads, background = slow(monkeypatch), []
    start(data, tmp_path, OPTIONS, on_event=lambda event: background.append(threads["now"]))
    assert tensors(tmp_path) == tensors(uninterrupted)
    assert threads["most"] == 1 and threads["threads"] == {"fastlm-writer_0"}
    assert sum(background) > 3  # lines written meanwhile
    assert not [t for t in threading.enumerate() if t.name.startswith("fastlm-writer")]


def test_an_error_ends_the_training_at_the_next_step(data, tmp_path, monkeypatch):
    slow(monkeypatch, 0.0, fail=3)  # best-0, step-5, then the best of step 6
    events = []
    with pytest.raises(InputError, match=r"best-00000006: cannot be written: No space left"):
        start(data, tmp_path, OPTIONS, on_event=events.append)
    assert max(event["step"] for event in events) < 13
    assert list_checkpoints(tmp_path)[0].name == "step-00000005"
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_an_error_of_the_last_write_is_raised(data, tmp_path, monkeypatch):
    slow(monkeypatch, 0.1, fail=6)
    options = replace(OPTIONS, save_best=False, save_steps=5, max_steps=28)
    with pytest.raises(InputError, match="step-00000028: cannot be written: No space left"):
        start(data, tmp_path, options)
    assert list_checkpoints(tmp_path)[-1].name == "step-00000025"


def test_ctrl_c_waits_for_what_is_being_written(data, tmp_path, uninterrupted, monkeypatch):
    slow(monkeypatch)

    def press(event):
        if event.get("step") == 6 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match=r"saved in .*step-00000006$"):
        start(data, tmp_path, OPTIONS, on_event=press)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-00000005", "step-00000006"]
    start(data, tmp_path, OPTIONS)
    assert tensors(tmp_path) == tensors(uninterrupted)


def test_a_training_that_diverges_names_the_checkpoint_under_way(data, tmp_path, monkeypatch):
    slow(monkeypatch)
    forward, calls = tiny_run.TinyLM.forward, 0

    def broken(self, *args, **kwargs):
        nonlocal calls
        out = forward(self, *args, **kwargs)
        calls += self.training
        if calls == 11:  # the first micro-batch of step 6
            out.loss = out.loss * float("nan")
        return out

    monkeypatch.setattr(tiny_run.TinyLM, "forward", broken)
    with pytest.raises(NonFiniteError, match=r"step-00000005$"):
        start(data, tmp_path, OPTIONS)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "fastlm.train.pretrain"])


@pytest.mark.parametrize(
    "point, count", [("step", 12), ("step", 23), ("write", 2), ("rename", 3), ("rename", 5)]
)
def test_killed_anywhere_it_goes_on_to_the_same_bits(data, tmp_path, uninterrupted, point, count):
    args = (data, tmp_path, point, count, OPTIONS)
    child = FORKS.Process(target=tiny_run.start_and_die, args=args)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    for path in list_checkpoints(tmp_path):
        folder.load_tensors(path)  # whole
    start(data, tmp_path, OPTIONS)
    assert tensors(tmp_path) == tensors(uninterrupted)


def test_the_writer():
    done: list[int] = []
    for background in (False, True):
        with CheckpointWriter(background) as writer:
            for i in range(3):
                writer.submit(lambda i=i: (time.sleep(0.02), done.append(i)))
    assert done == [0, 1, 2] * 2

    def fail():
        raise InputError("full")

    writer = CheckpointWriter(True)
    writer.submit(fail)
    with pytest.raises(InputError, match="full"):
        writer.wait()
    writer.wait()  # raised only once
    writer.submit(fail)
    while writer.job is not None and not writer.job.done():
        time.sleep(0.01)
    with pytest.raises(InputError, match="full"):
        writer.check()
    with contextlib.suppress(KeyError), writer:
        writer.submit(fail)
        raise KeyError("the first error")
