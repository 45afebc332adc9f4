"""`fastlm judge` and `fastlm label`: a model or a server grades answers, people label some."""

import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serve_app import script, serve_model, tiny_model
from test_cli import call, refused

from fastlm.errors import InputError
from fastlm.evals.judge import api_judge, grading
from fastlm.evals.judge.api_judge import KEY_VARIABLE, ApiJudge
from fastlm.evals.judge.grading import JudgeSource, grade_items
from fastlm.evals.judge.items import make_items
from fastlm.evals.judge.model_judge import ModelJudge
from fastlm.evals.judge.rubric import GRADES, Rubric
from fastlm.evals.judge.stage import JudgeAnswers
from fastlm.feedback.gate_metrics import read_scores, scores_of
from fastlm.pipeline.report import render_report  # noqa: F401  # the page of a folder
from fastlm.stages import KINDS, parse_recipe

QUESTION = [{"role": "user", "content": "please now what is stone"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "model"
    model, tokenizer = tiny_model(context=2048)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer_rows(count, pairs=False):
    other = {"answer_b": "now"} if pairs else {}
    return [{"prompt": f"what is {i}", "answer": f"stone {i}", **other} for i in range(count)]


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- a model as a judge


@pytest.mark.parametrize("chat", [True, False])
def test_a_model_gives_a_readable_grade_whatever_it_writes(model, chat):
    judge = ModelJudge(model, 12)
    if not chat:
        judge.tokenizer.chat_template = None
    answers = ["stone", "", 'a "quote" \\ and a\nline', "<answer> é 漢"]
    for scale, grades in GRADES.items():
        rubric = Rubric.read(scale, None, 4)
        prompts = [rubric.prompt(QUESTION, (a, "b")[: 1 + (scale == "pair")]) for a in answers]
        replies = judge.reply(prompts, grades)
        assert all(reply["grade"] in grades for reply in replies)
        assert all(0 < reply["probability"] <= 1 for reply in replies)
        assert replies == judge.reply(prompts, grades)
        (alone,) = judge.reply(prompts[:1], grades)
        assert alone["grade"] == replies[0]["grade"]
    assert any(reply["reason"] for reply in replies)
    stats = judge.engine.stats()
    assert stats.cached_tokens > 0.5 * (stats.cached_tokens + stats.prompt_tokens)


def test_the_probability_is_the_models_among_the_grades(model):
    """With one-token grades it is the softmax of the model's logits over them."""
    import torch

    judge = ModelJudge(model, 4)
    prompt = Rubric.read("1-5", None, 4).prompt(QUESTION, ("stone",))
    (reply,) = judge.reply([prompt], (1, 2, 3, 4, 5))
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
    result = JudgeAnswers(judge=str(model), answers=(str(answers),), max_reason_tokens=4)(
        tmp_path / "out", on_event=lambda event: warnings.append(event)
    )
    assert (result["items"], result["ungraded"]) == (4, 1)
    assert {"warning": "without a readable grade: 1 of 4 (grades.jsonl)"} in warnings
    last = read_rows(tmp_path / "out/grades.jsonl")[-1]
    assert last["grade"] is None and "tokens, the judge reads" in last["error"]
    write(answers, rows[-1])
    with pytest.raises(InputError, match="judge: expected a readable grade, got none: the prompt"):
        JudgeAnswers(judge=str(model), answers=(str(answers),))(tmp_path / "other")


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
    stage = JudgeAnswers(judge=str(model), answers=(answers,), max_reason_tokens=4)
    expected = stage(tmp_path / "undisturbed")
    sizes, reply = [], ModelJudge.reply

    def interrupted(self, prompts, grades):
        sizes.append(len(prompts))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return reply(self, prompts, grades)

    monkeypatch.setattr(ModelJudge, "reply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "out")
    assert stage(tmp_path / "out") == expected and sizes == [4, 4, 4, 3]
    for name in ("grades.jsonl", "scores.json"):
        assert (tmp_path / "out" / name).read_bytes() == (
            tmp_path / "undisturbed" / name
        ).read_bytes()


# ---- positions


class StubJudge:
    """Grades by a function of the texts of both answers."""

    def __init__(self, prefer):
        self.prefer, self.id = prefer, {"model": "stub"}

    def reply(self, prompts, grades):
        replies = []
        for prompt in prompts:
            a = prompt.split("<answer_a>\n")[1].split("\n</answer_a>")[0]
            b = prompt.split("<answer_b>\n")[1].split("\n</answer_b>")[0]
            replies.append({"grade": self.prefer(a, b), "reason": f"{a}/{b}", "probability": None})
        return replies


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
    items = make_items([(QUESTION, ("the long answer", "short")), (QUESTION, ("longest", "s"))])
    rubric = Rubric.read("pair", None, 4)
    graded = grade_items(items, rubric, StubJudge(prefer), tmp_path / "r.jsonl", {})
    assert [g.grade for g in graded] == [grade] * 2
    assert [g.is_consistent for g in graded] == [consistent] * 2
    reasons = [reply["reason"] for reply in graded[0].as_row()["replies"]]
    assert reasons == ["the long answer/short", "short/the long answer"]


# ---- a server as a judge


@contextlib.contextmanager
def stub_server(*replies):
    """Serve these replies, the last one again and again: (status, body, headers). Yield the address
    and the list of requests: (path, headers, body)."""
    requests, remaining, lock = [], list(replies), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.handle_request(None)

        def do_POST(self):
            self.handle_request(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def handle_request(self, body):
            with lock:
                requests.append((self.path, self.headers, body))
                reply = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            status, data, *headers = reply(body) if callable(reply) else reply
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chat_reply(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


GOOD = chat_reply('{"reason": "it is right", "grade": "pass"}')
MODELS = (200, {"data": [{"id": "big"}, {"id": "small"}]})


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(api_judge, "WAIT", 0.01)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def test_a_server_judges(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    answers = write(tmp_path / "a.jsonl", *answer_rows(5))

    def grade(body):
        if body is None:
            return MODELS
        right = "stone 3" in body["messages"][0]["content"]
        return chat_reply(json.dumps({"reason": "so", "grade": 5 if right else 2}))

    with stub_server(grade) as (address, requests):
        out = tmp_path / "out"
        arguments = ["judge", "--judge", address, "--answers", answers, "--scale", "1-5"]
        arguments += ["--min-labels", 1, "-o", out]
        output = call(*arguments).stdout
        path, headers, body = requests[1]
        assert requests[0][0] == "/v1/models" and path == "/v1/chat/completions"
        assert headers["authorization"] == "Bearer secret" and body["model"] == "big"
        schema = body["response_format"]["json_schema"]["schema"]
        assert schema["properties"]["grade"] == {"type": "integer", "enum": [1, 2, 3, 4, 5]}
        assert body["temperature"] == 0 and len(requests) == 6
        rows = read_rows(out / "grades.jsonl")
        assert [row["grade"] for row in rows] == [2, 2, 2, 5, 2]
        assert [row["reason"] for row in rows] == ["so"] * 5
        assert "The judge's error is not known" in output
        assert not any("secret" in path.read_text() for path in out.rglob("*") if path.is_file())
        # the labels of a person agree on all but one
        ids = [row["id"] for row in rows]
        labels = [
            {"id": id, "rater": "Ann", "label": label} for id, label in zip(ids, (2, 1, 4, 5, 3))
        ]
        label_file = write(tmp_path / "labels.jsonl", *labels)
        output = call(*arguments, "--labels", label_file).stdout
        assert len(requests) == 7  # the list of models again
        score = json.loads((out / "scores.json").read_text())["models"][str(answers)]["scores"]
    judge = score["pass"]["judge"]
    assert (judge["sensitivity"], judge["specificity"]) == ([1, 2], [3, 3])
    assert score["pass"]["corrected"] and score["pass"]["raw"] == pytest.approx(0.2)
    assert score["pass"]["value"] == pytest.approx(0.4)  # (0.2 + 1 - 1) / (1/2 + 1 - 1)
    assert score["grade"]["value"] == pytest.approx(2.6)
    assert "1/2" in output and "3/3" in output and "4/5" in output and "20.0 % before" in output


@pytest.mark.parametrize(
    "reply",
    [
        chat_reply("It is right."), chat_reply('{"grade": "good", "reason": ""}'),
        chat_reply('{"grade": 4, "reason": ""}'), chat_reply('{"grade": "pass"}'),
        chat_reply(None), (200, {"choices": []}), (200, b"<html>"), (200, b""), (503, b"busy"),
        (429, {"error": {"message": "slow down"}}), (200, b" " * (2**20 + 1)),
    ],
)  # fmt: skip
def test_a_bad_reply_is_asked_for_again(reply):
    with stub_server(reply, reply, GOOD) as (address, requests):
        judge = ApiJudge(address, "m", 5, 2)
        assert judge.reply(["a prompt"], ("pass", "fail")) == [
            {"grade": "pass", "reason": "it is right", "probability": None}
        ]
    assert len(requests) == 3 and requests[0][1]["authorization"] is None


def test_replies_that_stay_unreadable_have_no_grade():
    with stub_server(chat_reply('```json\n{"reason": "r", "grade": "fail"}\n```')) as (address, _):
        assert ApiJudge(address, "m", 5, 0).reply(["x"], ("pass", "fail"))[0]["grade"] == "fail"
    with stub_server(chat_reply("no")) as (address, requests):
        (reply,) = ApiJudge(address, "m", 5, 1).reply(["x"], ("pass", "fail"))
    assert reply["grade"] is None and reply["error"].startswith("reply:1: expected JSON")
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ((401, {"error": {"message": "no\nkey"}}), "refused: status 401, no key"),
        ((400, b"?"), "refused: status 400"),
        ((503, b""), "refused: status 503"),
        ((307, b"", ("location", "http://127.0.0.1:1/v1")), "refused: status 307"),
        ((302, b"", ("location", "http://127.0.0.1:1/v1")), "refused: status 302"),
        (lambda body: (time.sleep(1.5), GOOD)[1], "expected a server at"),
    ],
)
def test_a_server_that_fails_is_one_line(tmp_path, reply, text):
    answers = write(tmp_path / "a.jsonl", *answer_rows(2))
    with stub_server(reply) as (address, requests):
        refused(
            "judge", "--judge", address, "--judge-model", "m", "--answers", answers,
            "--retries", 1, "--timeout", 0.3, text=text,
        )  # fmt: skip
        retried = text[-3:] == "503" or "expected a server" in text
        assert len(requests) >= (3 if retried else 1)


def test_a_server_that_is_not_there(tmp_path):
    answers = write(tmp_path / "a.jsonl", *answer_rows(2))
    for address in ("http://127.0.0.1:1/v1", "http://nowhere.invalid/v1"):
        refused(
            "judge", "--judge", address, "--answers", answers, "--retries", 0,
            text=f"judge: expected a server at {address}, got: ",
        )  # fmt: skip
    for address in ("http://", "http://[/v1", "https:///v1"):
        refused(
            "judge", "--judge", address, "--answers", answers, text="judge: expected http://HOST"
        )


def test_fastlms_own_server_judges():
    rubric = Rubric.read("pair", None, 4)
    prompts = [rubric.prompt([{"role": "user", "content": "1 + 1?"}], ("2", "3"))] * 3
    model, tokenizer = tiny_model(context=4096)
    with serve_model(model, tokenizer) as (url, server):
        judge = ApiJudge(f"{url}/v1", None, 60, 0)
        assert judge.model == "tiny"
        script(server, '{"reason": "2 is right", "grade": "A"}')
        replies = judge.reply(prompts, rubric.grades)
    assert replies == [{"grade": "A", "reason": "2 is right", "probability": None}] * 3
    with serve_model(model, tokenizer) as (url, _):  # the server accepts the schema itself
        (reply,) = ApiJudge(f"{url}/v1", "tiny", 60, 0).reply(prompts[:1], rubric.grades)
    # a random model may write a reason up to the limit of tokens
    assert reply["grade"] in rubric.grades or reply["error"].startswith("reply:1: expected JSON")


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
    assert "pass is not corrected: expected 50 random labels with both verdicts, got" in output
    call(*again, "--labels", labels, "--min-labels", 10)
    scores = read_scores(out / "scores.json")
    score = scores_of("judge", scores)["judge.pass"]
    assert score["judge"]["agreement"][1] == 10
    verdicts = {row["id"]: row["grade"] for row in read_rows(out / "grades.jsonl")}
    people = {row["id"]: row["label"] for row in read_rows(labels)}
    from fastlm.evals.judge.labels import random_order

    sample = random_order(verdicts)[:10]
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
    shown = call("label", tmp_path / "out", labels, "-r", "Ann", "--count", 12, input="1\n" * 12)
    places = [line.strip("│ ") for line in shown.stdout.splitlines() if line.startswith("│")]
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
    write(labels, {"id": "1", "rater": "Ann", "label": 4})
    refused(*again, "--labels", labels, text=":1: label: expected one of pass, fail, got 4")
    answers = write(tmp_path / "a2.jsonl", *answer_rows(2))
    judge = ["judge", "--judge", model]
    for arguments, text in (
        ([], "answers: expected answers or a model that answers, got neither"),
        (["--answers", answers, "-m", model], "got both"),
        (["--answers", answers, "--old", model], "old: expected a model to compare it with"),
        (["-m", model], "data: expected prompts for the model, got none"),
        (["--answers", answers, "--data", answers], "data: expected none"),
        (["--answers", answers, "--scale", "1-10"], "scale: expected one of pass, 1-5"),
        (["--answers", answers, "--threshold", 1], "threshold: expected 2 to 5, got 1"),
        (["--answers", answers, "--rubric", tmp_path / "none"], "expected a readable text file"),
        (["--answers", answers, "--labels", tmp_path / "none"], "labels: expected a file"),
        (["--answers", answers, "--judge-model", "m"], "judge_model: expected a server as judge"),
        (["--answers", answers, "--timeout", 0], "timeout: expected a positive number"),
        (["--answers", answers, "--confidence", 1], "confidence: expected between 0 and 1"),
    ):
        refused(*judge, *arguments, text=text)
    refused("judge", "--judge", "nowhere", "--answers", answers, text="found nothing at 'nowhere'")
    (tmp_path / "empty").write_text(" \n")
    refused(*judge, "--answers", answers, "--rubric", tmp_path / "empty", text="got an empty file")


def test_a_recipe_judges(tmp_path):
    recipe = parse_recipe(
        {"name": "x", "stage": [{"kind": "judge", "judge": "model:smollm2", "answers": ["a.jsonl"],
                                 "from": []}]}
    )  # fmt: skip
    assert isinstance(recipe.steps[0].stage, JudgeAnswers) and KINDS["judge"] is JudgeAnswers


def test_the_rubric_of_a_file_is_what_the_judge_reads(tmp_path):
    (tmp_path / "r.txt").write_text("Count the stones.\n")
    rubric = Rubric.read("pass", str(tmp_path / "r.txt"), 4)
    prompt = rubric.prompt(QUESTION, ("two",))
    assert prompt.startswith("Count the stones.\n\nReply with one line of JSON")
    assert 'one of "pass", "fail".' in prompt
    assert "<conversation>\nuser: please now what is stone\n</conversation>" in prompt
    assert prompt.endswith("<answer>\ntwo\n</answer>")
    source = JudgeSource("http://127.0.0.1:1/v1", "m", 4, 1, 0)
    assert source.id == {"address": "http://127.0.0.1:1/v1", "model": "m"}
