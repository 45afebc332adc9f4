"""Reward models: the loss of pairs and lists against its formula, the head, normalisation, saving
for transformers, what is measured of the scores, training and resuming, and what is refused.
"""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_models import config, example, make_base, polite_pairs, write
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.errors import InputError
from fastlm.model.causal_lm import CausalLM
from fastlm.model.reward_model import RewardModel, scores
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train.loop import TrainingInterrupted
from fastlm.train.options import TrainOptions
from fastlm.train.preference_stage import PreferenceExample, accuracy_error, pairwise_accuracy
from fastlm.train.reward import Reward, RewardObjective, calibration, length_bias

TINY = Reward(
    data=("x.jsonl",), epochs=3, batch_size=3, gradient_accumulation_steps=2, lr=3e-3, heldout=0.25,
    validations=2, dtype="float32", save_steps=3,
)  # fmt: skip
ROWS = [
    PreferenceExample((example([5, 6, 7, 8, 9], 3, "1"), example([5, 6, 7, 10], 3)), margin=0.5),
    PreferenceExample(
        tuple(example([11, *answer], 1, "2") for answer in ([12, 13], [14], [15, 16, 17, 18]))
    ),
    PreferenceExample((example([20, 21, 22, 23], 2, "3"), example([20, 21, 24], 2))),
    PreferenceExample(tuple(example([30, i], 1, "4") for i in range(31, 36))),
    PreferenceExample((example([40, 41, 42], 1, "5"), example([40, 43, 44], 1)), margin=2.0),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(folder, result, events) of a training."""
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "pairs.jsonl", polite_pairs(60))
    events: list[dict] = []
    result = options(data=(data,))(folder / "out", model=base, on_event=events.append)
    return folder / "out", result, events


def conversation(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def options(**changes) -> Reward:
    return replace(TINY, **changes)


def model_of(**changes) -> RewardModel:
    return RewardModel(config(64, **changes), seed=3)


def objective(model: RewardModel, batch_size: int, margins: bool) -> RewardObjective:
    return RewardObjective(
        model, ROWS, ROWS, TrainOptions(max_steps=1), margins=margins, batch_size=batch_size,
        seed=4, base="",
    )  # fmt: skip


def naive(model: RewardModel, margins: bool) -> torch.Tensor:
    """The mean loss over comparisons, one sequence and one choice at a time, in float64."""
    model = model.double()
    losses = []
    for row in ROWS:
        scores = []
        for answer in row.answers:
            ids = torch.tensor([answer.ids.tolist()])
            scores.append((model.trunk.hidden(ids)[0, -1] * model.head.weight[0]).sum())
        if len(scores) == 2:
            margin = row.margin or 0.0 if margins else 0.0
            losses.append(-torch.sigmoid(scores[0] - scores[1] - margin).log())
        else:
            for best in range(len(scores) - 1):
                rest = torch.stack(scores[best:])
                losses.append(-(rest[0].exp() / rest.exp().sum()).log())
    assert len(losses) == 1 + 2 + 1 + 4 + 1
    return torch.stack(losses).mean()


@pytest.mark.parametrize("margins", [False, True])
def test_the_loss_is_the_formula_whatever_the_micro_batches(margins) -> None:
    model = model_of()
    with torch.no_grad():
        model.head.weight.mul_(5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    truth = naive(model, margins)
    truth.backward()
    expected = [p.grad.float() for p in model.parameters() if p.grad is not None]
    for size in (5, 2, 1):
        model = model_of()
        model.load_state_dict(state)
        trained = objective(model, size, margins)
        batches = trained.next_batches(9)
        count, total = sum(map(trained.num_items, batches)), 0.0
        assert count == 9
        for batch in batches:
            loss = trained.loss(batch, count)
            loss.backward()
            total += float(loss.detach())
        assert total == pytest.approx(float(truth.detach()), rel=1e-5)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
        with torch.no_grad():
            assert trained.validate()["val_loss"] == pytest.approx(total, rel=1e-5)


def test_the_head_is_drawn_from_its_distribution() -> None:
    model = RewardModel(config(64, hidden_size=1024, num_attention_heads=8, num_hidden_layers=1))
    weight = model.head.weight.detach()
    assert float(weight.std()) == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    assert model.head.bias is None and abs(float(weight.mean())) < 4 / 1025
    same = [RewardModel(config(64), seed=s).head.weight for s in (1, 1, 2)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_scores_are_those_of_the_last_token(monkeypatch) -> None:
    """Alone, together, in several forwards; and where the end token is the padding token."""
    from fastlm.model import reward_model

    model = model_of(pad_token_id=0, eos_token_id=0).eval()
    model.normalise(torch.tensor([1.0, 3.0]))
    assert (model.mean, model.std) == (2.0, 1.0)
    sequences = [[5, 6, 0], [7, 0], [8, 9, 10, 11, 0], [0]]
    together = model.score(sequences)
    assert together.dtype == torch.float32
    for i, sequence in enumerate(sequences):
        hidden = model.trunk.hidden(torch.tensor([sequence]))[0, -1]
        assert float(together[i]) == pytest.approx(
            float((hidden @ model.head.weight[0]).detach()) - 2.0, abs=1e-5
        )
    monkeypatch.setattr(reward_model, "BATCH_TOKENS", 4)
    torch.testing.assert_close(model.score(sequences), together)
    assert model.score([]).shape == (0,)
    ids, ends = torch.tensor([[5, 6, 0, 7, 0]]), torch.tensor([0, 3, 5], dtype=torch.int32)
    values = model.values(ids, ends)
    assert values.shape == (1, 5) and values.requires_grad
    torch.testing.assert_close(values[0, [2, 4]].detach(), together[:2])
    for bad, got in ([], 0), ([1] * 129, 129):
        with pytest.raises(
            InputError, match=rf"sequences\[1\]: expected 1 to 128 tokens, got {got}"
        ):
            model.score([[1], bad])


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_gives_the_same_scores(tmp_path, tied) -> None:
    from transformers import AutoModelForSequenceClassification

    lm = CausalLM(config(64, tie_word_embeddings=tied, pad_token_id=0), seed=1)
    model = RewardModel.from_causal_lm(lm, seed=2)
    sequences = [[5, 6, 7, 0], [8, 9, 10, 11, 12, 0]]
    model.normalise(model.score(sequences))
    model.save_pretrained(tmp_path)
    reloaded = RewardModel.from_pretrained(tmp_path)
    assert torch.equal(reloaded.score(sequences), model.score(sequences)) and not reloaded.training
    assert (reloaded.mean, reloaded.std) == (model.mean, model.std)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    settings = json.loads((tmp_path / "config.json").read_text())
    for sequence, score in zip(sequences, model.score(sequences)):
        with torch.no_grad():
            (logit,) = theirs(torch.tensor([sequence])).logits[0]
        normed = (float(logit) - settings["score_mean"]) / settings["score_std"]
        assert normed == pytest.approx(float(score), abs=1e-4)
    with pytest.raises(InputError, match="expected tensors of the model only"):
        CausalLM.from_pretrained(tmp_path)  # no language model
    lm.save_pretrained(tmp_path / "lm")
    with pytest.raises(InputError, match=r"expected a reward model, with score.weight \(1, 32\)"):
        RewardModel.from_pretrained(tmp_path / "lm")


# ---- what is measured


def test_calibration() -> None:
    actual = calibration([math.log(3)] * 3 + [-math.log(3)] + [0.0] * 2 + [9.0])
    assert [b["count"] for b in actual["bins"]] == [2, 4, 1] and actual["pairs"] == 7
    tie, three_quarters, sure = actual["bins"]
    assert (tie["predicted"], tie["observed"]) == (0.5, 0.5)
    assert three_quarters["predicted"] == pytest.approx(0.75) and three_quarters["observed"] == 0.75
    assert sure["observed"] == 1.0
    assert actual["ece"] == pytest.approx((1 - 1 / (1 + math.exp(-9))) / 7)
    wrong = calibration([-9.0] * 5)
    assert wrong["ece"] == pytest.approx(1 / (1 + math.exp(-9)))
    assert calibration([1e9, -1e9])["bins"][0]["predicted"] == 1.0


def test_a_calibration_error_is_compared_with_that_of_a_calibrated_model() -> None:
    rng = np.random.default_rng(0)

    def drawn(n: int, sharpness: float = 1.0) -> dict:
        """Return the calibration of pairs that are right with the predicted probability, at another
        sharpness.
        """
        margins = np.abs(rng.normal(0, 1.5, n))
        right = rng.random(n) < 1 / (1 + np.exp(-margins))
        return calibration(sharpness * np.where(right, margins, -margins))

    small = [drawn(40) for _ in range(60)]
    mean = np.mean([actual["ece"] for actual in small])
    assert mean > 0.09  # without any fault of the model
    assert abs(np.mean([actual["excess"] for actual in small])) < 0.02  # 3 standard errors
    assert np.mean([actual["null"]["p"] <= 0.05 for actual in small]) < 0.15
    large, sure = drawn(20_000), drawn(400, sharpness=3)  # normal from 2,000 pairs of a bin on
    assert large["null"]["mean"] < 0.01 and large["null"]["p"] > 0.01
    assert sure["ece"] > sure["null"]["p95"] and sure["null"]["p"] < 0.001 < sure["excess"]


def test_length_bias() -> None:
    lengths, arguments = [1, 2, 4, 8], [4.0, 3.0, 1.0, 2.0]
    actual = length_bias(lengths, arguments, [(0, 1), (3, 2), (2, 3), (0, 3)])
    assert actual["correlation"] == pytest.approx(np.corrcoef(lengths, arguments)[0, 1])
    assert actual["shorter"] == {"pairs": 3, "accuracy": pytest.approx(2 / 3)}
    assert actual["longer"] == {"pairs": 1, "accuracy": 1.0}
    assert length_bias([2, 2], [1.0, 3.0], [(0, 1)])["correlation"] is None


def test_standard_errors() -> None:
    right = torch.tensor([1.0, 1.0, 0.0, 1.0])
    single = accuracy_error(right, ["a", "b", "c", "d"])
    assert single == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    # a row counted twice is not twice the evidence
    twice = accuracy_error(right.repeat(2), ["a", "b", "c", "d"] * 2)
    assert twice == pytest.approx(single)
    assert accuracy_error(right, ["a"] * 4) == 0
    better, worse = torch.tensor([3.0, 2.0, 0.5]), torch.tensor([1.0, 2.0])
    share, error = pairwise_accuracy(better, worse)
    assert share == pytest.approx((2 + 1.5 + 0) / 6)
    v_better, v_worse = np.var([1, 0.75, 0], ddof=1), np.var([2 / 3, 0.5], ddof=1)
    assert error == pytest.approx(math.sqrt(v_better / 3 + v_worse / 2))
    assert pairwise_accuracy(better, worse[:0]) == (0.5, 0.0)


# ---- training


def test_the_model_learns_the_better_answer(trained, base) -> None:
    out, result, events = trained
    assert result["metrics"]["val_accuracy"] > 0.9 and result["metrics"]["val_margin"] > 0.5
    first = next(e for e in events if "loss" in e)
    assert abs(first["loss"] - math.log(2)) < 0.7 and {"accuracy", "margin"} <= first.keys()
    model, tokenizer = (
        RewardModel.from_pretrained(out),
        Tokenizer.load(out / "model"),
    )
    pairs = polite_pairs(75)[60:]
    both = [
        scores(model, tokenizer, [conversation(row["prompt"], row[side]) for row in pairs])
        for side in ("chosen", "rejected")
    ]
    assert int((both[0] > both[1]).sum()) >= 14


def test_scores_have_mean_0_and_standard_deviation_1_on_the_training(trained) -> None:
    out, result, _ = trained
    model, tokenizer = RewardModel.from_pretrained(out), Tokenizer.load(out / "model")
    assert result["evaluated_on"] == "held-out"
    from fastlm.data.preferences import parse_preference
    from fastlm.train.encoding import hash_fraction

    rows = [parse_preference(row) for row in polite_pairs(60)]
    conversations = [
        row.conversation(i).messages
        for row in rows
        if hash_fraction(row.conversation(0)) >= 0.25
        for i in (0, 1)
    ]
    assert len(conversations) == 2 * result["comparisons"]
    actual = scores(model, tokenizer, conversations).double()
    assert abs(float(actual.mean())) < 1e-5
    assert float(actual.std(correction=0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_command_continues_to_the_same_bits(base, tmp_path, dtype) -> None:
    data = write(tmp_path / "pairs.jsonl", polite_pairs(24))
    stage = options(data=(data,), dtype=dtype, epochs=2)
    uninterrupted = stage(tmp_path / "whole", model=base)

    def interrupt(event) -> None:
        if "loss" in event and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        stage(tmp_path / "cut", model=base, on_event=interrupt)
    cut = stage(tmp_path / "cut", model=base)
    files = [
        (tmp_path / name / "model" / file).read_bytes()
        for name in ("whole", "cut")
        for file in ("model.safetensors", "config.json")
    ]
    assert files[:2] == files[2:]
    assert cut["calibration"] == uninterrupted["calibration"]


def test_lists_and_ties(base, tmp_path) -> None:
    answers = ["bird", "road", "lamp"]
    rows = [
        {"prompt": "what is tree", "answers": answers, "ranks": [2, 0, 1]},  # 2 choices
        {"prompt": "what is song", "answers": answers, "ranks": [1, 0, 1]},  # 2 pairs
        {"prompt": "what is stone", "chosen": "song", "rejected": "field"},
    ]
    data = write(tmp_path / "lists.jsonl", rows)
    result = options(data=(data,), heldout=0.0, epochs=1)(tmp_path / "out", model=base)
    assert result["comparisons"] == 2 + 2 + 1 and result["evaluated_on"] == "training"
    assert result["calibration"]["pairs"] == 3 + 2 + 1


REFUSED = {
    "line 1: expected different answers, chosen and rejected are equal": (
        {"prompt": "a", "chosen": "b", "rejected": "b"}, {},
    ),
    "line 1: chosen: expected text from the assistant, got an empty message": (
        {"prompt": "a", "chosen": " ", "rejected": "b"}, {},
    ),
    "line 1: expected a comparison of answers, got one answer with a label": (
        {"prompt": "a", "completion": "b", "label": True}, {},
    ),
    "data: expected pairs to learn from, got none in 1 rows (1 too long)": (
        {"prompt": "x " * 150, "chosen": "b", "rejected": "c"}, {},
    ),
    "max_length: expected at most the model's context 128, got 129": (
        {"prompt": "a", "chosen": "b", "rejected": "c"}, {"max_length": 129},
    ),
    "sample_prompt: reward has no use for it, got 'Hello'": (
        {"prompt": "a", "chosen": "b", "rejected": "c"}, {"sample_prompt": "Hello"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused_data(base, tmp_path, message) -> None:
    row, changes = REFUSED[message]
    data = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError) as refusal:
        options(data=(data,), heldout=0.0, **changes)(tmp_path / "out", model=base)
    assert message in str(refusal.value)


def test_a_tokenizer_of_another_model_is_refused(base, tmp_path) -> None:
    folder = tmp_path / "small"
    CausalLM(config(100, 0)).save_pretrained(folder)
    Tokenizer.load(base).save(folder)
    data = write(tmp_path / "rows.jsonl", polite_pairs(2))
    with pytest.raises(InputError, match="expected a tokenizer of at most 100 ids"):
        options(data=(data,))(tmp_path / "out", model=folder)


def test_options_without_use_are_not_offered(base, tmp_path) -> None:
    call = CliRunner().invoke
    offered = call(app, ["reward", "--help"]).stdout
    assert "--val-tokens" in offered and "--sample" not in offered
    assert "--val-tokens" not in call(app, ["ppo", "--help"]).stdout
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "r"\n[[stage]]\nkind = "reward"\nfrom = "{base}"\ndata = ["x"]\n'
        "sample_tokens = 4\n"
    )
    done = call(app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2 and "reward.sample_tokens: unknown key" in done.stderr


def test_a_recipe_shows_it(base, tmp_path) -> None:
    data = write(tmp_path / "pairs.jsonl", polite_pairs(30))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "r"\n[[stage]]\nkind = "reward"\nfrom = "{base}"\ndata = [{json.dumps(data)}]\n'
        "heldout = 0.3\n"
    )
    done = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "run" / "report.html").read_text()
    for text in (
        "Reward model",
        "expected calibration error",
        "observed share",
        "answer is shorter",
    ):
        assert text in page
    assert RewardModel.from_pretrained(tmp_path / "run" / "reward").std > 0
