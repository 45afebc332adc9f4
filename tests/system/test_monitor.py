"""Tests of measurements of answers: numbers without text, in a bounded queue, without delay for the
answers; the dashboard's data and alerts that use them.
"""

import contextlib
import sqlite3
import threading
import time

import numpy as np
import pytest
from canary_app import canary_server, model_folders
from feedback_measurements import CODE, COOKING, MODELS, fill_measurements
from serve_app import HTTP, ask, script, serve_model, tiny_model

from fastlm.errors import InputError
from fastlm.serve.feedback import Feedback
from fastlm.serve.feedback_store import FeedbackStore
from fastlm.serve.monitor import features, recorder
from fastlm.serve.monitor.alerts import AlertConfig, AlertManager, AlertRule, read_alert_config
from fastlm.serve.monitor.answer_judges import JUDGES, REFUSAL_RULES, RUDE_WORDS, Judge
from fastlm.serve.monitor.monitor import MonitorConfig
from fastlm.serve.monitor.prompt_drift import DriftReference, drift
from fastlm.serve.monitor.recorder import Measurement, Recorder, Retention
from fastlm.serve.monitor.summary import RATES, VALUES, value_of
from fastlm.serve.ratings import Rating
from fastlm.serve.tables import MEASUREMENTS

STARS = Rating("stars", "number", "higher", low=1, high=5)
SECRET = "Zanzibar"  # in prompts and answers


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def measurements(store):
    with store.read() as connection:
        return [
            row._mapping
            for row in connection.execute(MEASUREMENTS.select().order_by(MEASUREMENTS.c.id))
        ]


def make_recorder(store, **options):
    """A recorder that has not been started."""
    defaults = {
        "judges": JUDGES,
        "retention": Retention(),
        "reference": DriftReference(50).rows,
    } | options
    return Recorder(store, **defaults)


def measurement(id="r", at=0.0, **more):
    values = {"response_id": id, "choice": 0, "model": "tiny", "at": at, "status": 200}
    return Measurement(values | more, "a prompt", 1, "an answer")


