"""Sequence-level distillation: the teacher's answers, and a student that learns them."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from preference_models import WORDS, config, make_base, write

from fastlm.errors import InputError
from fastlm.feedback.forget import forget
from fastlm.model.causal_lm import CausalLM
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train import teacher as teacher_completions
from fastlm.train.distill import Distill
from fastlm.train.loop import TrainingInterrupted
from fastlm.train.sft import SFT

ROWS = [{"prompt": f"what is {word}", "completion": f"please {word}"} for word in WORDS]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A model with another tokenizer, trained to answer and to end its answers."""
    folder = tmp_path_factory.mktemp("teacher")
    text = " ".join(["what is please system user assistant\n", *WORDS])
    tokenizer = Tokenizer.train([text * 5], 340)
    CausalLM(config(tokenizer.vocab_size, tokenizer.eos_id), seed=4).save_pretrained(folder / "new")
    tokenizer.save(folder / "new")
    SFT(
        data=(write(folder / "chats.jsonl", ROWS),), epochs=18, batch_size=7, lr=1e-2, heldout=0.0,
        validations=0, sample_at=(), dtype="float32",
    )(folder / "out", model=folder / "new")  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("student") / "model")


@pytest.fixture
def stage(tmp_path) -> Distill:
    """The data's own answers are not the teacher's; one prompt has two turns before its answer."""
    rows: list = [{"prompt": f"what is {word}", "completion": "garden"} for word in WORDS[:-1]]
    turns = ["what is boat", "stone now", "what is field", "garden"]
    roles = ("user", "assistant") * 2
    rows.append({"messages": [{"role": r, "content": t} for r, t in zip(roles, turns)]})
    return Distill(
        data=(write(tmp_path / "prompts.jsonl", rows),), epochs=8, batch_size=4, lr=5e-3,
        heldout=0.2, validations=2, sample_at=(), dtype="float32", save_steps=2,
        teacher_completions="greedy", max_new_tokens=12,
    )  # fmt: skip


@pytest.fixture
def small_batches(monkeypatch) -> None:
    monkeypatch.setattr(teacher_completions, "BATCH", 5)


def rows_of(folder: Path) -> list[dict]:
    files = sorted((folder / "teacher-completions").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_the_student_learns_what_the_teacher_says(stage, teacher, student, tmp_path) -> None:
    result = stage(tmp_path / "out", model=student, teacher=teacher)
    rows = rows_of(tmp_path / "out")
    model, tokenizer = CausalLM.from_pretrained(teacher), Tokenizer.load(teacher / "model")
    right = 0
    for row in rows:
        *prompt, answer = row["messages"]
        ids = tokenizer.encode_chat(
            [{k: v for k, v in m.items() if k != "weight"} for m in prompt], date=stage.date
        )
        (uninterrupted,) = model.generate(
            [ids], max_new_tokens=12, temperature=0.0, stop_ids=tuple(tokenizer.stop_ids)
        )
        assert answer["content"] == tokenizer.decode(uninterrupted[len(ids) : -1])
        right += answer["content"].startswith("please")
        assert [m.get("weight", 1) for m in prompt if m["role"] == "assistant"] in ([], [0])
    assert right >= 10  # the teacher's answers, not the data's
    dropped = result["counts"].get("without a complete answer", 0)
    assert result["rows_read"] == len(WORDS) == len(rows) + dropped
    assert result["conversations"] + result["heldout"] == len(rows)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    validations = [x["val_loss"] for x in map(json.loads, lines) if "val_loss" in x]
    assert validations[-1] < 0.7 * validations[0]


def test_it_continues_in_the_midst_of_the_answers(
    stage, teacher, student, tmp_path, small_batches
) -> None:
    stage = replace(stage, teacher_completions="sampled", temperature=0.7)
    inputs = {"model": student, "teacher": teacher}
    stage(tmp_path / "whole", **inputs)
    assert len(list((tmp_path / "whole" / "teacher-completions").iterdir())) == 3

    def cut(items, label="", **options):
        for i, item in enumerate(items):
            if label == "sampling from the teacher" and i == 1:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "cut", track=cut, **inputs)
    assert len(list((tmp_path / "cut" / "teacher-completions").iterdir())) == 1

    def press(event):
        if event.get("step") == 3 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        stage(tmp_path / "cut", on_event=press, **inputs)
    stage(tmp_path / "cut", **inputs)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    with pytest.raises(
        InputError, match=r"expected .*teacher-completions made with temperature 0\."
    ):
        replace(stage, temperature=0.9)(tmp_path / "cut", **inputs)
    with pytest.raises(InputError, match=r"expected .*teacher-completions made with teacher"):
        stage(tmp_path / "cut", model=student, teacher=student)


