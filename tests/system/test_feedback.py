"""Feedback: what is kept and what is not, without personal data, on SQLite and on PostgreSQL, and
rows to train on that the trainings' readers accept.
"""

import contextlib
import json
import shutil
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from serve_app import HTTP, ask, serve_model, tiny_model
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data.conversations import read_conversations
from fastlm.data.preferences import Comparison, UnpairedPreference, read_preferences
from fastlm.errors import InputError
from fastlm.feedback.build import BuildOptions, build
from fastlm.feedback.feedback_items import read_feedback_items
from fastlm.serve.canary.canary_store import CanaryStore
from fastlm.serve.feedback_store import Feedback, FeedbackStore, StoredResponse
from fastlm.serve.monitor.monitor import MonitorConfig
from fastlm.serve.monitor.window import read_feedback_rows
from fastlm.serve.ratings import Rating, read_ratings
from fastlm.serve.tables import MEASUREMENTS

PROMPT = [{"role": "user", "content": "Write to ann@mail.org or +44 20 7946 0958"}]
CLEAN = [{"role": "user", "content": "Write to <EMAIL_1> or <PHONE_1>"}]


def test_a_reader_that_keeps_the_text_in_the_log_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.serve.feedback_store.WAIT_SECONDS", 0.1)
    path = tmp_path / "feedback.sqlite"

    def left():
        return any(b"Nobody knows" in file.read_bytes() for file in tmp_path.iterdir())

    with FeedbackStore(path) as store:
        prompt = [{"role": "user", "content": "Nobody knows"}]
        store.add_response(
            StoredResponse("r1", "tiny", prompt, [[{"role": "assistant", "content": "Yes"}]])
        )
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("begin")
        reader.execute("select * from fastlm_responses").fetchall()
        with pytest.raises(InputError, match="another process reads: run the command again"):
            store.forget("r1")
        assert left()
        reader.execute("rollback")
        reader.close()
        assert store.forget("r1") == 0 and not left()


def filled(store):
    """Two answers to one prompt, one to another, and feedback about them."""
    texts = [[{"role": "assistant", "content": text}] for text in ("Better", "Worse")]
    store.add_response(StoredResponse("r1", "tiny", PROMPT, texts, conversation_id="talk"))
    other = [{"role": "user", "content": "What?"}]
    store.add_response(
        StoredResponse("r2", "tiny", other, [[{"role": "assistant", "content": "Wrong"}]])
    )
    for feedback in (
        Feedback("r1", choice=1, preferred_over=(("r1", 0),), rater="ann"),
        Feedback("r1", choice=0, preferred_over=(("r1", 1),), rater="ann"),  # the other, after all
        Feedback("r1", choice=0, thumb="down", rater="ann"),
        Feedback("r1", choice=0, thumb="up", rater="ann"),  # she changed her mind
        Feedback("r1", choice=1, thumb="down", rater="ann", comment="Mail bob@mail.org"),
        Feedback("r2", thumb="up"),
        Feedback("r2", corrected="Right, says\0 bob@mail.org"),
        Feedback("r3", thumb="up"),  # nobody consented to keep its text
        Feedback(None, "talk", thumb="up"),
        Feedback("r1", choice=0, preferred_over=(("r2", 0),)),  # another prompt
    ):
        store.add(feedback)
    return store


def build_database(database_url, out):
    """Every row of a database."""
    options = BuildOptions(judge=0.0, test=0.0, min_rater_weight=0.0, max_rater_share=1.0, rules=())
    return build([str(database_url)], out, options=options, cache=out)


