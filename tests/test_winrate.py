"""The win rate without the error of its judge."""

import json

import numpy as np
import preference_models
import pytest

from fastlm.evals.statistics import wilson
from fastlm.loop.bounds import scores_of
from fastlm.loop.winrate import WinRate
from fastlm.loop.winrate_judge import Accuracy, corrected, judge_accuracy
from fastlm.model.reward_model import RewardModel
from fastlm.serve.chat import load_model


def rate(w, n=100):
    of = wilson(w * n, n)
    return {"value": w, "low": of.low, "high": of.high, "n": n, "better": "higher"}


def test_a_rate_is_corrected_for_the_error_of_its_judge():
    found = corrected(rate(0.6), Accuracy(160, 200), 0.95)
    assert found["value"] == pytest.approx((0.6 - 0.2) / 0.6)
    assert found["low"] < 0.6 and found["high"] > 0.8  # wider than the raw one's
    even = corrected(rate(0.5), Accuracy(160, 200), 0.95)
    assert even["value"] == pytest.approx(0.5)
    assert even["low"] == pytest.approx(1 - even["high"])
    perfect = corrected(rate(0.6), Accuracy(10**6, 10**6), 0.95)
    assert perfect["value"] == pytest.approx(0.6)
    assert perfect["low"] == pytest.approx(rate(0.6)["low"], abs=1e-4)
    assert corrected(rate(0.9), Accuracy(140, 200), 0.95)["value"] == 1.0  # clipped
    # a judge that may be a coin
    coin = corrected(rate(0.9), Accuracy(11, 20), 0.95)
    assert (coin["low"], coin["high"]) == (0.0, 1.0) and "11 of 20 pairs" in coin["why"]
    assert scores_of("winrate", {"scores": {"corrected": coin}})["winrate.corrected"]["low"] == 0


def test_its_interval_covers_the_truth():
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        a, p = draw.uniform(0.65, 0.95), draw.random()
        w = draw.binomial(150, p * a + (1 - p) * (1 - a)) / 150
        found = corrected(rate(w, 150), Accuracy(draw.binomial(200, a), 200), 0.95)
        held += found["low"] <= p <= found["high"]
    assert held >= 285


def test_the_judge_is_measured_on_preferences_and_corrects_the_stage(tmp_path):
    base = preference_models.make_base(tmp_path / "base", max_position_embeddings=256)
    model, tokenizer = load_model(base)
    judge = tmp_path / "judge"
    RewardModel.from_causal_lm(model, seed=0).save_pretrained(judge)
    tokenizer.save(judge)
    pairs = [
        {"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No {i} here, {i + 1}."}
        for i in range(12)
    ]
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    swapped = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]
    for path, rows in ((one, pairs), (other, swapped)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = judge_accuracy(judge, [str(one)], cache=tmp_path)
    second = judge_accuracy(judge, [str(other)], cache=tmp_path)
    assert first is not None and second is not None
    assert first.pairs == 12 and first.right + second.right == 12
    with one.open("a") as file:  # beyond the judge's context of 256 tokens
        file.write(json.dumps({**pairs[0], "rejected": "It is " + "9 " * 300}) + "\n")
    said = []
    assert judge_accuracy(judge, [str(one)], cache=tmp_path, warn=said.append) == first
    assert said == ["1 of 13 pairs that measure the judge are beyond its context"]
    stage = WinRate(data=(str(one),), labelled=(str(one),), limit=3, max_new_tokens=4)
    result = stage(tmp_path / "out", cache=tmp_path, model=base, old=base, judge=judge)
    found = json.loads((tmp_path / "out/scores.json").read_text())["scores"]["corrected"]
    assert found == result["scores"]["corrected"] and found["judge"]["pairs"] == 12
    assert found["judge"]["accuracy"] == first.right / 12
