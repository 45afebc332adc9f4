"""Test one round of the feedback loop in this process: simulated users, feedback over HTTP, the
recipe that trains a new model, and its gates.
"""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import feedback_loop
import httpx
import pytest
import safety_sets
import synthetic_users as users
import torch
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
    questions = [users.draw_question(draw, harmful=0) for _ in range(300)]
    best = [users.draw_answer(draw, a, polite=1, short=1, word=1, on_topic=1) for a in questions]
    assert all(map(users.is_accepted, questions, best))
    for fault in ("polite", "short", "word"):
        fine = {name: float(name != fault) for name in ("polite", "short", "word", "on_topic")}
        assert not any(users.is_accepted(a, users.draw_answer(draw, a, **fine)) for a in questions)
    harmful = users.draw_question(draw, harmful=1)
    assert users.is_accepted(harmful, users.REFUSAL) and not users.is_accepted(harmful, best[0])
    for user in simulate_users(4, 0.5, 0.0, seed=1):
        written = [users.is_accepted(a, users.correction(a, user)) for a in (*questions, harmful)]
        assert all(written) if user.kind == "honest" else not any(written)
    assert (
        feedback_loop.parse_question(questions[0].text) == questions[0]
        and feedback_loop.parse_question(harmful.text) == harmful
    )


def test_one_round(tmp_path):
    model, tokenizer = tiny_model()
    old = tmp_path / "old"
    model.save_pretrained(old)
    tokenizer.save(old)
    draw = random.Random(5)
    answers = [users.draw_answer(draw, users.draw_question(draw)) for _ in range(40)]
    database = tmp_path / "feedback.db"
    raters = simulate_users(6, 1 / 6, 0.1, seed=1)
    with (
        FeedbackStore(database) as store,
        serve_model(model, tokenizer, feedback=store) as (url, server),
    ):
        script(server, *answers)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            round_ = feedback_loop.Round(client, raters, seed=1)
            round_.run(prompts=24, reviews=6)
            feedback_loop.post(client, [*round_.now, *round_.late])
        assert (
            round_.ids
            and store.counts()["responses"] > 30
            and store.counts()["preferred_over"] > 10
        )
        withdrawn = round_.ids[:3]
        for id in withdrawn:
            assert store.forget(id)
    text = tmp_path / "held.txt"
    text.write_text("\n".join(answers))
    run = tmp_path / "run"
    # so few pairs may leave none to hold out
    short = [*SHORT, "judge.heldout=0.0", 'judge.keep="last"', "feedback.test=0.2"]
    result = feedback_loop.improve(run, old, old, database, text, round_.questions, short)
    stages = json.loads((run / "summary.json").read_text())["stages"]
    decided = json.loads((run / "decision" / "decision.json").read_text())
    rows = stages["feedback"]["rows"]
    assert min(rows["train"][form] for form in ("sft", "preferences", "kto")) > 5
    assert stages["sft"]["rows_read"] == rows["train"]["sft"]
    assert stages["dpo"]["rows_read"] == rows["train"]["preferences"]
    assert stages["judge"]["rows_read"] == rows["judge"]["preferences"]
    written = "".join(p.read_text() for p in (tmp_path / "run" / "feedback").rglob("*.jsonl"))
    assert written and not any(id in written for id in withdrawn)
    gates = {gate["score"]: gate for gate in decided["gates"]}
    assert decided["promoted"] == all(gate["passed"] for gate in gates.values())
    assert result["promoted"] == decided["promoted"]
    assert len(result["reasons"]) == sum(not gate["passed"] for gate in gates.values())
    won = stages["winrate"]["scores"]["rate"]
    assert gates["winrate.rate"]["low"] == pytest.approx(won["low"]) and won["low"] < won["high"]
    assert gates["eval.bits_per_byte"]["value"] == result["bits_new"] / result["bits_old"]
    new_questions = feedback_loop.harmful_questions(round_.questions)
    assert 0 < gates["harm.refused"]["n"] == len(new_questions) <= len(users.harmful_questions())
    assert not {question.text for question in new_questions} & round_.questions
    hidden = result["hidden_winrate"]
    assert 0 <= hidden["low"] <= hidden["value"] <= hidden["high"] <= 1
    report = (run / "report.html").read_text()
    assert "The new model against the old one" in report and "User feedback" in report


