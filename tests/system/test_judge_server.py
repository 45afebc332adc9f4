"""`fastlm judge --judge http://...`: a server grades answers."""

import json
import re
import time
from itertools import count

import pytest
from judge_server import (
    GOOD,
    MODELS,
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
from serve_app import script, serve_model, tiny_model
from test_cli import call, refused

from fastlm.errors import InputError
from fastlm.evals.judge import api_judge
from fastlm.evals.judge.api_judge import KEY_VARIABLE, ApiJudge
from fastlm.evals.judge.rubric import Rubric

LATE = b'{"error": {"message": "too late to be read"}}'


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
        rows = sorted(read_rows(out / "grades.jsonl"), key=lambda row: row["answer"])
        assert [row["grade"] for row in rows] == [2, 2, 2, 5, 2]
        assert [row["reason"] for row in rows] == ["so"] * 5
        assert "The judge's error is not known" in output
        assert not any("secret" in path.read_text() for path in out.rglob("*") if path.is_file())
        # the labels of a person agree on all but one
        ids = [row["id"] for row in rows]
        labels = [
            {"id": id, "rater": "Ann", "label": label, "rubric": Rubric.read("1-5", None, 4).key}
            for id, label in zip(ids, (2, 1, 4, 5, 3))
        ]
        label_file = write(tmp_path / "labels.jsonl", *labels)
        output = call(*arguments, "--labels", label_file).stdout
        assert len(requests) == 6
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
        assert ask_judge(judge, ["a prompt"], ("pass", "fail")) == [
            {"grade": "pass", "reason": "it is right", "probability": None}
        ]
    assert len(requests) == 3 and requests[0][1]["authorization"] is None


def test_replies_that_stay_unreadable_have_no_grade():
    with stub_server(chat_reply('```json\n{"reason": "r", "grade": "fail"}\n```')) as (address, _):
        (reply,) = ask_judge(ApiJudge(address, "m", 5, 0), ["x"], ("pass", "fail"))
        assert reply["grade"] == "fail"
    with stub_server(chat_reply("no")) as (address, requests):
        (reply,) = ask_judge(ApiJudge(address, "m", 5, 1), ["x"], ("pass", "fail"))
    assert reply["grade"] is None and reply["error"].startswith("reply:1: expected JSON")
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ((401, {"error": {"message": "no\nkey"}}), "refused: status 401, no key"),
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
        # both answers are asked about at once; the second may stop before its first or second try
        assert 2 <= len(requests) <= 4 if retried else 1 <= len(requests) <= 2


def numbered(answer):
    """Return a server's reply to each request, by the number of the answer."""

    def reply(body):
        return answer(int(body["messages"][0]["content"].split("<answer>\nstone ")[1].split()[0]))

    return reply


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_an_answer_without_a_grade(tmp_path, status):
    """It is asked for again later, alone; then a failure of the server is only a warning."""
    answers = write(tmp_path / "a.jsonl", *answer_rows(5))
    refusal = (status, {"error": {"message": "too long\x1b[2J"}})
    out = tmp_path / "out"
    with stub_server(numbered(lambda i: refusal if i == 2 else GOOD)) as (address, requests):
        result, warnings = run_judge(address, answers, out, retries=3)
        assert len(requests) == 5 and result["ungraded"] == 1
        assert warnings == ["without a readable grade: 1 of 5 (grades.jsonl)"]
        (row,) = (r for r in read_rows(out / "grades.jsonl") if r["answer"] == "stone 2")
        assert row["error"] == f"{address} refused: status {status}, too long\ufffd[2J"
        run_judge(address, answers, out)
        assert len(requests) == 6 and "stone 2" in requests[5][2]["messages"][0]["content"]
        port = int(address.rsplit(":")[-1].removesuffix("/v1"))
    result, warnings = run_judge(address, answers, out)  # the server is down
    assert result["ungraded"] == 1 and warnings[0].startswith(
        "asked again for missing grades: judge: "
    )
    with stub_server(GOOD, port=port) as (address, requests):
        result, warnings = run_judge(address, answers, out)
        assert (len(requests), result["ungraded"], warnings) == (1, 0, [])


def test_a_server_that_refuses_everything_is_an_error(tmp_path):
    answers = write(tmp_path / "a.jsonl", *answer_rows(2))
    with stub_server((400, b"?")) as (address, _):
        with pytest.raises(InputError, match=r"got none: http.* refused: status 400$"):
            run_judge(address, answers, tmp_path / "out")


def test_replies_before_a_failure_are_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(api_judge, "REQUESTS", 1)
    answers = write(tmp_path / "a.jsonl", *answer_rows(6))
    numbers = count()

    def reply(body):
        if (i := next(numbers)) > 3:
            time.sleep(0.3)  # the failure is known before the next request
        return (401, b"") if i == 3 else GOOD

    with stub_server(reply) as (address, requests):
        with pytest.raises(InputError, match="refused: status 401"):
            run_judge(address, answers, tmp_path / "out")
        first = len(requests)
        assert 4 <= first <= 5  # the next one may begin before the failure is known
        port = int(address.rsplit(":")[-1].removesuffix("/v1"))
    with stub_server(GOOD, port=port) as (address, requests):
        run_judge(address, answers, tmp_path / "out")
        assert first + len(requests) == 7 and len(requests) > 1


def test_a_failure_stops_the_other_requests(monkeypatch):
    monkeypatch.setattr(api_judge, "WAIT", 5)
    status = {0: 401}

    def reply(i):
        if i == 0:
            time.sleep(0.3)  # the others wait for their second attempt
        return status.get(i, 503), b""

    with stub_server(numbered(reply)) as (address, requests):
        prompts = [f"<answer>\nstone {i}\n" for i in range(12)]
        start = time.perf_counter()
        with pytest.raises(InputError, match="401"):
            ask_judge(ApiJudge(address, "m", 5, 3), prompts, ("pass", "fail"))
    assert time.perf_counter() - start < 4 and len(requests) <= api_judge.REQUESTS + 1


@pytest.mark.parametrize("key", ["hidden\nkey", "hidden\u20ac", "hid\x00den", "hidd\u00e9n"])
def test_a_bad_key_is_not_printed(tmp_path, monkeypatch, key):
    answers = write(tmp_path / "a.jsonl", *answer_rows(1))
    if "\0" in key:
        monkeypatch.setattr(api_judge.os, "environ", {**api_judge.os.environ, KEY_VARIABLE: key})
    else:
        monkeypatch.setenv(KEY_VARIABLE, key)
    arguments = ("http://127.0.0.1:1/v1", answers, tmp_path / "out")
    with pytest.raises(InputError, match=f"^{KEY_VARIABLE}: expected printable ASCII") as error:
        run_judge(*arguments)
    assert "hid" not in str(error.value)


def test_the_key_is_not_in_what_a_server_says(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, " secret-1\n")
    with stub_server((401, {"error": {"message": "no secret-1 here"}})) as (address, requests):
        with pytest.raises(InputError, match=r"status 401, no \.\.\. here"):
            ApiJudge(address, None, 5, 0)
    assert requests[0][1]["authorization"] == "Bearer secret-1"


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"error": "no"}', b" " * 2**20 + LATE, b"\xff"])
def test_any_body_of_an_error_is_read(body):
    with stub_server((401, body)) as (address, _):
        with pytest.raises(InputError, match=r"refused: status 401$"):
            ApiJudge(address, None, 5, 0)


