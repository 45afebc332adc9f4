"""A canary: the conversations that it gets, the outcomes that count, and the decisions."""

import asyncio
import hashlib
import json
import re
import shutil
import sqlite3
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from canary_app import DEFAULTS, canary_server, model_folders
from serve_app import HTTP, ask

from fastlm.errors import InputError
from fastlm.serve import ratings
from fastlm.serve.canary import decision as decisions
from fastlm.serve.canary.canary import CanaryExperiment
from fastlm.serve.canary.canary_store import CanaryStore
from fastlm.serve.canary.decision import Variant
from fastlm.serve.feedback import Feedback, StoredResponse
from fastlm.serve.feedback_store import FeedbackStore
from fastlm.serve.monitor.monitor import MonitorConfig
from fastlm.serve.ratings import Rating
from fastlm.serve.state import read_state
from fastlm.stats.latency import PairCounts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return model_folders(tmp_path_factory.mktemp("models"), "ab")


@contextmanager
def canary_trial(models, folder, **options):
    """Serve a model with a canary, which gets half of the conversations by default; yield (URL,
    server).
    """
    with FeedbackStore(folder / "feedback.sqlite") as store:
        options = {"share": 0.5, **options}
        with canary_server(
            models["a"], folder / "state.json", canary=models["b"], store=store, **options
        ) as (url, server):
            yield url, server


def chat(url, text, model="tiny", path="/v1/chat/completions", **fields):
    body = {
        "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 3,
        "ignore_eos": True, **fields,
    }  # fmt: skip
    response = ask(url, body, path)
    assert response.status_code == 200, response.text
    return response.json()


def give_thumb(url, id, thumb, **fields):
    feedback = {"response_id": id, "thumb": thumb, **fields}
    assert ask(url, feedback, "/v1/feedback").status_code == 200


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def status(url):
    return HTTP.get(url + "/v1/canary").json()


def test_a_conversation_stays_with_its_model(models, tmp_path):
    with canary_trial(models, tmp_path, share=0.3, metric="stop", max_outcomes=10**6) as (
        url,
        server,
    ):
        old, new = server.served_model.name, server.models.experiment.served_model.name
        names = [m["id"] for m in HTTP.get(url + "/v1/models").json()["data"]]
        assert names == ["tiny", old, new] and len(set(names)) == 3
        first = {f"Hi {i}": chat(url, f"Hi {i}")["model"] for i in range(40)}
        assert 3 <= list(first.values()).count(new) <= 24 and set(first.values()) == {old, new}
        for text, model in first.items():  # the next turn
            talk = [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "Yes"},
                {"role": "user", "content": "And?"},
            ]
            assert chat(url, "", messages=talk)["model"] == model
        options = {"store": True, "conversation_id": "talk"}
        assert len({chat(url, f"Hi {i}", **options)["model"] for i in range(6)}) == 1
        mine = next(text for text, model in first.items() if model == new)
        for name in (old, new):  # the client names the model
            assert chat(url, mine, model=name)["model"] == name
        # a conversation counts once, and not at all if its client named the model
        counts = server.models.experiment.arms
        assert counts["old"].outcomes + counts["new"].outcomes == 41
        assert counts["old"].answers + counts["new"].answers == 40 + 40 + 6
        # embeddings, and requests with token ids if the vocabularies differ, use the old model
        for i in range(10):
            body = {"model": "tiny", "input": f"text {i}"}
            assert ask(url, body, "/v1/embeddings").json()["model"] == old
        server.models.experiment.same_vocabulary = False
        assert chat(url, mine, stop_token_ids=[5])["model"] == old
        assert chat(url, mine)["model"] == new
        stream = ask(url, {
            "model": "tiny", "messages": [{"role": "user", "content": mine}], "max_tokens": 2,
            "stream": True,
        })  # fmt: skip
        assert json.loads(stream.text.split("\n\n")[0][6:])["model"] == new
        # the old model answers what the canary refuses; this counts as an error of the canary
        server.models.experiment.served_model.context_limit = (
            server.models.experiment.served_model.prompt_encoder.context_limit
        ) = 8
        assert chat(url, mine)["model"] == old
        assert server.models.experiment.arms["new"].errors == 1
        response = ask(url, {"model": new, "messages": [{"role": "user", "content": mine}]})
        assert response.status_code == 400