def test_every_answer_is_measured_without_its_text(tiny, database_url):
    with FeedbackStore(database_url) as store, serve_model(*tiny, feedback=store) as (url, server):
        refusal = f"I'm sorry, but I cannot help with {SECRET}."
        script(server, refusal, f"{SECRET}, you are an idiot", "Fine", "One", "Two", "Streamed")
        chat = {"model": "tiny", "messages": [{"role": "user", "content": f"{SECRET}? 12"}]}
        first = ask(url, chat).json()
        second = ask(url, chat | {"store": True, "conversation_id": "talk"}).json()
        ask(
            url,
            chat | {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        )
        texts = {
            "model": "tiny",
            "prompt": [SECRET, server.served_model.tokenizer.encode("A")],
            "max_tokens": 9,
        }
        ask(url, texts, "/v1/completions")
        ask(url, chat | {"stream": True})
        assert ask(url, chat | {"temperature": 9}).status_code == 400  # never reached the engine
        assert server.monitor.recorder.flush()
        rows = measurements(store)
        assert [row["response_id"] for row in rows[:2]] == [first["id"], second["id"]]
        assert [row["conversation_id"] for row in rows] == [None, "talk", *[None] * 4]
        assert [row["choice"] for row in rows] == [0, 0, 0, 0, 1, 0]
        assert {row["model"] for row in rows} == {"tiny"} and {r["status"] for r in rows} == {200}
        usage = first["usage"]
        for row in rows:
            assert 0 <= row["queue_seconds"] <= row["first_token_seconds"] <= row["seconds"] < 600
            assert abs(row["at"] - time.time()) < 600
            assert (
                row["refusal_judge"] == REFUSAL_RULES.id and row["toxicity_judge"] == RUDE_WORDS.id
            )
        assert rows[0]["prompt_tokens"] == usage["prompt_tokens"]
        assert rows[0]["new_tokens"] == usage["completion_tokens"]
        assert rows[0]["finish_reason"] == "stop"
        assert [row["refusal"] for row in rows] == [1, 0, 0, 0, 0, 0]
        assert [row["toxicity"] for row in rows] == [0, 0.5, 0, 0, 0, 0]
        # token ids have no features, nor has the second of several choices
        assert [row["features"] is not None for row in rows] == [1, 1, 1, 1, 0, 1]
        assert all(len(r["features"]) == features.SIZE for r in rows if r["features"])
        for row in rows:
            values = [value for value in row.values() if isinstance(value, str | bytes)]
            assert not any(SECRET.encode() in str(value).encode() for value in values)
        with store.write() as connection:  # nobody consented to the first
            connection.exec_driver_sql("DELETE FROM fastlm_responses")
        if database_url.endswith(".sqlite"):
            with store.read() as connection:
                dump = "".join(connection.connection.dbapi_connection.iterdump())
            assert first["id"] in dump and SECRET not in dump


def test_outcomes_that_are_no_answer(tiny, tmp_path):
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(
            *tiny, feedback=store, pause=0.2, engine={"max_queue_size": 1, "max_num_seqs": 1}
        ) as (
            url,
            server,
        ),
    ):
        body = {"model": "tiny", "prompt": "The", "max_tokens": 500, "ignore_eos": True}
        with HTTP.stream("POST", url + "/v1/completions", json=body | {"stream": True}) as response:
            lines = response.iter_lines()  # held: one that is collected closes the connection
            next(lines)
            waiting = threading.Thread(
                target=ask, args=(url, body | {"max_tokens": 1}, "/v1/completions")
            )
            waiting.start()
            until = time.monotonic() + 60
            while not server.served_model.engine.stats().waiting and time.monotonic() < until:
                time.sleep(0.01)
            assert ask(url, body, "/v1/completions").status_code == 429
        waiting.join()

        def fails(*_):
            raise RuntimeError("broken")

        server.served_model.engine.submit = fails
        assert ask(url, body, "/v1/completions").status_code == 500
        assert server.monitor.recorder.flush()
        rows = measurements(store)
        assert sorted(row["status"] for row in rows) == [200, 429, 499, 500]
        bad = [row for row in rows if row["status"] != 200]
        assert all(row["prompt_tokens"] == 1 and row["seconds"] is None for row in bad)
        summary = server.monitor.data("hour")["groups"][0]["summary"]
        assert summary["requests"] == 4 and summary["answers"] == 1
        assert [
            summary[key]["hits"] for key in ("errors", "disconnected", "rejected", "truncated")
        ] == [1, 1, 1, 1]


def test_the_database_goes_and_comes_back(tmp_path, capfd):
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        broken, write = True, store.write

        def writes():
            if broken:
                raise InputError("disk is full")
            return write()

        store.write = writes
        writer = make_recorder(store)
        writer.start()
        writer.put(measurement("first"))
        assert not writer.flush(0.2)
        writer.put(measurement("second"))
        assert writer.counts.database_errors and not writer.counts.written
        broken = False
        assert writer.flush(60)
        assert [row["response_id"] for row in measurements(store)] == ["first", "second"]
        assert (writer.counts.written, writer.counts.dropped) == (2, 0)
        writer.put(measurement("third"))
        writer.close()  # writes what waits
        assert len(measurements(store)) == 3
    assert capfd.readouterr().err.count("the database cannot be used") == 1


def test_measurements_wait_in_a_bounded_queue(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "MAX_QUEUE_SIZE", 10)
    monkeypatch.setattr(recorder, "MAX_CHARACTERS", 1000)
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        writer = make_recorder(store)
        for i in range(25):
            writer.put(measurement(str(i)))
        assert writer.counts.dropped == 15
        writer.start()
        assert writer.flush(60) and len(measurements(store)) == 10
        writer.put(Measurement(measurement().values, "x" * 990, 1, "x" * 11))
        assert writer.counts.dropped == 16
        writer.close()
        off = make_recorder(store, retention=Retention(rows=0))
        off.put(measurement())
        assert off.counts.dropped == 0 and len(off._queue) == 0

        def fails(_):
            raise RuntimeError("a judge that fails")

        bad = make_recorder(store, judges=[Judge("toxicity", "bad", "1", fails, "")])
        bad.start()
        bad.put(measurement())
        assert bad.flush(60) and bad.counts.judge_errors == 1
        assert measurements(store)[-1]["toxicity"] is None and measurements(store)[-1]["features"]
        bad.close()