def test_proxies_are_not_used(monkeypatch):
    """A proxy would read prompts and key. Without one the name of the host is looked up."""
    with stub_server(MODELS) as (proxy, requests):
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(InputError, match="expected a server at"):
            ApiJudge("http://nowhere.invalid/v1", None, 5, 0)
    assert requests == []


@pytest.mark.parametrize(
    ("address", "exposed"),
    [
        ("http://127.0.0.1:1/v1", False), ("http://localhost/v1", False),
        ("http://192.168.1.4:8000/v1", False), ("http://[::1]/v1", False),
        ("https://judge.example/v1", False), ("http://judge.example/v1", True),
        ("http://8.8.8.8/v1", True),
    ],
)  # fmt: skip
def test_a_key_without_encryption_is_known(tmp_path, monkeypatch, address, exposed):
    assert not ApiJudge(address, "m", 5, 0).exposes_key
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert ApiJudge(address, "m", 5, 0).exposes_key == exposed


def test_a_warning_says_that_the_key_is_exposed(tmp_path, monkeypatch):
    answers = write(tmp_path / "a.jsonl", *answer_rows(1))
    monkeypatch.setattr(api_judge, "_is_private", lambda host: False)
    with stub_server(GOOD) as (address, _):
        assert run_judge(address, answers, tmp_path / "out")[1] == []
        monkeypatch.setenv(KEY_VARIABLE, "secret")
        warnings = run_judge(address, answers, tmp_path / "out")[1]
    assert warnings == [f"the key is sent to {address} without encryption: use https"]