def test_thumbs_promote_and_late_thumbs_count_for_the_model_that_answered(
    models, tmp_path, monkeypatch
):
    in_loop, compare = [], decisions.sequential.compare_rates

    def recorded(*counts):
        with suppress(RuntimeError):  # in a thread without a loop
            in_loop.append(asyncio.get_running_loop())
        return compare(*counts)

    monkeypatch.setattr(decisions.sequential, "compare_rates", recorded)
    with canary_trial(models, tmp_path, alpha=0.2) as (url, server):
        old, new = server.served_model.name, server.models.experiment.served_model.name
        answers = [chat(url, f"Hello {i}") for i in range(60)]
        # their feedback comes after the decision
        late, later = (next(a for a in answers if a["model"] == name) for name in (old, new))
        for answer in answers:
            if answer not in (late, later) and status(url)["status"] == "running":
                give_thumb(url, answer["id"], "up" if answer["model"] == new else "down")
                give_thumb(url, answer["id"], "down")  # the first counts
        give_thumb(url, "made-up", "down")
        wait_until(lambda: server.served_model.name == new)
        state = status(url)
        assert (state["status"], state["model"], state["canary"]) == ("promoted", new, new)
        assert state["arms"]["new"]["successes"] == state["arms"]["new"]["outcomes"] > 0
        # the rule and the numbers of the decision, which explain such an early promotion
        rule = {"name": "superiority", "test": "outcome", "bound": 0.0, "alpha": 0.2}
        after = state["rule"]["after"]  # one or two outcomes may have arrived since
        assert state["rule"] == {**rule, "metric": "thumb", "after": after}
        assert state["tests"]["outcome"]["low"] > 0
        numbers = re.fullmatch(
            r"thumb: (\d+) of \1 new, 0 of (\d+) old;"
            r" difference \+1\.000 in \[\+0\.\d{3}, \+1\.000\],"
            r" above the bound 0 of the rule 'superiority' at alpha 0\.2",
            state["reason"],
        )
        assert numbers and int(numbers[1]) + int(numbers[2]) == after
        assert state["arms"]["old"]["successes"] == 0
        assert chat(url, "Hello 0")["model"] == new
        before = state["arms"]["old"]["outcomes"]
        give_thumb(url, late["id"], "up")
        wait_until(lambda: status(url)["arms"]["old"]["outcomes"] == before + 1)
        assert status(url)["arms"]["old"]["successes"] == 1
        text = HTTP.get(url + "/metrics").text
        assert 'fastlm_canary{arm="old",kind="successes"} 1.0' in text
        assert "fastlm_canary_share 0.0" in text and not in_loop
        assert 'fastlm_canary_difference{statistic="low",test="outcome"}' in text
        assert f'fastlm_model{{model="{new}",role="current"}} 1.0' in text
    decision = read_state(tmp_path / "state.json").decisions[-1]
    assert decision["action"] == "promote" and decision["tests"]["outcome"]["low"] > 0
    assert (decision["rule"], decision["reason"]) == (state["rule"], state["reason"])
    # the next start serves the promoted model; `fastlm rollback` returns to the old one
    with canary_trial(models, tmp_path) as (url, server):
        assert server.served_model.name == new and server.models.experiment is None
        assert ask(url, {}, "/v1/admin/rollback").status_code == 200
        assert chat(url, "Hello 0")["model"] == old
    with canary_trial(models, tmp_path) as (url, server):  # no trial begins again
        assert server.served_model.name == old and server.models.experiment is None
        counts = server.manager.store.counts(decision["experiment"])["new"]
        give_thumb(url, later["id"], "up")
        after = server.manager.store.counts(decision["experiment"])["new"]
        assert after.successes == counts.successes + 1


@pytest.mark.parametrize("fails", ["experiment", "store"])
def test_feedback_sent_again_is_stored_and_counted_once(models, tmp_path, monkeypatch, fails):
    with canary_trial(models, tmp_path) as (url, server):
        answer = chat(url, "Hello")
        owner, name = {
            "experiment": (server.manager, "record_feedback"), "store": (server.feedback, "add"),
        }[fails]  # fmt: skip
        original = getattr(owner, name)
        errors = [InputError("no database")]

        def broken(feedback):
            if errors:
                raise errors.pop()
            return original(feedback)

        monkeypatch.setattr(owner, name, broken)
        body = {"response_id": answer["id"], "thumb": "up"}
        assert [ask(url, body, "/v1/feedback").status_code for _ in range(2)] == [503, 200]
        assert len(server.feedback.all_feedback()) == 1
        arms = server.manager.store.counts(server.manager.experiment.id)
        assert sum(arm.outcomes for arm in arms.values()) == 1


