"""`fastlm judge` and `fastlm label`: a model or a server grades answers, people label some."""

import json
import re

import pytest
from judge_server import (
    GOOD,
    PAIR,
    PASS,
    QUESTION,
    answer_rows,
    ask_judge,
    assistant,
    chat_reply,
    read_rows,
    run_judge,
    stub_server,
    write,
)
from serve_app import tiny_model
from test_cli import call, refused

from fastlm.errors import InputError
from fastlm.evals import model_answers
from fastlm.evals.chat_questions import parse_chat_question
from fastlm.evals.judge import grading
from fastlm.evals.judge.grading import JudgeSource, grade_items
from fastlm.evals.judge.items import JudgeItem, conversation_items, make_items, read_items
from fastlm.evals.judge.labels import random_labels
from fastlm.evals.judge.model_judge import ModelJudge
from fastlm.evals.judge.rubric import GRADES, SEPARATE_TURNS, Rubric
from fastlm.evals.judge.stage import JudgeAnswers
from fastlm.feedback.gate_metrics import read_scores, scores_of
from fastlm.inference.block_manager import BLOCK_SIZE
from fastlm.inference.engine import Engine
from fastlm.model.load import load_model
from fastlm.pipeline.execution_plan import fingerprints
from fastlm.progress import silent
from fastlm.sources.input_digest import InputDigest
from fastlm.stages import parse_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "model"
    model, tokenizer = tiny_model(context=2048)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


# ---- a model as a judge


@pytest.mark.parametrize("chat", [True, False])
def test_a_model_gives_a_readable_grade_whatever_it_writes(model, chat):
    judge = ModelJudge(model, 12)
    if not chat:
        judge.tokenizer.chat_template = None
    answers = ["stone", "", 'a "quote" \\ and a\nline', "<answer> é 漢"]
    for scale, grades in GRADES.items():
        rubric = Rubric.read(scale, None, 4)
        count = 2 if scale == "pair" else 1
        prompts = [rubric.prompt(QUESTION, assistant(a, "b")[:count]) for a in answers]
        replies = ask_judge(judge, prompts, grades)
        assert all(reply["grade"] in grades for reply in replies)
        assert all(0 < reply["probability"] <= 1 for reply in replies)
        assert replies == ask_judge(judge, prompts, grades)
        (alone,) = ask_judge(judge, prompts[:1], grades)
        assert alone["grade"] == replies[0]["grade"]
    assert any(reply["reason"] for reply in replies)
    stats = judge.engine.stats()
    assert stats.cached_tokens > 0.5 * (stats.cached_tokens + stats.prompt_tokens)


def test_the_probability_is_the_models_among_the_grades(model):
    """With one-token grades it is the softmax of the model's logits over them."""
    import torch

    judge = ModelJudge(model, 4)
    prompt = Rubric.read("1-5", None, 4).prompt(QUESTION, assistant("stone"))
    (reply,) = ask_judge(judge, [prompt], (1, 2, 3, 4, 5))
    tokenizer = judge.tokenizer
    ids = judge._encode(prompt) + tokenizer.encode('{"reason": "')
    ids += judge._encode_reason(reply["reason"]) + tokenizer.encode('", "grade":')
    space, digits = tokenizer.encode(" "), [tokenizer.encode(str(g)) for g in range(1, 6)]
    assert all(len(x) == 1 for x in (space, *digits))
    joined = [tokenizer.encode(f" {g}") for g in range(1, 6)]
    assert all(x == [*space, *d] for x, d in zip(joined, digits))
    with torch.no_grad():
        logits = judge.engine.model(torch.tensor([[*ids, *space]])).logits[0, -1].float()
    shares = logits[[d[0] for d in digits]].softmax(0)
    assert reply["grade"] == int(shares.argmax()) + 1
    assert reply["probability"] == pytest.approx(float(shares.max()), rel=1e-3)


def test_a_prompt_beyond_the_context_has_no_grade(model, tmp_path):
    rows = [*answer_rows(3), {"prompt": "what is x", "answer": "stone " * 2000}]
    answers = write(tmp_path / "a.jsonl", *rows)
    warnings = []
    result = JudgeAnswers(answers=(str(answers),), max_reason_tokens=4)(
        tmp_path / "out", judge=model, on_event=lambda event: warnings.append(event)
    )
    assert (result["items"], result["ungraded"]) == (4, 1)
    assert {"warning": "without a readable grade: 1 of 4 (grades.jsonl)"} in warnings
    (last,) = (row for row in read_rows(tmp_path / "out/grades.jsonl") if len(row["answer"]) > 99)
    assert last["grade"] is None and "tokens, the judge reads" in last["error"]
    write(answers, rows[-1])
    with pytest.raises(InputError, match="judge: expected a readable grade, got none: the prompt"):
        JudgeAnswers(answers=(str(answers),))(tmp_path / "other", judge=model)


