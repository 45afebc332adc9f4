"""The weights of the lowest val_loss: which they are, and that a killed training still has them."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import tiny_run
import torch

from fastlm.checkpoint.folder import load_tensors
from fastlm.errors import InputError
from fastlm.train.checkpoints import (
    BEST_NAME,
    BestCheckpoint,
    CheckpointWriter,
    checkpoint_path,
    list_checkpoints,
)
from fastlm.train.distributed import SingleDevice, SingleProcess
from fastlm.train.loop import TrainingInterrupted, train
from fastlm.train.pretrain import PretrainObjective

# The rate rises until the loss does
OPTIONS = replace(
    tiny_run.OPTIONS, lr=1.0, schedule="wsd", warmup_ratio=1.0, decay_ratio=0.0, max_grad_norm=None,
    validations=12, sample_at=(), save_best=True, spike_factor=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_run.shards(folder)
    return folder


pytestmark = pytest.mark.usefixtures("one_thread")


def start(data, run, options=OPTIONS, on_event=None):
    torch.manual_seed(1)
    model = tiny_run.TinyLM()
    sampler = tiny_run.BatchSampler(tiny_run.TokenDataset(data / "train"), 4, tiny_run.SEQ, seed=7)
    heldout = tiny_run.TokenDataset(data / "heldout")
    objective = PretrainObjective(model, sampler, heldout, options)
    result = train(objective, options, run, on_event=on_event)
    return model, result


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}


def bests(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir() if BEST_NAME.fullmatch(p.name))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole")
    return run, *start(data, run)


def test_the_best_is_the_lowest_of_the_curve(data, uninterrupted, tmp_path):
    run, last, result = uninterrupted
    values = curve(run)
    step = min(values, key=values.__getitem__)
    assert 0 < step < 24 and values[24] > values[step] + 0.1  # it did get worse
    assert (result.best_step, result.best_loss) == (step, values[step])
    assert bests(run) == [f"best-{step:08d}"]
    tensors, validations = load_tensors(run / "checkpoints" / f"best-{step:08d}")
    assert validations["val_loss"] == values[step]
    options = replace(OPTIONS, keep="best", save_best=False, save_steps=2, save_total_limit=30)
    model, _ = start(data, tmp_path, options)
    checkpoint, _ = load_tensors(checkpoint_path(tmp_path, step))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])
        assert torch.equal(tensor, checkpoint[f"model.{name}"])
    assert not torch.equal(tensors["mix.weight"], last.state_dict()["mix.weight"])


def test_a_finished_training_can_still_load_its_best(data, uninterrupted):
    run, _, result = uninterrupted
    model, reloaded = start(data, run, replace(OPTIONS, keep="best"))
    tensors, _ = load_tensors(run / "checkpoints" / f"best-{result.best_step:08d}")
    assert reloaded.steps == 24
    assert torch.equal(model.state_dict()["mix.weight"], tensors["mix.weight"])


def test_without_the_option_there_is_none(data, tmp_path):
    _, result = start(data, tmp_path, replace(OPTIONS, save_best=False))
    assert bests(tmp_path) == [] and result.best_step is None


@pytest.mark.parametrize("at", [1, 13, 17])
def test_cut_off_anywhere_it_ends_with_the_same_best(data, uninterrupted, tmp_path, at):
    def press(event):
        if event.get("step") == at and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        start(data, tmp_path, on_event=press)
    _, result = start(data, tmp_path)
    assert result.best_step == uninterrupted[2].best_step and bests(tmp_path) == bests(
        uninterrupted[0]
    )
    assert curve(tmp_path) == curve(uninterrupted[0])


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "fastlm.train.pretrain"])


@pytest.mark.parametrize("count", [2, 5])
def test_killed_at_a_rename_it_ends_with_the_same_best(data, uninterrupted, tmp_path, count):
    args = (data, tmp_path, "rename", count, OPTIONS)
    child = FORKS.Process(target=tiny_run.start_and_die, args=args)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    _, result = start(data, tmp_path)
    assert result.best_step == uninterrupted[2].best_step and bests(tmp_path) == bests(
        uninterrupted[0]
    )
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]
    weights = [
        list_checkpoints(r)[-1] / "tensors.safetensors" for r in (tmp_path, uninterrupted[0])
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="validations: expected 1 or more to find the best"):
        start(data, tmp_path, replace(OPTIONS, validations=0))
    with pytest.raises(InputError, match="keep: expected one of last, best, got 'first'"):
        start(data, tmp_path, replace(OPTIONS, keep="first"))
    model = tiny_run.TinyLM()
    dataset = tiny_run.TokenDataset(data / "train")
    sampler = tiny_run.BatchSampler(dataset, 4, tiny_run.SEQ, seed=7)
    with pytest.raises(InputError, match="to validate on, got none; raise heldout, give more"):
        train(PretrainObjective(model, sampler, None, OPTIONS), OPTIONS, tmp_path)
    best = BestCheckpoint(
        tmp_path,
        True,
        CheckpointWriter(False),
        SingleDevice(torch.nn.Linear(1, 1)),
        SingleProcess(),
    )
    with pytest.raises(InputError, match="best-00000007: expected the best weights"):
        best.resume(7, 1.0)
    best.update(1, {"val_loss": float("nan")}, model)
    with pytest.raises(
        InputError, match="keep: expected save_best from the start, and a validation"
    ):
        best.load()