def test_picks(models, tmp_path):
    with canary_trial(models, tmp_path, metric="pick", alpha=1e-9) as (url, server):
        old, new = server.served_model.name, server.models.experiment.served_model.name
        # a hash assigns each to an arm: with a probability of 1 in 500,000, all to one
        for i in range(20):
            better, worse = (chat(url, f"Hi {i}", model=name)["id"] for name in (new, old))
            body = {"response_id": better, "preferred_over": [{"response_id": worse}]}
            for _ in range(2):  # the second one does not count
                assert ask(url, body, "/v1/feedback").status_code == 200
        both = [chat(url, "Hi", model=new)["id"] for _ in range(2)]  # no outcome
        body = {"response_id": both[0], "preferred_over": [{"response_id": both[1]}]}
        assert ask(url, body, "/v1/feedback").status_code == 200
        arms = status(url)["arms"]
        assert arms["old"]["outcomes"] + arms["new"]["outcomes"] == 20
        assert arms["new"]["successes"] == arms["new"]["outcomes"] > 0
        assert arms["old"]["successes"] == 0 < arms["old"]["outcomes"]


def test_a_declared_number_decides(models, tmp_path):
    effort = Rating("effort", "number", "lower", low=1, high=5)
    options = {"metric": "effort", "rating": effort, "monitoring": MonitorConfig([effort])}
    with canary_trial(models, tmp_path, alpha=0.2, **options) as (url, server):
        new = server.models.experiment.served_model.name

        def rate(answer, value):
            body = {"response_id": answer["id"], "metrics": {"effort": value}}
            assert ask(url, body, "/v1/feedback").status_code == 200

        rate(chat(url, "Between"), 3)  # in the middle of the range: no outcome
        give_thumb(url, chat(url, "Thumb")["id"], "up")
        assert [arm["outcomes"] for arm in status(url)["arms"].values()] == [0, 0]
        for i in range(60):
            if status(url)["status"] == "running":
                answer = chat(url, f"Hello {i}")
                rate(answer, 2 if answer["model"] == new else 4)
        wait_until(lambda: server.served_model.name == new)
        state = status(url)
        assert state["reason"].startswith("effort: ") and "difference +1.000 in" in state["reason"]
        assert state["arms"]["old"]["successes"] == 0 < state["arms"]["old"]["outcomes"]
        text = HTTP.get(url + "/metrics").text
    board = json.loads(Path(ratings.__file__).with_name("grafana.json").read_text())
    queries = "".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    for name in ("canary", "canary_difference", "model_answers_total", "model_decisions_total"):
        assert re.search(rf"fastlm_{name}\b", queries) and f"fastlm_{name}{{" in text
    with pytest.raises(InputError, match="canary_metric: expected thumb, pick, stop, or a"):
        replace(DEFAULTS, metric="stars", rating=effort)


def test_a_canary_that_fails_is_rolled_back(models, tmp_path):
    with canary_trial(models, tmp_path, max_outcomes=10**6) as (url, server):
        canary = server.models.experiment.served_model

        def broken(*_):
            raise RuntimeError("broken")

        canary.engine._compute = broken
        for i in range(60):
            body = {"model": "tiny", "messages": [{"role": "user", "content": f"Hi {i}"}]}
            assert ask(url, {**body, "max_tokens": 2}).status_code in (200, 500)
            if server.models.experiment is None:
                break
        wait_until(lambda: server.models.experiment is None)
        state, reference = status(url), weakref.ref(canary.model)
        del canary, broken
        wait_until(lambda: reference() is None)  # its memory is returned
        assert state["status"] == "rolled back" and state["reason"].startswith("errors: ")
        assert (
            state["rule"]["name"] == "fewer errors"
            and " of the rule 'fewer errors'" in state["reason"]
        )
        assert state["arms"]["new"]["errors"] == state["arms"]["new"]["answers"] < 30
        assert server.served_model.path == str(models["a"])
        assert all(chat(url, f"Hi {i}")["model"] == server.served_model.name for i in range(20))


def experiment(store, name, decide=None, **config):
    return CanaryExperiment(
        SimpleNamespace(name="new"), replace(DEFAULTS, **config), store, name, decide=decide
    )


