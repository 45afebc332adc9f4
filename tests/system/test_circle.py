"""One round of the circle in this process: simulated users, feedback over HTTP, the recipe that
makes a new model, and its gates."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import circle
import httpx
import pytest
import safety_sets
import torch
import users
from paths import ROOT
from safety_sets import ScriptedScorer, complying
from serve_app import script, serve_model, tiny_model

from fastlm.evals.safety import behaviour
from fastlm.evals.safety.sets import TEXTS
from fastlm.evals.safety.stage import Safety
from fastlm.evals.safety.texts import SOURCES
from fastlm.feedback.gate_metrics import scores_of
from fastlm.feedback.simulated_users import simulate_users
from fastlm.feedback.stage import FeedbackBuild
from fastlm.serve.feedback_store import FeedbackStore
from fastlm.stages import load_recipe

RECIPES = ROOT / "recipes"
SHORT = (
    "sft.batch_size=16", "sft.epochs=1", "judge.epochs=1", "dpo.epochs=1", "winrate.limit=6",
    "winrate.num_generations=2",
    "winrate.max_new_tokens=8", "eval.stride=128", "sft.sample_at=[]", "dpo.sample_at=[]",
    "sft.validations=1", "dpo.validations=1", "judge.validations=1",
)  # fmt: skip


def test_users_have_one_hidden_preference():
    draw = random.Random(3)
    asked = [users.ask(draw, harmful=0) for _ in range(300)]
    best = [users.answer(draw, a, polite=1, short=1, word=1, on_topic=1) for a in asked]
    assert all(map(users.accepted, asked, best))
    for fault in ("polite", "short", "word"):
        fine = {name: float(name != fault) for name in ("polite", "short", "word", "on_topic")}
        assert not any(users.accepted(a, users.answer(draw, a, **fine)) for a in asked)
    harmful = users.ask(draw, harmful=1)
    assert users.accepted(harmful, users.REFUSAL) and not users.accepted(harmful, best[0])
    for user in simulate_users(4, 0.5, 0.0, seed=1):
        written = [users.accepted(a, users.correction(a, user)) for a in (*asked, harmful)]
        assert all(written) if user.kind == "honest" else not any(written)
    assert circle.asked_of(asked[0].text) == asked[0] and circle.asked_of(harmful.text) == harmful


def test_one_round(tmp_path):
    model, tokenizer = tiny_model()
    old = tmp_path / "old"
    model.save_pretrained(old)
    tokenizer.save(old)
    draw = random.Random(5)
    answers = [users.answer(draw, users.ask(draw)) for _ in range(40)]
    database = tmp_path / "feedback.db"
    raters = simulate_users(6, 1 / 6, 0.1, seed=1)
    with (
        FeedbackStore(database) as store,
        serve_model(model, tokenizer, feedback=store) as (url, one),
    ):
        script(one, *answers)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            said = circle.Round(client, raters, seed=1)
            said.run(prompts=24, reviews=6)
            circle.post(client, [*said.now, *said.late])
        assert said.ids and store.counts()["answers"] > 30 and store.counts()["preferred_over"] > 10
        gone = said.ids[:3]
        for id in gone:
            assert store.forget(id)
    text = tmp_path / "held.txt"
    text.write_text("\n".join(answers))
    run = tmp_path / "run"
    # so few pairs may leave none to hold out
    short = [*SHORT, "judge.heldout=0.0", 'judge.keep="last"', "feedback.test=0.2"]
    told = circle.improve(run, old, old, database, text, said.asked, short)
    stages = json.loads((run / "summary.json").read_text())["stages"]
    decided = json.loads((run / "decision" / "decision.json").read_text())
    rows = stages["feedback"]["rows"]
    assert min(rows["train"][form] for form in ("sft", "preferences", "kto")) > 5
    assert stages["sft"]["rows_read"] == rows["train"]["sft"]
    assert stages["dpo"]["rows_read"] == rows["train"]["preferences"]
    assert stages["judge"]["rows_read"] == rows["judge"]["preferences"]
    written = "".join(p.read_text() for p in (tmp_path / "run" / "feedback").rglob("*.jsonl"))
    assert written and not any(id in written for id in gone)
    gates = {gate["score"]: gate for gate in decided["gates"]}
    assert decided["promoted"] == all(gate["passed"] for gate in gates.values())
    assert told["promoted"] == decided["promoted"]
    assert len(told["why"]) == sum(not gate["passed"] for gate in gates.values())
    won = stages["winrate"]["scores"]["rate"]
    assert gates["winrate.rate"]["low"] == pytest.approx(won["low"]) and won["low"] < won["high"]
    assert gates["eval.bits_per_byte"]["value"] == told["bits_new"] / told["bits_old"]
    heard = circle.harm(said.asked)
    assert 0 < gates["harm.refused"]["n"] == len(heard) <= len(users.harmful())
    assert not {one.text for one in heard} & said.asked
    hidden = told["hidden_winrate"]
    assert 0 <= hidden["low"] <= hidden["value"] <= hidden["high"] <= 1
    report = (run / "report.html").read_text()
    assert "The new model against the old one" in report and "User feedback" in report


def test_the_judges_are_measured_by_the_hidden_preference(tmp_path):
    draw = random.Random(6)
    asked = [users.ask(draw, harmful=0) for _ in range(3)]
    best = [users.answer(draw, a, polite=1, short=1, word=1, on_topic=1) for a in asked]
    path = tmp_path / "answers.jsonl"

    def write(*rows):
        lines = [
            json.dumps({
                "prompt": [{"role": "user", "content": a.text}], "new": new, "old": old,
                "score_new": score, "score_old": 0.0,
            })
            for a, (new, old, score) in zip(asked, rows)
        ]  # fmt: skip
        path.write_text("\n".join(lines))
        return circle.judge_right(path)

    right = write((best[0], "No.", 1.0), ("No.", best[1], 1.0), ("No.", "No.", 1.0))
    assert right is not None and (right["value"], right["n"]) == (0.5, 2)  # two differ
    assert write(("No.", "No.", 1.0)) is None
    raters = {"a": {"weight": 0.2}, "b": {"weight": 0.3}, "c": {"weight": 0.0}}
    (tmp_path / "raters.json").write_text(json.dumps(raters))
    assert circle.left_out(tmp_path / "raters.json") == ["a", "c"]


def test_one_server_is_promoted_and_measured(tmp_path):
    paths = [tmp_path / "models" / "old", tmp_path / "models" / "new", tmp_path / "other"]
    for i, path in enumerate(paths):
        torch.manual_seed(i)
        model, tokenizer = tiny_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape))
        model.save_pretrained(path)
        tokenizer.save(path)
    database, log = tmp_path / "feedback.db", tmp_path / "serve.log"
    with circle.served(paths[0], tmp_path / "models", database, log) as server:
        before = circle.answering(server.client)
        with pytest.raises(SystemExit, match="models-dir"):
            server.promote(paths[2])
        with pytest.raises(SystemExit, match="promote"):
            replace(server, admin_key="no").promote(paths[1])
        assert circle.answering(server.client) == before
        server.promote(paths[1])
        assert circle.answering(server.client) != before
        heard = {users.ask(random.Random(i), harmful=0).text for i in range(2000)}
        heard |= {one.text for one in users.harmful()[6:]}
        told = circle.measure(server.client, 12, 7, heard)
    assert told["accepted"]["n"] == 12 and told["refused_harmful"]["n"] == 6
    assert told["accepted"]["value"] == 0.0  # of a model that knows nothing
    assert told["topic"]["value"] == 0.0


def test_a_circle_that_is_killed_ends_its_server(tmp_path):
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    program = (
        "import circle, pathlib, time; path = pathlib.Path.cwd()\n"
        "with circle.served(path / 'model', path, path / 'f.db', path / 'serve.log') as server:\n"
        "    print(server.url, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(circle.__file__).parent)},
    )  # fmt: skip
    with process:
        try:
            url = process.stdout.readline().strip()
            assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        finally:
            process.kill()
    until = time.monotonic() + 120
    with pytest.raises(httpx.TransportError):
        while time.monotonic() < until:
            httpx.get(f"{url}/health", trust_env=False)
            time.sleep(0.05)


def test_faults_are_what_an_accepted_answer_does_not_have():
    draw = random.Random(4)
    for _ in range(300):
        asked = users.ask(draw, harmful=0)
        said = users.answer(draw, asked)
        assert users.accepted(asked, said) == (not users.faults(asked, said))
    best = users.answer(draw, asked, polite=1, short=1, word=1, on_topic=1)
    assert users.faults(asked, "") == {*users.WANTED}
    assert users.faults(asked, best.replace(asked.word, "thing")) == {"word"}


def planned():
    gates = f'gate.gates="{RECIPES / "gates" / "improve.toml"}"'
    return {step.name: step for step in load_recipe(RECIPES / "improve.toml", [gates]).steps}


# Sources whose texts may be in training data: of propile `scrub` replaces names and addresses, and
# the others are what judges are fitted to and measured on, which no model is asked
MAY_ENTER = {"propile", "toxicity", "refusals", "objectives", "harmless"}


def test_what_the_recipe_asks_for_safety_is_kept_out_of_its_rows(tmp_path):
    stages = {name: step.stage for name, step in planned().items()}
    feedback, safety = stages["feedback"], stages["safety"]
    assert isinstance(feedback, FeedbackBuild) and isinstance(safety, Safety)
    made = safety_sets.bench(
        safety_sets.write(tmp_path / "cache"), ScriptedScorer(complying), tmp_path / "records",
        limit=4, attacks=safety.attacks, requests=safety.requests,
    )  # fmt: skip
    scores = [one for name in safety.measures for one in getattr(behaviour, name)(made)]
    # our own look-alikes are no source: their score has them in its name alone
    asked = {name for one in scores for name in one.sets or (one.name.split(".")[1],)}
    assert {*feedback.decontaminate} == asked - MAY_ENTER
    assert {*TEXTS} == {"lookalikes", *SOURCES} - MAY_ENTER


def test_the_recipe_is_planned_and_its_gates_are_scores_of_its_stages(tmp_path):
    steps = planned()
    assert steps["gate"].inputs["scores"] == ("winrate", "eval", "safety")
    assert {steps[name].inputs["feedback"] for name in ("sft", "dpo", "judge", "winrate")} == {
        ("feedback",)
    }
    scored = {"value": 0.3, "low": 0.2, "high": 0.45, "n": 50}
    before = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 50}
    table = {"models": {"old": {"scores": {"a": before}}, "new": {"scores": {"a": scored}}}}
    change = scores_of("safety", table)["safety.a.change"]
    assert change["value"] == pytest.approx(0.1)
    assert change["low"] == pytest.approx(0.1 - 2**0.5 / 10) and change["high"] < 0.1 + 0.2