def test_two_models_are_compared_and_stored_replies_are_used(model, tmp_path, monkeypatch):
    prompts = write(tmp_path / "p.jsonl", *({"prompt": f"what is {i}"} for i in range(5)))
    arguments = ["judge", "--judge", model, "-m", model, "--old", model, "--data", prompts]
    arguments += ["--max-new-tokens", 6, "--max-reason-tokens", 4, "--num-generations", 2]
    out = tmp_path / "out"
    call(*arguments, "-o", out, "--seed", 1)
    first = read_rows(out / "grades.jsonl")
    assert len(first) == 10 and {len(row["replies"]) for row in first} == {2}
    # both are the same model with the same seed
    assert all(row["answer"] == row["answer_b"] for row in first)
    table = read_scores(out / "scores.json")
    assert table["ids"][0].id == table["ids"][1].id
    scores = scores_of("judge", table)
    assert 0 <= scores["judge.win_rate"]["value"] <= 1 and scores["judge.wins"]["n"] == 10
    assert (out / "report.html").is_file()

    def no_model(*_):
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(grading, "ModelJudge", no_model)
    monkeypatch.setattr("fastlm.evals.model_answers.load_model", no_model)
    call(*arguments, "-o", out, "--seed", 1, "--confidence", 0.9)
    assert read_rows(out / "grades.jsonl") == first
    for other in (["--seed", 2], ["--seed", 1, "--max-reason-tokens", 5]):
        assert isinstance(call(*arguments, "-o", out, *other, status=1).exception, AssertionError)


