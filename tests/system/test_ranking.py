"""fastlm rank: the store of answers and rankings, the agreement of raters against published
values, the terminal as a rater types into it, and what a crash, a full disk or a damaged file do.
"""

import json
import math
import os
import pty
import random
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import krippendorff
import numpy as np
import pytest
from typer.testing import CliRunner

import fastlm.serve.feedback_store
from fastlm.checkpoint.config import ModelConfig
from fastlm.cli import app
from fastlm.data.conversations import message_contents, parse_conversation, read_conversations
from fastlm.data.preferences import (
    Comparison,
    UnpairedPreference,
    parse_preference,
    read_preferences,
)
from fastlm.errors import InputError
from fastlm.feedback.build import BuildOptions, build
from fastlm.feedback.rank_terminal import edit_text, parse_ranking
from fastlm.model.causal_lm import CausalLM
from fastlm.serve.feedback import Feedback, StoredResponse
from fastlm.serve.ranking import RankingStore, RaterCounts, read_ranking_examples
from fastlm.stats.agreement import PairAgreement, agreement_of
from fastlm.tokenizer.tokenizer import Tokenizer

NONE = float("nan")


def prompt_row(number, answers=3):
    return {"prompt": f"Question {number}?", "answers": [f"{number}.{i}" for i in range(answers)]}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def filled(folder, *rows, name="store.sqlite", **options):
    """A store with these rows."""
    file = write(folder / "rows.jsonl", *rows)
    store = RankingStore(folder / name, **options)
    store.add_items(read_ranking_examples([file], cache=folder))
    return store


def call(*arguments, status=0, **kwargs):
    result = CliRunner().invoke(app, ["rank", *map(str, arguments)], **kwargs)
    assert result.exit_code == status, (result.output, result.exception)
    return result


def refused(*arguments, **kwargs):
    (*_, line) = call(*arguments, status=2, **kwargs).stderr.strip().splitlines()
    assert line.startswith("fastlm: ")
    return line.removeprefix("fastlm: ")


# ---- agreement


def test_alpha_at_its_ends() -> None:
    ranks = np.random.default_rng(0).permuted(np.tile(np.arange(4), (2, 500, 1)), axis=2).tolist()
    same = agreement_of([{"ann": a, "bob": a} for a in ranks[0]])
    chance = agreement_of([{"ann": a, "bob": b} for a, b in zip(*ranks)])
    turned = agreement_of([{"ann": a, "bob": [3 - r for r in a]} for a in ranks[0]])
    assert same.alpha == 1 and abs(chance.alpha) < 0.06 and turned.alpha < -0.9
    for undefined in ([], [{"ann": [0, 1]}], [{"ann": [0, 0], "bob": [0, 0]}]):
        assert math.isnan(agreement_of(undefined).alpha)


def test_agreement_of_rankings() -> None:
    rankings = [
        {"ann": [0, 1, 2], "bob": [0, 0, 1]},
        {"ann": [1, 0], "bob": [1, 0], "cat": [0, 1]},
        {"cat": [0, 1]},
    ]
    agreement = agreement_of(rankings)
    assert agreement.items == 2
    assert agreement.pairs == [
        PairAgreement(("ann", "bob"), 2, 3, 4),  # bob ties two answers that ann does not
        PairAgreement(("ann", "cat"), 1, 0, 1),
        PairAgreement(("bob", "cat"), 1, 0, 1),
    ]
    # places: tied answers share their mean, the worst of two and of three answers are both 1
    values = [[0, 0.5, 1, 1, 0], [0.25, 0.25, 1, 1, 0], [NONE, NONE, NONE, 0, 1]]
    alpha = krippendorff.alpha(values, level_of_measurement="ordinal")
    assert agreement.alpha == pytest.approx(alpha)


# ---- the store


def content(example):
    """What a comparison says, whatever the order of its answers."""
    scores = example.scores or [None] * len(example.ranks)
    answers = sorted(zip(example.ranks, scores, map(message_contents, example.answers)), key=str)
    return message_contents(example.prompt), answers, example.margin, example.tools, example.rater