def test_old_measures_go_and_those_of_the_reference_stay_without_names(database_url):
    now = time.time()
    with FeedbackStore(database_url) as store:
        fill_measurements(store, 300, days=10, now=now)
        writer = make_recorder(store, retention=Retention(days=2, rows=40))
        with store.read() as connection:
            reference_rows = connection.execute(
                MEASUREMENTS.select().where(DriftReference(50).rows(connection))
            ).all()
        assert sum(row.features is not None for row in reference_rows) == 50
        deleted = writer.sweep(now)
        rows = measurements(store)
        assert deleted == 300 - len(rows) == 300 - 40 - len(reference_rows)
        old = rows[: len(reference_rows)]
        assert [row["features"] for row in old] == [row.features for row in reference_rows]
        assert all(row["response_id"] is None for row in old)
        assert all(
            row["at"] > now - 2 * 86400 and row["response_id"]
            for row in rows[len(reference_rows) :]
        )
        assert writer.sweep(now) == 0
        assert (
            make_recorder(store, retention=Retention(days=1)).sweep(now)
            == 300 - deleted - len(reference_rows) - 30
        )
        first, last = rows[0]["at"], rows[9]["at"]  # a period as the reference
        begin, end = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) for at in (first - 1, last + 1)
        )
        period = DriftReference(begin=begin, end=end)
        make_recorder(store, retention=Retention(days=1, rows=1), reference=period.rows).sweep(now)
        assert len(measurements(store)) == 10 + 1


def test_features():
    assert features.decode_features([]).shape == (0, features.SIZE - 1)
    for text in ("", "?", "a" * 10_000, "\ud800", "Ünïcödé 12\n34?", "\0 x"):
        for tokens, turns in ((1, 1), (10**7, 500)):
            row = features.features(text, tokens, turns)
            table = features.decode_features([row, None, b"", b"\x02" + row[1:]])
            assert table.shape == (1, features.SIZE - 1)
            vector = features.feature_vectors(table)
            assert vector.min() >= 0 and vector.max() <= 1
            counts = features.bin_counts(table)
            assert {name: c.sum() for name, c in counts.items()} == dict.fromkeys(counts, 1)
    assert features.features("One two", 2, 1)[11:] == features.features("two ONE", 2, 1)[11:]
    assert features.features("one two", 2, 1) != features.features("three two", 2, 1)


def test_built_in_judges():
    for text, refuses in (
        ("I'm sorry, but I can't help with that.", 1), ("I\u2019m sorry, I can\u2019t do that", 1),
        ("I cannot assist with this.", 1), ("As an AI language model, I cannot do this", 1),
        ("Unfortunately, I am unable to provide that.", 1), ("I can't wait to tell you!", 0),
        ("I will not lie: it is good", 0), ("Bread: " + "x" * 400 + " I cannot help with that", 0),
    ):  # fmt: skip
        assert REFUSAL_RULES.score(text) == refuses, text
    for text, score in (
        ("You are an idiot, go to hell", 0.75), ("A spicy moral lesson", 0), ("", 0),
        ("Shit! " * 5, 1), ("It is spiced with class in Scunthorpe", 0),
    ):  # fmt: skip
        assert RUDE_WORDS.score(text) == score, text
    start = time.process_time()
    for text in ("sorry " * 100_000, "i " * 200_000, "\u2019" * 400_000, "you are " * 50_000):
        assert 0 <= REFUSAL_RULES.score(text) <= 1 and 0 <= RUDE_WORDS.score(text) <= 1
    assert time.process_time() - start < 2