def test_a_slow_canary_is_rolled_back_and_load_bursts_are_not_decisive(tmp_path):
    async def run(name, slower, count):
        verdicts = []

        async def decide(trial, verdict):
            verdicts.append(verdict)
            trial.end(verdict)

        trial = experiment(store, name, share=0.5, decide=decide)
        watching = asyncio.create_task(trial.watch())
        for i in range(count):
            busy = 5 if i % 60 < 25 else 1  # in bursts each answer takes five times as long
            arm = "new" if trial.is_canary(f"{i}") else "old"
            pace = 0.01 * busy * (slower if arm == "new" else 1) * (1 + i % 5 / 10)
            for turn in range(
                2 if i % 10 == 0 else 1
            ):  # a second answer of a conversation does not count
                await trial.record_response(
                    f"{name}-{i}-{turn}", f"{i}", None, arm, arm, assigned=True, seconds=pace
                )
        if slower > 2:
            await watching
        else:
            watching.cancel()
        return trial, verdicts

    with FeedbackStore(tmp_path / "feedback.sqlite") as feedback:
        store = CanaryStore(feedback)
        trial, (verdict,) = asyncio.run(run("three times", 3, 140))
        pairs = trial.paces.counts
        assert verdict.action == "roll back" and verdict.rule.name == "as fast"
        assert verdict.reason.startswith("slow answers: the new model was slower in ")
        assert verdict.reason.endswith("above the bound 0.25 of the rule 'as fast' at alpha 0.05")
        assert 10 < verdict.rule.after <= pairs.total < 60 and pairs.new > 0.9 * pairs.total
        trial, verdicts = asyncio.run(run("a little", 1.3, 140))
        pairs = trial.paces.counts
        assert not verdicts and 20 < pairs.total < 60  # one pair of 4 conversations
        restarted = experiment(store, "a little")
        assert restarted.paces.counts == pairs  # after a restart


def test_counts_survive_a_restart(models, tmp_path):
    with canary_trial(models, tmp_path, max_outcomes=10**6) as (url, server):
        for i in range(25):
            answer = chat(url, f"Hi {i}")
            if i % 2:
                give_thumb(url, answer["id"], "up" if i % 3 else "down")
        before, name = status(url), server.models.experiment.id
        assert sum(arm["outcomes"] for arm in before["arms"].values()) == 12
        first = {f"Hi {i}": chat(url, f"Hi {i}")["model"] for i in range(10)}
        before = status(url)
    with canary_trial(models, tmp_path, max_outcomes=10**6) as (url, server):
        assert server.models.experiment.id == name
        after = status(url)
        assert after["arms"] == before["arms"] and after["tests"] == before["tests"]
        assert {text: chat(url, text)["model"] for text in first} == first
        assert after["slower"] == before["slower"]
    folder = tmp_path / "other"
    shutil.copytree(tmp_path, folder)
    with canary_trial(models, folder, metric="stop") as (
        url,
        server,
    ):  # other outcomes: another trial
        assert server.models.experiment.id != name
    with canary_trial(models, tmp_path, max_outcomes=10**6) as (url, server):
        response = ask(url, {"model": str(models["a"])}, "/v1/admin/promote")
        assert response.status_code == 400 and "expected the canary" in response.text
        assert ask(url, {}, "/v1/admin/rollback").json()["status"] == "rolled back"
        assert {chat(url, text)["model"] for text in first} == {server.served_model.name}
    with pytest.raises(InputError, match="canary: expected another model"):
        with canary_trial({"a": models["a"], "b": models["a"]}, tmp_path):
            pass


