"""One round of the circle in this process: simulated users, feedback over HTTP, the recipe that
makes a new model, and its gates."""

import json
import random
from pathlib import Path

import circle
import httpx
import pytest
import users
from serve_app import script, serving, tiny_model

from fastlm.loop.bounds import scores_of
from fastlm.loop.gate import Gate
from fastlm.runs.recipe import load_recipe
from fastlm.runs.run import run_recipe
from fastlm.serve.feedback import FeedbackStore

RECIPES = Path(__file__).parent.parent / "recipes"
SHORT = (
    "sft.batch_size=16", "sft.lr=1e-3", "judge.epochs=1", "dpo.lr=1e-3", "winrate.limit=6",
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
    people = users.users(20, 0.2, seed=1)
    assert [user.kind for user in people[:5]] == ["reversed", "random", "reversed", "random",
                                                 "honest"]  # fmt: skip
    worst = users.answer(draw, asked[0], polite=0, short=0, word=0)
    right = {
        user.kind: sum(bool(user.prefers(asked[0], best[0], worst)) for _ in range(200)) / 200
        for user in people
    }
    assert right["honest"] > 0.8 and right["reversed"] < 0.2 and 0.35 < right["random"] < 0.65
    assert circle.asked_of(asked[0].text) == asked[0] and circle.asked_of(harmful.text) == harmful


def test_one_round(tmp_path):
    model, tokenizer = tiny_model()
    old = tmp_path / "old"
    model.save_pretrained(old)
    tokenizer.save(old)
    draw = random.Random(5)
    answers = [users.answer(draw, users.ask(draw)) for _ in range(40)]
    database = tmp_path / "feedback.db"
    people = users.users(6, 1 / 6, seed=1)
    with FeedbackStore(database) as store, serving(model, tokenizer, feedback=store) as (url, one):
        script(one, *answers)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            said = circle.Round(client, people, seed=1)
            said.run(prompts=12, reviews=6)
            circle.post(client, [*said.now, *said.late])
        assert said.ids and store.counts()["answers"] > 30 and store.counts()["preferred_over"] > 10
        gone = said.ids[:3]
        for id in gone:
            assert store.forget(id)
    text = tmp_path / "held.txt"
    text.write_text("\n".join(answers))
    summary = run_recipe(
        RECIPES / "improve.toml", tmp_path / "run", until="winrate",
        overrides=[
            f'feedback.database=["{database}"]', f'sft.from="{old}"', f'judge.from="{old}"',
            f'eval.of=["{old}", "dpo"]', f'eval.data="{text}"', f'winrate.old="{old}"',
            f'safety.of=["{old}", "dpo"]', *SHORT,
            'feedback.decontaminate=["lookalikes"]',  # the others are in packages
            # so few pairs may leave none to hold out
            "judge.heldout=0.0", 'judge.take="last"',
        ],
    )  # fmt: skip
    stages = summary["stages"]
    run = tmp_path / "run"
    decided = Gate(gates=str(circle.GATES))(run / "gate", scores=[run / "winrate", run / "eval"])
    rows = stages["feedback"]["rows"]
    assert min(rows["train"][form] for form in ("sft", "preferences", "kto")) > 5
    assert stages["sft"]["read"] == rows["train"]["sft"]
    assert stages["dpo"]["read"] == rows["train"]["preferences"]
    assert stages["judge"]["read"] == rows["judge"]["preferences"]
    written = "".join(p.read_text() for p in (tmp_path / "run" / "feedback").rglob("*.jsonl"))
    assert written and not any(id in written for id in gone)
    gates = {gate["score"]: gate for gate in decided["gates"]}
    assert decided["promoted"] == all(gate["passed"] for gate in gates.values())
    won = stages["winrate"]["scores"]["rate"]
    assert gates["winrate.rate"]["low"] == pytest.approx(won["low"]) and won["low"] < won["high"]
    assert gates["eval.bits_per_byte"]["value"] > 0
    hidden = circle.hidden_wins(tmp_path / "run" / "winrate" / "answers.jsonl")
    assert 0 <= hidden["low"] <= hidden["value"] <= hidden["high"] <= 1
    report = (tmp_path / "run" / "report.html").read_text()
    assert "The new model against the old one" in report and "What users said" in report
    assert json.loads((run / "gate" / "decision.json").read_text()) == decided


def test_the_recipe_is_planned_and_its_gates_are_scores_of_its_stages(tmp_path):
    recipe = load_recipe(
        RECIPES / "improve.toml", [f'gate.gates="{RECIPES / "gates" / "improve.toml"}"']
    )
    steps = {step.name: step for step in recipe.steps}
    assert steps["gate"].inputs["scores"] == ("winrate", "eval", "safety")
    assert {steps[name].inputs["feedback"] for name in ("sft", "dpo", "judge", "winrate")} == {
        ("feedback",)
    }
    stages = {step.name: step.stage for step in recipe.steps}
    assert {*stages["feedback"].decontaminate} == {
        *stages["safety"].requests, "lookalikes", "realtoxicity",
    }  # fmt: skip
    assert {*stages["safety"].measures} == {"attacks", "overrefusal", "toxicity"}
    scored = {"value": 0.3, "low": 0.2, "high": 0.45, "n": 50}
    before = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 50}
    table = {"models": {"old": {"scores": {"a": before}}, "new": {"scores": {"a": scored}}}}
    change = scores_of("safety", table)["safety.a.change"]
    assert change["value"] == pytest.approx(0.1)
    assert change["low"] == pytest.approx(0.1 - 2**0.5 / 10) and change["high"] < 0.1 + 0.2