def test_rates_name_their_judge_and_do_not_mix(tiny, tmp_path):
    long = Judge("refusal", "length", "2", lambda text: float(len(text) < 5), "short answers")
    config = MonitorConfig(judges=[long, RUDE_WORDS])
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny, feedback=store, monitoring=config) as (url, server),
    ):
        fill_measurements(store, 40, days=0.01)
        script(server, "No", "A long answer")
        for _ in range(2):
            ask(url, {"model": "tiny", "prompt": "The"}, "/v1/completions")
        assert server.monitor.recorder.flush()
        refusals = server.monitor.data("hour")["groups"][0]["summary"]["refusal"]
        assert (refusals["judge"], refusals["hits"], refusals["n"]) == ("length 2", 1, 2)
        assert refusals["other_judges"] == sum(
            r["refusal_judge"] == REFUSAL_RULES.id for r in measurements(store)
        )


def test_dashboard_data(tiny, database_url):
    config = MonitorConfig([STARS])
    key = "a-key-of-this-server"
    with (
        FeedbackStore(database_url) as store,
        serve_model(*tiny, feedback=store, monitoring=config, keys=[key]) as (url, server),
    ):

        def data(status=200, **query):
            headers = {"authorization": f"Bearer {key}"}
            response = HTTP.get(url + "/dashboard/data", params=query, headers=headers)
            assert response.status_code == status, response.text
            return response.json()

        page = HTTP.get(url + "/dashboard")  # holds no data: open, as the page to chat is
        assert page.status_code == 200 and "script" in page.text
        assert HTTP.get(url + "/dashboard/data").status_code == 401
        for window in ("hour", "day", "week", "all"):
            result = data(window=window)
            assert result["groups"][0]["summary"]["answers"] == 0 and result["models"] == []
            assert result["groups"][0]["summary"]["refusal"]["value"] is None
            assert not result["drift"]["enough_prompts"]
        ids = fill_measurements(store, 1, days=0.001)
        store.add(Feedback(ids[0], metrics=(("stars", 3.0),)))
        with store.read() as connection:
            (row,) = connection.execute(MEASUREMENTS.select()).all()
        assert row.status == 200  # seed 0
        server.monitor._cached.clear()  # what was read serves all who look for five seconds
        result = data(window="all")
        (group,) = result["groups"]
        assert group["summary"]["metrics"]["stars"]["value"] == 3.0
        assert group["summary"]["metrics"]["stars"]["better"] == "higher"
        assert group["summary"]["first_token"]["p95"] == pytest.approx(row.first_token_seconds)
        assert sum(group["lengths"]["new_tokens"]) == 1
        for query, param in (
            ({"window": "year"}, "window"), ({"months": 1}, "months"), ({"begin": "x"}, "end"),
            ({"begin": "x", "end": "y"}, "begin"),
            ({"begin": "2026-02-01", "end": "2026-01-01"}, "end"),
        ):  # fmt: skip
            assert data(400, **query)["error"]["param"] == param
        store.read, read = lambda: (_ for _ in ()).throw(InputError("gone")), store.read
        assert data(503, window="week", begin="2026-01-01", end="2026-01-02")["error"]["code"]
        store.read = read
    with serve_model(*tiny) as (url, _):
        result = HTTP.get(url + "/dashboard/data")
        assert result.status_code == 404 and result.json()["error"]["code"] == "no_feedback"
        assert HTTP.get(url + "/dashboard").status_code == 200


def test_two_models_side_by_side(tmp_path, tiny):
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny, feedback=store, monitoring=MonitorConfig([STARS])) as (_, server),
    ):
        ids = fill_measurements(store, 1200, models=MODELS, words=(COOKING, CODE))
        for i, id in enumerate(ids[:40]):
            store.add(Feedback(id, metrics=(("stars", 5.0 if i % 2 else 1.0),), rater="ann"))
        store.add(Feedback("elsewhere", thumb="up"))
        data = server.monitor.data("day")
        assert [group["model"] for group in data["groups"]] == [None, *MODELS]
        both, old, new = (group["summary"] for group in data["groups"])
        rows = [row for row in measurements(store) if row["status"] == 200]
        assert both["answers"] == len(rows) == old["answers"] + new["answers"]
        times = [row["first_token_seconds"] for row in rows if row["model"] == MODELS[1]]
        assert new["first_token"]["p50"] == pytest.approx(np.median(times))
        assert (old["metrics"]["stars"]["value"], new["metrics"]["stars"]["value"]) == (1, 5)
        assert both["metrics"]["stars"]["value"] == 3 and both["metrics"]["stars"]["low"] < 3
        assert both["thumbs"]["n"] == 51 and old["thumbs"]["n"] == 50 and new["thumbs"]["n"] == 0
        assert data["unmatched"] == 1
        refused = sum(row["refusal"] >= 0.5 for row in rows)
        assert both["refusal"]["hits"] == refused and both["refusal"]["judge"] == REFUSAL_RULES.id
        assert both["refusal"]["low"] < both["refusal"]["value"] < both["refusal"]["high"]
        series = data["groups"][0]["series"]
        minutes = (data["edges"][1] - data["edges"][0]) / 60
        assert sum(series["per_minute"]) * minutes == pytest.approx(len(rows), abs=2)
        assert len(series["per_minute"]) == len(data["edges"]) - 1
        assert len(series["refusal"]) == len(data["rate_edges"]) - 1
        assert data["drift"]["enough_prompts"] and data["drift"]["mmd"]["p"] < 0.01