def test_rows_to_train_on(database_url, tmp_path):
    with filled(FeedbackStore(database_url)) as store:
        responses = store.responses()
        assert responses["r1"].prompt == CLEAN and responses["r1"].conversation_id == "talk"
        assert store.all_feedback()[4].comment == "Mail <EMAIL_1>"
        assert store.counts()["responses"] == 2 and store.counts()["thumb"] == 6

        done = build_database(database_url, tmp_path)
        pairs = list(read_preferences([str(tmp_path / "train/preferences.jsonl")], cache=tmp_path))
        assert done.funnel.steps[0]["removed"] == {
            "a pick between answers to different prompts": 1,
            "about a conversation, not an answer": 1,
            "changed later by the same rater": 2,
        }
        assert done.funnel.steps[1]["removed"] == {"no consent to store the text": 1}
        assert all(isinstance(pair, Comparison) for pair in pairs)
        assert [[a[0]["content"] for a in pair.answers] for pair in pairs] == [
            ["Better", "Worse"],
            ["Right, says <EMAIL_1>", "Wrong"],
        ]
        assert pairs[0].prompt == CLEAN

        labels = list(read_preferences([str(tmp_path / "train/kto.jsonl")], cache=tmp_path))
        assert all(isinstance(label, UnpairedPreference) for label in labels)
        assert [(x.answer[0]["content"], x.desirable) for x in labels] == [
            ("Better", True), ("Worse", False), ("Right, says <EMAIL_1>", True), ("Wrong", False),
        ]  # fmt: skip

        talks = list(read_conversations([str(tmp_path / "train/sft.jsonl")], cache=tmp_path))
        assert [t.messages[-1]["content"] for t in talks] == ["Better", "Right, says <EMAIL_1>"]

        assert store.forget("talk") == 8 and store.forget("r1") == 0
        assert [o.response_id for o in store.all_feedback()] == ["r2", "r2", "r3"]
        store.forget("r2")
        with pytest.raises(InputError, match="got none; 1 no consent to store the text"):
            build_database(database_url, tmp_path / "none")


def test_what_was_forgotten_is_not_stored_again(database_url, monkeypatch):
    answer = StoredResponse(
        "r1", "tiny", PROMPT, [[{"role": "assistant", "content": "Yes"}]], None, "talk"
    )
    rows = (
        Feedback("r1", thumb="up"), Feedback("r1", "talk", comment="Mine"), Feedback(None, "talk"),
        Feedback("r9", "talk", thumb="down"),
    )  # fmt: skip
    with FeedbackStore(database_url) as store:
        store.add_response(answer)
        assert store.add(rows[0]) == 1
        assert store.forget("talk") == 2
        assert [store.add(feedback) for feedback in rows] == [None] * 4 and not store.add_response(
            answer
        )
        assert not store.all_feedback() and store.add(Feedback("r2", "other", thumb="up"))
        # forgotten by another process in the middle
        blocked, calls = store._is_forgotten, []

        def late(feedback):
            calls.append(feedback)
            if len(calls) == 2:
                with FeedbackStore(database_url) as other:
                    other.forget("r3")
            return blocked(feedback)

        monkeypatch.setattr(store, "_is_forgotten", late)
        assert store.add(Feedback("r3", thumb="up")) is None
        assert [feedback.response_id for feedback in store.all_feedback()] == ["r2"]


def test_a_conversation_takes_no_answer_of_another_along(database_url):
    """Feedback names the victim's answer and the attacker's conversation, who then withdraws."""
    choices = [[{"role": "assistant", "content": "Yes"}]]
    with FeedbackStore(database_url) as store:
        store.add_response(StoredResponse("victims", "tiny", PROMPT, choices, None, "theirs"))
        store.add_response(StoredResponse("alone", "tiny", PROMPT, choices))
        store.add_response(StoredResponse("mine", "tiny", PROMPT, choices, None, "talk"))
        for response in ("victims", "alone", "mine", "unknown"):
            store.add(Feedback(response, "talk", thumb="down"))
            store.add(Feedback(response, thumb="up"))
        assert store.stored_conversation("victims") == ("theirs",)
        assert store.stored_conversation("alone") == (None,)
        assert store.stored_conversation("unknown") is None
        # the attacker's four feedback rows; the answer of the conversation, and what is unknown
        assert store.forget("talk") == 4 + 2 + 1
        assert set(store.responses()) == {"victims", "alone"}
        assert [(o.response_id, o.thumb) for o in store.all_feedback()] == [
            ("victims", "up"), ("alone", "up"),
        ]  # fmt: skip
        assert store.add(Feedback("victims", thumb="up"))


