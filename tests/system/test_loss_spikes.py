"""Loss spikes: what counts as one, and what a training does about it."""

import json
import os
import signal
from dataclasses import replace

import pytest
import tiny_run
import torch

from fastlm.errors import InputError
from fastlm.train.checkpoints import list_checkpoints
from fastlm.train.loop import SpikeError, TrainingInterrupted
from fastlm.train.loss_spikes import SpikeDetector

BAD = 12  # the step whose loss is broken
OPTIONS = replace(tiny_run.OPTIONS, spike_window=8, validations=0, sample_at=())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_run.shards(folder)
    return folder


pytestmark = pytest.mark.usefixtures("one_thread")


def broken_at(monkeypatch, step):
    """Multiply the loss of the batch whose first window is that of `step`; the gradient with it."""
    forward = tiny_run.TinyLM.forward
    steps = {}

    def broken(self, input_ids, **kwargs):
        out = forward(self, input_ids, **kwargs)
        key = input_ids.numpy().tobytes()
        if self.training and hasattr(out, "loss"):
            if steps.setdefault(key, len(steps)) == 2 * (step - 1):
                out.loss = out.loss * 10
        return out

    monkeypatch.setattr(tiny_run.TinyLM, "forward", broken)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return (list_checkpoints(run)[-1] / "tensors.safetensors").read_bytes()


def test_a_spike_is_far_above_a_full_window():
    spikes = SpikeDetector(3.0, 4)
    assert [spikes.check(x) for x in (9.0, 1.0, 2.0, 1.0)] == [None] * 4  # not full yet
    assert spikes.check(2.0) is None and spikes.losses == [1.0, 2.0, 1.0, 2.0]
    assert spikes.check(2.99) is None
    spikes.losses = [1.0, 2.0, 1.0, 2.0]
    message = spikes.check(3.01)  # mean 1.5, deviation 0.5
    assert (
        message
        == "the loss 3.01 is 3.0 standard deviations above the mean 1.5 of the previous 4 steps"
    )
    assert spikes.losses == [2.0, 1.0, 2.0, 3.01]
    constant = SpikeDetector(3.0, 2)
    assert [constant.check(x) for x in (1.0, 1.0, 1.0 + 1e-12)] == [None] * 3
    off = SpikeDetector(None, 1)
    assert [off.check(x) for x in (1.0, 2.0, 900.0)] == [None] * 3


def test_a_warning_names_the_batch_and_changes_nothing(data, tmp_path, monkeypatch):
    broken_at(monkeypatch, BAD)
    events = []
    tiny_run.start(data, tmp_path / "warn", OPTIONS, on_event=events.append)
    warnings = [e["warning"] for e in events if "warning" in e]
    assert len(warnings) == 1 and warnings[0].startswith(f"step {BAD}: the loss ")
    assert "windows from 88 of" in warnings[0]  # 11 steps with 2 batches of 4
    marked = [line for line in lines(tmp_path / "warn") if "spike" in line]
    assert [(m["step"], "skipped" in m) for m in marked] == [(BAD, False)]
    assert "windows from 88 of" in marked[0]["spike"]
    tiny_run.start(data, tmp_path / "off", replace(OPTIONS, spike_factor=None))
    assert not any("spike" in line for line in lines(tmp_path / "off"))


def test_a_skipped_step_moves_nothing(data, tmp_path, monkeypatch):
    broken_at(monkeypatch, BAD)
    options = replace(OPTIONS, on_spike="skip", save_steps=1, save_total_limit=30, max_steps=14)
    result = tiny_run.start(data, tmp_path, options)
    marked = [line for line in lines(tmp_path) if "skipped" in line]
    assert [m["step"] for m in marked] == [BAD] and result.steps == 14
    from safetensors.torch import load_file

    states = {
        int(path.name[5:]): load_file(path / "tensors.safetensors")
        for path in list_checkpoints(tmp_path)
    }

    def moved(step):
        names = [n for n in states[step] if n.startswith("model.") or n.endswith(".exp_avg")]
        return any(not torch.equal(states[step][n], states[step - 1][n]) for n in names)

    assert [moved(step) for step in (BAD - 1, BAD, BAD + 1)] == [True, False, True]


@pytest.mark.parametrize("at", [7, 10])
def test_the_window_is_resumed(data, tmp_path, monkeypatch, at):
    """A run that is interrupted before the spike detects it and continues to the same bits."""
    broken_at(monkeypatch, BAD)
    options = replace(OPTIONS, on_spike="skip")

    def press(event):
        if event.get("step") == at:
            os.kill(os.getpid(), signal.SIGINT)

    tiny_run.start(data, tmp_path / "whole", options)
    with pytest.raises(TrainingInterrupted):
        tiny_run.start(data, tmp_path / "cut", options, on_event=press)
    tiny_run.start(data, tmp_path / "cut", options)
    assert [m["step"] for m in lines(tmp_path / "cut") if "spike" in m] == [BAD]
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_stop_keeps_the_last_checkpoint_and_skip_goes_on(data, tmp_path, monkeypatch):
    broken_at(monkeypatch, BAD)
    with pytest.raises(SpikeError) as e:
        tiny_run.start(data, tmp_path, replace(OPTIONS, on_spike="stop"))
    text = str(e.value)
    assert "\n" not in text and text.startswith(f"step {BAD}: the loss ")
    assert "windows from 88 of" in text and text.endswith("step-00000010")
    result = tiny_run.start(data, tmp_path, replace(OPTIONS, on_spike="skip"))
    assert result.steps == 24
    assert [m["step"] for m in lines(tmp_path) if "skipped" in m] == [BAD]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"spike_factor": 0.0}, "spike_factor: expected a positive number, got 0.0"),
        ({"spike_window": 0}, "spike_window: expected 1 or more, got 0"),
        ({"on_spike": "retry"}, "on_spike: expected one of warn, skip, stop, got 'retry'"),
    ],
)
def test_options_are_checked(data, tmp_path, change, text):
    with pytest.raises(InputError, match=text):
        tiny_run.start(data, tmp_path, replace(OPTIONS, **change))


def test_guards_that_only_watch_are_no_part_of_the_identity():
    warn, stop = (replace(OPTIONS, on_spike=name) for name in ("warn", "stop"))
    assert warn.identity() == stop.identity() == replace(warn, spike_window=9).identity()
    assert replace(OPTIONS, on_spike="skip").identity() != warn.identity()