def test_answers_that_do_not_end_are_left_out(
    stage, student, teacher, tmp_path, small_batches
) -> None:
    """Also whole batches of them: one token is no answer and its end."""
    stage = replace(stage, max_new_tokens=1)
    with pytest.raises(
        InputError, match="data: expected conversations to learn from, got none in 14"
    ):
        stage(tmp_path / "out", model=student, teacher=teacher)
    assert rows_of(tmp_path / "out") == []
    long = write(tmp_path / "long.jsonl", [{"prompt": "what " * 300}, {"prompt": "what is tree"}])
    result = replace(stage, data=(long,), max_new_tokens=12, heldout=0.0, max_steps=1)(
        tmp_path / "long", model=student, teacher=teacher
    )
    assert result["counts"] == {"too long for the teacher": 1} and result["conversations"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher_completions": "beam"},
            "teacher_completions: expected one of greedy, sampled, got 'beam'",
        ),
        (
            {"divergence": "jsd"},
            "divergence: expected forward with teacher_completions greedy, which",
        ),
        ({"sft_weight": 1.0}, "sft_weight: expected none with teacher_completions"),
        ({"teacher_top_k": 4}, "teacher_top_k: expected none with teacher_completions greedy"),
        ({"temperature": 0.5}, "temperature: expected 1.0 with teacher_completions greedy"),
        ({"data_weights": (2.0,)}, "data_weights: expected none with teacher_completions greedy"),
    ],
)
def test_refused(stage, student, teacher, tmp_path, changes, message) -> None:
    with pytest.raises(InputError, match=message):
        replace(stage, **changes)(tmp_path / "out", model=student, teacher=teacher)


def test_without_a_teacher(stage, student, tmp_path) -> None:
    with pytest.raises(
        InputError, match="teacher: expected a teacher or teacher_logits, got neither"
    ):
        stage(tmp_path / "out", model=student)


def test_the_teacher_uses_its_own_template(stage, teacher, student, tmp_path) -> None:
    """Also where the student gets another one."""
    template = tmp_path / "other.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }} please {{ m.content }}<|im_end|>{% endfor %}"
    )
    stage = replace(stage, max_steps=1, validations=0)
    stage(tmp_path / "own", model=student, teacher=teacher)
    other = replace(stage, chat_template=str(template))
    other(tmp_path / "other", model=student, teacher=teacher)
    assert rows_of(tmp_path / "other") == rows_of(tmp_path / "own") != []
    bare = tmp_path / "bare"
    tokenizer = Tokenizer.train(["what is please"], 260, special_tokens=["<|end|>"])
    CausalLM(config(tokenizer.vocab_size, tokenizer.eos_id), seed=4).save_pretrained(bare)
    tokenizer.save(bare)
    with pytest.raises(
        InputError, match="teacher: expected a chat template of its own; expected one,"
    ):
        other(tmp_path / "bare-out", model=student, teacher=bare)


def test_answers_to_a_forgotten_prompt_are_removed(stage, teacher, student, tmp_path) -> None:
    rows = [
        {"prompt": f"what is {word}", "completion": "garden",
         "provenance": {"responses": [f"r{i}"], "conversations": [f"c{i}"]}}
        for i, word in enumerate(WORDS)
    ]  # fmt: skip
    stage = replace(stage, data=(write(tmp_path / "prompts.jsonl", rows),), epochs=1)
    stage(tmp_path / "out", model=student, teacher=teacher)
    before = rows_of(tmp_path / "out")
    names = [row["provenance"]["responses"][0] for row in before]
    assert len(names) > 8
    going, talk = names[2], f"c{names[5][1:]}"
    report = forget([tmp_path / "out"], [going, talk], dry_run=True)
    (removed,) = report.removed
    assert (
        removed["kind"] == "row" and removed["count"] == 2 and rows_of(tmp_path / "out") == before
    )
    forget([tmp_path / "out"], [going, talk])
    left = [row for i, row in enumerate(before) if i not in (2, 5)]
    assert rows_of(tmp_path / "out") == left
    assert forget([tmp_path / "out"], [going, talk]).removed == []
