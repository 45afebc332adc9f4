"""Simulated users of a real `fastlm serve`, the feedback that they leave, and what serves next."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from paths import ROOT
from serve_app import tiny_model
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.errors import InputError
from fastlm.evals.suite import model_id, model_ids
from fastlm.feedback.gate import Gate
from fastlm.feedback.local_server import MODEL_NAME, LocalServer, run_local_server
from fastlm.feedback.promotion import Promotion
from fastlm.feedback.simulate import DATABASE, LOG, Simulate
from fastlm.feedback.simulated_users import AnsweredQuestion, simulate_feedback, simulate_users
from fastlm.feedback.stage import FeedbackBuild
from fastlm.feedback.winrate import WinRate
from fastlm.model.reward_model import RewardModel
from fastlm.pipeline.stage import Input
from fastlm.quant.stage import Quantize
from fastlm.serve.feedback_store import FeedbackStore
from fastlm.stages import load_recipe, run_recipe

RECIPES = ROOT / "recipes"
OPTIONS = {"limit": 24, "users": 6, "max_new_tokens": 8, "consent_rate": 0.8, "clients": 4}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
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


def feedback_of(users, count=60, reviewers=3):
    questions = [
        AnsweredQuestion(f"r{i}", ("a", "b"), (i / count, 0.5), f"right {i}") for i in range(count)
    ]
    return simulate_feedback(questions, users, reviewers=reviewers, thumb_threshold=0.4, seed=1)


def agreement(feedback):
    agrees = [item.agrees for item in feedback if item.agrees is not None]
    return sum(agrees) / len(agrees)


def test_users_say_what_the_scores_say_but_for_noise_and_malice():
    honest = feedback_of(simulate_users(10, 0.0, 0.1, seed=1))
    assert 0.85 < agreement(honest) < 0.95
    assert agreement(feedback_of(simulate_users(10, 0.0, 0.0, seed=1))) == 1
    assert {user.kind for user in simulate_users(10, 1.0, 0.0, seed=1)} == {"reversed", "random"}
    bad = feedback_of(simulate_users(10, 1.0, 0.0, seed=1))
    assert 0.1 < agreement(bad) < 0.4  # 0 of those who say the opposite, a half of the others
    assert (
        agreement(bad)
        < agreement(feedback_of(simulate_users(10, 0.2, 0.1, seed=1)))
        < agreement(honest)
    )
    raters = {}
    for item in honest:
        raters.setdefault(item.body["response_id"], set()).add(item.body["rater"])
    assert Counter(map(len, raters.values())).most_common(1)[0][0] >= 3
    kinds = Counter(item.kind for item in honest)
    assert kinds["pick"] and kinds["thumb"] and kinds["correction"]
    for item in honest:
        if item.kind == "correction":  # only of whoever asked, and the right one
            number = int(item.body["response_id"][1:])
            assert item.body["rater"] == f"simulated-{number % 10:03d}"
            assert item.body["corrected"] == f"right {number}"
    wrong = [item.body for item in bad if item.kind == "correction"]
    assert wrong and not any(
        body["corrected"].split()[1] == body["response_id"][1:] for body in wrong
    )


def corrections(references, malicious, number=200):
    """By question, what those who asked wrote; ``references`` repeat, for ``number`` users."""
    questions = [
        AnsweredQuestion(f"r{i}", ("a", "b"), (0.0, 0.0), text) for i, text in enumerate(references)
    ]
    users, texts = simulate_users(number, malicious, 0.0, seed=1), {}
    for i in range(0, number, len(questions)):
        for item in simulate_feedback(
            questions, users[i:], reviewers=1, thumb_threshold=0.4, seed=i
        ):
            if item.kind == "correction":
                texts.setdefault(item.body["response_id"], set()).add(item.body["corrected"])
    return texts


def test_a_wrong_correction_is_the_reference_of_another_question():
    some = ["right 0", None, "right 2", "", "right 2"]
    assert corrections(some, 0.0) == {"r0": {"right 0"}, "r2": {"right 2"}, "r4": {"right 2"}}
    assert corrections(some, 1.0) == {"r0": {"right 2"}, "r2": {"right 0"}, "r4": {"right 0"}}
    for single in (["right"], [None, "right", ""], ["right", "right"]):
        assert not corrections(single, 1.0)
        assert {text for texts in corrections(single, 0.0).values() for text in texts} == {"right"}


def test_a_recipe_from_the_served_model_to_rows(model_folder, tmp_path):
    recipe = tmp_path / "simulated.toml"
    options = "\n".join(f"{key} = {value}" for key, value in OPTIONS.items())
    recipe.write_text(f"""
