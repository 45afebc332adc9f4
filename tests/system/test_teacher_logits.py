"""A teacher on disk: the loss against logits, the files, and trainings without a teacher."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_models import (
    WORDS,
    config,
    example,
    make_student_and_teacher,
    metrics_of,
    weights_of,
    write,
)
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from fastlm.backend import use_backend
from fastlm.errors import InputError
from fastlm.model.causal_lm import CausalLM
from fastlm.ops import linear_distillation
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train import teacher as teacher_logits
from fastlm.train.distill import Distill
from fastlm.train.loop import TrainingInterrupted
from fastlm.train.objective import examples_digest, weights_digest
from fastlm.train.teacher import (
    TeacherHeader,
    TeacherLogits,
    logprobs_at,
    topk_forward_kl,
    write_logits,
)

EXAMPLES = [
    example([5, 6, 7, 8, 9], 3, "chats.jsonl, line 1"), example([10, 11, 12], 1, "line 2"),
    example([20, 21, 22, 23, 24, 25], 4, "line 3"),
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the loss


def likeliest(x: Tensor, w: Tensor, k: int, temperature: float, softcap: float | None):
    """Ids and log-probabilities of the k likeliest tokens, and the log of the rest."""
    z = x @ w.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(-1)
    top, ids = logp.topk(k)
    return ids, top, torch.log((1 - top.exp().sum(-1)).clamp(min=0))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("k", [1, 4, 23])
def test_the_formula_on_logits(k, softcap, monkeypatch) -> None:
    torch.manual_seed(k)
    h, w = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (9, 23))
    t, v = torch.randn(9, 5, dtype=torch.float64), torch.randn(23, 5, dtype=torch.float64)
    ids, top, rest = likeliest(t, v, k, 1.7, None)
    if k == 23:
        rest = torch.full_like(rest, -torch.inf)

    def formula() -> Tensor:
        z = h @ w.T
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        logs = (z / 1.7).log_softmax(-1)
        is_stored = torch.zeros(9, 23, dtype=torch.bool).scatter(1, ids, True)
        s = logs.gather(1, ids)
        kl = (top.exp() * (top - s)).sum(-1)
        if k < 23:
            s_rest = logs.masked_fill(is_stored, -torch.inf).logsumexp(-1)
            kl = kl + rest.exp() * (rest - s_rest)
        return kl

    expected = formula()
    grads = torch.autograd.grad(expected.sum(), (h, w))
    for workspace in (1 << 26, 2 * k * 6 * 8, 1):
        monkeypatch.setattr(teacher_logits, "WORKSPACE", workspace)
        with use_backend("reference"):
            got = topk_forward_kl(
                logprobs_at(h, w, ids, temperature=1.7, softcap=softcap), top, rest
            )
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
            for a, b in zip(torch.autograd.grad(got.sum(), (h, w)), grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    full = linear_distillation(
        h, w, t, v, temperature=1.7, student_softcap=softcap, num_items=1
    )  # fmt: skip
    if k == 23:
        torch.testing.assert_close(got.sum().float(), full.float(), rtol=1e-6, atol=1e-6)
    else:
        assert 0 < float(got.sum().detach()) < float(full.detach())


def test_a_16_bit_head() -> None:
    """Against float64 on the same numbers: at most 2 (gradients 3) times torch's error."""
    torch.manual_seed(1)
    h, w = torch.randn(64, 32).bfloat16(), (torch.randn(300, 32) / 4).bfloat16()
    t, v = torch.randn(64, 32, dtype=torch.float64), torch.randn(300, 32, dtype=torch.float64) / 4
    ids, top, rest = likeliest(t, v, 16, 1.0, None)

    def run(dtype: torch.dtype, head_gradients: bool):
        x, y = (a.to(dtype).requires_grad_() for a in (h, w))
        if head_gradients:
            logp = logprobs_at(x, y, ids)
        else:
            logp = (x @ y.T).to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
            logp = logp.gather(1, ids)
        loss = topk_forward_kl(logp, top.to(logp.dtype), rest.to(logp.dtype)).mean()
        return loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, (x, y)))

    truth = run(torch.float64, False)
    ours, naive = (
        [float((a - b).abs().max()) for a, b in zip(run(torch.bfloat16, head_gradients), truth)]
        for head_gradients in (True, False)
    )
    for got, bound, times in zip(ours, naive, (2, 3, 3)):
        assert got <= times * bound + 1e-6


