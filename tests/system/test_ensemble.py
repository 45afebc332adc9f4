"""Several reward models as one score."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_models import WORDS, make_base, write
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.errors import InputError
from fastlm.model.causal_lm import CausalLM
from fastlm.model.reward_model import RewardModel
from fastlm.stages import parse_recipe
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train.loop import TrainingInterrupted
from fastlm.train.online_stage import PPO, RewardEnsemble, combine_scores

PPO_STAGE = PPO(
    data=("x.jsonl",), prompts_per_round=4, num_generations=2, batch_size=4, max_new_tokens=5,
    max_steps=4, lr=1e-3, heldout=0.0, validations=0, sample_at=(), dtype="float32", save_steps=8,
    num_iterations=2, ensemble="uwo", uwo_coefficient=0.5,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rewards(base, tmp_path_factory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("rewards") / name for name in "abc"]
    for seed, folder in enumerate(folders):
        trunk = CausalLM.from_pretrained(base, dtype=torch.float32)
        model = RewardModel.from_causal_lm(trunk, seed=seed)
        model.mean, model.std = 0.1 * seed, 1.0 + seed
        model.save_pretrained(folder)
        Tokenizer.load(base).save(folder)
    return folders


@pytest.fixture
def data(tmp_path) -> str:
    return write(tmp_path / "prompts.jsonl", [{"prompt": f"what is {word}"} for word in WORDS])


def steps(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def test_combined() -> None:
    scores = np.array([[1.0, 4.0], [3.0, 4.0], [5.0, 1.0]])
    assert combine_scores(scores, "mean").tolist() == [3, 3]
    assert combine_scores(scores, "min").tolist() == [1, 1]
    # variances over n: 8/3 and 2
    np.testing.assert_allclose(combine_scores(scores, "uwo", 0.3), [3 - 0.8, 3 - 0.6])
    np.testing.assert_allclose(combine_scores(scores, "uwo", 0.0), combine_scores(scores, "mean"))


def test_the_models_score_one_by_one(rewards) -> None:
    models = [RewardModel.from_pretrained(folder) for folder in rewards]
    sequences = [[5, 6, 7], [8], [9, 10]]
    scores = np.array([model.score(sequences).tolist() for model in models])
    assert len(set(scores[:, 0])) == 3
    got, spread = RewardEnsemble(models, "min", 0.1).score(sequences)
    np.testing.assert_allclose(got, scores.min(0))
    np.testing.assert_allclose(spread, scores.std(0))
    single = RewardEnsemble(models[:1], "mean", 0.1)
    assert single.identity() == RewardEnsemble(models[:1], "mean", 0.7).identity()
    several = [RewardEnsemble(models, how, 0.1).identity() for how in ("mean", "min", "uwo")]
    assert several[0][:2] == single.identity() and len({tuple(x) for x in several}) == 3
    assert RewardEnsemble(models, "uwo", 0.2).identity() != several[2]


def test_ppo_continues_to_the_same_bits(base, rewards, data, tmp_path) -> None:
    stage = replace(PPO_STAGE, data=(data,))
    inputs = {"model": base, "reward_model": rewards}
    stage(tmp_path / "whole", **inputs)
    spreads = [line["ensemble_std"] for line in steps(tmp_path / "whole")]
    assert len(spreads) == 4 and min(spreads) > 0

    def press(event):
        if event.get("step") == 3 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        stage(tmp_path / "cut", on_event=press, **inputs)
    more = replace(stage, ensemble="min", max_steps=6)
    with pytest.raises(InputError, match="with these options, got another: scorer_identity was"):
        more(tmp_path / "cut", **inputs)
    stage(tmp_path / "cut", **inputs)
    uninterrupted, cut = (
        (tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("whole", "cut")
    )
    assert uninterrupted == cut
    assert [x["ensemble_std"] for x in steps(tmp_path / "cut")] == spreads
    # the lowest of three different scores is below their mean
    first = {}
    for how in ("mean", "min"):
        replace(stage, ensemble=how, max_steps=1)(tmp_path / how, **inputs)
        first[how] = steps(tmp_path / how)[0]["score"]
    assert first["min"] < first["mean"]


def test_in_a_recipe(base, rewards, data, tmp_path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
name = "aligned"

[[stage]]
kind = "grpo"
from = "{base}"
reward_model = ["{rewards[0]}", "{rewards[1]}"]
ensemble = "min"
data = ["{data}"]
prompts_per_round = 2
num_generations = 2
max_new_tokens = 4
max_steps = 1
heldout = 0.0
sample_at = []
dtype = "float32"
""")
    run = ["run", str(recipe), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 0, done.output
    assert "min of 2 reward models" in (tmp_path / "run" / "report.html").read_text()
    assert "skip" in CliRunner().invoke(app, run).output


@pytest.mark.parametrize(
    ("changes", "count", "message"),
    [
        ({"ensemble": "max"}, 2, "ensemble: expected one of mean, min, uwo, got 'max'"),
        ({}, 1, "ensemble: expected two or more reward_models for uwo, got 1"),
        (
            {"reward_function": "exact"},
            0,
            "ensemble: expected two or more reward_models for uwo, got 0",
        ),
        ({"uwo_coefficient": -1.0}, 2, r"uwo_coefficient: expected 0 or more, got -1\.0"),
    ],
)
def test_refused(base, rewards, data, tmp_path, changes, count, message) -> None:
    with pytest.raises(InputError, match=message):
        replace(PPO_STAGE, data=(data,), **changes)(
            tmp_path / "out", model=base, reward_model=rewards[:count]
        )


def test_one_model_is_no_ensemble(base, rewards, data, tmp_path) -> None:
    """Neither twice by one name, nor by a copy of its files."""
    copy = tmp_path / "copy"
    shutil.copytree(rewards[0], copy)
    for twice in ([rewards[0], rewards[0]], [rewards[0], copy]):
        with pytest.raises(InputError, match=r"reward_model: expected each once, got .*, "):
            replace(PPO_STAGE, data=(data,))(tmp_path / "out", model=base, reward_model=twice)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"kind": "ppo", "ensemble": "min", "reward_model": ["./a"]}, "ensemble: expected two or"),
        ({"kind": "ppo", "reward_model": ["./a", "./a"]}, "reward_model: expected each once, got"),
        ({"kind": "grpo"}, "reward_function: expected a function, or a reward_model, got neither"),
        (
            {"kind": "ppo", "reward_function": "exact", "value_model": "reward"},
            "value_model: expected a reward_model",
        ),
        ({"kind": "distill"}, "teacher: expected a teacher or teacher_logits, got neither"),
        ({"kind": "distill", "teacher": "./a", "teacher_logits": "b"}, "teacher: .* got both"),
    ],
)
def test_a_recipe_is_refused_before_its_first_stage(stage, message) -> None:
    stage = {"from": "./model", "data": ["x.jsonl"], **stage}
    with pytest.raises(InputError, match=rf"{stage['kind']}\.{message}"):
        parse_recipe({"name": "late", "stage": [stage]})
