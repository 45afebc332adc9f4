"""Feedback: what is kept and what is not, without personal data, on SQLite and on PostgreSQL, and
rows to train on that the trainings' readers accept.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve_app import HTTP, ask, serving, tiny_model
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data.conversations import read_conversations
from fastlm.data.preferences import Comparison, Label, read_preferences
from fastlm.errors import InputError
from fastlm.serve.feedback import FeedbackStore, Kept, Opinion
from fastlm.serve.feedback_export import export

PROMPT = [{"role": "user", "content": "Write to ann@mail.org or +44 20 7946 0958"}]
CLEAN = [{"role": "user", "content": "Write to <EMAIL> or <PHONE>"}]


def filled(store):
    """Two answers to one prompt, one to another, and opinions about them."""
    texts = [[{"role": "assistant", "content": text}] for text in ("Better", "Worse")]
    store.keep(Kept("r1", "tiny", PROMPT, texts, conversation_id="talk"))
    other = [{"role": "user", "content": "What?"}]
    store.keep(Kept("r2", "tiny", other, [[{"role": "assistant", "content": "Wrong"}]]))
    for opinion in (
        Opinion("r1", choice=1, preferred_over=(("r1", 0),), rater="ann"),
        Opinion("r1", choice=0, preferred_over=(("r1", 1),), rater="ann"),  # the other, after all
        Opinion("r1", choice=0, thumb="down", rater="ann"),
        Opinion("r1", choice=0, thumb="up", rater="ann"),  # she changed her mind
        Opinion("r1", choice=1, thumb="down", rater="ann", comment="Mail bob@mail.org"),
        Opinion("r2", corrected="Right, says\0 bob@mail.org"),
        Opinion("r2", thumb="up"),
        Opinion("r3", thumb="up"),  # nobody consented to keep its text
        Opinion(None, "talk", thumb="up"),
        Opinion("r1", choice=0, preferred_over=(("r2", 0),)),  # another prompt
    ):
        store.add(opinion)
    return store


def test_rows_to_train_on(where, tmp_path):
    with filled(FeedbackStore(where)) as store:
        kept = store.answers()
        assert kept["r1"].prompt == CLEAN and kept["r1"].conversation_id == "talk"
        assert store.opinions()[4].comment == "Mail <EMAIL>"
        assert store.counts()["answers"] == 2 and store.counts()["thumb"] == 6

        done = export(store, tmp_path / "p.jsonl", "preferences")
        pairs = list(read_preferences([str(tmp_path / "p.jsonl")], cache=tmp_path))
        assert done.left_out == {"of answers to different prompts": 1}
        assert all(isinstance(pair, Comparison) for pair in pairs)
        assert [[a[0]["content"] for a in pair.answers] for pair in pairs] == [
            ["Right, says <EMAIL>", "Wrong"],
            ["Better", "Worse"],
        ]
        assert pairs[1].prompt == CLEAN and pairs[1].rater == "ann"

        done = export(store, tmp_path / "k.jsonl", "kto")
        labels = list(read_preferences([str(tmp_path / "k.jsonl")], cache=tmp_path))
        assert all(isinstance(label, Label) for label in labels)
        assert [(x.answer[0]["content"], x.desirable) for x in labels] == [
            ("Better", True), ("Worse", False), ("Wrong", True),
        ]  # fmt: skip
        assert done.left_out == {"of answers whose text was not kept": 1}

        export(store, tmp_path / "s.jsonl", "sft")
        talks = list(read_conversations([str(tmp_path / "s.jsonl")], cache=tmp_path))
        assert [t.messages[-1]["content"] for t in talks] == ["Right, says <EMAIL>", "Better"]
        with pytest.raises(InputError, match="form: wanted one of sft"):
            export(store, tmp_path / "x.jsonl", "dpo")

        assert store.forget("talk") == 8 and store.forget("r1") == 0
        assert [o.response_id for o in store.opinions()] == ["r2", "r2", "r3"]
        with pytest.raises(InputError, match="got none; 1 of answers whose text was not kept"):
            store.forget("r2")
            export(store, tmp_path / "x.jsonl", "kto")
        assert not (tmp_path / "x.jsonl").exists()


def test_several_servers_write_at_once(where):
    with FeedbackStore(where) as one, FeedbackStore(where) as other:

        def write(i):
            (one, other)[i % 2].add(Opinion(f"r{i}", thumb="up"))
            (one, other)[i % 2].keep(Kept("same", "tiny", PROMPT, []))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(60)))
        assert sorted(o.response_id for o in one.opinions()) == sorted(f"r{i}" for i in range(60))
        assert len(other.answers()) == 1


def test_a_database_that_cannot_be_used(tmp_path):
    (tmp_path / "text").write_text("no database" * 99)
    for where in (tmp_path / "text", tmp_path / "none" / "x", "postgresql://u:pw@127.0.0.1:1/x",
                  "nosuch://x", "://"):  # fmt: skip
        with pytest.raises(InputError) as raised:
            FeedbackStore(where)
        assert "pw" not in str(raised.value) and "\n" not in str(raised.value)


def test_over_http(where):
    model, tokenizer = tiny_model()
    with (
        FeedbackStore(where) as store,
        serving(model, tokenizer, feedback=store) as (url, server),
    ):
        talk = {"messages": [{"role": "user", "content": "I am ann@mail.org"}]}
        asked = {"model": "tiny", **talk, "max_tokens": 6, "temperature": 0}
        first, second = (ask(url, asked).json() for _ in range(2))
        assert first["id"] != second["id"] and not store.answers()

        def give(status=200, **fields):
            response = ask(url, fields, "/v1/feedback")
            assert response.status_code == status, response.text
            return response.json()

        made = give(response_id=first["id"], thumb="up", comment="I am ann@mail.org", rater="ann")
        assert made["kept"] is False and store.opinions()[0].comment == "I am <EMAIL>"
        assert not store.answers()  # still nobody consented
        said = first["choices"][0]["message"]["content"]
        consent = {"consent": True, **talk, "choices": [said]}
        late = give(response_id=first["id"], corrected="Better", conversation=consent)
        assert late["kept"] is True
        kept = store.answers()[first["id"]]
        assert kept.prompt[0]["content"] == "I am <EMAIL>" and kept.choices[0][0]["content"] == said
        over = [{"response_id": second["id"]}, {"choice": 1}]
        give(response_id=first["id"], preferred_over=over)
        assert store.opinions()[-1].preferred_over == ((second["id"], 0), (first["id"], 1))
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
        told = HTTP.post(
            url + "/v1/feedback",
            content=json.dumps({"response_id": "x", "conversation": {"tools": tools}}),
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert told.status_code == 400 and "surrogate" in told.json()["error"]["message"]
        for lacking in ({}, {"consent": False}, {"messages": None}, {"choices": None}):
            body = {**consent, **lacking} if lacking else talk
            answer = give(400, response_id="x", thumb="up", conversation=body)
            assert answer["error"]["param"].startswith("conversation")
        text = server.metrics.text().decode()
        assert 'fastlm_feedback_total{kind="thumb"} 2.0' in text

        def full(*_):
            raise InputError("disk is full")

        store.add, add = full, store.add
        lost = ask(url, {"response_id": "x", "thumb": "up"}, "/v1/feedback")
        assert lost.status_code == 503 and "retry-after" in lost.headers
        store.add = add
        store.keep = full
        failed = ask(url, {**asked, "store": True})
        assert failed.status_code == 500
        streamed = ask(url, {**asked, "store": True, "stream": True})
        assert "was not kept" in streamed.text and "[DONE]" not in streamed.text


def test_commands(tmp_path):
    def call(*arguments, status=0):
        result = CliRunner().invoke(app, ["feedback", *map(str, arguments)])
        assert result.exit_code == status, (result.output, result.exception)
        return result

    base = tmp_path / "f.sqlite"
    assert "not found" in call("show", base, status=2).stderr
    filled(FeedbackStore(base)).close()
    assert json.loads(call("show", base, "--json").stdout)["corrected"] == 1
    assert call("export", base, tmp_path / "x.jsonl").stdout.endswith("x.jsonl: 2 rows\n")
    assert call("export", base, tmp_path / "x.jsonl", "--form", "kto").stdout.endswith(": 3 rows\n")
    assert "ends in .jsonl" in call("export", base, tmp_path / "x", status=2).stderr
    assert b"Better" in b"".join(f.read_bytes() for f in tmp_path.glob("f.sqlite*"))
    assert call("forget", base, "talk").stdout == "talk: 8 rows deleted\n"
    assert b"Better" not in b"".join(f.read_bytes() for f in tmp_path.glob("f.sqlite*"))
    assert "wanted one of the database" in call("forget", base, "talk", status=2).stderr