def test_the_judges_are_measured_by_the_hidden_preference(tmp_path):
    draw = random.Random(6)
    questions = [users.draw_question(draw, harmful=0) for _ in range(3)]
    best = [users.draw_answer(draw, a, polite=1, short=1, word=1, on_topic=1) for a in questions]
    path = tmp_path / "answers.jsonl"

    def write(*rows):
        lines = [
            json.dumps({
                "prompt": [{"role": "user", "content": a.text}], "new": new, "old": old,
                "score_new": score, "score_old": 0.0,
            })
            for a, (new, old, score) in zip(questions, rows)
        ]  # fmt: skip
        path.write_text("\n".join(lines))
        return feedback_loop.hidden_accuracy(path)

    right = write((best[0], "No.", 1.0), ("No.", best[1], 1.0), ("No.", "No.", 1.0))
    assert right is not None and (right["value"], right["n"]) == (0.5, 2)  # two differ
    assert write(("No.", "No.", 1.0)) is None
    raters = {"a": {"weight": 0.2}, "b": {"weight": 0.3}, "c": {"weight": 0.0}}
    (tmp_path / "raters.json").write_text(json.dumps(raters))
    assert feedback_loop.excluded_raters(tmp_path / "raters.json") == ["a", "c"]


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
    with feedback_loop.run_server(paths[0], tmp_path / "models", database, log) as server:
        before = feedback_loop.serving_model(server.client)
        with pytest.raises(SystemExit, match="models-dir"):
            server.promote(paths[2])
        with pytest.raises(SystemExit, match="promote"):
            replace(server, admin_key="no").promote(paths[1])
        assert feedback_loop.serving_model(server.client) == before
        server.promote(paths[1])
        assert feedback_loop.serving_model(server.client) != before
        past_questions = {
            users.draw_question(random.Random(i), harmful=0).text for i in range(2000)
        }
        past_questions |= {question.text for question in users.harmful_questions()[6:]}
        metrics = feedback_loop.measure(server.client, 12, 7, past_questions)
    assert metrics["accepted"]["n"] == 12 and metrics["refused_harmful"]["n"] == 6
    assert metrics["accepted"]["value"] == 0.0  # of a model that knows nothing
    assert metrics["topic"]["value"] == 0.0


def test_a_loop_that_is_killed_ends_its_server(tmp_path):
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    program = (
        "import feedback_loop, pathlib, time; path = pathlib.Path.cwd()\n"
        "run = feedback_loop.run_server\n"
        "with run(path / 'model', path, path / 'f.db', path / 'serve.log') as server:\n"
        "    print(server.url, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(feedback_loop.__file__).parent)},
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
        question = users.draw_question(draw, harmful=0)
        answer = users.draw_answer(draw, question)
        assert users.is_accepted(question, answer) == (not users.faults(question, answer))
    best = users.draw_answer(draw, question, polite=1, short=1, word=1, on_topic=1)
    assert users.faults(question, "") == {*users.PROPERTIES}
    assert users.faults(question, best.replace(question.word, "thing")) == {"word"}


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
    bench = safety_sets.make_target(
        safety_sets.write(tmp_path / "cache"), ScriptedScorer(complying), tmp_path / "records",
        limit=4, attacks=safety.attacks, requests=safety.requests,
    )  # fmt: skip
    scores = [score for name in safety.measures for score in getattr(behaviour, name)(bench)]
    # our own look-alikes are no source: their score has them in its name alone
    sets = {name for score in scores for name in score.sets or (score.name.split(".")[1],)}
    assert {*feedback.decontaminate} == sets - MAY_ENTER
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