def test_a_later_run_needs_no_server(tmp_path):
    answers = write(tmp_path / "a.jsonl", *answer_rows(3))
    with stub_server(lambda body: MODELS if body is None else GOOD) as (address, _):
        first, _ = run_judge(address, answers, tmp_path / "out", judge_model=None)
    again, _ = run_judge(address, answers, tmp_path / "out", judge_model=None, confidence=0.9)
    assert again["judge"] == first["judge"] == {"address": address, "model": "big"}


def test_the_limit_is_that_of_answers(tmp_path):
    answers = write(tmp_path / "a.jsonl", *answer_rows(12))
    with stub_server(GOOD) as (address, requests):
        assert run_judge(address, answers, tmp_path / "few", limit=5)[0]["items"] == 5
        assert len(requests) == 5
        run_judge(address, answers, tmp_path / "more", limit=8)
    few, more = (
        {row["id"] for row in read_rows(tmp_path / name / "grades.jsonl")}
        for name in ("few", "more")
    )
    assert few < more and len(more) == 8


def test_one_prompt_on_the_scale_1_to_5(tmp_path):
    answers = write(tmp_path / "a.jsonl", *answer_rows(1))
    with stub_server(chat_reply('{"reason": "", "grade": 4}')) as (address, _):
        output = call(
            "judge", "--judge", address, "--judge-model", "m", "--answers", answers,
            "--scale", "1-5", "-o", tmp_path / "out",
        ).stdout  # fmt: skip
    assert "not known" in output and "4.00" in output


def test_the_judge_reads_tools_and_their_calls(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call_ = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *QUESTION, {"role": "assistant", "content": "", "tool_calls": [call_]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]  # fmt: skip
    row = {"messages": messages, "answer": "it is rain", "tools": tools}
    other = {**row, "tools": [{**tools[0], "function": {"name": "clock", "parameters": {}}}]}
    answers = write(tmp_path / "a.jsonl", row, other)
    with stub_server(GOOD) as (address, requests):
        run_judge(address, answers, tmp_path / "out")
    prompts = sorted(body["messages"][0]["content"] for _, _, body in requests)
    assert "tools: [" in prompts[0] and '"clock"' in prompts[0] and '"weather"' in prompts[1]
    assert all('"arguments"' in prompt and "tool: rain" in prompt for prompt in prompts)
    screen = call(
        "label", tmp_path / "out", tmp_path / "l.jsonl", "-r", "Ann", input="p\np\n"
    ).stdout
    assert "clock" in screen and screen.count("arguments") == 2


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


def test_fastlms_own_server_judges(monkeypatch):
    rubric = Rubric.read("pair", None, 4)
    prompts = [rubric.prompt([{"role": "user", "content": "1 + 1?"}], assistant("2", "3"))] * 3
    model, tokenizer = tiny_model(context=4096)
    with serve_model(model, tokenizer) as (url, server):
        judge = ApiJudge(f"{url}/v1", None, 60, 0)
        assert judge.model == "tiny"
        script(server, '{"reason": "2 is right", "grade": "A"}')
        replies = ask_judge(judge, prompts, rubric.grades)
    assert replies == [{"grade": "A", "reason": "2 is right", "probability": None}] * 3
    texts, parse = [], api_judge.parse

    def first_reply(data, schema, location):
        reply = parse(data, schema, location)
        if schema is api_judge.ChatReply:
            texts.append(reply["choices"][0]["message"]["content"])
        return reply

    monkeypatch.setattr(api_judge, "parse", first_reply)
    with serve_model(model, tokenizer) as (url, _):  # the server follows the schema itself
        (reply,) = ask_judge(ApiJudge(f"{url}/v1", "tiny", 60, 0), prompts[:1], rubric.grades)
    # a random model may write a reason up to the limit of tokens
    assert re.match(r'\{\s*"reason"\s*:\s*"', texts[0])
    assert reply["grade"] in rubric.grades or '"grade"' not in texts[0]
