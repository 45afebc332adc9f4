"""Distillation: the loss against logits, what the student learns, its own samples, resuming."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from preference_models import WORDS, config, example, make_student_and_teacher, write
from typer.testing import CliRunner

from fastlm.backend import use_backend
from fastlm.cli import app
from fastlm.errors import InputError
from fastlm.model.causal_lm import CausalLM
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train.distill import Distill, DistillOptions, TeacherModelObjective
from fastlm.train.loop import TrainingInterrupted
from fastlm.train.options import TrainOptions

TINY = Distill(
    data=("x.jsonl",), epochs=2, batch_size=4, lr=3e-3, heldout=0.3, validations=2, sample_at=(),
    dtype="float32", save_steps=2,
)  # fmt: skip
EXAMPLES = [
    example([5, 6, 7, 8, 9], 3), example([10, 11, 12], 1), example([20, 21, 22, 23, 24, 25], 4),
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    return make_student_and_teacher(tmp_path_factory.mktemp("models"))


@pytest.fixture
def data(tmp_path) -> str:
    rows = [{"prompt": f"what is {word}", "completion": f"please {word}"} for word in WORDS]
    return write(tmp_path / "chats.jsonl", rows)


def objective(rules: DistillOptions, **changes) -> TeacherModelObjective:
    student = CausalLM(config(64, **changes), seed=1).double()
    teacher = CausalLM(config(64, hidden_size=48, initializer_range=0.3), seed=2).double()
    return TeacherModelObjective(
        student, EXAMPLES, [], TrainOptions(max_steps=1), batch_size=3, seed=0, base="",
        tokenizer=None, prompt=(), teacher=teacher, distill_options=rules,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_loss_is_the_formula_on_logits(kind) -> None:
    rules = DistillOptions(kind, jsd_beta=0.3, temperature=1.7, sft_weight=0.5)
    game = objective(rules, final_logit_softcapping=None)
    model, total = game.trained, 0.0
    count = sum(e.num_loss_tokens for e in EXAMPLES)
    for e in EXAMPLES:
        ids = torch.tensor(e.ids[None, :-1]).long()
        keep = torch.tensor(e.loss_mask[1:])
        target = torch.tensor(e.ids[1:]).long()[keep]
        with use_backend("reference"):
            logits = model(ids).logits[0][keep]
            other = game.teacher(ids).logits[0][keep]
        s, t = ((x / 1.7).log_softmax(-1) for x in (logits, other))
        if kind == "forward":
            rows = (t.exp() * (t - s)).sum(-1)
        elif kind == "reverse":
            rows = (s.exp() * (s - t)).sum(-1)
        else:
            m = (0.3 * t.exp() + 0.7 * s.exp()).log()
            rows = 0.3 * (t.exp() * (t - m)).sum(-1) + 0.7 * (s.exp() * (s - m)).sum(-1)
        total = (
            total
            + rows.sum()
            + 0.5 * torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        )
    expected = torch.autograd.grad(total / count, list(model.parameters()))
    for split in (1, 3):  # whatever the micro-batches
        model.zero_grad()
        batches = [game.collate(EXAMPLES[i : i + split]) for i in range(0, 3, split)]
        with use_backend("reference"):
            losses = [game.loss(batch, count) for batch in batches]
        sum(losses).backward()
        assert float(sum(losses).detach()) == pytest.approx(float(total.detach()) / count, rel=1e-9)
        for p, g in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-12)
    assert all(p.grad is None for p in game.teacher.parameters())


def test_its_own_samples() -> None:
    """The student samples new answers, after only the first question."""
    game = objective(DistillOptions(on_policy_fraction=1.0, max_new_tokens=5))
    game.trained.float(), game.teacher.float()
    (batch,) = game.next_batches(1)
    ids, labels, cu_seqlens = batch
    prompts = sorted(e.ids[: int(e.loss_mask.argmax())].tolist() for e in EXAMPLES)
    parts = [p.tolist() for p in ids[0].split(cu_seqlens.diff().tolist())]
    starts = [[i for i in p if i in (5, 6, 7, 10, 20, 21, 22, 23)] for p in parts]
    assert sorted(s[: len(p)] for s, p in zip(sorted(starts), prompts)) == prompts
    assert (
        game.scalars([game.measurements()])["on_policy_fraction"] == 1 and (labels >= 0).sum() >= 3
    )
    repeated = objective(DistillOptions(on_policy_fraction=1.0, max_new_tokens=5))
    repeated.trained.float()
    assert torch.equal(repeated.next_batches(1)[0][0], ids)
    half = objective(DistillOptions(on_policy_fraction=0.5))
    half.trained.float(), half.teacher.float()
    shares = set()
    for _ in range(12):
        half.next_batches(1)
        shares.add(half.scalars([half.measurements()])["on_policy_fraction"])
    assert shares == {0.0, 1.0}


@pytest.mark.parametrize("on_policy_fraction", [0.0, 0.5])
def test_the_student_comes_closer_and_continues_to_the_same_bits(
    models, data, tmp_path, on_policy_fraction
) -> None:
    student, teacher = models
    stage = replace(
        TINY, data=(data,), on_policy_fraction=on_policy_fraction, max_new_tokens=6, epochs=4
    )
    inputs = {"model": student, "teacher": teacher}
    result = stage(tmp_path / "whole", **inputs)
    lines = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    validations = [line["val_loss"] for line in lines if "val_loss" in line]
    assert validations[-1] < 0.9 * validations[0] and result["steps"] == 12

    def press(event):
        if event.get("step") == 5 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        stage(tmp_path / "cut", on_event=press, **inputs)
    stage(tmp_path / "cut", **inputs)
    uninterrupted, cut = (
        (tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("whole", "cut")
    )
    assert uninterrupted == cut


def test_the_command(models, data, tmp_path) -> None:
    student, teacher = models
    arguments = [
        data,
        "--model",
        str(student),
        "--teacher",
        str(teacher),
        "-o",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(
        app, ["distill", *arguments, "--divergence", "jsd", "--sample-at", "1"]
    )
    assert done.exit_code == 0, done.output
    CausalLM.from_pretrained(tmp_path / "o")


def test_refused(models, data, tmp_path) -> None:
    student, teacher = models
    for changes, message in (
        ({"divergence": "kl"}, "divergence: expected one of forward, reverse, jsd, got 'kl'"),
        ({"jsd_beta": 1.0}, "jsd_beta: expected a number between 0 and 1, got 1.0"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"on_policy_fraction": 1.5}, "on_policy_fraction: expected 0 to 1, got 1.5"),
        ({"sft_weight": -1.0}, "sft_weight: expected 0 or more, got -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            replace(TINY, data=(data,), **changes)(tmp_path / "o", model=student, teacher=teacher)
    other = tmp_path / "other"
    tokenizer = Tokenizer.train(["other words than those, many times over " * 9], 300)
    CausalLM(config(tokenizer.vocab_size, tokenizer.eos_id), seed=1).save_pretrained(other)
    tokenizer.save(other)
    with pytest.raises(InputError, match=r"teacher: expected the vocabulary of .* token \d+ is"):
        replace(TINY, data=(data,))(tmp_path / "o", model=student, teacher=other)
