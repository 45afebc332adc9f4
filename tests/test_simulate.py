"""Simulated users of a real `fastlm serve`, the feedback that they leave, and what serves next."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from serve_app import tiny_model
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.errors import InputError
from fastlm.loop.promotion import Promotion
from fastlm.loop.served import Served
from fastlm.loop.simulate import DATABASE, LOG, Simulate
from fastlm.loop.simulated import Asked, opinions, people
from fastlm.loop.stage import Feedback
from fastlm.model.reward_model import RewardModel
from fastlm.runs.recipe import load_recipe
from fastlm.runs.run import run_recipe
from fastlm.serve.feedback import FeedbackStore

RECIPES = Path(__file__).parent.parent / "recipes"
OPTIONS = {"limit": 24, "users": 6, "max_new_tokens": 8, "consent": 0.8, "clients": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a chat model, a reward model and questions with reference answers."""
    folder = tmp_path_factory.mktemp("made")
    model, tokenizer = tiny_model()
    model.save_pretrained(folder / "model")
    tokenizer.save(folder / "model")
    RewardModel.from_causal_lm(model, seed=3).save_pretrained(folder / "rewards")
    tokenizer.save(folder / "rewards")
    rows = [
        {"instruction": f"What is {i} + {i}?", "input": "", "output": f"It is {2 * i}."}
        for i in range(30)
    ]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def said_of(users, count=60, reviews=3):
    asked = [Asked(f"r{i}", ("a", "b"), (i / count, 0.5), f"right {i}") for i in range(count)]
    return opinions(asked, users, reviews=reviews, liked=0.4, seed=1)


def agreement(said):
    found = [one.agrees for one in said if one.agrees is not None]
    return sum(found) / len(found)


def test_users_say_what_the_scores_say_but_for_noise_and_malice():
    honest = said_of(people(10, 0.0, 0.1, seed=1))
    assert 0.85 < agreement(honest) < 0.95
    assert agreement(said_of(people(10, 0.0, 0.0, seed=1))) == 1
    assert {user.kind for user in people(10, 1.0, 0.0, seed=1)} == {"reversed", "random"}
    bad = said_of(people(10, 1.0, 0.0, seed=1))
    assert 0.1 < agreement(bad) < 0.4  # 0 of those who say the opposite, a half of the others
    assert agreement(bad) < agreement(said_of(people(10, 0.2, 0.1, seed=1))) < agreement(honest)
    raters = {}
    for one in honest:
        raters.setdefault(one.body["response_id"], set()).add(one.body["rater"])
    assert Counter(map(len, raters.values())).most_common(1)[0][0] >= 3
    kinds = Counter(one.kind for one in honest)
    assert kinds["pick"] and kinds["thumb"] and kinds["correction"]
    for one in honest:
        if one.kind == "correction":  # only of whoever asked, and the right one
            number = int(one.body["response_id"][1:])
            assert one.body["rater"] == f"simulated-{number % 10:03d}"
            assert one.body["corrected"] == f"right {number}"
    wrong = [one.body for one in bad if one.kind == "correction"]
    assert wrong and not any(
        body["corrected"].split()[1] == body["response_id"][1:] for body in wrong
    )


def test_a_recipe_from_the_served_model_to_rows(made, tmp_path):
    recipe = tmp_path / "simulated.toml"
    options = "\n".join(f"{key} = {value}" for key, value in OPTIONS.items())
    recipe.write_text(f"""
name = "simulated"
[[stage]]
kind = "simulate"
model = "{made}/model"
reward_model = "{made}/rewards"
data = ["{made}/asked.jsonl"]
{options}
[[stage]]
kind = "feedback"
""")
    summary = run_recipe(recipe, tmp_path / "run")
    database = tmp_path / "run" / "simulate" / DATABASE
    left = database.read_bytes()
    run_recipe(recipe, tmp_path / "run")  # the feedback has read it, and nothing runs again
    assert database.read_bytes() == left
    told, rows = summary["stages"]["simulate"], summary["stages"]["feedback"]["rows"]
    assert told["questions"] == 24 and told["errors"] == 0
    assert told["requests"] == 24 + sum(told["kinds"].values())
    assert 0 < told["seconds_p50"] <= told["seconds_p99"] and told["tokens_per_second"] > 0
    assert 24 < told["tokens"] <= 2 * 8 * 24
    liked = told["liked"]
    assert liked["low"] <= liked["value"] <= liked["high"] and liked["n"] == told["kinds"]["thumb"]
    with FeedbackStore(database) as store:
        counts = store.counts()
        assert counts["answers"] == told["consented"] < 24
        assert len({one.rater for one in store.opinions()}) == 6
    assert counts["corrected"] == told["kinds"]["correction"]
    assert rows["train"]["preferences"] > 5 and rows["train"]["kto"] > 5
    corrected = (tmp_path / "run" / "feedback" / "train" / "sft.jsonl").read_text()
    assert "It is " in corrected
    page = (tmp_path / "run" / "report.html").read_text()
    assert "No person said any of this" in page and "--until simulate" in page