def test_several_servers_write_at_once(database_url):
    with FeedbackStore(database_url) as first, FeedbackStore(database_url) as other:

        def write(i):
            (first, other)[i % 2].add(Feedback(f"r{i}", thumb="up"))
            (first, other)[i % 2].add_response(StoredResponse("same", "tiny", PROMPT, []))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(60)))
        assert sorted(o.response_id for o in first.all_feedback()) == sorted(
            f"r{i}" for i in range(60)
        )
        assert len(other.responses()) == 1


def test_several_servers_start_with_a_new_database(database_url):
    """Each sees that the tables are missing; one of them makes them."""
    together = threading.Barrier(4)

    def start(database):
        together.wait()
        with FeedbackStore(database) as store:
            CanaryStore(store)
            return store.add(Feedback("r", thumb="up"))

    files = [f"{database_url}-{i}" for i in range(9)] if "://" not in str(database_url) else []
    with ThreadPoolExecutor(4) as pool:
        for database in (database_url, *files):
            assert sorted(pool.map(start, [database] * 4)) == [1, 2, 3, 4]


def test_a_closed_database_is_one_file(tmp_path):
    """A copy of it has what was stored; also while another process has it open."""
    for name in ("alone", "other"):
        base = tmp_path / f"{name}.sqlite"
        with contextlib.ExitStack() as stack:
            if name == "other":
                other = stack.enter_context(FeedbackStore(base))
                assert not other.all_feedback()
            with FeedbackStore(base) as store:
                store.add(Feedback("r1", thumb="up"))
            copy = Path(shutil.copy(base, tmp_path / "copy.sqlite"))
            with FeedbackStore(copy) as store:
                assert [feedback.response_id for feedback in store.all_feedback()] == ["r1"]
    assert not (tmp_path / "alone.sqlite-wal").exists()


def test_a_database_that_cannot_be_used(tmp_path):
    (tmp_path / "text").write_text("no database" * 99)
    for database_url in (tmp_path / "text", tmp_path / "none" / "x", "postgresql://u:pw@127.0.0.1:1/x",
                  "nosuch://x", "://"):  # fmt: skip
        with pytest.raises(InputError) as raised:
            FeedbackStore(database_url)
        assert "pw" not in str(raised.value) and "\n" not in str(raised.value)


def test_feedback_is_stored_if_responses_cannot_be_read(tmp_path, monkeypatch):
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny_model(), feedback=store) as (url, _),
    ):

        def fails(*ids):
            raise InputError("the database is locked")

        monkeypatch.setattr(store, "has_text", fails)
        response = ask(url, {"response_id": "r1", "thumb": "up"}, "/v1/feedback")
        assert response.status_code == 200 and response.json()["text_stored"] is None
        (feedback,) = store.all_feedback()
        assert feedback.thumb == "up"


