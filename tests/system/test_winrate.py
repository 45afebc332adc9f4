"""How often the judge of a win rate is right."""

import json
from statistics import fmean

import preference_models
import pytest

from fastlm.data.prompts import Prompt
from fastlm.errors import InputError
from fastlm.feedback.gate_metrics import scores_of
from fastlm.feedback.pairwise import judge_accuracy, judge_answers
from fastlm.feedback.winrate import WinRate
from fastlm.model.load import load_model
from fastlm.model.reward_model import RewardModel
from fastlm.stats.intervals import wilson


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
    first_file, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    swapped = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]
    for path, rows in ((first_file, pairs), (other, swapped)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = judge_accuracy([judge], [str(first_file)], cache=tmp_path)
    second = judge_accuracy([judge], [str(other)], cache=tmp_path)
    assert first is not None and second is not None
    assert first["n"] == 12 and first["value"] + second["value"] == 1
    interval = wilson(12 * first["value"], 12)
    assert (first["low"], first["high"]) == (interval.low, interval.high)
    several = tmp_path / "several.jsonl"
    ranked = {"prompt": "Say 1.", "answers": ["1.", "2.", "3.", "4."], "ranks": [0, 1, 2, 3]}
    several.write_text(json.dumps(ranked))
    accuracy = judge_accuracy([judge], [str(several)], cache=tmp_path)
    assert accuracy is not None and accuracy["n"] == 1  # of six pairs
    with first_file.open("a") as file:  # beyond the judge's context of 256 tokens
        file.write(json.dumps({**pairs[0], "rejected": "It is " + "9 " * 300}) + "\n")
    warnings = []
    assert judge_accuracy([judge], [str(first_file)], cache=tmp_path, warn=warnings.append) == first
    assert warnings == ["1 of 13 preferences that measure the judge exceed its context"]
    stage = WinRate(
        data=(str(first_file),), preferences=(str(first_file),), limit=3, max_new_tokens=4
    )
    result = stage(tmp_path / "out", cache_dir=tmp_path, model=base, old=base, judge=judge)
    table = json.loads((tmp_path / "out/scores.json").read_text())
    assert table["scores"]["judge"] == result["scores"]["judge"] == first
    assert scores_of("winrate", table)["winrate.judge"]["value"] == first["value"]


def test_several_judges_score_by_their_mean(tmp_path):
    base = preference_models.make_base(tmp_path / "base", max_position_embeddings=256)
    model, tokenizer = load_model(base)
    judges = [tmp_path / "first", tmp_path / "second"]
    for seed, path in enumerate(judges):
        RewardModel.from_causal_lm(model, seed=seed).save_pretrained(path)
        tokenizer.save(path)
    prompts = [Prompt([{"role": "user", "content": f"Say {i}."}], {}) for i in range(4)]
    answered = [[f"It is {i}." for i in range(3)] + [" "]]
    warnings = []
    ((*points, empty),) = judge_answers(judges, prompts, answered, warnings.append)
    by_judge = [judge_answers([path], prompts, answered)[0] for path in judges]
    assert points == pytest.approx([fmean(both) for both in zip(*by_judge)][:3], abs=1e-6)
    assert by_judge[0][:3] != pytest.approx(by_judge[1][:3], abs=1e-3)
    assert empty == min(points) and warnings == ["empty answers have the lowest score of all: 1"]

    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No {i} here."}
        for i in range(12)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def scored(key):
        prompts_ = [Prompt([{"role": "user", "content": row["prompt"]}], {}) for row in rows]
        return judge_answers(judges, prompts_, [[row[key] for row in rows]])[0]

    # four rows to one prompt say less than four prompts: no row adds to what its prompts tell
    same = tmp_path / "same.jsonl"
    same.write_text("".join(json.dumps(rows[i // 4 * 4]) + "\n" for i in range(12)))
    narrow = judge_accuracy(judges, [str(pairs)], cache=tmp_path)
    wide = judge_accuracy(judges, [str(same)], cache=tmp_path)
    assert narrow is not None and wide is not None and wide["n"] == 12
    assert wide["high"] - wide["low"] > narrow["high"] - narrow["low"]

    right = [a > b for a, b in zip(scored("chosen"), scored("rejected"), strict=True)]
    accuracy = judge_accuracy(judges, [str(pairs)], cache=tmp_path)
    assert accuracy is not None and accuracy["value"] == sum(right) / 12
    stage = WinRate(data=(str(pairs),), limit=3, max_new_tokens=4)
    with pytest.raises(InputError, match=r"judge: expected different reward models, got .* equal"):
        stage(tmp_path / "out", cache_dir=tmp_path, model=base, old=base, judge=[judges[0]] * 2)
    result = stage(tmp_path / "out", cache_dir=tmp_path, model=base, old=base, judge=judges)
    assert [judge["name"] for judge in result["judges"]] == [str(path) for path in judges]
    for line in (tmp_path / "out/answers.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = Prompt(row["prompt"], {})
        score = judge_answers(judges, [prompt], [[row["new"]]])[0][0]
        assert row["score_new"] == pytest.approx(score, abs=1e-3)