name = "simulated"
[[stage]]
kind = "simulate"
model = "{model_folder}/model"
reward_model = "{model_folder}/rewards"
data = ["{model_folder}/asked.jsonl"]
{options}
[[stage]]
kind = "feedback"
""")
    summary = run_recipe(recipe, tmp_path / "run")
    database = tmp_path / "run" / "simulate" / DATABASE
    left = database.read_bytes()
    run_recipe(recipe, tmp_path / "run")  # the feedback has read it, and nothing runs again
    assert database.read_bytes() == left
    result, rows = summary["stages"]["simulate"], summary["stages"]["feedback"]["rows"]
    assert result["questions"] == 24 and result["errors"] == 0
    assert result["requests"] == 24 + sum(result["feedback_counts"].values())
    assert 0 < result["seconds_p50"] <= result["seconds_p99"] and result["tokens_per_second"] > 0
    assert 24 < result["tokens"] <= 2 * 8 * 24
    liked = result["like_rate"]
    assert (
        liked["low"] <= liked["value"] <= liked["high"]
        and liked["n"] == result["feedback_counts"]["thumb"]
    )
    with FeedbackStore(database) as store:
        counts = store.counts()
        assert counts["responses"] == result["consents"] < 24
        assert len({row.rater for row in store.all_feedback()}) == 6
    assert counts["corrected"] == result["feedback_counts"]["correction"]
    assert rows["train"]["preferences"] > 5 and rows["train"]["kto"] > 5
    corrected = (tmp_path / "run" / "feedback" / "train" / "sft.jsonl").read_text()
    assert "It is " in corrected
    page = (tmp_path / "run" / "report.html").read_text()
    assert "No person said any of this" in page and "--until simulate" in page


def test_killed_and_run_again_it_ends_right(model_folder, tmp_path):
    words = [
        "feedback",
        "simulate",
        str(model_folder / "asked.jsonl"),
        "--model",
        str(model_folder / "model"),
    ]
    words += ["--reward-model", str(model_folder / "rewards"), "--out", str(tmp_path)]
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
    stage = Simulate(data=(str(model_folder / "asked.jsonl"),), **OPTIONS)
    inputs = {"model": model_folder / "model", "reward_model": model_folder / "rewards"}
    repeated = stage(tmp_path, **inputs)
    with FeedbackStore(tmp_path / DATABASE) as store:
        assert store.counts()["responses"] == repeated["consents"]  # nothing of the first start
        feedback = [(row.rater, row.thumb, row.corrected) for row in store.all_feedback()]
    assert len(feedback) == sum(repeated["feedback_counts"].values())
    # what a server of its own says depends on seeds alone
    fresh = stage(tmp_path / "fresh", **inputs)
    with FeedbackStore(tmp_path / "fresh" / DATABASE) as store:
        assert [(row.rater, row.thumb, row.corrected) for row in store.all_feedback()] == feedback
    for key in ("feedback_counts", "like_rate", "score", "agreement", "tokens", "consents"):
        assert fresh[key] == repeated[key]


def children(pid):
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            pids.append(int(path.parent.name))
    return pids


def test_a_server_that_dies_is_one_line(model_folder, tmp_path, monkeypatch):
    stage = Simulate(data=(str(model_folder / "asked.jsonl"),), **OPTIONS)
    inputs = {"model": model_folder / "model", "reward_model": model_folder / "rewards"}
    post = LocalServer.post

    def dies(self, path, body):
        self.process.kill()
        return post(self, path, body)

    monkeypatch.setattr(LocalServer, "post", dies)
    with pytest.raises(InputError, match="the server ended with status -9: its log is empty"):
        stage(tmp_path / "dies", **inputs)
    (tmp_path / "empty").mkdir()
    words = [
        "feedback",
        "simulate",
        str(model_folder / "asked.jsonl"),
        "--model",
        str(tmp_path / "empty"),
    ]
    words += ["--reward-model", str(model_folder / "rewards"), "--out", str(tmp_path / "none")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "config.json" in done.stderr
    assert done.stderr.startswith("fastlm: the server ended with status 2:")
    assert len(done.stderr.splitlines()) == 1


def test_the_server_takes_a_key_of_its_own_alone(model_folder, tmp_path, monkeypatch):
    users = "a-key-of-another-server"
    monkeypatch.setenv("FASTLM_API_KEYS", users)
    monkeypatch.setenv("FASTLM_ADMIN_KEYS", "an-admin-key-of-another-server")
    database, log = tmp_path / DATABASE, tmp_path / LOG
    with run_local_server(model_folder / "model", database, log, 1) as server:
        messages = [{"role": "user", "content": "What is 1 + 1?"}]
        body = {"model": MODEL_NAME, "messages": messages, "max_tokens": 2}
        reply = server.post("/v1/chat/completions", body)
        assert reply.status == 200
        feedback = {"response_id": reply.body["id"], "choice": 0, "thumb": "up"}
        for key in (users, "none"):
            assert replace(server, key=key).post("/v1/feedback", feedback).status == 401
        assert server.post("/v1/feedback", feedback).status == 200
        assert server.key not in repr(server)
    # a server refuses admin keys beside no others
    monkeypatch.delenv("FASTLM_API_KEYS")
    with run_local_server(model_folder / "model", database, log, 1) as server:
        assert server.post("/v1/feedback", feedback | {"thumb": "down"}).status == 200


def test_of_equal_questions_the_first_counts(model_folder, tmp_path):
    rows = [
        {"instruction": question, "input": "", "output": answer}
        for question, answer in (("Who?", "Ann."), ("When?", "Now."), ("Who?", "Bob."))
    ]
    (tmp_path / "twice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stage = Simulate(data=(str(tmp_path / "twice.jsonl"), str(model_folder / "asked.jsonl")))
    inputs = {"model": model_folder / "model", "reward_model": model_folder / "rewards"}
    prompts = stage._prompts(stage.context(tmp_path / "out", **inputs))
    written = {prompt.messages[-1]["content"]: prompt.row["output"] for prompt in prompts}
    assert len(prompts) == len(written) == 32
    assert written["Who?"] == "Ann." and written["When?"] == "Now."


def test_what_cannot_work_is_refused(model_folder):
    good = {"data": (str(model_folder / "asked.jsonl"),)}
    for wrong, name in (
        ({"data": ()}, "data"), ({"users": 1}, "users"), ({"noise": 1.5}, "noise"),
        ({"malicious_share": -0.1}, "malicious_share"), ({"temperature": 0.0}, "temperature"),
        ({"reviewers": -1}, "reviewers"), ({"limit": 0}, "limit"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^{name}: expected"):
            Simulate(**{**good, **wrong}).check()
    with pytest.raises(InputError, match=r"^database: expected at least one"):
        FeedbackBuild()("rows")


def decision(folder, promoted):
    gates = [{"score": "winrate.rate", "passed": promoted, "reason": "winrate.rate: expected more"}]
    (folder / "decision.json").write_text(json.dumps({"promoted": promoted, "gates": gates}))
    return folder / "decision.json"


@pytest.mark.parametrize("promoted", [True, False])
def test_the_gate_decides_which_model_serves_next(model_folder, tmp_path, promoted):
    new, old = model_at(tmp_path / "new", 2), model_folder / "model"
    stage, inputs = Promotion(), {"new": new, "old": old, "decision": decision(tmp_path, promoted)}
    ctx = stage.context(tmp_path / "out", **inputs)
    result = stage.run(ctx)
    assert result["promoted"] is promoted and bool(result["failures"]) is not promoted
    selected, other = (new, old) if promoted else (old, new)
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    assert weights == (selected / "model.safetensors").read_bytes()
    assert weights != (other / "model.safetensors").read_bytes()
    assert ("was promoted" in stage.report(ctx, result).note) is promoted
    # the other way round, over what is there
    reversed_ = stage(tmp_path / "out", **inputs | {"decision": decision(tmp_path, not promoted)})
    assert reversed_["served_model"] == str(other)
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    assert weights == (other / "model.safetensors").read_bytes()
    (tmp_path / "decision.json").write_text('{"promoted": "yes"}')
    with pytest.raises(
        InputError, match=r"decision.json: promoted: expected true or false, got 'yes'"
    ):
        stage(tmp_path / "out", **inputs)


def model_at(folder, seed):
    model, tokenizer = tiny_model(seed=seed)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def measured(model_folder, tmp_path_factory):
    """A folder with models old, new and other, and a win rate of the new one against the old."""
    folder = tmp_path_factory.mktemp("measured")
    for seed, name in enumerate(("old", "new", "other")):
        model_at(folder / name, seed)
    stage = WinRate(data=(str(model_folder / "asked.jsonl"),), limit=3, max_new_tokens=4)
    inputs = {"model": folder / "new", "old": folder / "old", "judge": model_folder / "rewards"}
    stage(folder / "winrate", **inputs)
    (folder / "gates.toml").write_text('[[gate]]\nscore = "winrate.rate"\nmin = 0\n')
    return folder


def safety_of(folder, *names):
    """What `fastlm safety` of these models leaves, without its scores."""
    scores = {"models": {name: {"scores": {}} for name in names}}
    scores["ids"] = model_ids([Input(name, str(folder / name)) for name in names])
    return scores


def decide(measured, out, safety_scores=None):
    """The gate's decision by the win rate and ``told``, and what it warned of."""
    scores, warned = [measured / "winrate"], []
    if safety_scores is not None:
        (out / "safety").mkdir(parents=True)
        (out / "safety" / "scores.json").write_text(json.dumps(safety_scores))
        scores.append(out / "safety")
    stage = Gate(gates=str(measured / "gates.toml"))
    ctx = stage.context(out / "gate", scores=scores, on_event=warned.append)
    return stage, ctx, stage.run(ctx), [event["warning"] for event in warned]