def test_over_http(database_url):
    model, tokenizer = tiny_model()
    with (
        FeedbackStore(database_url) as store,
        serve_model(model, tokenizer, feedback=store) as (url, server),
    ):
        talk = {"messages": [{"role": "user", "content": "I am ann@mail.org"}]}
        request = {"model": "tiny", **talk, "max_tokens": 6, "temperature": 0}
        first, second = (ask(url, request).json() for _ in range(2))
        assert first["id"] != second["id"] and not store.responses()

        def give(status=200, **fields):
            response = ask(url, fields, "/v1/feedback")
            assert response.status_code == status, response.text
            return response.json()

        result = give(response_id=first["id"], thumb="up", comment="I am ann@mail.org", rater="ann")
        assert (
            result["text_stored"] is False and store.all_feedback()[0].comment == "I am <EMAIL_1>"
        )
        assert not store.responses()  # still nobody consented
        content = first["choices"][0]["message"]["content"]
        consent = {"consent": True, **talk, "choices": [content]}
        late = give(response_id=first["id"], corrected="Better", conversation=consent)
        assert late["text_stored"] is True
        repeated = give(response_id=first["id"], thumb="up")  # the text is there from before
        assert (
            repeated["text_stored"] is True
            and give(response_id=second["id"], thumb="up")["text_stored"] is False
        )
        asked_to = ask(url, {**request, "store": True, "conversation_id": "talk"}).json()
        assert give(response_id=asked_to["id"], thumb="up")["text_stored"] is True
        assert give(conversation_id="talk", comment="Fine")["text_stored"] is True
        assert give(conversation_id="other", comment="Fine")["text_stored"] is False
        stored = store.responses()[first["id"]]
        assert (
            stored.prompt[0]["content"] == "I am <EMAIL_1>"
            and stored.choices[0][0]["content"] == content
        )
        over = [{"response_id": second["id"]}, {"choice": 1}]
        give(response_id=first["id"], preferred_over=over)
        assert store.all_feedback()[-1].preferred_over == ((second["id"], 0), (first["id"], 1))
        give(conversation_id="talk", thumb="down")

        def refused(param, **fields):
            assert give(400, **fields)["error"]["param"] == param

        refused("response_id", thumb="up")
        refused("response_id", conversation_id="talk", corrected="x")
        refused("thumb", response_id="x")
        refused("thumb", response_id="x", thumb=1)
        refused("comment", response_id="x", comment="x" * 5000)
        refused("preferred_over[0]", response_id="x", preferred_over=[{}])
        refused("stars", response_id="x", stars=5)
        refused("response_id", response_id="x\0", thumb="up")
        refused("response_id", response_id="ann@mail.org", thumb="up")
        refused("conversation_id", conversation_id="ann@mail.org", thumb="up")
        refused("preferred_over[0].response_id", response_id="x",
                preferred_over=[{"response_id": "x y"}])  # fmt: skip
        tools = [{"type": "function", "function": {"name": "\ud800"}}]
        error = HTTP.post(
            url + "/v1/feedback",
            content=json.dumps({"response_id": "x", "conversation": {"tools": tools}}),
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert error.status_code == 400 and "surrogate" in error.json()["error"]["message"]
        for lacking in ({}, {"consent": False}, {"messages": None}, {"choices": None}):
            body = {**consent, **lacking} if lacking else talk
            answer = give(400, response_id="x", thumb="up", conversation=body)
            assert answer["error"]["param"].startswith("conversation")
        text = server.metrics.text().decode()
        assert 'fastlm_feedback_total{kind="thumb"} 5.0' in text

        def full(*_):
            raise InputError("disk is full")

        wrong = give(400, response_id=asked_to["id"], conversation_id="other", thumb="up")
        assert wrong["error"]["param"] == "conversation_id"
        give(response_id=asked_to["id"], conversation_id="talk", thumb="up")
        store.forget("talk")
        forgotten = give(response_id=asked_to["id"], comment="I am back")
        assert (
            forgotten["id"] is None
            and forgotten["text_stored"] is False
            and not store.has_text(None, "talk")
        )
        assert (
            server.metrics.text().decode().count('fastlm_feedback_total{kind="comment"} 3.0') == 1
        )

        store.add = full
        lost = ask(url, {"response_id": "x", "thumb": "up"}, "/v1/feedback")
        assert lost.status_code == 503 and "retry-after" in lost.headers


def test_a_rater_belongs_to_a_key(tmp_path):
    """Who has another key cannot turn what a rater said."""
    keys = ["a-key-of-this-server", "another-key-of-it"]
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny_model(), feedback=store, keys=keys) as (url, _),
    ):
        for key, thumb in ((keys[0], "up"), (keys[1], "down")):
            for rater in ({"rater": "ann"}, {}):
                error = ask(url, {"response_id": "r1", "thumb": thumb, **rater}, "/v1/feedback",
                           authorization=f"Bearer {key}")  # fmt: skip
                assert error.status_code == 200
        raters = [feedback.rater or "" for feedback in store.all_feedback()]
        assert len(set(raters)) == 4 and len(read_feedback_rows(store, 0, time.time() + 9)) == 4
        hashes = [rater.partition(":")[0] for rater in raters]
        assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
        assert [rater.partition(":")[2] for rater in raters] == ["ann", "", "ann", ""]
        assert all(len(item) == 12 and item.isalpha() for item in hashes)
        long = {"response_id": "r1", "thumb": "up", "rater": "x" * 116}
        assert ask(url, long, "/v1/feedback", authorization=f"Bearer {keys[0]}").status_code == 400