def test_killed_and_run_again_it_ends_right(made, tmp_path):
    words = ["feedback", "simulate", str(made / "asked.jsonl"), "--model", str(made / "model")]
    words += ["--reward-model", str(made / "rewards"), "--out", str(tmp_path)]
    words += [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
    process = subprocess.Popen([sys.executable, "-P", "-m", "fastlm", *words, "--threads", "1"])
    log, until = tmp_path / LOG, time.monotonic() + 120
    while not (log.exists() and '"event": "ready"' in log.read_text()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    (server,) = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while os.path.exists(f"/proc/{server}"):  # nobody is left to end it
        assert time.monotonic() < until
        time.sleep(0.02)
    stage = Simulate(data=(str(made / "asked.jsonl"),), **OPTIONS)
    given = {"model": made / "model", "reward_model": made / "rewards"}
    again = stage(tmp_path, **given)
    with FeedbackStore(tmp_path / DATABASE) as store:
        assert store.counts()["answers"] == again["consented"]  # nothing of the first start
        opinions = [(one.rater, one.thumb, one.corrected) for one in store.opinions()]
    assert len(opinions) == sum(again["kinds"].values())
    # what a server of its own says depends on seeds alone
    fresh = stage(tmp_path / "fresh", **given)
    with FeedbackStore(tmp_path / "fresh" / DATABASE) as store:
        assert [(one.rater, one.thumb, one.corrected) for one in store.opinions()] == opinions
    for key in ("kinds", "liked", "score", "agreement", "tokens", "consented"):
        assert fresh[key] == again[key]


def children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def test_a_server_that_dies_is_one_line(made, tmp_path, monkeypatch):
    stage = Simulate(data=(str(made / "asked.jsonl"),), **OPTIONS)
    given = {"model": made / "model", "reward_model": made / "rewards"}
    post = Served.post

    def dies(self, path, body):
        self.process.kill()
        return post(self, path, body)

    monkeypatch.setattr(Served, "post", dies)
    with pytest.raises(InputError, match="the server ended with status -9: it said nothing"):
        stage(tmp_path / "dies", **given)
    (tmp_path / "empty").mkdir()
    words = ["feedback", "simulate", str(made / "asked.jsonl"), "--model", str(tmp_path / "empty")]
    words += ["--reward-model", str(made / "rewards"), "--out", str(tmp_path / "none")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "config.json" in done.stderr
    assert done.stderr.startswith("fastlm: the server ended with status 2:")
    assert len(done.stderr.splitlines()) == 1


def test_what_cannot_work_is_refused(made):
    good = {"data": (str(made / "asked.jsonl"),)}
    for wrong, name in (
        ({"data": ()}, "data"), ({"users": 1}, "users"), ({"noise": 1.5}, "noise"),
        ({"malicious": -0.1}, "malicious"), ({"temperature": 0.0}, "temperature"),
        ({"reviews": -1}, "reviews"), ({"limit": 0}, "limit"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^{name}: wanted"):
            Simulate(**{**good, **wrong}).check()
    with pytest.raises(InputError, match=r"^database: wanted at least one"):
        Feedback()("rows")


def decision(folder, promoted):
    gates = [{"score": "winrate.rate", "passed": promoted, "why": "winrate.rate: wanted more"}]
    (folder / "decision.json").write_text(json.dumps({"promoted": promoted, "gates": gates}))
    return folder / "decision.json"


@pytest.mark.parametrize("promoted", [True, False])
def test_the_gate_decides_which_model_serves_next(made, tmp_path, promoted):
    new = tmp_path / "new"
    model, tokenizer = tiny_model(seed=2)
    model.save_pretrained(new)
    tokenizer.save(new)
    old = made / "model"
    stage, given = Promotion(), {"new": new, "old": old, "decision": decision(tmp_path, promoted)}
    job = stage.job(tmp_path / "out", **given)
    result = stage.run(job)
    assert result["promoted"] is promoted and bool(result["failed"]) is not promoted
    taken, other = (new, old) if promoted else (old, new)
    served = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    assert served == (taken / "model.safetensors").read_bytes()
    assert served != (other / "model.safetensors").read_bytes()
    assert ("was promoted" in stage.report(job, result).note) is promoted
    # the other way round, over what is there
    again = stage(tmp_path / "out", **given | {"decision": decision(tmp_path, not promoted)})
    assert again["serves"] == str(other)
    served = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    assert served == (other / "model.safetensors").read_bytes()
    (tmp_path / "decision.json").write_text('{"promoted": "yes"}')
    with pytest.raises(InputError, match="decision: wanted what fastlm gate writes"):
        stage(tmp_path / "out", **given)


def test_the_full_recipe_closes_the_circle():
    sets = [
        f'{name}.gates="{RECIPES / "gates" / file}"'
        for name, file in (("gate", "full.toml"), ("gate-next", "full_next.toml"))
    ]
    recipe = load_recipe(RECIPES / "full.toml", sets)
    steps = {step.name: step.inputs for step in recipe.steps}
    assert steps["simulate"] == {"model": ("quantize",), "reward_model": ("reward",)}
    assert steps["feedback"]["opinions"] == ("simulate",)
    assert steps["dpo"]["feedback"] == steps["judge"]["feedback"] == ("feedback",)
    assert steps["gate"]["scores"] == ("answers", "safety")
    assert steps["promotion"]["decision"] == ("gate-next",)
    assert steps["next"]["model"] == ("promotion",) and recipe.steps[-1].name == "next"
    for name in ("sft", "reward", "ppo"):  # they stand above the feedback
        assert steps[name].get("feedback", ()) == ()