def promote(out, **inputs):
    warned = []
    result = Promotion()(out / "next", decision=out / "gate", on_event=warned.append, **inputs)
    return result, [event["warning"] for event in warned]


def test_a_decision_is_about_its_two_models(measured, tmp_path):
    old, new, other = (measured / name for name in ("old", "new", "other"))
    stage, ctx, decided, warned = decide(measured, tmp_path, safety_of(measured, "old", "new"))
    ids = {key: model_id(measured / key) for key in ("old", "new")}
    written = json.loads((tmp_path / "gate" / "decision.json").read_text())
    assert {key: model["id"] for key, model in written["models"].items()} == ids and not warned
    assert stage.report(ctx, decided).facts["new model"] == str(new)
    assert promote(tmp_path, new=new, old=old)[1] == []
    # the content counts, not the place: promotion's own copy is the same model
    result, warned = promote(tmp_path, new=tmp_path / "next", old=old)
    assert result["promoted"] and not warned
    for inputs in (
        {"new": old, "old": new},
        {"new": other, "old": old},
        {"new": new, "old": other},
    ):
        with pytest.raises(InputError, match=r"^decision: expected one about the new model ") as e:
            promote(tmp_path, **inputs)
        expected = [f"{inputs[key]} (id {model_id(inputs[key])[:12]})" for key in ("new", "old")]
        template = "the new model {} and the old model {}"
        actual = template.format(*(f"{measured / k} (id {ids[k][:12]})" for k in ("new", "old")))
        assert template.format(*expected) in str(e.value) and actual in str(e.value)
        assert len(str(e.value).splitlines()) == 1


