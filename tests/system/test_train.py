"""The training loop: schedules, accumulation, events, resuming after SIGKILL and Ctrl-C, non-finite
losses.
"""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import tiny_run
import torch
from tiny_run import OPTIONS, start

from fastlm.errors import InputError
from fastlm.train import loop
from fastlm.train.checkpoints import identity_difference, list_checkpoints, prune_checkpoints
from fastlm.train.loop import NonFiniteError, TrainingInterrupted, train
from fastlm.train.options import TrainOptions
from fastlm.train.pretrain import PretrainObjective

TIMES = ("seconds", "tokens_per_second", "progress")
STEP_TOKENS = OPTIONS.gradient_accumulation_steps * 4 * tiny_run.SEQ  # batches of 4 windows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_run.shards(folder)
    return folder


pytestmark = pytest.mark.usefixtures("one_thread")


def json_lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run):
    """metrics.jsonl without the values that depend on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in json_lines(run)]


def test_schedules():
    flat = TrainOptions(lr=2.0, warmup_ratio=0.1)
    assert flat.learning_rate(0.05) == 1.0
    assert flat.learning_rate(0.1) == pytest.approx(2.0)
    assert flat.learning_rate(0.55) == pytest.approx(1.0)
    assert replace(flat, final_lr=0.1).learning_rate(1.0) == pytest.approx(0.2)
    wsd = replace(flat, schedule="wsd", decay_ratio=0.2)
    assert wsd.learning_rate(0.5) == wsd.learning_rate(0.79) == 2.0
    assert wsd.learning_rate(0.9) == pytest.approx(1.0)
    assert wsd.learning_rate(1.0) == 0.0
    assert TrainOptions(max_steps=10, max_seconds=40).progress(5, 0, 30) == 0.75
    assert TrainOptions(max_seconds=40).progress(5, 0, 50) == 1.0
    assert TrainOptions(max_steps=10, max_seconds=40, max_tokens=100).progress(5, 90, 10) == 0.9
    grows = TrainOptions(gradient_accumulation_steps=4, batch_warmup=0.3)
    sizes = [grows.micro_batches(done) for done in (0.0, 0.09, 0.11, 0.21, 0.29, 0.3, 1.0)]
    assert sizes == [1, 1, 2, 3, 3, 4, 4]
    assert TrainOptions(gradient_accumulation_steps=4).micro_batches(0.0) == 4
    assert TrainOptions(batch_warmup=1.0).micro_batches(0.5) == 1


def test_a_run_learns_and_writes_every_step(data, tmp_path):
    received = []
    result = start(data, tmp_path, on_event=received.append)
    written = events(tmp_path)
    assert [e["step"] for e in written if "loss" in e] == list(range(1, 25))
    assert [e["step"] for e in written if "val_loss" in e] == [0, 6, 12, 18, 24]
    assert [e["step"] for e in written if "sample" in e] == [0, 12, 24]
    assert len(received) == len(written)
    values = [e["val_loss"] for e in written if "val_loss" in e]
    assert values[-1] < values[0] - 0.3
    assert result.steps == 24 and result.tokens == 24 * 2 * 4 * tiny_run.SEQ
    assert result.metrics["bits_per_byte"] == written[-2]["bits_per_byte"]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000024"]
    # starting a finished run again does nothing
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert start(data, tmp_path).steps == 24
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_accumulation_is_one_large_batch(data, tmp_path):
    """Two micro-batches of 4 windows against one of 8, in float32 without dropout."""
    plain = replace(OPTIONS, dtype="float32", max_steps=3, validations=0, sample_at=())

    def losses(name, gradient_accumulation_steps, batch):
        torch.manual_seed(1)
        model = tiny_run.TinyLM()
        model.train = lambda mode=True: model  # no dropout: the two runs would draw different masks
        model.eval()
        model.training = False
        sampler = tiny_run.BatchSampler(
            tiny_run.TokenDataset(data / "train"), batch, tiny_run.SEQ, seed=7
        )
        options = replace(plain, gradient_accumulation_steps=gradient_accumulation_steps)
        train(PretrainObjective(model, sampler, None, options), options, tmp_path / name)
        return [e["loss"] for e in events(tmp_path / name)]

    assert losses("a", 2, 4) == pytest.approx(losses("b", 1, 8), rel=1e-5)


def test_the_batch_grows_and_a_run_cut_off_in_between_goes_on_alike(data, tmp_path):
    options = replace(
        OPTIONS, gradient_accumulation_steps=3, batch_warmup=0.5, validations=0, sample_at=()
    )

    def press(event):
        if event.get("step") == 5:
            os.kill(os.getpid(), signal.SIGINT)

    result = start(data, tmp_path / "whole", options)
    sizes = [0, *(e["tokens"] for e in events(tmp_path / "whole"))]
    batches = [(b - a) // (4 * tiny_run.SEQ) for a, b in itertools.pairwise(sizes)]
    assert batches == [1] * 6 + [2] * 6 + [3] * 12 and result.steps == 24
    with pytest.raises(TrainingInterrupted):
        start(data, tmp_path / "cut", options, on_event=press)
    start(data, tmp_path / "cut", options)
    assert events(tmp_path / "cut") == events(tmp_path / "whole")
    assert last_tensors(tmp_path / "cut") == last_tensors(tmp_path / "whole")


@pytest.mark.parametrize(
    "point, count",
    [
        ("step", 1), ("step", 16), ("step", 33), ("write", 1), ("write", 3),
        ("rename", 1), ("rename", 2), ("rename", 6), ("metrics", 9),
    ],
)  # fmt: skip
def test_sigkill_anywhere_goes_on_to_the_same_losses(data, tmp_path, uninterrupted, point, count):
    """Killed at one point and started again: the same lines in metrics.jsonl, each step once, and
    the same parameters.
    """
    run = tmp_path / "run"
    child = FORKS.Process(target=tiny_run.start_and_die, args=(data, run, point, count))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    start(data, run)
    assert events(run) == events(uninterrupted)
    assert last_tensors(run) == last_tensors(uninterrupted)
    names = [p.name for p in (run / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000020", "step-00000024"]


# a server that has imported torch forks a child in milliseconds; it never runs a parallel region
# itself
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "fastlm.train.pretrain"])


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole")
    start(data, run)
    return run


def last_tensors(run):
    return (list_checkpoints(run)[-1] / "tensors.safetensors").read_bytes()


def test_ctrl_c_saves_and_says_where(data, tmp_path, uninterrupted):
    def press(event):
        if event.get("step") == 8 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=r"after step 8; saved in .*step-00000008$"):
        start(data, tmp_path, on_event=press)
    assert signal.getsignal(signal.SIGINT) is handler
    start(data, tmp_path)
    assert events(tmp_path) == events(uninterrupted)


def test_ctrl_c_in_the_last_step_is_not_lost(data, tmp_path, uninterrupted):
    def press(event):
        if event.get("step") == 24 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match=r"after step 24; saved in .*step-00000024$"):
        start(data, tmp_path, on_event=press)
    assert start(data, tmp_path).steps == 24
    assert events(tmp_path) == events(uninterrupted)


def test_other_moments_to_look_and_save_go_on_from_the_same_checkpoint(
    data, tmp_path, uninterrupted
):
    def press(event):
        if event.get("step") == 8 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        start(data, tmp_path, on_event=press)
    watching = replace(
        OPTIONS, validations=1, val_tokens=64, sample_at=(0.6,), sample_prompt="b",
        sample_tokens=2, save_steps=7, save_total_limit=3,
    )  # fmt: skip
    start(data, tmp_path, watching)
    losses = [[e["loss"] for e in events(run) if "loss" in e] for run in (tmp_path, uninterrupted)]
    assert losses[0] == losses[1]
    names = [p.name for p in list_checkpoints(tmp_path)]
    assert names == ["step-00000014", "step-00000021", "step-00000024"]


@pytest.mark.parametrize("quantity", ["loss", "gradient norm"])
def test_non_finite_names_step_batch_and_checkpoint(data, tmp_path, monkeypatch, quantity):
    calls = 0
    forward = tiny_run.TinyLM.forward

    def broken(self, *args, **kwargs):
        nonlocal calls
        out = forward(self, *args, **kwargs)
        calls += self.training
        if calls == 23:  # the first micro-batch of step 12
            if quantity == "loss":
                out.loss = out.loss * math.nan
            else:
                out.loss.register_hook(lambda g: g * math.inf)
        return out

    monkeypatch.setattr(tiny_run.TinyLM, "forward", broken)
    with pytest.raises(NonFiniteError) as e:
        start(data, tmp_path)
    text = str(e.value)
    assert "\n" not in text
    assert f"step 12: the {quantity} is " in text
    assert "windows from 88 of" in text  # 11 steps with 2 batches of 4
    assert text.endswith("step-00000010")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000010"]


class Clock:
    """The loop's clock: a step takes an eighth of a second, a validation ``validation``, and
    nothing else any time, however busy the machine is.
    """

    def __init__(self, validation=0.0):
        self.now, self.validation = 0.0, validation

    def perf_counter(self):
        self.now += 1e-6  # rates are per second: none may be 0
        return self.now

    def event(self, event):
        self.now += 0.125 * ("loss" in event) + self.validation * ("val_loss" in event)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    return clock


def test_time_budget_ends_the_run_and_keeps_used_time(data, tmp_path, clock):
    options = replace(OPTIONS, max_steps=None, max_seconds=1.0, save_steps=10, validations=2)

    def press(event):
        clock.event(event)
        if event.get("step") == 5 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        start(data, tmp_path, options, on_event=press)
    assert events(tmp_path)[-1]["step"] == 5
    clock.now += 100  # until the next start
    result = start(data, tmp_path, options, on_event=clock.event)
    steps = [e["step"] for e in events(tmp_path) if "loss" in e]
    assert steps == list(range(1, 9)) and result.steps == 8
    rates = [e["lr"] for e in events(tmp_path) if "loss" in e]
    assert rates[-1] < 0.1 * max(rates)
    assert result.seconds == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("tokens, steps", [(24 * STEP_TOKENS, 24), (24 * STEP_TOKENS + 1, 25)])
def test_token_budget_ends_the_run_and_spreads_the_schedule(
    data, tmp_path, uninterrupted, tokens, steps
):
    """The tokens of 24 steps last 24 steps, with the same learning rates, also if resumed."""

    def press(event):
        if event.get("step") == 8 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    options = replace(OPTIONS, max_steps=None, max_tokens=tokens)
    with pytest.raises(TrainingInterrupted):
        start(data, tmp_path, options, on_event=press)
    assert start(data, tmp_path, options).steps == steps
    if steps == 24:
        assert events(tmp_path) == events(uninterrupted)


@pytest.mark.parametrize(
    "budget, unit, total",
    [
        ({"max_steps": 24}, "steps", 24),
        ({"max_steps": None, "max_tokens": 24 * STEP_TOKENS}, "k tokens", 3),
        ({"max_steps": None, "max_seconds": 3.2}, "s", 3),
    ],
)
def test_progress_counts_what_the_budget_counts(data, tmp_path, clock, budget, unit, total):
    """Every announced tick arrives, so the time left is that of the whole run."""
    bars = []

    def track(ticks, description, total, unit):
        bars.append((total, unit))
        for tick in ticks:
            bars.append(tick)
            yield tick

    start(data, tmp_path, replace(OPTIONS, **budget), track=track, on_event=clock.event)
    assert bars[0] == (total, unit) and len(bars) == 1 + total


def test_budget_and_warmup_begin_with_the_first_step(data, tmp_path, clock):
    """The duration of the validation before it does not count."""
    options = replace(OPTIONS, max_steps=None, max_seconds=1.0, warmup_ratio=0.5, validations=2)
    clock.validation = 0.4
    start(data, tmp_path, options, on_event=clock.event)
    rates = [e["lr"] for e in events(tmp_path) if "loss" in e]
    assert rates[0] < 0.01 * options.lr and rates[4] > 0.99 * options.lr and len(rates) == 8


def test_validations_and_samples_do_not_use_the_budget(data, tmp_path, clock):
    options = replace(OPTIONS, max_steps=None, max_seconds=0.6, validations=4)
    clock.validation = 0.5
    result = start(data, tmp_path, options, on_event=clock.event)
    written = events(tmp_path)
    assert [e["progress"] for e in json_lines(tmp_path) if "sample" in e][-1] == 1.0
    # the five validations take 2.5 s
    assert sum("val_loss" in e for e in written) == 5 and result.steps == 5
    assert result.seconds == pytest.approx(5 * 0.125, abs=0.01)


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_training_goes_on_under_a_larger_budget(data, tmp_path, interrupted):
    """The rate follows the new schedule. What was trained, drawn and written is kept."""

    def press(event):
        if interrupted and event.get("step") == 8 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    plain = replace(OPTIONS, schedule="wsd", warmup_ratio=0.1, decay_ratio=0.25)
    with pytest.raises(TrainingInterrupted) if interrupted else contextlib.nullcontext():
        start(data, tmp_path, replace(plain, max_steps=12), on_event=press)
    done = events(tmp_path)
    result = start(data, tmp_path, plain)
    written = events(tmp_path)
    assert result.steps == 24 and written[: len(done)] == done
    steps = [e for e in written if "loss" in e]
    assert [e["step"] for e in steps] == list(range(1, 25))
    first = 8 if interrupted else 12
    for e in steps[first:]:
        assert e["lr"] == pytest.approx(plain.learning_rate((e["step"] - 0.5) / 24))
    assert [e["step"] for e in written if "val_loss" in e][-1] == 24
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert start(data, tmp_path, replace(plain, max_steps=20)).steps == 24  # already reached
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_checkpoints_of_another_run_are_refused(data, tmp_path):
    start(data, tmp_path)
    with pytest.raises(InputError, match=r"lr was 0\.003, now 0\.001"):
        start(data, tmp_path, replace(OPTIONS, lr=1e-3))


def test_one_training_at_a_time_in_a_folder(data, tmp_path):
    import fcntl

    start(data, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another training is at work in this folder"):
            start(data, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    start(data, tmp_path)


def test_a_corrupt_checkpoint_is_refused(data, tmp_path):
    start(data, tmp_path)
    file = list_checkpoints(tmp_path)[-1] / "tensors.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InputError, match="corrupt"):
        start(data, tmp_path)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"max_steps": None}, "max_tokens, max_steps, max_seconds: expected at least one"),
        ({"max_tokens": 0}, "max_tokens: expected a positive number, got 0"),
        ({"lr": -1.0}, "lr: expected a positive number, got -1.0"),
        ({"schedule": "linear"}, "schedule: expected one of cosine, wsd"),
        (
            {"schedule": "wsd", "warmup_ratio": 0.4, "decay_ratio": 0.7},
            "decay_ratio: expected at most 1 - warmup_ratio =",
        ),
        ({"sample_at": (2.0,)}, r"sample_at\[0\]: expected 0 to 1"),
        ({"save_total_limit": 0}, "save_total_limit: expected 1 or more"),
        ({"batch_warmup": 1.5}, "batch_warmup: expected 0 to 1, got 1.5"),
        ({"dtype": "float64"}, "dtype: expected one of bfloat16, float32"),
    ],
)
def test_options_are_checked(data, tmp_path, change, text):
    with pytest.raises(InputError, match=text):
        start(data, tmp_path, replace(OPTIONS, **change))


def test_pruning_removes_what_was_left_of_steps_that_are_not_written_again(tmp_path):
    for name in ("step-00000005", "step-00000010", ".step-00000007.fastlm-0123456789abcdef.part"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    prune_checkpoints(tmp_path, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


def test_full_disk_leaves_the_last_checkpoint(data, tmp_path, monkeypatch):
    from fastlm.checkpoint import folder

    save_file = folder.save_file
    calls = 0

    def full(tensors, path, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        return save_file(tensors, path, *args, **kwargs)

    monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises(InputError, match="step-00000015: cannot be written: No space left"):
        start(data, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name[0] == "."] == []
    assert list_checkpoints(tmp_path)[-1].name == "step-00000010"


def test_another_run_is_described_by_its_options_and_not_by_hashes():
    saved = {"lr": 0.1, "heldout": "e3b0", "data": "77aa", "loss": "sigmoid"}
    now = {**saved, "heldout": "0c11", "loss": "kto", "weight": 2.0}
    assert (
        identity_difference(saved, now) == "loss was 'sigmoid', now 'kto', weight was None, now 2.0"
    )
    assert identity_difference(saved, now, ("loss",)) == "weight was None, now 2.0"
    now = {**saved, "heldout": "0c11", "data": "1"}
    rows = "the held-out rows are not the same and the rows of the data are not the same"
    assert identity_difference(saved, now) == rows and identity_difference(saved, dict(saved)) == ""