def test_a_hundred_thousand_answers_are_read_in_bounded_time(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("fastlm.serve.monitor.window.MAX_ROWS", 10_000)  # a tenth
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny, feedback=store) as (_, server),
    ):
        fill_measurements(store, 12_000)
        start = time.process_time()
        data = server.monitor.data("all")
        assert time.process_time() - start < 10  # 0.2 measured
        assert data["truncated"] and data["groups"][0]["summary"]["requests"] == 10_000
        assert data["drift"]["truncated"] and data["drift"]["prompts"] == 5000


def test_drift_is_seen_and_none_is_not(database_url):
    with FeedbackStore(database_url) as store:
        now = time.time()
        fill_measurements(store, 1600, days=2, now=now, words=(COOKING, COOKING))
        same = drift(store, DriftReference(300), now - 86400, now)
        assert same["enough_prompts"] and same["reference_prompts"] == 300
        assert same["mmd"]["p"] > 0.05 and all(f["p"] > 0.05 for f in same["features"])
        fill_measurements(store, 400, days=0.5, now=now, words=(CODE, CODE), seed=1)
        moved = drift(store, DriftReference(300), now - 0.5 * 86400, now)
        assert moved["mmd"]["p"] <= 0.002
        by_name = {f["name"]: f for f in moved["features"]}
        assert by_name["punctuation"]["psi"] > 0.25 and by_name["punctuation"]["p"] < 0.05
        assert by_name["turns"]["p"] > 0.5
        begin, end = (
            time.strftime("%Y-%m-%dT%H:%M", time.gmtime(now - d * 86400)) for d in (1.9, 1)
        )
        period = drift(store, DriftReference(begin=begin, end=end), now - 86400 / 2, now)
        assert period["reference"] == f"{begin} to {end}" and period["mmd"]["p"] <= 0.002
        few = drift(store, DriftReference(300), now + 10, now + 20)
        assert not few["enough_prompts"] and few["features"] == []


def estimate(value, n=100, low=None, high=None):
    return {"value": value, "n": n, "low": low, "high": high}


def make_alert(rule):
    """Return a function that checks the rule with values and returns its changes so far."""
    changes, values = [], []
    alerts = AlertManager(
        (rule,), lambda _: lambda _: values[-1], lambda state: changes.append(state.firing)
    )

    def check(*new_values):
        for value in new_values:
            values.append(value)
            alerts.check(float(len(values)))
        return changes

    return check