def test_a_gate_refuses_scores_of_other_models(measured, tmp_path):
    for i, (names, key) in enumerate((
        (("old", "other"), "new"), (("other", "new"), "old"), (("new", "old"), "old"),
        (("old",), "new"),
    )):  # fmt: skip
        with pytest.raises(InputError, match=f"^scores: expected scores of one {key} model, ") as e:
            decide(measured, tmp_path / str(i), safety_of(measured, *names))
        assert str(measured / "winrate") in str(e.value) and f"{tmp_path / str(i)}/safety" in str(
            e.value
        )
    # one model is the new one; the others between stand for themselves
    decide(measured, tmp_path / "one", safety_of(measured, "new"))
    decide(measured, tmp_path / "three", safety_of(measured, "old", "other", "new"))
    quantized = tmp_path / "quantized"
    Quantize(format="w8a16")(quantized, model=measured / "new")
    with pytest.raises(InputError, match="one new model"):
        decide(measured, tmp_path / "int8", safety_of(measured, "old", str(quantized)))


def test_scores_and_decisions_that_name_no_models_are_warned_of(measured, tmp_path):
    old, new, other = (measured / name for name in ("old", "new", "other"))
    scores = safety_of(measured, "old", "other")
    del scores["ids"]
    warned = decide(measured, tmp_path, scores)[-1]
    assert warned == [f"scores: {tmp_path}/safety does not say which models it is about"]
    assert promote(tmp_path, new=new, old=old)[1] == []
    path = tmp_path / "gate" / "decision.json"
    table = json.loads(path.read_text())
    del table["models"]["old"]  # all scores were of one model
    path.write_text(json.dumps(table))
    message = f"decision: {tmp_path}/gate does not name the "
    assert promote(tmp_path, new=new, old=other)[1] == [f"{message}old model"]
    del table["models"]
    path.write_text(json.dumps(table))
    result, warned = promote(tmp_path, new=other, old=old)
    assert result["served_model"] == str(other) and warned == [f"{message}new and the old model"]
    path.write_text(json.dumps(table | {"models": {"new": {"name": "new"}}}))
    with pytest.raises(InputError, match=r"models\.new\.id: expected this field, got nothing"):
        promote(tmp_path, new=new, old=old)
    path.write_text(json.dumps(table | {"models": {"new": 3}}))
    with pytest.raises(InputError, match=r"models\.new: expected an object, got 3"):
        promote(tmp_path, new=new, old=old)


def test_the_full_recipe_closes_the_loop():
    sets = [
        f'{name}.gates="{RECIPES / "gates" / file}"'
        for name, file in (("gate", "full.toml"), ("gate-next", "full_next.toml"))
    ]
    recipe = load_recipe(RECIPES / "full.toml", sets)
    steps = {step.name: step.inputs for step in recipe.steps}
    assert steps["simulate"] == {"model": ("quantize",), "reward_model": ("reward",)}
    assert steps["feedback"]["feedback_db"] == ("simulate",)
    assert steps["dpo"]["feedback"] == steps["judge"]["feedback"] == ("feedback",)
    assert steps["gate"]["scores"] == ("answers", "safety")
    assert steps["promotion"]["decision"] == ("gate-next",)
    assert steps["next"]["model"] == ("promotion",) and recipe.steps[-1].name == "next"
    for name in ("sft", "reward", "ppo"):  # they stand above the feedback
        assert steps[name].get("feedback", ()) == ()