def test_a_student_without_a_rest_has_finite_gradients() -> None:
    """A student that is sure of the teacher's tokens, and no rows at all."""
    sure = torch.tensor([[-1e-9, -30.0]], requires_grad=True)
    teacher, rest = torch.tensor([[-0.2, -3.0]]), torch.tensor([-2.0])
    loss = topk_forward_kl(sure, teacher, rest)
    (grad,) = torch.autograd.grad(loss.sum(), sure)
    assert loss.isfinite().all() and grad.isfinite().all()
    none = logprobs_at(torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(0, 2, dtype=torch.long))
    assert none.shape == (0, 2)


# ---- the files


@pytest.fixture(scope="module")
def teacher() -> CausalLM:
    return CausalLM(config(64, hidden_size=48, initializer_range=0.3), seed=2).eval()


def header(teacher: CausalLM, k: int = 4, temperature: float = 1.0) -> TeacherHeader:
    return TeacherHeader(weights_digest(teacher), 64, k, temperature)


def test_rows_are_the_teachers(teacher, tmp_path) -> None:
    stored = write_logits(tmp_path, teacher, EXAMPLES, header(teacher, temperature=1.3))
    order = [EXAMPLES[2], EXAMPLES[0], EXAMPLES[2]]
    ids, logprobs = stored.rows(order)
    at = 0
    for e in order:
        with torch.no_grad():
            z = teacher(torch.tensor(e.ids[None, :-1]).long()).logits[0][
                torch.tensor(e.loss_mask[1:])
            ]
        top, expected = (z.float() / 1.3).log_softmax(-1).topk(4)
        rows = slice(at, at + e.num_loss_tokens)
        at += e.num_loss_tokens
        assert (ids[rows] == expected.numpy()).all()
        np.testing.assert_allclose(logprobs[rows, :-1], top.numpy(), atol=4e-3)
        rest = 1 - top.exp().sum(-1)
        np.testing.assert_allclose(np.exp(logprobs[rows, -1]), rest.numpy(), atol=1e-3)
    assert at == len(ids)
    np.testing.assert_allclose(np.exp(logprobs).sum(-1), 1, atol=1e-6)
    (shard,) = tmp_path.glob("*")
    assert shard.stat().st_size < 1500 + 6 * (4 * 2 + 5 * 2)  # headers, and bytes per token


def test_all_tokens_have_no_rest(teacher, tmp_path) -> None:
    _, logprobs = write_logits(tmp_path, teacher, EXAMPLES, header(teacher, 64)).rows(EXAMPLES)
    assert (logprobs[:, -1] == -np.inf).all()