def test_a_database_that_hangs_delays_no_answer(models, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.serve.canary.canary.WRITE_SECONDS", 0.05)
    with canary_trial(models, tmp_path, max_outcomes=10**6) as (url, server):
        other = sqlite3.connect(tmp_path / "feedback.sqlite", isolation_level=None)
        other.execute("begin immediate")  # longer than the answers take
        threads = [
            threading.Thread(target=give_thumb, args=(url, f"id-{i}", "up"), daemon=True)
            for i in range(50)  # more than the threads of answers
        ]
        for thread in threads:
            thread.start()
        for i in range(20):
            chat(url, f"Hi {i}")
        assert sum(arm.answers for arm in server.models.experiment.arms.values()) == 0
        other.execute("rollback")
        wait_until(lambda: sum(arm.answers for arm in server.models.experiment.arms.values()) == 20)
        other.close()
        for thread in threads:
            thread.join()


def test_forgotten_responses_count_without_ids(models, tmp_path):
    with canary_trial(models, tmp_path, max_outcomes=10**6) as (url, server):
        talk = {"store": True, "conversation_id": "private-talk"}
        for text in ("Hi", "And?"):
            stored_id = chat(url, text, **talk)["id"]
        other = chat(url, "Hi")["id"]
        give_thumb(url, stored_id, "up")
        give_thumb(url, other, "down")
        store, name = server.feedback, server.models.experiment.id
        before = server.manager.store.counts(name)
        assert server.monitor.recorder.flush()
        unit = hashlib.sha256(b"id\0private-talk").hexdigest()
        assert stored_id in all_rows(store)
        assert unit not in all_rows(
            store
        )  # guesses cannot be tested without the state file's secret
        with store.read() as connection:
            (mine,) = connection.exec_driver_sql(
                f"select unit from fastlm_canary_answers where response_id = '{stored_id}'"
            ).one()
        assert store.forget("private-talk") == 2 + 1 + 2 + 2  # answers, thumb, measures, trial
        rows = all_rows(store)
        assert not any(word in rows for word in ("private-talk", stored_id, mine)) and other in rows
        assert server.manager.store.counts(name) == before
        # a response that is forgotten while it is being stored
        late = StoredResponse(
            "late", "tiny", [{"role": "user", "content": "secret"}], [[]], None, "talk-2"
        )
        blocked, blocked_results = store._is_forgotten, []

        def look(answer):
            blocked_results.append(blocked(answer))
            if len(blocked_results) == 1:
                store.forget("talk-2")
            return blocked_results[-1]

        store.add(Feedback("late", "talk-2", thumb="up"))
        store._is_forgotten = look
        assert not store.add_response(late) and "secret" not in all_rows(store)
        assert blocked_results == [False, True]


def all_rows(store):
    with store.read() as connection:
        names = [row[0] for row in connection.exec_driver_sql(
            "select name from sqlite_master where type = 'table' and name != 'fastlm_withdrawn'"
        )]  # fmt: skip
        return str([connection.exec_driver_sql(f"select * from {n}").all() for n in names])


def test_decisions_from_counts():
    def arms(a, b, old=None, new=None):
        return {"old": Variant(*a, **(old or {})), "new": Variant(*b, **(new or {}))}

    def decide(arms, strict, pairs=None):
        return decisions.evaluate_counts(arms, pairs or PairCounts(), strict)

    strict, lenient = DEFAULTS, replace(DEFAULTS, rule="non-inferiority", margin=0.1)
    assert decide(arms((0, 0), (0, 0)), strict) is None
    assert decide(arms((50, 25), (10, 5)), strict) is None
    better, worse = arms((900, 450), (300, 225)), arms((900, 450), (300, 75))
    assert decide(better, strict).action == decide(better, lenient).action == "promote"
    assert decide(worse, strict).action == decide(worse, lenient).action == "roll back"
    alike = arms((9000, 4500), (2000, 1000))
    assert decide(alike, lenient).action == "promote"
    assert decide(alike, strict).action == "keep"  # 11,000 outcomes
    test = decisions.comparisons(better, PairCounts(), strict)["outcome"]
    assert 0 < test.low < test.difference == 0.25 < test.high < 0.5 and test.p < 0.05
    # the guards come before the outcomes
    failing = arms((900, 450), (100, 75), new={"answers": 20, "errors": 9}, old={"answers": 180})
    assert decide(failing, strict).action == "roll back"
    assert decide(failing, strict).reason.startswith("errors: ")
    slow = decide(arms((9, 4), (9, 4)), strict, PairCounts(new=27, old=0, neither=3))
    assert slow.reason.startswith("slow answers: ") and slow.rule.test == "slow"
    assert decide(arms((9, 4), (9, 4)), strict, PairCounts(new=60, old=30, neither=210)) is None
    assert decide(worse, lenient).rule.bound == -0.1 and decide(alike, strict).rule.after == 11_000
    for wrong in (
        {"share": 0}, {"share": 1.0}, {"metric": "fun"}, {"rule": "x"}, {"margin": 0},
        {"alpha": float("nan")}, {"max_outcomes": 0},
    ):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(wrong))):
            replace(DEFAULTS, **wrong)


def test_a_share_of_the_conversations(tmp_path):
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        trial = experiment(CanaryStore(store), "x", share=0.1)
        count = sum(trial.is_canary(str(i)) for i in range(20_000))
        assert 1_850 < count < 2_150  # 3.5 standard deviations
        other = experiment(CanaryStore(store), "y", share=0.1)
        both = sum(trial.is_canary(str(i)) and other.is_canary(str(i)) for i in range(20_000))
        assert 140 < both < 260  # each trial has a hash of its own