def test_a_full_disk_costs_the_conversation_but_not_the_answer(tmp_path, capfd):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi " * 1400}],
        "store": True,
    }
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny_model(8192), feedback=store) as (url, server),
    ):
        store.close()  # connections from now on have no space

        @sa.event.listens_for(store.engine, "connect")
        def fill(connection, _):
            connection.execute("PRAGMA max_page_count = 1")

        answer = ask(url, {**body, "max_tokens": 4})
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]
        streamed = ask(url, {**body, "max_tokens": 4, "stream": True}).text
        assert streamed.endswith("data: [DONE]\n\n") and '"error"' not in streamed
        assert HTTP.get(url + "/ready").status_code == 200
        assert "fastlm_store_failures_total 2.0" in server.metrics.text().decode()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    failures = [line for line in lines if line["event"] == "failure"]
    assert [line["what"] for line in failures] == ["store"] * 2
    assert "database or disk is full" in failures[0]["message"]
    assert answer.json()["id"] == f"chatcmpl-{failures[0]['id']}"
    assert [line["stored"] for line in lines if "stored" in line] == [False] * 2


ANSWER, FEEDBACK = "fastlm_responses 'r1': ", "fastlm_feedback 1: "
DEEP = "[" * 5000
HOSTILE = [
    ("responses", "prompt", "{", ANSWER + "prompt:1: expected JSON, got: EOF"),
    ("responses", "prompt", DEEP, ANSWER + "prompt: expected at most 200 levels"),
    ("responses", "prompt", "7", ANSWER + "prompt: expected an array, got 7"),
    ("responses", "prompt", "[7]", ANSWER + r"prompt\[0\]: expected an object"),
    ("responses", "prompt", "[{}]", ANSWER + r"prompt\[0\]: expected a role"),
    (
        "responses",
        "prompt",
        '[{"role": "user", "content": 7}]',
        ANSWER + r"prompt\[0\]: expected text",
    ),
    (
        "responses",
        "prompt",
        '[{"role": "user", "content": "\\ud800"}]',
        ANSWER + "prompt:1: expected JSON, got",
    ),
    ("responses", "prompt", b"\xff", ANSWER + "prompt: expected a string"),
    ("responses", "choices", "[[7]]", ANSWER + r"choices\[0\]\[0\]: expected an object"),
    ("responses", "choices", '[[{"role": [], "content": ""}]]', ANSWER + r"choices\[0\]\[0\]"),
    ("responses", "choices", "{}", ANSWER + "choices: expected an array"),
    ("responses", "tools", "7", ANSWER + "tools: expected an array"),
    ("responses", "model", b"x", ANSWER + "model: expected a string"),
    ("responses", "response_id", b"r1", "fastlm_responses b'r1': response_id: expected a string"),
    ("feedback", "choice", "x", FEEDBACK + "choice: expected a whole number, got 'x'"),
    ("feedback", "choice", -1, FEEDBACK + "choice: expected 0 or more, got -1"),
    ("feedback", "thumb", "left", FEEDBACK + "thumb: expected up or down, got 'left'"),
    ("feedback", "rater", b"ann", FEEDBACK + "rater: expected a string"),
    ("feedback", "corrected", b"\xff", FEEDBACK + "corrected: expected a string"),
    ("feedback", "preferred_over", "7", FEEDBACK + "preferred_over: expected an array"),
    ("feedback", "preferred_over", '[["r2"]]', FEEDBACK + r"preferred_over\[0\]\[1\]: expected"),
    ("feedback", "preferred_over", '[["r2", -1]]', FEEDBACK + "choice: expected 0 or more, got -1"),
    ("feedback", "ranking", "7", FEEDBACK + "ranking: expected an object"),
    ("feedback", "ranking", '{"ranks": [0, 2]}', FEEDBACK + "ranks: expected ranks from 0"),
    (
        "feedback",
        "ranking",
        '{"ranks": [0], "display_order": [1]}',
        FEEDBACK + "display_order: expected each",
    ),
    ("feedback", "ranking", '{"ranks": [0], "scores": []}', FEEDBACK + "scores: expected one"),
    ("feedback", "metrics", '{"stars": "x"}', FEEDBACK + "metrics.stars: expected a number"),
    ("feedback", "metrics", '{"stars": 1e999}', FEEDBACK + "metrics.stars: expected a finite"),
    ("feedback", "metrics", "[]", None),  # as none
    ("metrics", "kind", "star", "fastlm_metrics 'stars': kind: expected 'boolean' or 'number'"),
    ("metrics", "low", "x", "fastlm_metrics 'stars': low: expected a number, got 'x'"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A closed database with one answer and one feedback."""
    base = tmp_path_factory.mktemp("small") / "f.sqlite"
    with FeedbackStore(base) as store:
        store.declare_ratings([STARS])
        store.add_response(
            StoredResponse("r1", "tiny", PROMPT, [[{"role": "assistant", "content": "Hi"}]])
        )
        store.add(Feedback("r1", thumb="up", corrected="Hello", metrics=(("stars", 4.0),)))
    return base


@pytest.mark.parametrize(("table", "column", "value", "message"), HOSTILE)
def test_databases_of_strangers(small, tmp_path, table, column, value, message):
    base = Path(shutil.copy(small, tmp_path))
    with contextlib.closing(sqlite3.connect(base)) as connection, connection:
        connection.execute(f"UPDATE fastlm_{table} SET {column} = ?", (value,))
    with FeedbackStore(base) as store:
        if message is None:
            assert read_items(base, tmp_path)
            return
        with pytest.raises(InputError, match=rf"f\.sqlite: {message}") as raised:
            store.responses(), store.all_feedback(), store.ratings()
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 1001
        with pytest.raises(InputError, match=message):
            read_items(base, tmp_path)
        # nobody's text stays because a row is damaged
        assert store.forget("r1") == (1 if column == "response_id" else 2)


def read_items(base, folder):
    return read_feedback_items([str(base)], folder, Counter())


def test_the_dashboard_reads_databases_of_strangers(tmp_path):
    base, now = tmp_path / "f.sqlite", time.time()
    with FeedbackStore(base) as store:
        store.add(Feedback("r1", thumb="up", metrics=(("stars", 4.0),)))
        for change, message in (
            ("metrics = '{'", "fastlm_feedback: metrics:1: expected JSON"),
            ("metrics = '[7]'", "fastlm_feedback: metrics: expected an object"),
            ("metrics = NULL, created_at = '2999'", None),
            ("created_at = '2000-13-99T'", "fastlm_feedback: created_at: expected a time"),
        ):
            with store.write() as connection:
                connection.exec_driver_sql(f"UPDATE fastlm_feedback SET {change}")
            if message is None:
                assert read_feedback_rows(store, 0, now + 60) == []
                continue
            with pytest.raises(InputError, match=message):
                read_feedback_rows(store, 0, now + 60)


def test_commands(tmp_path):
    def call(*arguments, status=0):
        result = CliRunner().invoke(app, ["feedback", *map(str, arguments)])
        assert result.exit_code == status, (result.output, result.exception)
        return result

    base = tmp_path / "f.sqlite"
    assert "not found" in call("show", base, status=2).stderr
    filled(FeedbackStore(base)).close()
    report = json.loads(call("show", base, "--json").stdout)
    assert (report["corrected"], report["comment"]) == (1, 1)
    (comment,) = report["comments"]
    assert comment["comment"] == "Mail <EMAIL_1>" and comment["response_id"] == "r1"
    with FeedbackStore(base) as store:
        store.add(Feedback(None, "talk2", comment="Two\nlines \x1b[31mand colour\u202e"))
    counts, *lines = call("show", base).stdout.splitlines()
    assert counts.startswith("responses 2, thumb 6, comment 2")
    assert lines[0].endswith("conversation talk2: Two lines \ufffd[31mand colour\ufffd")
    assert lines[1].endswith("r1, choice 1, ann, thumb down: Mail <EMAIL_1>") and len(lines) == 2
    assert len(call("show", base, "--comments", 1).stdout.splitlines()) == 2
    assert b"Better" in b"".join(f.read_bytes() for f in tmp_path.glob("f.sqlite*"))
    assert call("forget", base, "talk").stdout == "talk: 8 rows deleted\n"
    assert b"Better" not in b"".join(f.read_bytes() for f in tmp_path.glob("f.sqlite*"))
    assert "expected one of the database" in call("forget", base, "talk", status=2).stderr


STARS = Rating("stars", "number", "higher", low=1, high=5)
SOLVED = Rating("solved", "boolean", "higher", "conversation")


def test_numbers_by_name(database_url):
    settings = MonitorConfig([STARS, SOLVED])
    with (
        FeedbackStore(database_url) as store,
        serve_model(*tiny_model(), feedback=store, monitoring=settings) as (url, server),
    ):

        def give(**fields):
            return ask(url, fields, "/v1/feedback")

        declared = HTTP.get(url + "/v1/models/tiny").json()["fastlm"]["metrics"]
        assert [metric["name"] for metric in declared] == ["stars", "solved"]
        assert give(response_id="x", metrics={"stars": 4}).status_code == 200
        assert give(conversation_id="c", metrics={"solved": True}).status_code == 200
        both = {"stars": 1.5, "solved": False}
        values = give(response_id="x", conversation_id="c", metrics=both, thumb="down")
        assert values.status_code == 200
        assert [o.metrics for o in store.all_feedback()] == [
            (("stars", 4.0),), (("solved", 1.0),), (("stars", 1.5), ("solved", 0.0)),
        ]  # fmt: skip
        for metrics, message in (
            ({"strs": 4}, "metrics.strs: expected one of stars, solved"),
            ({"stars": 6}, "metrics.stars: expected a number from 1 to 5, got 6"),
            ({"stars": 0.99}, "metrics.stars: expected a number from 1 to 5, got 0.99"),
            ({"stars": True}, "metrics.stars: expected a number from 1 to 5, got True"),
            ({"stars": "4"}, "metrics.stars: expected a number from 1 to 5, got '4'"),
            ({"stars": None}, "metrics.stars: expected a number from 1 to 5, got None"),
            (
                {"solved": True},
                "metrics.solved: expected conversation_id: it is about a conversation",
            ),
        ):
            refused = give(response_id="x", metrics=metrics)
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert error["message"] == message and error["param"] == message.partition(":")[0]
        ids = give(conversation_id="c", metrics={"stars": 4}).json()["error"]["message"]
        assert ids == "metrics.stars: expected response_id: it is about a response"
        for metrics in ({}, [], 4, "stars", {f"m{i}": 1 for i in range(33)}):
            refused = give(response_id="x", metrics=metrics)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "metrics"
        unnamed = give(response_id="x", metrics={"x" * 999: 1})
        assert unnamed.status_code == 400 and len(unnamed.text) < 500
        assert len(store.all_feedback()) == 3
        text = server.metrics.text().decode()
        assert 'fastlm_feedback_total{kind="metrics"} 3.0' in text
    with FeedbackStore(database_url) as store:  # what the numbers mean does not change
        store.declare_ratings([STARS])
        changed = Rating("stars", "number", "lower", low=1, high=5)
        with pytest.raises(InputError, match=r"metric stars: better: expected 'higher'"):
            store.declare_ratings([changed])
        assert store.ratings() == [SOLVED, STARS]


def test_metrics_of_a_file(tmp_path):
    file = tmp_path / "metrics.toml"
    good = '[[metric]]\nname = "stars"\nkind = "number"\nlow = 1\nhigh = 5\nbetter = "higher"\n'
    talk = '[[metric]]\nname="solved"\nkind="boolean"\nbetter="higher"\nlevel="conversation"\n'
    file.write_text(good + "# a comment\n" + talk)
    assert read_ratings(file) == [STARS, SOLVED]
    for text, message in (
        (
            good.replace('"number"', '"stars"'),
            r"line 3: kind: expected 'boolean' or 'number', got 'stars'",
        ),
        (good + good.replace("5", "1"), r"line 11: high: expected more than low, 1, got 1"),
        (good + good, r"line 8: name: expected each once, got 'stars' again"),
        (good + good.replace("stars", "thumb"), r"line 8: name: expected another than .*'thumb'"),
        (good.replace("stars", "pick"), r"line 2: name: expected another than .*'pick'"),
        (good.replace("stars", "stop"), r"line 2: name: expected another than .*'stop'"),
        (good.replace("better", "beter"), r"line 6: beter: unknown key.*'better'"),
        (good.replace('better = "higher"\n', ""), r"line 1: better: expected this field"),
        (good.replace("low = 1", "low = 'x'"), r"line 4: low: expected a number, got 'x'"),
        (good.replace("stars", "Stars!"), r"line 2: name: expected a text that matches"),
        (talk + "low = -1\n", r"line 6: low: expected none for a boolean"),
        (good.replace("[[metric]]", "[[metrics]]"), r"line 1: metrics: unknown key"),
        (good.replace("[[metric]]", "[metric]"), r"line 1: metric: expected \[\[metric\]\]"),
        ("\nmetric = 3\n", r"line 2: metric: expected \[\[metric\]\]"),
        (good + "kind = }", r":7: expected TOML, got: "),
        ("a" + ".a" * 2000 + "=1", r":1: expected at most 1,000 dots"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message) as raised:
            read_ratings(file)
        assert "\n" not in str(raised.value)


def test_feedback_comes_early_late_and_about_conversations(database_url):
    """Before its answer is measured, after a restart, and after days; the answer's own time and
    model count.
    """
    now = time.time()
    with FeedbackStore(database_url) as store:
        store.declare_ratings([STARS, SOLVED])
        store.add(Feedback("early", thumb="up", metrics=(("stars", 5.0),)))
        assert read_feedback_rows(store, now - 60, now + 60)[0].model == ""  # no answer yet
        row = dict.fromkeys(c.name for c in MEASUREMENTS.columns if c.name != "id")
        row |= {"choice": 0, "status": 200}
        with store.write() as connection:
            connection.execute(MEASUREMENTS.insert(), [
                row | {"response_id": "early", "model": "new", "at": now},
                row | {"response_id": "late", "model": "old", "at": now - 5 * 86400},
                row | {"response_id": "t1", "conversation_id": "talk", "model": "new", "at": now},
            ])  # fmt: skip
    with FeedbackStore(database_url) as store:
        store.add(Feedback("late", thumb="down", rater="ann"))
        store.add(Feedback("late", thumb="up", rater="ann"))  # she changed her mind
        store.add(Feedback(None, "talk", metrics=(("solved", 1.0),)))
        store.add(Feedback(None, "elsewhere", thumb="down"))
        today = {item.key: item for item in read_feedback_rows(store, now - 3600, now + 60)}
        assert set(today) == {("early", 0), ("talk", -1), ("elsewhere", -1)}
        assert today["early", 0].model == today["talk", -1].model == "new"
        assert (today["early", 0].kind, today["early", 0].value) == ("metrics.stars", 5.0)
        assert not today["elsewhere", -1].model
        week = read_feedback_rows(store, now - 7 * 86400, now + 60)
        (late,) = (item for item in week if item.key == ("late", 0))
        assert (late.value, late.model, round(now - late.at)) == (1.0, "old", 5 * 86400)
        assert store.forget("late") == 3  # two feedback rows and its measure
        with store.read() as connection:
            left = connection.execute(MEASUREMENTS.select()).all()
        assert [item.response_id for item in left] == ["early", "t1"]


def test_a_schema_that_is_not_utf_8_is_refused_in_one_line(tmp_path):
    path = tmp_path / "f.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE abc (x)")
        connection.commit()
    path.write_bytes(path.read_bytes().replace(b"abc", b"ab\xff"))
    with pytest.raises(InputError, match=r"f\.sqlite: "):
        FeedbackStore(path, create=False)