def test_a_killed_judge_continues(model, tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "CHUNK", 4)
    answers = str(write(tmp_path / "a.jsonl", *answer_rows(11)))
    stage = JudgeAnswers(answers=(answers,), max_reason_tokens=4)
    expected = stage(tmp_path / "undisturbed", judge=model)
    sizes, reply = [], ModelJudge.reply

    def interrupted(self, prompts, grades):
        sizes.append(len(prompts))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return reply(self, prompts, grades)

    monkeypatch.setattr(ModelJudge, "reply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "out", judge=model)
    assert stage(tmp_path / "out", judge=model) == expected and sizes == [4, 4, 4, 3]
    for name in ("grades.jsonl", "scores.json"):
        assert (tmp_path / "out" / name).read_bytes() == (
            tmp_path / "undisturbed" / name
        ).read_bytes()


def test_prompts_that_differ_in_tools_are_answered_each(model, tmp_path):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    prompts = write(tmp_path / "p.jsonl", {"prompt": "what"}, {"prompt": "what", "tools": tools})
    with stub_server(GOOD) as (address, _):
        stage = JudgeAnswers(judge_model="m", data=(str(prompts),), max_new_tokens=3)
        assert stage(tmp_path / "out", model=model, judge=address)["items"] == 2
        write(prompts, {"prompt": "what"}, {"prompt": "what", "tools": tools * 2})
        stage(tmp_path / "out", model=model, judge=address)
    (path,) = (tmp_path / "out/records").glob("answers-*")
    assert len(read_rows(path)) == 1 + 3  # only the changed prompt was answered again
    assert {len(row.get("tools", ())) for row in read_rows(tmp_path / "out/grades.jsonl")} == {0, 2}


def test_a_killed_model_continues_its_answers(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model_answers, "CHUNK", 2)
    questions = [
        parse_chat_question({"turns": [f"what is {i}", "now the stone"][: 1 + i % 2]})
        for i in range(5)
    ]
    prompts = [question.prompt for question in questions]
    options = {"num_generations": 2, "max_new_tokens": 4, "temperature": 0.7, "seed": 0}
    firsts = [answer.text for answer in model_answers.generate_answers(model, prompts, **options)]
    sizes, generate = [], Engine.generate

    def interrupted(self, requests, **others):
        sizes.append(len(requests))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return generate(self, requests, **others)

    monkeypatch.setattr(Engine, "generate", interrupted)
    arguments = (tmp_path / "a.jsonl", {}, model, {str(i): q for i, q in enumerate(questions)})
    options["track"] = silent
    with pytest.raises(KeyboardInterrupt):
        model_answers.read_or_generate(*arguments, **options)
    texts = model_answers.read_or_generate(*arguments, **options)
    assert [answers[0] for answers in texts] == firsts
    assert [len(answers) for answers in texts] == [1, 1, 2, 2, 1, 1, 2, 2, 1, 1]
    assert model_answers.read_or_generate(*arguments, **options) == texts
    # chunks of two questions, a call per turn; the first chunk begins again
    assert sizes == [4, 2, 4, 2, 4, 2, 2]


# ---- positions


class StubJudge:
    """Grades by a function of the texts of both answers."""

    def __init__(self, prefer):
        self.prefer, self.id, self.is_server = prefer, {"model": "stub"}, False

    def reply(self, prompts, grades):
        for i, prompt in enumerate(prompts):
            a = prompt.split("<answer_a>\n")[1].split("\n</answer_a>")[0]
            b = prompt.split("<answer_b>\n")[1].split("\n</answer_b>")[0]
            yield i, {"grade": self.prefer(a, b), "reason": f"{a}/{b}", "probability": None}


@pytest.mark.parametrize(
    ("prefer", "grade", "consistent"),
    [
        (lambda a, b: "A" if len(a) > len(b) else "B", "A", True),
        (lambda a, b: "A" if len(a) < len(b) else "B", "B", True),
        (lambda a, b: "A", "tie", False),
        (lambda a, b: "B", "tie", False),
        (lambda a, b: "tie", "tie", True),
    ],
)
def test_both_orders_are_asked(tmp_path, prefer, grade, consistent):
    pairs = (("the long answer", "short"), ("longest", "s"))
    items = make_items(JudgeItem("", QUESTION, pair) for pair in pairs)
    rubric = Rubric.read("pair", None, 4)
    graded = grade_items(items, rubric, StubJudge(prefer), tmp_path)
    assert [g.grade for g in graded] == [grade] * 2
    assert [g.is_consistent for g in graded] == [consistent] * 2
    reasons = [reply["reason"] for reply in graded[0].as_row()["replies"]]
    assert reasons == ["the long answer/short", "short/the long answer"]


def test_a_model_is_not_asked_again_for_a_missing_grade(tmp_path):
    asked = []

    def prefer(a, b):
        asked.append(a)
        return None if a == "short" else "A"

    pairs = (("long", "short"), ("a", "b"))
    items = make_items(JudgeItem("", QUESTION, pair) for pair in pairs)
    for _ in range(2):
        graded = grade_items(items, PAIR, StubJudge(prefer), tmp_path)
        assert [g.grade for g in graded] == [None, "tie"] and len(asked) == 4


# ---- labels


@pytest.fixture
def judged(tmp_path):
    """A folder of judged answers: every third one passes. Return it with the ids by prompt."""

    def grade(body):
        text = body["messages"][0]["content"]
        number = int(text.split("<answer>\nstone ")[1].split("\n")[0])
        grade = "pass" if number % 3 == 0 else "fail"
        return chat_reply(json.dumps({"reason": "the judge's reason", "grade": grade}))

    answers = write(tmp_path / "a.jsonl", *answer_rows(30))
    with stub_server(grade) as (address, _):
        call(
            "judge", "--judge", address, "--judge-model", "hidden-name", "--answers", answers,
            "-o", tmp_path / "out",
        )  # fmt: skip
        yield (
            tmp_path / "out",
            [
                "judge",
                "--judge",
                address,
                "--judge-model",
                "hidden-name",
                "--answers",
                answers,
                "-o",
                tmp_path / "out",
            ],
        )


def test_a_person_labels_without_the_judges_verdict(judged, tmp_path):
    out, again = judged
    labels = tmp_path / "labels.jsonl"
    arguments = ["label", out, labels, "--rater", "Ann", "--count", 20]
    output = call(*arguments, input="p\nf\ns\nb\nf\n").stdout
    assert "Ann: 3 of 20 labelled: " in output
    assert "The answer passes if" in " ".join(output.split())
    assert "1 of 20" in output and "what is " in output and "stone " in output
    for hidden in ("hidden-name", "the judge's reason", str(out), "pass\n", "a.jsonl"):
        assert hidden not in output.replace(str(labels), "")
    assert [row["label"] for row in read_rows(labels)] == ["pass", "fail", None, "fail"]
    assert "4 of 20" in call(*arguments, input="").stdout  # continues
    assert "Ann: 20 of 20 labelled" in call(*arguments, input="p\n" * 8 + "f\n" * 9).stdout
    assert "Ann: 20 of 20 labelled" in call(*arguments, input="").stdout
    assert len({row["id"] for row in read_rows(labels)}) == 20
    assert "Bob: 0 of 20" in call(*arguments[:4], "Bob", "--count", 20, input="?\nq\n").stdout

    output = " ".join(call(*again, "--labels", labels).stdout.split())
    assert "this model" in output and "pass other labels agreement" in output
    assert "pass is not corrected: expected 40 random labels with both verdicts, got" in output
    call(*again, "--labels", labels, "--min-labels", 10)
    scores = read_scores(out / "scores.json")
    score = scores_of("judge", scores)["judge.pass"]
    assert score["judge"]["agreement"][1] == 10
    verdicts = {row["id"]: row["grade"] for row in read_rows(out / "grades.jsonl")}
    people = {row["id"]: row["label"] for row in read_rows(labels)}
    sample = [*verdicts][:10]
    assert score["judge"]["agreement"][0] == sum(verdicts[i] == people[i] for i in sample)
    page = (out / "report.html").read_text()
    assert "What a judge says" in page and "sensitivity" in page


def test_labels_of_pairs_are_those_of_the_answers_not_of_their_places(tmp_path):
    rows = [{"prompt": f"what {i}", "answer": "good", "answer_b": "bad"} for i in range(12)]
    answers = write(tmp_path / "a.jsonl", *rows)
    always_a = chat_reply('{"reason": "", "grade": "A"}')
    with stub_server(always_a) as (address, _):
        output = call(
            "judge", "--judge", address, "--judge-model", "m", "--answers", answers,
            "-o", tmp_path / "out",
        ).stdout  # fmt: skip
    assert all(re.search(line, output) for line in ("consistent +0.0 %", "first_position +100.0 %"))
    labels = tmp_path / "labels.jsonl"
    done = call("label", tmp_path / "out", labels, "-r", "Ann", "--count", 12, input="1\n" * 12)
    places = [line.strip("│ ") for line in done.stdout.splitlines() if line.startswith("│")]
    expected = ["A" if first == "good" else "B" for first in places[::2]]
    assert [row["label"] for row in read_rows(labels)] == expected
    assert set(expected) == {"A", "B"}
    call("label", tmp_path / "out", labels, "-r", "Bob", "--count", 12, input="=\n" * 12)
    assert [row["label"] for row in read_rows(labels)][12:] == ["tie"] * 12


def test_refusals(model, judged, tmp_path):
    out, again = judged
    labels = tmp_path / "labels.jsonl"
    refused("label", out, labels, "-r", "Ann", text="p or f", input="good\n")
    refused("label", out, labels, "-r", "Ann", text="session's first", input="b\n")
    refused("label", out, labels, "-r", " ", text="rater: expected a name")
    refused(
        "label", tmp_path, labels, "-r", "Ann", text="grades: expected a folder of fastlm judge"
    )
    refused("label", out, tmp_path / "x.txt", "-r", "Ann", text="labels: expected a name that ends")
    write(labels, {"id": "1", "rater": "Ann", "label": 4, "rubric": PASS.key})
    refused(*again, "--labels", labels, text=":1: label: expected one of pass, fail, got 4")
    answers = write(tmp_path / "a2.jsonl", *answer_rows(2))
    judge = ["judge", "--judge", model]
    for arguments, text in (
        ([], "answers: expected answers or a model that answers, got neither"),
        (["--answers", answers, "-m", model], "got both"),
        (["--answers", answers, "--old", model], "old: expected a model to compare it with"),
        (["-m", model], "data: expected prompts for the model, got none"),
        (["--answers", answers, "--data", answers], "data: expected none"),
        (["--answers", answers, "--scale", "1-7"], "scale: expected one of pass, 1-5, 1-10"),
        (
            ["--answers", answers, "--scale", "1-10", "--threshold", 11],
            "threshold: expected 2 to 10, got 11",
        ),
        (["-m", model, "--data", "questions:three"], "data: expected one of questions:two-turn"),
        (["--answers", answers, "--threshold", 1], "threshold: expected 2 to 5, got 1"),
        (["--answers", answers, "--rubric", tmp_path / "none"], "expected a readable text file"),
        (["--answers", answers, "--labels", tmp_path / "none"], "labels: expected a file"),
        (["--answers", answers, "--judge-model", "m"], "judge_model: expected none with a model"),
        (["--answers", answers, "--retries", 1], "retries: expected none with a model on this"),
        (["--answers", answers, "--seed", 1], "seed: expected none with answers, got 1"),
        (["--answers", answers, "--num-generations", 2], "num_generations: expected none with"),
        (["--answers", answers, "--timeout", 0], "timeout: expected a positive number"),
        (["--answers", answers, "--confidence", 1], "confidence: expected between 0 and 1"),
    ):
        refused(*judge, *arguments, text=text)
    refused("judge", "--judge", "nowhere", "--answers", answers, text="found nothing at 'nowhere'")
    (tmp_path / "empty").write_text(" \n")
    refused(*judge, "--answers", answers, "--rubric", tmp_path / "empty", text="got an empty file")


def judge_recipe(judge, **options):
    stages = [
        {"kind": "sft", "name": name, "from": "model:smollm2", "data": ["a.jsonl"]}
        for name in ("chat", "big")
    ]
    last = {"kind": "judge", "from": "chat", "judge": judge, "data": ["questions:two-turn"]}
    return parse_recipe({"name": "x", "stage": [*stages, {**last, **options}]})


@pytest.mark.parametrize(
    "judge", ["big", "model:smollm2", "http://localhost:8000/v1", "runs/other/sft"]
)
def test_a_recipe_judges(judge):
    step = judge_recipe(judge).step("judge")
    assert isinstance(step.stage, JudgeAnswers)
    assert step.inputs == {"model": ("chat",), "old": (), "judge": (judge,)}


@pytest.mark.parametrize(
    ("judge", "options", "text"),
    [
        ("large", {}, "judge.judge: expected the name of an earlier stage or a path with a /"),
        ("judge", {}, "judge.judge: expected an earlier stage, 'judge' comes later"),
        ([], {}, "judge.judge: expected the name of a stage or a path"),
        ("big", {"retries": 1}, "judge.retries: expected none with a model on this machine"),
        ("http://a/v1", {"max_reason_tokens": 5}, "judge.max_reason_tokens: expected none with a"),
        ("big", {"data": []}, "judge.data: expected prompts for the model"),
        ("big", {"data": ["questions:x"]}, "judge.data: expected one of questions:two-turn, got"),
    ],
)
def test_a_recipe_refuses_before_it_runs(judge, options, text):
    with pytest.raises(InputError) as error:
        judge_recipe(judge, **options)
    assert text in str(error.value)


def test_the_plan_of_a_run_depends_on_the_stage_that_judges(tmp_path, model):
    rows = write(tmp_path / "a.jsonl", {"prompt": "what", "completion": "stone"})
    prints = []
    for epochs, judge in ((1, "big"), (2, "big"), (2, "http://localhost:1/v1"), (2, str(model))):
        training = {"kind": "sft", "from": str(model), "data": [str(rows)]}
        recipe = parse_recipe({"name": "x", "stage": [
            {**training, "name": "chat"}, {**training, "name": "big", "epochs": epochs},
            {"kind": "judge", "from": "chat", "judge": judge, "data": ["questions:two-turn"]},
        ]})  # fmt: skip
        digest = InputDigest(tmp_path / "sources.json", cache=tmp_path)
        prints.append(fingerprints(recipe, digest)["judge"])
    assert len(set(prints)) == 4


def test_a_recipe_runs_a_stage_of_its_own_as_the_judge(tmp_path, model):
    rows = write(tmp_path / "a.jsonl", {"prompt": "what", "completion": "stone"})
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"""
name = "x"
[[stage]]
kind = "quantize"
from = "{model}"
name = "small"
method = "rtn"
[[stage]]
kind = "judge"
from = "{model}"
judge = "small"
data = ["{rows}"]
max_new_tokens = 3
max_reason_tokens = 3
""")
    call("run", recipe, "--out", tmp_path / "run")
    table = json.loads((tmp_path / "run/judge/scores.json").read_text())
    assert table["items"] == 1 and table["judge"]["model"] != table["ids"][0]["id"]
    record = (tmp_path / "run/stages.json").read_text()
    assert json.loads(record)["stages"]["judge"]["inputs"]["judge"] == ["small"]
    # the card of the judge has no results of the model that it judged
    call("runs", "card", "run/small", "--in", tmp_path, "-o", tmp_path / "card.md")
    assert "confidence" not in (tmp_path / "card.md").read_text()