def test_alerts_do_not_flap():
    check = make_alert(AlertRule("slow", "first_token_p95", "1h", above=2.0))
    assert (
        check(estimate(1.9), estimate(2.1), estimate(1.9), estimate(2.1)) == []
    )  # never twice in a row
    assert check(estimate(2.2)) == [True]
    assert check(*[estimate(1.9), estimate(2.1)] * 5, estimate(1.9), estimate(1.9)) == [
        True
    ]  # within a tenth
    assert check(estimate(1.7), estimate(1.85), estimate(1.7), estimate(1.7)) == [True, False]
    assert check(estimate(9.0, n=19), estimate(9.0, n=19)) == [True, False]  # of too few answers
    assert (
        check(estimate(9.0), estimate(9.0), estimate(None, n=0), estimate(None, n=0))
        == [True, False] * 2
    )

    check = make_alert(AlertRule("refuses", "refusal", "1h", above=0.2, consecutive_checks=1))
    assert check(estimate(0.3, 10, 0.1, 0.6)) == []  # the interval reaches the bound
    assert check(estimate(0.3, 100, 0.22, 0.4)) == [True]
    assert check(estimate(0.21, 100, 0.14, 0.3)) == [True]
    assert check(estimate(0.19, 100, 0.1, 0.3)) == [True, False]
    check = make_alert(
        AlertRule("disliked", "thumbs", "1d", below=0.5, clear=0.6, consecutive_checks=1)
    )
    assert check(estimate(0.4, 9, 0.2, 0.6), estimate(0.4, 90, 0.3, 0.49)) == [True]
    assert check(estimate(0.55, 90, 0.5, 0.6)) == [True]
    assert check(estimate(0.61, 90, 0.5, 0.7)) == [True, False]


def test_the_noise_of_a_rate_at_its_bound_does_not_fire():
    """Of 500 hours of 200 answers whose true rate is the bound, few fire; twice the bound does."""
    from fastlm.stats.summaries import rate

    rng = np.random.default_rng(0)
    rule = AlertRule("refuses", "refusal", "1h", above=0.1, consecutive_checks=1)
    hits = rng.binomial(200, 0.1, 500)
    assert sum(rule.is_beyond(rate(int(h), 200)) for h in hits) < 25
    assert all(rule.is_beyond(rate(int(h), 200)) for h in rng.binomial(200, 0.25, 100))


def test_rules_of_a_file(tmp_path):
    file = tmp_path / "alerts.toml"
    good = '[[alert]]\nname = "slow"\nmetric = "latency_p95"\nabove = 2\nwindow = "15m"\n'
    period = '[[reference]]\nbegin = "2026-11-01"\nend = "2026-11-08"\n'
    file.write_text(good + period)
    config = read_alert_config(file, [STARS])
    assert config.alerts == (AlertRule("slow", "latency_p95", "15m", above=2.0),)
    assert config.reference.name == "2026-11-01 to 2026-11-08"
    for text, message in (
        (
            good.replace("latency", "lateness"),
            r"line 3: metric: expected one of refusal, .*stars; got",
        ),
        (good.replace("above = 2\n", ""), r"line 1: above: expected this or below, got neither"),
        (good + "below = 1\n", r"line 4: above: expected this or below, got both"),
        (good.replace("15m", "15s"), r"line 5: window: expected minutes, hours or days"),
        (good.replace("15m", "91d"), r"line 5: window: expected minutes, hours or days"),
        (good + "\n# clear\nclear = 3\n", r"line 8: clear: expected at most 2, the bound, got 3"),
        (
            good + "consecutive_checks = 0\n",
            r"line 6: consecutive_checks: expected greater than or equal to 1, got 0",
        ),
        (good + "abov = 0\n", r"line 6: abov: unknown key"),
        (good.replace("2", "nan"), r"line 4: above: expected a finite number"),
        (good + good, r"line 7: name: expected each once"),
        (good.replace("latency_p95", "drift_p") + 'model = "x"\n', r"line 6: model: expected none"),
        (period.replace("08", "32"), r"line 3: end: expected a date"),
        (period.replace("08", "01"), r"line 3: end: expected a time after"),
        (period.replace('end = "2026-11-08"\n', ""), r"line 1: end: expected with begin"),
        (period + period, r"line 4: reference: expected at most 1"),
        (
            "[[reference]]\nfirst = 3\n",
            r"line 2: first: expected greater than or equal to 50",
        ),
        (good * 2 + "name =", r"expected TOML, got: "),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message) as raised:
            read_alert_config(file, [STARS])
        assert "\n" not in str(raised.value)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="alerts"):
        read_alert_config(file, [])