def test_an_interrupted_folder_is_completed(teacher, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(teacher_logits, "FORWARD_TOKENS", 4)  # one example at a time
    uninterrupted = write_logits(tmp_path / "whole", teacher, EXAMPLES, header(teacher))

    def cut(items, label, unit):
        yield items[0]
        raise KeyboardInterrupt

    call = (tmp_path / "cut", teacher, EXAMPLES, header(teacher))
    with pytest.raises(KeyboardInterrupt):
        write_logits(*call, track=cut)
    (first,) = (tmp_path / "cut").iterdir()
    begun = first.read_bytes()
    assert EXAMPLES[0] in TeacherLogits(tmp_path / "cut")
    batches = []

    def count(items, label, unit):
        batches.extend(items)
        return items

    stored = write_logits(*call, track=count, shard_bytes=1)
    files = sorted((tmp_path / "cut").iterdir())
    assert len(batches) == 2 and len(files) == 3 and first.read_bytes() == begun
    assert stored.identity(EXAMPLES) == uninterrupted.identity(EXAMPLES)
    assert stored.identity(EXAMPLES[:2]) != uninterrupted.identity(EXAMPLES)
    first.unlink()
    resumed = write_logits(*call)
    assert sorted((tmp_path / "cut").iterdir()) == files and first.read_bytes() == begun
    assert resumed.identity(EXAMPLES) == uninterrupted.identity(EXAMPLES)


def test_a_kill_loses_a_minute(teacher, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(teacher_logits, "FORWARD_TOKENS", 4)  # one example at a time
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(teacher_logits.time, "monotonic", lambda: next(clock))
    there = []

    def watch(items, label, unit):
        for item in items:
            yield item
            there.append(len(list(tmp_path.iterdir())))  # after the batch

    stored = write_logits(tmp_path, teacher, EXAMPLES, header(teacher), track=watch)
    assert there == [0, 1, 1] and len({*map(id, stored.shards.values())}) == 2


def test_what_does_not_fit_is_named(teacher, tmp_path) -> None:
    with pytest.raises(InputError, match=r"teacher_logits: expected shards in .*, got none"):
        TeacherLogits(tmp_path)
    stored = write_logits(tmp_path, teacher, EXAMPLES[:2], header(teacher))
    other = example([5, 6, 7, 8, 9], 2, "chats.jsonl, line 9")  # another mask
    with pytest.raises(InputError, match=r"expected the tokens of chats.jsonl, line 9 in .* date"):
        stored.rows([other])
    for changed, message in (
        (header(teacher, 5), "expected logits with top_k 5, got 4"),
        (header(teacher, temperature=2.0), r"expected logits with temperature 2\.0, got 1\.0"),
        (replace(header(teacher), teacher="x"), "expected logits with teacher x, got "),
    ):
        with pytest.raises(InputError, match=message):
            write_logits(tmp_path, teacher, EXAMPLES, changed)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    with safe_open(path, "np") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    key = examples_digest(EXAMPLES[:1])
    ids, logprobs = f"{key}.ids", f"{key}.logprobs"
    for change, message in (
        ({ids: tensors[ids][1:]}, "got ids of shape"),
        ({logprobs: tensors[logprobs][:, 1:]}, "got ids of shape"),
        ({ids: tensors[ids] + np.uint16(60)}, "got ids beyond 64"),
        ({logprobs: tensors[logprobs] * np.float16(np.nan)}, "got rows that are no"),
        ({logprobs: tensors[logprobs] + np.float16(1)}, "got rows that are no"),
    ):
        save_file({**tensors, **change}, path, meta)
        with pytest.raises(InputError, match=f"teacher_logits: .*: expected shards of .*{message}"):
            TeacherLogits(tmp_path).identity(EXAMPLES[:2])
    for metadata in (None, {**meta, "header": "{}"}):
        save_file(tensors, path, metadata)
        with pytest.raises(InputError, match=r"teacher_logits: .*, got"):
            TeacherLogits(tmp_path)
    for data in (good[: len(good) // 2], b"", b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"teacher_logits: .*teacher-"):
            TeacherLogits(tmp_path)
    path.write_bytes(good)
    write_logits(tmp_path / "b", teacher, EXAMPLES, header(teacher, 5))
    (other,) = (tmp_path / "b").iterdir()
    other.rename(tmp_path / "teacher-other.safetensors")
    with pytest.raises(InputError, match="another header than that of the previous shards"):
        TeacherLogits(tmp_path)


# ---- trainings


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    return make_student_and_teacher(tmp_path_factory.mktemp("models"))


@pytest.fixture
def stage(tmp_path) -> Distill:
    rows = [{"prompt": f"what is {word}", "completion": f"please {word}"} for word in WORDS]
    return Distill(
        data=(write(tmp_path / "chats.jsonl", rows),), epochs=4, batch_size=4, lr=3e-3,
        heldout=0.3, validations=2, sample_at=(), dtype="float32", save_steps=2,
        teacher_top_k=32, sft_weight=0.1,
    )  # fmt: skip


def test_it_continues_to_the_same_bits_and_is_used_again(models, stage, tmp_path) -> None:
    student, teacher = models
    inputs = {"model": student, "teacher": teacher}
    stage(tmp_path / "whole", **inputs)
    validations = [
        line["val_loss"] for line in metrics_of(tmp_path / "whole") if "val_loss" in line
    ]
    assert validations[-1] < 0.9 * validations[0]

    def press(event):
        if event.get("step") == 5 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        stage(tmp_path / "cut", on_event=press, **inputs)
    stage(tmp_path / "cut", **inputs)
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    # without the teacher, from the other run's folder
    logits = str(tmp_path / "whole" / "teacher-logits")
    reused = replace(stage, teacher_top_k=None, teacher_logits=logits)
    reused(tmp_path / "again", model=student)
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "whole")
    # its rows are part of the training
    cut = replace(reused, max_steps=3)
    cut(tmp_path / "short", model=student)
    other = replace(stage, teacher_top_k=8, max_steps=1)
    other(tmp_path / "other", **inputs)
    changed = replace(cut, teacher_logits=str(tmp_path / "other" / "teacher-logits"), max_steps=5)
    with pytest.raises(InputError, match="with these options, got another: teacher_logits was"):
        changed(tmp_path / "short", model=student)


def test_all_tokens_are_the_teacher_in_memory(models, stage, tmp_path) -> None:
    student, teacher = models
    inputs = {"model": student, "teacher": teacher}
    vocabulary = Tokenizer.load(student).vocab_size
    replace(stage, teacher_top_k=vocabulary)(tmp_path / "disk", **inputs)
    replace(stage, teacher_top_k=None)(tmp_path / "memory", **inputs)
    for key in ("loss", "val_loss"):
        disk, memory = (
            [line[key] for line in metrics_of(tmp_path / name) if key in line]
            for name in ("disk", "memory")
        )
        assert len(disk) == len(memory) > 1
        np.testing.assert_allclose(disk, memory, rtol=2e-3)  # float16 on disk


def test_refused(models, stage, tmp_path) -> None:
    student, teacher = models
    logits = write_logits(
        tmp_path / "made", CausalLM.from_pretrained(teacher, dtype=torch.float32), EXAMPLES,
        TeacherHeader("x", Tokenizer.load(student).vocab_size, 4, 2.0),
    )  # fmt: skip
    stored = replace(stage, teacher_top_k=None, teacher_logits=str(logits.folder), temperature=2.0)
    write_logits(
        tmp_path / "small", CausalLM(config(64), seed=0), EXAMPLES, TeacherHeader("x", 64, 4, 2.0)
    )
    for changed, changes, message in (
        (
            replace(stage, divergence="jsd"),
            teacher,
            "divergence: expected forward with teacher_top",
        ),
        (
            replace(stage, on_policy_fraction=0.5),
            teacher,
            "on_policy_fraction: expected 0 with teacher_top_k, which",
        ),
        (replace(stage, teacher_top_k=0), teacher, "teacher_top_k: expected 1 or more, got 0"),
        (replace(stage, teacher_top_k=9999), teacher, "teacher_top_k: expected at most the voc"),
        (
            replace(stage, teacher_logits="x"),
            teacher,
            "expected none with teacher_logits, got bo",
        ),
        (stage, None, "teacher: expected a teacher or teacher_logits, got neither"),
        (stored, teacher, "teacher: expected a teacher or teacher_logits, got both"),
        (stored, None, r"expected the tokens of .*chats.jsonl, line \d+ in"),
        (replace(stored, temperature=1.0), None, "teacher_logits: expected temperature 1.0 of the"),
        (replace(stored, teacher_logits=str(tmp_path / "small")), None, "expected vocab_size"),
        (replace(stored, teacher_logits=str(tmp_path / "none")), None, "expected shards in .*none"),
    ):
        inputs = {"model": student, **({} if changes is None else {"teacher": changes})}
        with pytest.raises(InputError, match=message):
            changed(tmp_path / "out", **inputs)
