"""Question sets: records that survive a kill, metrics, comparisons, the stage."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import question_files
from paths import PYTHONPATH
from preference_models import make_base

import fastlm.model.load
from fastlm.errors import InputError
from fastlm.evals import answers, contamination, runner
from fastlm.evals.results import RecordFile
from fastlm.evals.runner import run_questions, run_tasks
from fastlm.evals.scorer import Scorer
from fastlm.evals.stage import Eval
from fastlm.evals.suite import compare_models, model_hash
from fastlm.evals.tables import score_rows, task_tables
from fastlm.evals.task import MultipleChoice, OpenQuestion, Task
from fastlm.evals.task_metrics import (
    argmax_score,
    part_metrics,
    passage_clusters,
    question_metrics,
    summarize_metrics,
)
from fastlm.model.load import load_model
from fastlm.stats.intervals import mean_error
from fastlm.stats.power import rate_mde

WORDS = ("tree", "river", "stone", "bird")


def choices(count: int, **changes) -> Task:
    """Return questions with four answers; each index is right equally often."""
    questions = [
        MultipleChoice(
            str(i), tuple((f"what is {i}\n", f" {w} {i % 7}") for w in WORDS), i % 4,
            tuple(("what", f" {w} {i % 7}") for w in WORDS),
        )
        for i in range(count)
    ]  # fmt: skip
    return Task(
        **{
            "name": "words", "ability": "facts", "questions": questions, "source": "the test",
            "licence": "none", "format": "own", **changes,
        }
    )  # fmt: skip


def written(count: int) -> Task:
    def judge(answers):
        return [float(text.count("e") % 2) for text, _ in answers]

    questions = [
        OpenQuestion(str(i), f"tree {i}", {}, " river", max_new_tokens=5) for i in range(count)
    ]
    return Task("talk", "facts", questions, "the test", "none", "own", judge=judge)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def scorer(base):
    return Scorer(*load_model(base))


class Killed(Exception):
    pass


@pytest.mark.parametrize("make", [choices, written])
@pytest.mark.parametrize("torn", [b"", b'{"id": "9", "logp', 2])
def test_a_killed_evaluation_continues_with_the_same_bits(
    make, torn, scorer, tmp_path, monkeypatch
):
    monkeypatch.setattr(runner, "CHUNK", 8)
    task, options = make(20), {}
    if task.is_open:
        options = {"samples": 2, "temperature": 1.0, "seed": 3}
    with RecordFile(tmp_path / "whole.jsonl", {"task": task.hash}) as results:
        full_records = run_questions(task, scorer, results, **options)
    assert len(full_records) == 20

    class Cut(RecordFile):
        def add(self, records):
            super().add(records)
            raise Killed

    path = tmp_path / "cut.jsonl"
    with pytest.raises(Killed), Cut(path, {"task": task.hash}) as results:
        run_questions(task, scorer, results, **options)
    assert len(path.read_bytes().splitlines()) == 1 + runner.CHUNK
    with open(path, "ab") as file:  # what a kill in the middle of a part leaves
        lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)[9:]
        file.write(b"".join(lines[:torn]) if isinstance(torn, int) else torn)
    with RecordFile(path, {"task": task.hash}) as results:
        assert run_questions(task, scorer, results, **options) == full_records
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_killed_process_continues(base, tmp_path):
    """After a SIGKILL within a chunk the records are those of an uninterrupted run."""
    code = (
        "import sys, test_evals as t; from fastlm.evals.results import RecordFile\n"
        "scorer = t.Scorer(*t.load_model(sys.argv[1])); task = t.choices(256)\n"
        "with RecordFile(sys.argv[2], {'task': task.hash}) as r: t.run_questions(task, scorer, r)\n"
    )
    path = [sys.executable, "-c", code, str(base)]
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = tmp_path / "done.jsonl"
    subprocess.run([*path, str(done)], env=env, check=True)
    cut = tmp_path / "cut.jsonl"
    child = subprocess.Popen([*path, str(cut)], env=env)
    while child.poll() is None and (not cut.exists() or cut.read_bytes().count(b"\n") < 2):
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert cut.read_bytes().count(b"\n") >= 2
    subprocess.run([*path, str(cut)], env=env, check=True)
    assert cut.read_bytes() == done.read_bytes()


def test_records_of_something_else_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    with RecordFile(path, {"task": "one"}) as results:
        results.add([{"id": "0"}])
    with pytest.raises(InputError, match=r"expected records of .*two.*got those of .*one"):
        RecordFile(path, {"task": "two"})
    path.write_bytes(path.read_bytes() + b"not json\n" + b'{"id": "1"}\n')
    with pytest.raises(InputError, match=r"r.jsonl:3: expected JSON"):
        RecordFile(path, {"task": "one"})


@pytest.fixture(scope="module")
def records(scorer, tmp_path_factory):
    """Return kind of task -> the records of three questions."""
    files = {}
    for make in (choices, written):
        path = tmp_path_factory.mktemp("records") / "r.jsonl"
        with RecordFile(path, {}) as results:
            run_questions(make(3), scorer, results)
        files[make] = path.read_bytes()
    return files


@pytest.mark.parametrize(
    ("make", "old", "new", "refusal"),
    [
        (choices, b'"id": "1"', b'"id": "2"', ":3: id: expected '1', got '2'"),
        (choices, b'"logprob": [', b'"logprob": [1.0, ', ":2: logprob: expected 4 values, got 5"),
        (choices, b'"logprob": [', b'"logprob": ["a", ', ":2: logprob[0]: expected a number"),
        (choices, b'"logprob"', b'"lp"', ":2: logprob: expected this field, got nothing"),
        (choices, b'{"id": "0"', b"[" * 9000, ":2: expected at most 200 levels of nesting"),
        (written, b'"scores": [', b'"scores": [1.0, ', ":2: scores: expected 1 values, got 2"),
        (written, b'"scores": [0', b'"scores": [NaN, 0', ":2: scores[0]: expected a finite number"),
        (written, b'"answers": [', b'"answers": [1, ', ":2: answers[0]: expected a string, got 1"),
        (written, b'"gold": ', b'"gold": "x", "g": ', ":2: gold: expected a number, got 'x'"),
    ],
)
def test_damaged_records_are_refused_by_line(make, old, new, refusal, scorer, records, tmp_path):
    path = tmp_path / "r.jsonl"
    assert old in records[make]
    path.write_bytes(records[make].replace(old, new, 1))
    with pytest.raises(InputError) as refused:
        with RecordFile(path, {}, runner.schema_of(make(3))) as results:
            run_questions(make(3), scorer, results)
    assert str(refused.value).startswith(f"{path}{refusal}"), refused.value


def test_records_of_more_questions_are_refused(scorer, records, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(records[choices])
    with RecordFile(tmp_path / "r.jsonl", {}) as results:
        with pytest.raises(InputError, match="expected at most 2 records, got 3"):
            run_questions(choices(2), scorer, results)


def test_measures_follow_their_formulas():
    task = choices(1, normalisation="unconditional")
    record = {
        "id": "0",
        "logprob": [-9.0, -8.0, -12.0, -30.0],
        "unconditional": [-8.0, -1.0, -20.0, -30.0],
    }
    actual = {name: each[0] for name, each in question_metrics(task, [record]).items()}
    assert actual["bits_per_byte"] == pytest.approx(9 / math.log(2) / len("tree 0"))
    assert actual["acc"] == 0  # the second answer is the likeliest
    assert actual["acc_olmes"] == 0  # -1, -7, 8, 0: the third
    assert actual["acc_norm"] == 0 and actual["acc_bytes"] == 0  # -9/6, -8/7, ...
    by_characters = question_metrics(choices(1, normalisation="characters"), [record])
    assert by_characters["acc_olmes"][0] == argmax_score([-9 / 7, -8 / 8, -12 / 8, -30 / 7], 0)
    assert (
        question_metrics(task, [record | {"logprob": [-1.0, -1.0, -2.0, -1.0]}])["acc"][0] == 1 / 3
    )


def test_models_whose_answers_are_known(tmp_path):
    task = choices(80)
    for make, accuracy in ((question_files.oracle, 1.0), (question_files.always_first, 0.25)):
        actual = question_files.measure(task, make(task), tmp_path / str(accuracy))
        assert actual["acc"] == accuracy
    flat = question_files.measure(task, question_files.FakeScorer(), tmp_path / "flat")
    assert flat["acc"] == pytest.approx(task.chance)  # all answers are equally likely
    records = [{"id": str(i), "logprob": [0.0, -1, -1, -1]} for i in range(80)]
    metrics = summarize_metrics(
        task, question_metrics(task, [r | {"unconditional": [0.0] * 4} for r in records])
    )
    assert metrics["acc"]["error"] == pytest.approx(math.sqrt(0.25 * 0.75 / 79))
    assert metrics["acc"]["min_detectable_effect"] == pytest.approx(
        rate_mde(80, 0.25)
    )  # its power is 0.8
    nothing = summarize_metrics(task, {"acc": np.zeros(80)})["acc"]
    assert nothing["error"] == 0 and nothing["min_detectable_effect"] == pytest.approx(
        6.6 / 80, abs=2e-3
    )
    shares = summarize_metrics(task, {"rules": np.zeros(80) + 0.5 * (np.arange(80) == 3)})["rules"]
    assert 0.02 < shares["min_detectable_effect"] < nothing["min_detectable_effect"]
    bits = summarize_metrics(task, {"bits_per_byte": np.full(80, 0.5)})["bits_per_byte"]
    assert bits["min_detectable_effect"] is None


def test_as_many_answers_as_were_drawn_pass():
    task = replace(written(1), metric="pass", extra_judges={})
    record = {"gold": None, "scores": [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], "answers": [""] * 7}
    actual = question_metrics(task, [record])
    assert list(actual) == ["pass@1", "pass@2", "pass@5", "pass@7"]
    expected = [2 / 7, 1 - 10 / 21, 20 / 21, 1.0]  # 5 of 7 miss both in one of 21 draws
    assert [each[0] for each in actual.values()] == pytest.approx(expected)
    assert list(question_metrics(task, [record | {"scores": [0.0]}])) == ["pass@1"]
    assert list(question_metrics(task, [record | {"scores": [0.0] * 10}])) == [
        "pass@1", "pass@2", "pass@5", "pass@10",
    ]  # fmt: skip


def test_samples_vote_by_their_final_answer():
    task = replace(written(1), vote=answers.VOTES[answers.last_number], extra_judges={})
    texts = ["so 6", "it is 6.0", "#### 7", "none", "7", "6,000", "6"]
    row = {"answer": "6"}
    scores = answers.last_number([(text, row) for text in texts])
    record = {"gold": None, "scores": scores, "answers": texts}
    actual = {name: each[0] for name, each in question_metrics(task, [record]).items()}
    assert list(actual) == [
        "exact_match", "pass@2", "majority@2", "pass@5", "majority@5", "pass@7", "majority@7",
    ]  # fmt: skip
    assert actual["exact_match"] == pytest.approx(3 / 7) and actual["majority@7"] == 1
    # of two samples: both 6 (3 pairs), 6 and none (3), 6 and another number (3 x 3, half)
    assert actual["majority@2"] == pytest.approx((3 + 3 + 9 / 2) / 21)
    chosen = question_metrics(task, [record], (1, 4))
    assert list(chosen) == ["exact_match", "pass@1", "majority@1", "pass@4", "majority@4"]
    assert chosen["majority@1"] == pytest.approx(3 / 7) == chosen["pass@1"]
    programs = replace(task, metric="pass", vote=None)
    assert list(question_metrics(programs, [record], (3,))) == ["pass@3"]
    with pytest.raises(InputError, match=r"k: expected 1 to 5 \(samples\), got 6"):
        Eval(samples=5, temperature=1.0, k=(2, 6)).check()


@pytest.mark.parametrize(
    ("judge", "same", "other"),
    [
        ("exact_match", ["The Moon.\nYes", "moon"], "sun"),
        ("first_word", ["Moon is", "moon"], "sun"),
        ("last_number", ["-1,000", "about \N{MINUS SIGN}1000.0"], "1000"),
        ("last_number", ["0.33333333", "0.333333333"], "0"),
        ("latex_answer", [r"\boxed{0}", "The answer is 0.0."], r"\boxed{1}"),
        ("latex_answer", [r"\boxed{\frac12}", "The answer is 0.5."], r"\boxed{x}"),
    ],
)
def test_answers_that_a_judge_holds_equal_vote_alike(judge, same, other):
    vote = answers.VOTES[getattr(answers, judge)]
    assert vote(same[0]) == vote(same[1]) != vote(other) and vote(other) is not None
    assert vote("") is None


def test_questions_of_a_passage_count_as_one_draw_in_parts_and_clean_ones():
    plain = choices(40)
    results_of = [
        replace(q, group=f"passage {i // 10}" if i < 30 else "", part="ab"[i % 2])
        for i, q in enumerate(plain.questions)
    ]
    task = replace(plain, questions=results_of)
    each = {"acc": np.repeat([1.0, 0.0, 1.0, 0.0], 10)}  # a passage is right or wrong as a whole
    names = [q.group or q.id for q in results_of]
    actual = part_metrics(task, each)
    rows = np.arange(0, 40, 2)
    clustered = mean_error(each["acc"][rows], clusters=[names[i] for i in rows]).error
    assert actual["a"]["metrics"]["acc"]["error"] == pytest.approx(clustered)
    assert clustered > 1.5 * mean_error(each["acc"][rows]).error
    dirty = np.arange(40) < 20
    parted = contamination.contamination_report(task, dirty.astype(float), {"m": each})["models"][
        "m"
    ]
    for part, indices in (("dirty", dirty), ("clean", ~dirty)):
        groups = [name for name, entry in zip(names, indices) if entry]
        expected = mean_error(each["acc"][indices], clusters=groups).error
        assert parted[part]["acc"]["error"] == pytest.approx(expected)


def test_copies_of_a_question_count_as_one_draw():
    plain = choices(20)
    copies = [replace(q, id=str(i)) for i, q in enumerate([*plain.questions, *plain.questions])]
    values = {"acc": np.tile([1.0, 0.0, 1.0, 1.0], 10)}
    actual = summarize_metrics(replace(plain, questions=copies), values)["acc"]
    once = summarize_metrics(plain, {"acc": values["acc"][:20]})["acc"]
    assert actual["value"] == once["value"] and actual["error"] == pytest.approx(once["error"])
    shot = OpenQuestion("0", "How many?", {}, " 3")
    other = [shot, replace(shot, id="1"), replace(shot, gold=" 4"), replace(shot, prompt="Who?")]
    clusters = passage_clusters(replace(plain, questions=other))
    assert clusters is not None and clusters[0] == clusters[1] and len(set(clusters)) == 3
    assert passage_clusters(plain) is None


def test_what_this_machine_cannot_judge_is_refused_before_a_question_is_asked(tmp_path):
    def lacks():
        raise InputError("sandbox: this machine lacks a user namespace")

    programs = replace(written(4), check=lacks)
    with pytest.raises(InputError, match="sandbox: this machine lacks"):
        run_tasks([choices(4), programs], None, tmp_path, model="m")  # nobody to ask
    assert not [*tmp_path.iterdir()]


def test_a_comparison_is_symmetric_and_adjusted(tmp_path):
    tasks = [choices(100), choices(60, name="fewer")]
    rng = np.random.default_rng(0)
    noise = {(c, a): v for c, a in _pairs(tasks) for v in [rng.normal()]}

    def model(skill: float):
        golds = {q.requests[q.gold] for t in tasks for q in t.questions}
        return question_files.FakeScorer(
            logprob=lambda c, a: -8 + noise.get((c, a), 0) + skill * ((c, a) in golds)
        )  # fmt: skip

    results_of = {
        name: run_tasks(tasks, model(skill), tmp_path / name, model=name)
        for name, skill in (("weak", 0.5), ("strong", 2.0))
    }
    forth = compare_models(tasks, results_of)
    back = compare_models(tasks, dict(reversed(results_of.items())))
    for entry, other in zip(forth, back, strict=True):
        for a, b in zip(entry["comparisons"], other["comparisons"], strict=True):
            assert a["difference"] == -b["difference"] and a["p"] == b["p"]
            assert (a["low"], a["high"]) == (-b["high"], -b["low"])
            assert a["p_adjusted"] >= a["p"]
    better = {c["metric"]: c for c in forth[0]["comparisons"]}
    assert better["acc"]["difference"] > 0 and better["acc"]["p_adjusted"] < 0.05
    assert better["bits_per_byte"]["difference"] < 0  # fewer bits
    rows = task_tables(forth)[-1].rows
    assert [row[0] for row in rows] == ["words", "words", "fewer", "fewer"]


def _pairs(tasks):
    return dict.fromkeys(pair for t in tasks for q in t.questions for pair in q.requests)


def test_a_sample_is_drawn_once_for_all_models():
    task = choices(100)
    few = task.sample(10, seed=1)
    assert [q.id for q in few.questions] == [q.id for q in task.sample(10, seed=1).questions]
    assert few.hash != task.hash and few.hash != task.sample(10, seed=2).hash
    assert [int(q.id) for q in few.questions] == sorted(int(q.id) for q in few.questions)
    assert task.sample(100, 0) is task and task.sample(None, 0) is task


@pytest.fixture
def cache(tmp_path):
    rows = [
        {
            "request_type": "loglikelihood", "doc": {}, "label": i % 2, "doc_id": i,
            "request": {"context": f"what is {i}\nAnswer:", "continuation": f" {word}"},
        }
        for i in range(9) for word in ("tree", "river")
    ]  # fmt: skip
    question_files.write_requests(tmp_path / "cache", "winogrande", "rc_5shot", rows)
    return tmp_path / "cache"


def test_the_stage_asks_models_and_compares_them(base, cache, tmp_path):
    other = make_base(tmp_path / "other", hidden_size=64)
    stage, out = Eval(tasks=("winogrande",), limit=8), tmp_path / "out"
    scores = stage(out, model=[str(base), str(other)], cache_dir=cache)
    (task,) = scores["tasks"]
    assert scores["models"] == {} and task["questions"] == 8 and task["chance"] == 0.5
    assert set(task["models"]) == {str(base), str(other)} and task["licence"] == "CC-BY"
    assert json.loads((out / "scores.json").read_text()) == json.loads(json.dumps(scores))
    files = sorted(p.relative_to(out / "items") for p in (out / "items").rglob("*.jsonl"))
    assert [p.parts[0] for p in files] == sorted([model_hash(str(base)), model_hash(str(other))])
    summary = [(entry["name"], entry["id"][:16]) for entry in scores["ids"]]
    assert summary == [(str(path), model_hash(str(path))) for path in (base, other)]
    (base / "README.md").write_text("a card is no part of a model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "loglikelihoods", None)  # nothing is asked again
        second_scores = stage(out, model=[str(base), str(other)], cache_dir=cache)
    for name, model in second_scores["tasks"][0]["models"].items():
        assert model["metrics"] == task["models"][name]["metrics"]
    output = list(score_rows(scores["tasks"]))
    assert [row["chance"] for row in output] == ["50.0", "50.0"]


def test_activations_are_rounded_as_asked(base, cache, tmp_path, monkeypatch):
    """Records of one activation width are not used for another."""
    loaded, load = [], fastlm.model.load.load_model
    monkeypatch.setattr(
        fastlm.model.load, "load_model", lambda path, *rest: (loaded.append(rest), load(path))[1]
    )
    options = {"model": [str(base)], "cache_dir": cache}
    Eval(tasks=("winogrande",), limit=4, act_bits=8)(tmp_path / "out", **options)
    with pytest.raises(InputError, match="act_bits 16"):
        Eval(tasks=("winogrande",), limit=4, act_bits=16)(tmp_path / "out", **options)
    assert loaded == [(8,), (16,)]
    with pytest.raises(InputError, match="act_bits: expected 8 or 16, got 4"):
        Eval(tasks=("winogrande",), act_bits=4).check()


def test_the_command_writes_a_report(base, cache, tmp_path):
    from typer.testing import CliRunner

    from fastlm.cli import app

    options = ["eval", "-m", str(base), "--tasks", "winogrande", "--cache", str(cache)]
    result = CliRunner().invoke(app, [*options, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out/report.html").read_text()
    assert "Question sets" in page and "CC-BY" in page and "<svg" in page
    assert "winogrande" in result.stdout
    for extra, message in (
        (["--limit", "0"], "limit: expected 1 or more, got 0"),
        (["--samples", "2"], "temperature: expected more than 0 for 2 samples"),
        (["--tasks", "winogrand"], "expected a name such as winogrande"),
        (["--tasks", ""], "data: expected held-out text, or tasks, got neither"),
    ):
        refused = CliRunner().invoke(app, [*options, *extra])
        assert refused.exit_code == 2 and message in refused.stderr, refused.stderr


def test_a_full_disk_is_one_line_and_loses_no_record(tmp_path):
    path = tmp_path / "full.jsonl"
    done = subprocess.run(
        [
            sys.executable, "-c",
            "import resource, signal, sys\n"
            "from fastlm.errors import InputError\n"
            "from fastlm.evals.results import RecordFile\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
            "try:\n"
            "    with RecordFile(sys.argv[1], {}) as results:\n"
            "        while True:\n"
            "            results.add([{'text': 'x' * 100}])\n"
            "except InputError as error:\n"
            "    print(error, len(results.records))\n",
            str(path),
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "cannot be written" in done.stdout
    with RecordFile(path, {}) as results:
        assert str(len(results.records)) == done.stdout.split()[-1]


def test_the_delimiter_before_an_answer_has_no_length():
    """lm-evaluation-harness divides by the length of the choice without the delimiter."""
    questions = MultipleChoice("0", (("q", "\nab"), ("q", "\nabcdef")), 1)
    task = Task("own", "own", [questions], "", "", "", delimiter="\n")
    actual = question_metrics(task, [{"logprob": [-2.0, -5.0]}])
    assert actual["acc_norm"][0] == 1.0  # by 2 and 6 characters; by 3 and 7 the first is better
    assert actual["bits_per_byte"][0] == pytest.approx(5 / math.log(2) / 6)


def test_one_question_tells_no_error(tmp_path):
    task = choices(1)
    results_of = {"m": run_tasks([task], question_files.oracle(task), tmp_path, model="m")}
    (row,) = compare_models([task], results_of)
    json.dumps(row, allow_nan=False)
    assert row["models"]["m"]["metrics"]["acc"] == {
        "value": 1.0,
        "error": None,
        "min_detectable_effect": None,
    }
    (line,) = score_rows([row])
    assert line["accuracy"] == "100.0" and line["MDE"] == ""