def test_an_alert_on_the_dashboard_in_prometheus_and_in_the_log(tiny, tmp_path, capfd):
    alerts = AlertConfig((
        AlertRule("refuses", "refusal", "1d", above=0.02, consecutive_checks=1),
        AlertRule("of another", "refusal", "1d", above=0.02, consecutive_checks=1, model="other"),
        AlertRule("moved", "drift_p", "1d", below=0.01, consecutive_checks=1),
        AlertRule("idle", "per_minute", "1d", below=0.1, consecutive_checks=1),
        AlertRule("stars", "stars", "1d", below=4, consecutive_checks=1),
    ))  # fmt: skip
    config = MonitorConfig([STARS], alerts)
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny, feedback=store, monitoring=config) as (url, server),
    ):
        ids = fill_measurements(store, 1000, words=(COOKING, CODE))
        for i, id in enumerate(ids[:30]):
            store.add(Feedback(id, metrics=(("stars", 1.0 + i % 2),)))
        server.monitor.alerts.check(time.time())
        by_name = {alert["name"]: alert for alert in server.monitor.data("day")["alerts"]}
        firing = {name for name, alert in by_name.items() if alert["firing"]}
        assert firing == {"refuses", "moved", "stars"}
        assert by_name["refuses"]["low"] > 0.02 and by_name["of another"]["value"] is None
        text = HTTP.get(url + "/metrics").text
        assert 'fastlm_alert{name="refuses"} 1.0' in text
        assert 'fastlm_alert{name="idle"} 0.0' in text
        assert 'fastlm_measurements_total{outcome="written"}' in text
        server.monitor.alerts.check(time.time() + 3 * 86400)  # nothing of the last day
        text = HTTP.get(url + "/metrics").text
        assert 'fastlm_alert{name="refuses"} 0.0' in text
        assert 'fastlm_alert{name="idle"} 1.0' in text
    lines = [line for line in capfd.readouterr().err.splitlines() if '"event": "alert"' in line]
    assert sum('"firing": true' in line for line in lines) == 4
    assert sum('"firing": false' in line for line in lines) == 3
    assert any('"name": "refuses"' in line and '"metric": "refusal"' in line for line in lines)


def test_every_metric_of_a_rule_has_a_value(tiny, tmp_path):
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny, feedback=store) as (_, server),
    ):
        fill_measurements(store, 600)
        data = server.monitor.data("day")
        for metric in (*RATES, *VALUES):
            value = value_of(metric, data["groups"][0]["summary"], data["drift"])
            assert value["value"] is not None and value["n"] > 0, metric
            assert (value["low"] is not None) == (metric in RATES), metric


def test_a_server_that_measures_while_another_deletes(tmp_path):
    """`fastlm feedback forget` and a sweep in another process: nothing is lost or stuck."""
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        FeedbackStore(tmp_path / "f.sqlite") as other,
    ):
        writer = make_recorder(store)
        writer.start()
        for i in range(200):
            writer.put(measurement(f"r{i}", at=time.time()))
            if i % 20 == 10:
                other.forget(f"r{i - 5}")
                make_recorder(other).sweep(time.time())
        assert writer.flush(60)
        writer.close()
        assert writer.counts.written == 200 and writer.counts.database_errors == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "f.sqlite")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_canary_is_a_column_of_its_own(tmp_path):
    models = model_folders(tmp_path, "ab")
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        canary_server(
            models["a"], tmp_path / "state", canary=models["b"], store=store, share=0.5
        ) as (url, server),
    ):  # fmt: skip
        answered, old = {}, server.served_model.name
        for i in range(24):
            talk = {"store": True, "conversation_id": f"talk{i}", "max_tokens": 2}
            body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]} | talk
            response = ask(url, body).json()
            answered[response["id"]] = response["model"]
            thumb = "down" if response["model"] == old else "up"
            ask(url, {"response_id": response["id"], "thumb": thumb}, "/v1/feedback")
        assert server.monitor.recorder.flush()
        assert {row["response_id"]: row["model"] for row in measurements(store)} == answered
        data = server.monitor.data("hour")
        names = [group["model"] for group in data["groups"]]
        assert len(names) == 3 and set(names[1:]) == set(answered.values())
        thumbs = {g["model"]: g["summary"]["thumbs"]["value"] for g in data["groups"][1:]}
        assert thumbs == {name: float(name != old) for name in names[1:]}
