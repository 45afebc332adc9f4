"""How often the judge of a win rate is right."""

import json

import preference_models

from fastlm.evals.statistics import wilson
from fastlm.loop.bounds import scores_of
from fastlm.loop.winning import judge_accuracy
from fastlm.loop.winrate import WinRate
from fastlm.model.reward_model import RewardModel
from fastlm.serve.chat import load_model


def test_the_judge_is_measured_on_preferences(tmp_path):
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
    assert first["n"] == 12 and first["value"] + second["value"] == 1
    known = wilson(12 * first["value"], 12)
    assert (first["low"], first["high"]) == (known.low, known.high)
    several = tmp_path / "several.jsonl"
    ranked = {"prompt": "Say 1.", "answers": ["1.", "2.", "3.", "4."], "ranks": [0, 1, 2, 3]}
    several.write_text(json.dumps(ranked))
    found = judge_accuracy(judge, [str(several)], cache=tmp_path)
    assert found is not None and found["n"] == 1  # of six pairs
    with one.open("a") as file:  # beyond the judge's context of 256 tokens
        file.write(json.dumps({**pairs[0], "rejected": "It is " + "9 " * 300}) + "\n")
    said = []
    assert judge_accuracy(judge, [str(one)], cache=tmp_path, warn=said.append) == first
    assert said == ["1 of 13 preferences that measure the judge exceed its context"]
    stage = WinRate(data=(str(one),), labelled=(str(one),), limit=3, max_new_tokens=4)
    result = stage(tmp_path / "out", cache=tmp_path, model=base, old=base, judge=judge)
    table = json.loads((tmp_path / "out/scores.json").read_text())
    assert table["scores"]["judge"] == result["scores"]["judge"] == first
    assert scores_of("winrate", table)["winrate.judge"]["value"] == first["value"]