def test_what_is_imported_is_exported(tmp_path) -> None:
    rows = [
        {"prompt": "a?", "chosen": "1", "rejected": "2", "margin": 0.5},
        {"prompt": "b?", "answers": ["1", "2", "3"], "scores": [2, 7.5, 2], "rater": "ann"},
        {"prompt": "c?", "answer": "1", "corrected": "2"},
        {
            "messages": [{"role": "user", "content": "d?"}],
            "answers": ["1", {"role": "assistant", "content": "2"}, "3"], "ranks": [1, 0, 2],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
        prompt_row(1),
    ]  # fmt: skip
    with filled(tmp_path, *rows) as store:
        assert store.raters() == {"ann": RaterCounts(1), "file": RaterCounts(2, 0, 1)}
        exported = {}
        for form in ("pairs", "ranked", "labels", "corrected"):
            count = store.export(tmp_path / f"{form}.jsonl", form)
            exported[form] = list(
                read_preferences([str(tmp_path / f"{form}.jsonl")], cache=tmp_path)
            )
            assert len(exported[form]) == count
        expected = [
            replace(parse_preference(row), rater=row.get("rater", "file")) for row in rows[:4]
        ]
        a, b, c, d = map(content, expected)
        assert [content(x) for x in exported["ranked"]] == [a, b, d]
        assert [content(x) for x in exported["corrected"]] == [c]
        assert [type(x) for x in exported["pairs"]] == [Comparison] * 7
        assert [x.margin for x in exported["pairs"]] == [0.5, 5.5, 5.5, None, None, None, None]
        assert [type(x) for x in exported["labels"]] == [UnpairedPreference] * 7
        assert Counter(x.desirable for x in exported["labels"]) == {True: 3, False: 4}
        store.export(tmp_path / "demos.jsonl", "demonstrations")
        (demo,) = read_conversations([str(tmp_path / "demos.jsonl")], cache=tmp_path)
        assert demo.messages == parse_conversation({"prompt": "c?", "completion": "2"}).messages
        assert store.export(tmp_path / "ann.jsonl", "pairs", rater="ann") == 2
        # once more, and what was exported: nothing is new
        repeated = store.add_items(
            read_ranking_examples([str(tmp_path / "rows.jsonl")], cache=tmp_path)
        )
        again2 = store.add_items(
            read_ranking_examples([str(tmp_path / "ranked.jsonl")], cache=tmp_path)
        )
        assert [(x.items, x.rankings, x.corrections, x.duplicates) for x in (repeated, again2)] == [
            (0, 0, 0, 5), (0, 0, 0, 3),
        ]  # fmt: skip
        turned = {**rows[3], "answers": rows[3]["answers"][::-1], "rater": "bob"}
        store.add_items(
            read_ranking_examples([write(tmp_path / "t.jsonl", turned)], cache=tmp_path)
        )
        (bob,) = store.comparisons("bob")
        (first,) = [x for x in store.comparisons("file") if len(x.answers) == 3]
        assert bob.answers == first.answers
        ranks = {a[0]["content"]: (x, y) for a, x, y in zip(bob.answers, first.ranks, bob.ranks)}
        assert ranks == {"1": (1, 2), "2": (0, 0), "3": (2, 1)}  # by answer, not by place


def test_each_rater_sees_an_order_of_its_own(tmp_path) -> None:
    with filled(tmp_path, *map(prompt_row, range(300))) as store:
        orders = {}
        for rater in ("ann", "bob"):
            items = [store.item(id, rater) for id in range(1, 301)]
            orders[rater] = [[a[0]["content"] for a in item.answers] for item in items]
            places = Counter(order.index(f"{i}.0") for i, order in enumerate(orders[rater]))
            assert min(places.values()) > 70  # of 100; 5 standard deviations are 41
        same = sum(a == b for a, b in zip(*orders.values()))
        assert 20 < same < 80  # of 50
        item = store.item(7, "ann")
        assert item == store.item(7, "ann")
        store.rank("ann", item, [2, 0, 1])
        (feedback,) = store.all_feedback()
        assert feedback.ranking.display_order == item.display_order
        (ranked,) = store.comparisons()
        ranks = {a[0]["content"]: rank for a, rank in zip(ranked.answers, ranked.ranks)}
        assert [ranks[a[0]["content"]] for a in item.answers] == [2, 0, 1]
    with RankingStore(tmp_path / "store.sqlite", seed=1) as store:
        others = [store.item(id, "ann") for id in range(1, 301)]
        texts = [[a[0]["content"] for a in item.answers] for item in others]
        assert sum(a == b for a, b in zip(texts, orders["ann"])) < 80


def test_items_are_judged_once_and_skipped_ones_return_on_request(tmp_path) -> None:
    correction = {"prompt": "c?", "answer": "1", "corrected": "2"}  # nothing to rank
    with filled(tmp_path, correction, *map(prompt_row, range(3))) as store:
        first = store.next_item("ann")
        store.skip("ann", first)
        second = store.next_item("ann")
        store.rank("ann", second, [0, 0, 0])
        assert store.next_item("ann").id == second.id + 1
        assert store.next_item("bob").id == first.id
        assert store.next_item("ann", skipped=True).id == first.id
        assert store.next_item("ann", skipped=True, after=first.id) is None
        store.rank("ann", first, [2, 0, 2])  # instead of the skip
        assert store.next_item("ann", skipped=True) is None
        assert store.progress("ann") == (RaterCounts(2), 3)
        (ranking,) = store.comparisons("ann")  # nothing is learnt from ties alone
        assert sorted(ranking.ranks) == [0, 1, 1]
        for ranks, message in (
            ([0, 1], "ranks: expected one for each of 3 answers, got 2"),
            ([0, 1, 3], "ranks: expected whole numbers from 0 to 2, got 3"),
            ([0, 1.0, 2], "ranks: expected whole numbers from 0 to 2, got 1.0"),
        ):
            with pytest.raises(InputError, match=message):
                store.rank("ann", first, ranks)
        for name, message in ((" ", "expected a name, got ' '"), ("a@mail.org", "no address")):
            with pytest.raises(InputError, match=f"rater: .*{message}"):
                store.rank(name, first, [0, 1, 2])
        for text, message in (
            (" ", "correction: expected text, got an empty one"),
            (first.answers[0][0]["content"], "correction: expected another text than the answer"),
            ("\ud800", "correction: expected valid Unicode"),
        ):
            with pytest.raises(InputError, match=message):
                store.correct("ann", first, 0, text)
        store.correct("ann", first, 0, "better")
        store.correct("ann", first, 0, "best, says bob@mail.org")
        (corrected,) = store.comparisons("ann", corrected=True)
        assert corrected.answers[0] == [{"role": "assistant", "content": "best, says <EMAIL_1>"}]


# ---- faults


JUDGE = [sys.executable, "-P", "-m", "fastlm", "rank", "judge"]


def test_two_raters_at_once(tmp_path) -> None:
    count = 60
    with filled(tmp_path, *map(prompt_row, range(count))) as store:
        raters = [
            subprocess.Popen(
                [*JUDGE, str(tmp_path / "store.sqlite"), "-r", rater], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rater in ("ann", "bob")
        ]  # fmt: skip
        for process in raters:
            process.stdin.write("213\n" * count)
            process.stdin.close()
        for process in raters:
            assert process.stdout.read().endswith(f"{count} of {count} ranked, 0 to do\n")
            assert process.stderr.read() == "" and process.wait(60) == 0
            process.stdout.close(), process.stderr.close()
        assert store.raters() == {"ann": RaterCounts(count), "bob": RaterCounts(count)}
        assert store.agreement().items == count


def test_a_killed_rater_loses_nothing(tmp_path) -> None:
    rng, done = random.Random(0), 0
    with filled(tmp_path, *map(prompt_row, range(20))) as store:
        for _ in range(3):
            more = rng.randrange(1, 5)
            process = subprocess.Popen(
                [*JUDGE, str(tmp_path / "store.sqlite"), "-r", "ann"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            process.stdin.write("132\n" * more)
            process.stdin.flush()
            for _ in range(more):
                while "stored: 1 > 3 > 2" not in process.stdout.readline():
                    assert process.poll() is None
            process.kill()
            process.communicate()
            done += more
            assert store.raters() == {"ann": RaterCounts(done)}
            assert store.next_item("ann").id == done + 1
        with store.read() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def test_a_full_disk_is_one_line_and_leaves_the_store_whole(tmp_path) -> None:
    with filled(tmp_path, *map(prompt_row, range(5))) as store:
        rows = [prompt_row(i, 9) for i in range(100, 400)]
        more = list(read_ranking_examples([write(tmp_path / "m.jsonl", *rows)], cache=tmp_path))

        def limited(more_pages):  # SQLite's own way to be full, of the pool's connection
            with store.read() as connection:
                pages = connection.exec_driver_sql("PRAGMA page_count").scalar() + more_pages
                connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        limited(0)
        with pytest.raises(InputError) as full:
            store.add_items(more)
        assert str(full.value) == f"{store.name}: cannot be used: database or disk is full"
        assert store.progress("ann")[1] == 5
        limited(1000)
        assert store.add_items(more).items == 300


def test_a_store_in_use_is_waited_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fastlm.serve.feedback_store, "WAIT_SECONDS", 0.2)
    with (
        filled(tmp_path, prompt_row(0)) as store,
        RankingStore(tmp_path / "store.sqlite") as other,
    ):
        item = other.next_item("ann")
        with store.write() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            assert other.next_item("ann") == item  # readers do not wait
            with pytest.raises(InputError, match="cannot be used: database is locked"):
                other.rank("ann", item, [0, 1, 2])
        other.rank("ann", item, [0, 1, 2])


def test_rankings_are_feedback(database_url, tmp_path) -> None:
    """Items of `fastlm serve`, too, are ranked, and what was ranked are picks to train on."""
    file = write(tmp_path / "rows.jsonl", prompt_row(0), {**prompt_row(1), "ranks": [1, 0, 1]})
    with RankingStore(database_url) as store:
        store.add_items(read_ranking_examples([file], cache=tmp_path))
        prompt, texts = [{"role": "user", "content": "Served?"}], ("Yes", "No", "So")
        store.add_response(
            StoredResponse(
                "r1", "m", prompt, [[{"role": "assistant", "content": text}] for text in texts]
            )
        )
        store.add(Feedback("r1", choice=0, preferred_over=(("r1", 1),), rater="ann"))
        store.add(Feedback("r1", choice=0, preferred_over=(("r1", 1),), rater="bob"))
        store.rank("ann", store.item(3, "ann"), [0, 0, 0])  # takes back her pick
        store.rank("ann", store.item(1, "ann"), [0, 1, 2])
        store.rank("ann", store.item(1, "ann"), [0, 1, 1])
        store.skip("cid", store.item(1, "cid"))
        assert store.progress("ann") == (RaterCounts(2), 3)
        best = store.item(1, "ann").answers[0][0]["content"]
        assert store.forget(store.item(2, "ann").response_id) == 2  # nor imported again
        repeated = store.add_items(read_ranking_examples([file], cache=tmp_path))
        assert (repeated.items, repeated.duplicates) == (0, 2)
        assert store.has_prompt([{"role": "user", "content": "Question 0?"}], None)
        assert store.next_item("cid").response_id == "r1"
        assert store.next_item("cid", skipped=True).id == 1
    options = BuildOptions(judge=0.0, test=0.0, max_rater_share=1.0)
    done = build([database_url], tmp_path / "out", options=options, cache=tmp_path)
    assert done.funnel.steps[0]["removed"] == {
        "ties and skipped rankings": 7,
        "changed later by the same rater": 4,
    }
    text = (tmp_path / "out/train/preferences.jsonl").read_text()
    rows = [json.loads(row) for row in text.splitlines()]
    assert [(row["chosen"][0]["content"], row.get("model")) for row in rows] == [
        ("Yes", "m"), (best, None), (best, None),
    ]  # fmt: skip


def test_files_that_are_no_store(tmp_path) -> None:
    path = tmp_path / "x.sqlite"
    judge = ("judge", path, "-r", "ann")
    assert refused(*judge) == f"{path}: expected a feedback database, not found"
    path.write_text("hello " * 99)
    assert refused(*judge) == f"sqlite:///{path}: cannot be used: file is not a database"
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE notes (text)")
    other.close()
    before = path.read_bytes()
    rows = write(tmp_path / "a.jsonl", prompt_row(0))
    for arguments in (judge, ("import", path, rows)):
        message = f"sqlite:///{path}: expected a feedback database, got another SQLite file"
        assert refused(*arguments) == message
    assert path.read_bytes() == before
    path.unlink()
    filled(tmp_path, *map(prompt_row, range(50)), name="x.sqlite").close()
    with sqlite3.connect(path) as other:
        other.execute("UPDATE fastlm_responses SET choices = '[' WHERE id = 1")
    other.close()
    assert "choices:1: expected JSON" in refused(*judge)
    data = bytearray(path.read_bytes())
    data[4096:] = random.Random(0).randbytes(len(data) - 4096)
    path.write_bytes(data)
    assert "cannot be used: database disk image is malformed" in refused(*judge)
    assert "cannot be used" in refused("import", tmp_path / "no" / "x.sqlite", rows)


def test_bad_rows_and_options(tmp_path) -> None:
    store, rows = tmp_path / "s.sqlite", tmp_path / "a.jsonl"
    for row, message in (
        ({"prompt": "a?", "answers": ["1"]}, "expected a list of two or more answers, got 1"),
        ({"prompt": "a?", "answers": ["1", "1"]}, "answers 0 and 1 are equal"),
        (
            {"prompt": "a?", "completion": "1", "label": True},
            "expected two or more answers to rank, got one with a label",
        ),
        (
            {"prompt": "a?", "answers": ["1", "2"], "ranks": [0, 1], "rater": "ann@mail.org"},
            "rater: expected a name, no address and no number, got 'ann@mail.org'",
        ),
        (
            {"prompt": "a?", "answer": "1", "corrected": [{"role": "assistant", "content": "2",
             "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}]},
            "corrected: expected the answer with another last text",
        ),
    ):  # fmt: skip
        write(rows, prompt_row(0), row)
        assert refused("import", store, rows).startswith(f"{rows}, line 2: ")
        assert message in refused("import", store, rows)
        assert not store.exists()
    private = {"prompt": "b?", "answers": ["ann@mail.org", "bob@mail.org"]}
    result = call("import", store, rows, write(tmp_path / "b.jsonl", private), "--skip-bad")
    assert (
        "3 rows read, 1 malformed, 1 with answers that differ only in personal data, 0 duplicates"
        in result.stdout
    )
    assert "; new prompts 1," in result.stdout
    assert "line 2" in result.stderr
    out = tmp_path / "o.jsonl"
    assert "expected something to export as pairs, got nothing" in refused("export", store, out)
    assert "form: expected one of pairs, ranked" in refused("export", store, out, "--form", "x")
    assert "rater: expected one of none, got 'z'" in refused("export", store, out, "-r", "z")
    assert "expected a name that ends in .jsonl" in refused("export", store, tmp_path / "o.csv")
    assert not out.exists()
    assert "rater: expected a name, got '\\n'" in refused("judge", store, "-r", "\n", input="123\n")


# ---- the terminal


@pytest.mark.parametrize(
    "text, ranks",
    [
        ("2 1 3", [1, 0, 2]), ("213", [1, 0, 2]), ("21", [1, 0, 2]), ("2, 1", [1, 0, 2]),
        ("2>1>3", [1, 0, 2]), ("1=2 3", [0, 0, 1]), ("1 = 23", [0, 0, 1]), ("3 1=2", [1, 1, 0]),
        ("1=2=3", [0, 0, 0]), ("1=2", [0, 0, 1]),
    ],
)  # fmt: skip
def test_inputs_that_rank(text, ranks) -> None:
    assert parse_ranking(text, 3) == ranks


@pytest.mark.parametrize(
    "text", ["", "x", "1", "0 1 2", "1 2 4", "2 2", "1 2 3 3", "1==2", "=1", "1=", "-1 2", "٢ 1"]
)
def test_inputs_that_do_not(text) -> None:
    with pytest.raises(InputError, match="expected 1 2 3 in your order, the best first"):
        parse_ranking(text, 3)


def test_more_than_nine_answers_have_spaces_between() -> None:
    assert parse_ranking("10 2 3=4 5 6 7 8 9 11", 11) == [9, 1, 2, 2, 3, 4, 5, 6, 7, 0, 8]
    with pytest.raises(InputError, match="each once; got '12'"):
        parse_ranking("12", 11)


def test_lines_of_a_pipe_are_inputs(tmp_path) -> None:
    evil = {"prompt": "Say [red]hi[/red].\x1b[2J", "answers": ["a\x1b]0;x\x07", "b\u202ec\x9b"]}
    filled(tmp_path, evil, *map(prompt_row, range(4))).close()
    path = tmp_path / "store.sqlite"
    output = call("judge", path, "-r", "ann", input="2\ns\nc 3 Fixed.\nb\n12\n321\n\n?\nq\n").stdout
    assert not set("\x1b\x07\u202e\x9b") & set(output)
    assert "Say [red]hi[/red].\ufffd[2J" in output
    assert "stored: 2 > 1\n" in output and "stored: a correction of 3" in output
    assert output.count("Question 0?") == 2 and "── back ──" in output
    assert "1=2 3     1 and 2 are equally good" in output
    assert output.endswith("ann: 3 of 5 ranked, 2 to do\n")
    with RankingStore(path) as store:
        (correction,) = store.comparisons("ann", corrected=True)
        assert correction.answers[0][0]["content"] == "Fixed."
        assert correction.prompt[0]["content"] == "Question 1?"
    for line, message in (
        (
            "first",
            "expected 1 2 3 in your order, the best first (? shows the commands), got 'first'",
        ),
        ("b", "b: expected a prompt before this one"),
        ("c 4 x", "c: expected an answer from 1 to 3, got '4'"),
        ("c 1", "c 1: expected the corrected text after it, got none"),
    ):
        assert message in refused("judge", path, "-r", "ann", input=f"{line}\n")
    call("judge", path, "-r", "bob", input="1\ns\ns\n1=2\n3=2 1\n")
    output = call("judge", path, "-r", "bob", "--skipped", input="s\n1 2 3\n").stdout
    assert output.count("skipped before") == 2
    assert output.endswith("bob: 4 of 5 ranked, 1 skipped, 0 to do\n")
    figures = json.loads(call("agreement", path, "--json").stdout)
    assert figures["raters"]["bob"] == {"ranked": 4, "skipped": 1, "corrected": 0}
    assert figures["items"] == 2 and -1 <= figures["alpha"] <= 1
    table = call("agreement", path).stdout
    assert "ann, bob" in table and f"alpha (ordinal): {figures['alpha']:.3f}" in table
    assert (
        ": 3 rows"
        in call("export", path, tmp_path / "l.jsonl", "--form", "ranked", "-r", "ann").stdout
    )


def test_agreement_of_one_rater(tmp_path) -> None:
    with filled(tmp_path, prompt_row(0)) as store:
        store.rank("[b]ann", store.next_item("[b]ann"), [0, 1, 2])
    path = tmp_path / "store.sqlite"
    output = call("agreement", path).stdout
    assert "[b]ann" in output and "alpha: none, no two raters ranked the same prompt" in output
    assert json.loads(call("agreement", path, "--json").stdout)["alpha"] is None


def test_on_a_terminal(tmp_path) -> None:
    """Errors leave the session going, an answer is edited in an editor, Ctrl-C ends it and loses
    nothing.
    """
    filled(tmp_path, *map(prompt_row, range(3))).close()
    path = tmp_path / "store.sqlite"
    fd, inside = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "90", "EDITOR": "sed -i 's/$/ or so/'"}
    environment.pop("VISUAL", None)
    ours = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR))\n"  # Ctrl-C is for us
    code = f"{ours}from fastlm.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, "rank", "judge", str(path), "-r", "ann"],
        stdin=inside, stdout=inside, stderr=inside, start_new_session=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(inside)
    output = ""

    def type_(text: str, *expected: str) -> None:
        nonlocal output
        os.write(fd, text.encode())
        until = time.monotonic() + 60
        for part in expected:
            while part not in output:
                assert time.monotonic() < until, f"{part!r} not in {output!r}"
                if select.select([fd], [], [], 1)[0]:
                    output += os.read(fd, 4096).decode(errors="replace")
                elif text == "\x03":  # readline misses one between its prompt and its wait
                    os.write(fd, b"\x03")
            output = output.partition(part)[2]

    reading = "? for help: "
    try:
        type_("", "1 of 3", "Question 0?", reading)
        type_("9 9 9\r", "each once; got '9 9 9'", reading)
        type_("c 2\r", "stored: a correction of 2", reading)
        type_("1=2\r", "stored: 1 = 2 > 3", "2 of 3", reading)
        type_("b\r", "back", "Question 0?", reading)
        type_("312\r", "stored: 3 > 1 > 2", "2 of 3", reading)
        type_("\x03", "ann: 1 of 3 ranked, 2 to do", "fastlm: interrupted")
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(fd)
    with RankingStore(path) as store:
        assert store.raters() == {"ann": RaterCounts(1, 0, 1)}
        (correction,) = store.comparisons(corrected=True)
        better, worse = (answer[0]["content"] for answer in correction.answers)
        assert better == f"{worse} or so"


def test_an_answer_is_corrected_in_an_editor() -> None:
    assert edit_text("two\nlines", "sed -i s/lines/rows/") == "two\nrows"
    for editor in ("false", "no-such-editor"):
        with pytest.raises(InputError, match=f"a text, got: {editor}: Editing failed"):
            edit_text("x", editor)


# ---- sampling


@pytest.mark.parametrize("template", [True, False])
def test_answers_of_a_model(tmp_path, template) -> None:
    tokenizer = Tokenizer.train(["What is it? Who are you? system user assistant\n" * 9], 300)
    if not template:
        tokenizer.chat_template = None
    shape = {
        "model_type": "llama", "vocab_size": tokenizer.vocab_size, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 128, "eos_token_id": tokenizer.eos_id,
    }  # fmt: skip
    CausalLM(ModelConfig.from_dict(shape), seed=1).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    prompt_rows = [{"prompt": "What is it?"}, {"messages": [{"role": "user", "content": "Who?"}]}]
    prompts = write(tmp_path / "p.jsonl", *prompt_rows)
    arguments = ["-m", tmp_path / "model", "--prompts", prompts, "--num-generations", 3]
    arguments += ["--max-new-tokens", 8]
    output = call("sample", tmp_path / "a.sqlite", *arguments).stdout
    assert "new prompts 2, duplicates 0," in output and output.endswith("are equal 0\n")
    output = call("sample", tmp_path / "a.sqlite", *arguments).stdout
    assert "new prompts 0, duplicates 2," in output
    call("sample", tmp_path / "b.sqlite", *arguments)
    call("sample", tmp_path / "c.sqlite", *arguments, "--seed", 9)
    answers = []
    for name in "abc":
        with RankingStore(tmp_path / f"{name}.sqlite") as store:
            items = [store.item(id, "x") for id in (1, 2)]
        assert [item.prompt[0]["content"] for item in items] == ["What is it?", "Who?"]
        assert all(2 <= len(item.answers) <= 3 for item in items)
        answers.append([item.answers for item in items])
    assert answers[0] == answers[1] != answers[2]
    long = write(tmp_path / "long.jsonl", prompt_rows[0], {"prompt": "Who? " * 99})
    message = refused("sample", tmp_path / "d.sqlite", *arguments, "--prompts", long)
    assert message.startswith(f"{long}, line 2: prompt: expected fewer than the model's 128 tokens")
    with RankingStore(tmp_path / "d.sqlite") as store:
        assert store.progress("x")[1] == 2  # what was sampled before stays