# ---- conversations of several turns

TWO = {"turns": ["please what is stone", "now the tree"], "category": "stem"}
LONG = ["a " * 80, "b", "c"]


def test_the_second_turn_follows_the_models_own_answer(model, monkeypatch):
    """Each request is the conversation so far, with the answer that the model gave before."""
    rows = ({**TWO, "system": "be brief"}, {"turns": ["what"]}, {"turns": LONG})
    questions = [parse_chat_question(row) for row in rows]
    calls, cached, generate = [], [], Engine.generate

    def listen(self, requests, **others):
        calls.append([list(request.prompt) for request in requests])
        completions = generate(self, requests, **others)
        cached.append(self.stats().cached_tokens)
        return completions

    monkeypatch.setattr(Engine, "generate", listen)
    (chunk,) = model_answers._generate_chunks(
        model, [questions], num_generations=2, max_new_tokens=20, temperature=0.7, seed=3,
        track=silent,
    )  # fmt: skip
    texts = [[completion.text for completion in answers] for answers in chunk]
    assert [len(answers) for answers in texts] == [2, 2, 1, 1, 3, 3] and texts[0] != texts[1]
    _, tokenizer = load_model(model)
    user = [{"role": "user", "content": text} for text in LONG]
    answers = [{"role": "assistant", "content": text} for text in texts[4]]
    third = [user[0], answers[0], user[1], answers[1], user[2]]
    second = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": TWO["turns"][0]},
        {"role": "assistant", "content": texts[1][0]}, {"role": "user", "content": TWO["turns"][1]},
    ]  # fmt: skip
    assert [len(prompts) for prompts in calls] == [6, 4, 2]
    assert calls[0][4] == tokenizer.encode_chat(user[:1])
    assert calls[1][1] == tokenizer.encode_chat(second)
    assert calls[2][0] == tokenizer.encode_chat(third)
    # full blocks of the prompt of the turn before are not computed again
    for turn, before in ((1, [calls[0][i] for i in (0, 1, 4, 5)]), (2, calls[1][2:])):
        expected = sum(len(prompt) // BLOCK_SIZE * BLOCK_SIZE for prompt in before)
        assert cached[turn] - cached[turn - 1] >= expected >= 2 * BLOCK_SIZE


def test_the_answer_to_a_turn_depends_only_on_its_conversation(model):
    options = {"num_generations": 1, "max_new_tokens": 6, "temperature": 0.7, "seed": 3}
    questions = [parse_chat_question({"turns": [f"what is {i}", "now"]}) for i in range(3)]

    def answers(questions):
        chunks = model_answers._generate_chunks(model, [questions], **options, track=silent)
        return [[c.text for c in turns] for chunk in chunks for turns in chunk]

    assert answers(questions) == [*answers(questions[:1]), *answers(questions[1:])]


def test_a_conversation_beyond_the_context_is_refused(model, tmp_path):
    data = write(tmp_path / "q.jsonl", {"turns": ["what", "stone " * 2000]})
    refused(
        "judge", "--judge", model, "-m", model, "--data", data, "--max-new-tokens", 2,
        text="max_new_tokens: expected answers that leave the next turn within the 2,048 tokens",
    )  # fmt: skip


def test_the_judge_reads_the_conversation_and_the_reference(model, tmp_path):
    rows = [{**TWO, "reference": ["a mineral", None]}, {"prompt": "what", "reference": "yes"}]
    data = write(tmp_path / "q.jsonl", *rows)
    stage = JudgeAnswers(judge_model="m", data=(str(data),), max_new_tokens=4, scale="1-10")

    def grade(body):
        schema = body["response_format"]["json_schema"]["schema"]["properties"]["grade"]
        assert schema["enum"] == [*range(1, 11)]
        second = "user: now the tree" in body["messages"][0]["content"]
        return chat_reply(json.dumps({"reason": "", "grade": 9 if second else 6}))

    with stub_server(grade) as (address, requests):
        stage(tmp_path / "out", model=model, judge=address)
        assert stage(tmp_path / "out", model=model, judge=address)["items"] == 3
    assert len(requests) == 3  # stored replies and answers are used again
    rows = sorted(read_rows(tmp_path / "out/grades.jsonl"), key=lambda row: len(row["prompt"]))
    first, second = (next(r for r in rows if r.get("turn") == turn) for turn in (1, 2))
    alone = next(r for r in rows if "turn" not in r)
    assert first["question_id"] == second["question_id"] and "question_id" not in alone
    assert (first["grade"], second["grade"], alone["grade"]) == (6, 9, 6)
    assert second["prompt"][1] == {"role": "assistant", "content": first["answer"]}
    prompts = {body["messages"][0]["content"] for _, _, body in requests}
    text = Rubric.read("1-10", None).text
    assert all(prompt.startswith(f"{text}\n\nReply with one line of JSON") for prompt in prompts)
    ends = [prompt.split("9, 10.\n\n")[1] for prompt in prompts]
    note = (
        "The reference is a right answer to the last message. Other words, or another way to the"
        " same result, are right, too. An answer that contradicts it is wrong.\n\n"
    )
    assert set(ends) == {
        f"{note}<conversation>\nreference: a mineral\nuser: please what is stone\n"
        f"</conversation>\n\n<answer>\n{first['answer']}\n</answer>",
        f"<conversation>\nuser: please what is stone\nassistant: {first['answer']}\n"
        f"user: now the tree\n</conversation>\n\n<answer>\n{second['answer']}\n</answer>",
        f"{note}<conversation>\nreference: yes\nuser: what\n"
        f"</conversation>\n\n<answer>\n{alone['answer']}\n</answer>",
    }
    # the judged rows are answers that another judge reads
    with stub_server(grade) as (address, others):
        again, _ = run_judge(address, tmp_path / "out/grades.jsonl", tmp_path / "b", scale="1-10")
    assert {body["messages"][0]["content"] for _, _, body in others} == prompts
    scores = next(iter(again["models"].values()))["scores"]
    assert scores["grade.turn.2"]["value"] == 9 and scores["grade.category.stem"]["value"] == 7.5


def test_two_conversations_are_compared_in_both_orders(tmp_path):
    question = parse_chat_question({**TWO, "reference": ["x", "y"]})
    first, second = items = make_items(conversation_items(question, [("a1", "a2"), ("b1", "b2")]))
    assert first.prompt_b is None and first.cluster == second.cluster and first.id != second.id
    start = [{"role": "user", "content": "please what is stone"}]
    assert [m["role"] for m in second.conversation] == ["reference", "user"]
    prompts = []

    class Judge(StubJudge):
        def reply(self, texts, grades):
            prompts.extend(texts)
            return super().reply(texts, grades)

    graded = grade_items(items, PAIR, Judge(lambda a, b: "A" if a < b else "B"), tmp_path)
    assert [g.grade for g in graded] == ["A", "A"]
    blocks = [
        "<conversation>\nreference: y\nuser: please what is stone\n</conversation>",
        *(
            f"<conversation_{a}>\nassistant: {x}1\nuser: now the tree\n</conversation_{a}>\n\n"
            f"<answer_{a}>\n{x}2\n</answer_{a}>"
            for a, x in (("a", "b"), ("b", "a"))
        ),
    ]
    assert prompts[3].endswith("conversation_a and conversation_b.\n\n" + "\n\n".join(blocks))
    assert "conversation_a" not in prompts[0]
    # a row of grades.jsonl is the item
    write(tmp_path / "g.jsonl", *(g.as_row() for g in graded))
    assert read_items([str(tmp_path / "g.jsonl")], cache=tmp_path) == items
    # equal answers before: one conversation
    same = conversation_items(question, [("a1", "a2"), ("a1", "b2")])[1]
    assert same.prompt_b is None and len(same.conversation) == 4
    assert same.messages[:1] == start


def test_a_row_of_grades_is_an_answer_for_another_judge(tmp_path):
    """Also after an empty answer, and with a turn but no question."""
    question = parse_chat_question(TWO)
    items = make_items(conversation_items(question, [("", "a2"), (" ", "")]))
    user, other = QUESTION, [*QUESTION, {"role": "assistant", "content": ""}, *QUESTION]
    items += make_items([
        JudgeItem("", other, ("a", "b"), turn=2),
        JudgeItem("", user, ("a", "b"), prompt_b=other, question_id="7"),
    ])  # fmt: skip
    path = write(tmp_path / "g.jsonl", *(item.as_row() for item in items))
    assert read_items([str(path)], cache=tmp_path) == items
    write(path, {**items[-1].as_row(), "question_id": 7})  # FastChat's are numbers
    assert read_items([str(path)], cache=tmp_path) == items[-1:]
    write(path, {**items[0].as_row(), "prompt": [{"role": "user", "content": ""}]})
    with pytest.raises(InputError, match="expected text from the user, got an empty message"):
        read_items([str(path)], cache=tmp_path)


def test_both_orders_say_that_an_answer_has_its_own_turns():
    longer = [*QUESTION, {"role": "assistant", "content": "x"}, *QUESTION]
    item = JudgeItem("", QUESTION, ("a", "b"), prompt_b=longer)
    answers = item.answer_messages
    for order in (answers, answers[::-1]):
        assert SEPARATE_TURNS in PAIR.prompt(item.conversation, order)


def test_a_rater_reads_the_conversation(model, tmp_path):
    data = write(tmp_path / "q.jsonl", {**TWO, "reference": ["a mineral", "a plant"]})
    other = tmp_path / "other"
    network, tokenizer = tiny_model(seed=5, context=2048)
    network.save_pretrained(other)
    tokenizer.save(other)
    arguments = ["judge", "--judge-model", "m", "-m", model, "--data", data, "--temperature", 0]
    arguments += ["--max-new-tokens", 4, "--judge"]
    with stub_server(chat_reply('{"reason": "", "grade": 10}')) as (address, _):
        call(*arguments, address, "--scale", "1-10", "-o", tmp_path / "one")
    with stub_server(chat_reply('{"reason": "", "grade": "A"}')) as (address, _):
        call(*arguments, address, "--old", other, "-o", tmp_path / "two")
    for name, labels in (("one", "10\n1\n"), ("two", "1\n=\n")):
        rows = read_rows(tmp_path / name / "grades.jsonl")
        path = tmp_path / f"{name}.jsonl"
        text = call("label", tmp_path / name, path, "-r", "Ann", input=labels).stdout
        screen = " ".join(line.strip("│ ") for line in text.splitlines())
        second = next(row for row in rows if row["turn"] == 2)
        assert len(read_rows(path)) == 2 and "now the tree" in screen and "a plant" in screen
        earlier = [second["prompt"][1]["content"]]
        if name == "two":
            earlier.append(second["prompt_b"][1]["content"])
            assert earlier[0] != earlier[1]
        for content in earlier:
            assert " ".join(content.split()) in " ".join(screen.split())


def test_conversations_that_are_refused(model, tmp_path):
    judge = ["judge", "--judge", model]
    data = write(tmp_path / "q.jsonl", {"turns": ["a", " "]})
    refused(*judge, "-m", model, "--data", data, text="line 1: turns: expected the user's messages")
    row = {"prompt": "a", "answer": "b"}
    for fields, text in (
        ({"prompt_b": "a"}, 'expected "answer_b" with "prompt_b", got none'),
        ({"prompt_b": "z", "answer_b": "c"}, "prompt_b: expected the first message of the prompt"),
        ({"turn": 0}, "turn: expected 1 or more, got 0"),
        ({"turn": "2"}, "turn: expected 1 or more, got '2'"),
        ({"reference": ["x", "y"]}, "reference: expected one, got 2"),
        ({"question_id": [1]}, "question_id: expected text or a whole number, got [1]"),
        ({"question_id": True}, "question_id: expected text or a whole number, got True"),
    ):
        answers = write(tmp_path / "a.jsonl", {**row, **fields})
        refused(*judge, "--answers", answers, text=text)


def test_a_larger_limit_keeps_labels_answers_and_replies(model, tmp_path, monkeypatch):
    """The answers of a smaller limit are the first ones of a larger limit, also with several
    answers and turns, so that the labels of their random sample stay one. Neither the model nor
    the judge is asked again."""
    prompts = [{"turns": [f"what is {i}", "now"][: 1 + i % 2]} for i in range(12)]
    data = write(tmp_path / "p.jsonl", *prompts)
    ids, sizes, generate = [], [], Engine.generate

    def counted(self, requests, **options):
        sizes.append(len(requests))
        return generate(self, requests, **options)

    monkeypatch.setattr(Engine, "generate", counted)
    with stub_server(GOOD) as (address, requests):
        for limit in (6, 9, 6):
            stage = JudgeAnswers(
                judge_model="m", data=(str(data),), limit=limit, max_new_tokens=2, num_generations=2
            )
            stage(tmp_path / "out", model=model, judge=address)
            rows = read_rows(tmp_path / "out/grades.jsonl")
            ids.append([row["id"] for row in rows])
            write(data, *prompts[::-1])  # the order of the rows has no effect
            if limit == 9:
                first = [row["prompt"][0]["content"] for row in rows]
    few, more, same = ids
    assert few == same and 12 <= len(few) < len(more) and more[: len(few)] == few
    assert sum(sizes) == len(more)
    contents = [body["messages"][0]["content"] for _, _, body in requests]
    assert len(few) / 2 <= len(contents) == len({*contents}) <= len(more)
    labels = dict.fromkeys(few[:10], "pass")
    assert random_labels(few, labels) == random_labels(more, labels) == labels
    assert list(dict.fromkeys(first)) != sorted(set(first), key=lambda text: int(text.split()[-1]))


def test_the_rubric_of_a_file_is_what_the_judge_reads(tmp_path):
    (tmp_path / "r.txt").write_text("Count the stones.\n")
    rubric = Rubric.read("pass", str(tmp_path / "r.txt"), 4)
    prompt = rubric.prompt(QUESTION, assistant("two"))
    assert prompt.startswith("Count the stones.\n\nReply with one line of JSON")
    assert 'one of "pass", "fail".' in prompt
    assert "<conversation>\nuser: please now what is stone\n</conversation>" in prompt
    assert prompt.endswith("<answer>\ntwo\n</answer>")
    source = JudgeSource("http://127.0.0.1:1/v1", "m", 4, 1, 0)
    assert source.id == {"address": "http://127.0.0.1:1/v1", "model": "m"}
