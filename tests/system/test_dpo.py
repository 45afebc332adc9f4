"""Preference training: the losses of encoded pairs and labels against their formulas, that no split
into micro-batches changes them, the reference, resuming, learning, and what is refused.
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
from fastlm.train.dpo import DPO
from fastlm.train.dpo_objective import DPOObjective
from fastlm.train.loop import TrainingInterrupted
from fastlm.train.objective import IGNORE, Example, pack_groups
from fastlm.train.options import TrainOptions
from fastlm.train.preference_stage import DPOOptions, PreferenceExample, add_mismatched_answers

TINY = DPO(
    data=("x.jsonl",), epochs=2, batch_size=3, gradient_accumulation_steps=2, lr=2e-3, heldout=0.25,
    validations=2, sample_at=(), dtype="float32", save_steps=3,
)  # fmt: skip
PAIRS = [
    PreferenceExample((example([5, 6, 7, 8, 9], 3, "row 1"), example([5, 6, 7, 10], 3))),
    PreferenceExample((example([11, 12, 13], 1, "row 2"), example([11, 14, 15, 16, 17, 18], 1))),
    PreferenceExample((example([20, 21, 22, 23], 2, "row 3"), example([20, 21, 24], 2))),
    PreferenceExample((example([30, 31], 1, "row 4"), example([30, 32, 33], 1))),
    PreferenceExample((example([40, 41, 42], 1, "row 5"), example([40, 43, 44], 1))),
]
LABELS = add_mismatched_answers(
    [
        PreferenceExample((answer,), desirable=good)
        for pair in PAIRS
        for answer, good in zip(pair.answers, (True, False))
    ],
    64,
)
TERMS = {
    "sigmoid": DPOOptions(beta=0.3),
    "cdpo": DPOOptions(beta=0.3, label_smoothing=0.2),
    "ipo": DPOOptions(loss_type="ipo", beta=0.3, length_normalise=True),
    "hinge": DPOOptions(loss_type="hinge", beta=2.0),
    "rpo": DPOOptions(beta=0.3, sft_weight=0.5, length_normalise=True),
    "simpo": DPOOptions(loss_type="simpo", beta=2.0, simpo_gamma=0.7, sft_weight=0.2),
    "orpo": DPOOptions(loss_type="orpo", beta=0.3),
    "kto": DPOOptions(loss_type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.7),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def data(tmp_path) -> str:
    return write(tmp_path / "pairs.jsonl", polite_pairs(40))


def options(**changes) -> DPO:
    return replace(TINY, **changes)


def objective(terms: DPOOptions, batch_size: int = 2, examples=None) -> DPOObjective:
    """On a model that is not its reference any more."""
    model = CausalLM(config(64), seed=3)
    examples = examples or (LABELS if terms.loss_type == "kto" else PAIRS)
    dpo_objective = DPOObjective(
        model, examples, examples, TrainOptions(max_steps=1), terms, batch_size=batch_size, seed=4,
        base="", tokenizer=None, prompt=(),
    )  # fmt: skip
    dpo_objective.measure_reference(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
            parameter.add_(0.05 * draw)
    return dpo_objective


def logp(model: CausalLM, answer: Example) -> torch.Tensor:
    """The log-probability of an answer, one sequence at a time, from its logits in float64."""
    ids = torch.tensor(answer.ids.tolist())
    logits = model(ids[None]).logits[0].double().log_softmax(-1)
    positions = torch.tensor(answer.loss_mask.tolist()).nonzero()[:, 0]
    return logits[positions - 1, ids[positions]].sum()


def naive(model, reference, terms: DPOOptions, examples) -> torch.Tensor:
    """The mean loss, written from the papers' formulas."""
    t, losses = terms, []
    if t.loss_type == "kto":
        others = [logp(model, j.answers[1]) - logp(reference, j.answers[1]) for j in examples]
        kl = torch.stack(others).mean().clamp(min=0).detach()
    for preference in examples:
        policy = [logp(model, answer) for answer in preference.answers]
        with torch.no_grad():
            before = [logp(reference, answer) for answer in preference.answers]
        ratios = [a - b for a, b in zip(policy, before)]
        if t.loss_type == "kto":
            weight = t.desirable_weight if preference.desirable else t.undesirable_weight
            sign = 1 if preference.desirable else -1
            losses.append(weight * (1 - torch.sigmoid(sign * t.beta * (ratios[0] - kl))))
            continue
        lengths = [int(answer.loss_mask.sum()) for answer in preference.answers]
        means = [a / n for a, n in zip(policy, lengths)]
        if t.loss_type == "orpo":
            odds = [mean.exp() / (1 - mean.exp()) for mean in means]
            losses.append(-means[0] - t.beta * (odds[0] / (odds[0] + odds[1])).log())
            continue
        if t.length_normalise:
            ratios = [ratio / n for ratio, n in zip(ratios, lengths)]
        h = ratios[0] - ratios[1]
        if t.loss_type == "sigmoid":
            good, e = torch.sigmoid(t.beta * h), t.label_smoothing
            loss = -(1 - e) * good.log() - e * (1 - good).log()
        elif t.loss_type == "simpo":
            loss = -torch.sigmoid(t.beta * (means[0] - means[1]) - t.simpo_gamma).log()
        elif t.loss_type == "ipo":
            loss = (h - 1 / (2 * t.beta)) ** 2
        else:
            loss = (1 - t.beta * h).clamp(min=0)
        losses.append(loss - t.sft_weight * policy[0] / lengths[0])
    return torch.stack(losses).mean()


def step(trained: DPOObjective, micro_batches: int) -> tuple[float, list[torch.Tensor]]:
    trained.trained.zero_grad()
    batches = trained.next_batches(micro_batches)
    count, total = sum(map(trained.num_items, batches)), 0.0
    for batch in batches:
        loss = trained.loss(batch, count)
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in trained.trained.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", TERMS)
def test_the_loss_is_the_formula_whatever_the_micro_batches(name) -> None:
    """Against logits in memory, one sequence at a time; in every split of a step."""
    terms = TERMS[name]
    examples = LABELS if terms.loss_type == "kto" else PAIRS
    trained = objective(terms, batch_size=len(examples))
    model, reference = trained.trained, CausalLM(config(64), seed=3)
    truth = naive(model.double(), reference.double(), terms, examples)
    truth.backward()
    expected = [p.grad.float() for p in model.parameters() if p.grad is not None]
    for size in (len(examples), 2, 1):
        actual, gradients = step(objective(terms, size), -(-len(examples) // size))
        assert actual == pytest.approx(float(truth.detach()), rel=1e-4)
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-6)


def test_a_step_counts_pairs_and_tokens() -> None:
    trained = objective(TERMS["sigmoid"], batch_size=3)
    batches = trained.next_batches(9)
    assert [trained.num_items(batch) for batch in batches] == [3, 2]
    tokens = sum(answer.num_loss_tokens for pair in PAIRS for answer in pair.answers)
    assert sum(trained.tokens(batch) for batch in batches) == tokens
    for batch in batches:
        trained.loss(batch, 5)
    scalars = trained.scalars([trained.measurements()])
    logps = [float(logp(trained.trained, pair.answers[0]).detach()) for pair in PAIRS]
    assert scalars["logp_chosen"] == pytest.approx(np.mean(logps), rel=1e-5)
    lengths = [pair.answers[1].num_loss_tokens for pair in PAIRS]
    assert scalars["length_rejected"] == pytest.approx(np.mean(lengths))
    assert scalars["margin"] == pytest.approx(
        scalars["reward_chosen"] - scalars["reward_rejected"], abs=1e-6
    )
    with torch.no_grad():
        validation = trained.validate()
    assert validation["val_loss"] == pytest.approx(step(trained, 9)[0], rel=1e-5)
    right = np.mean([float(v) for m in trained.step_measurements for v in m["accuracy"]])
    assert validation["val_accuracy"] == pytest.approx(right)
    assert validation["val_accuracy_error"] == pytest.approx((right * (1 - right) / 4) ** 0.5)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_a_loss_without_a_reference_measures_none(name, monkeypatch) -> None:
    """The only forward passes are those of the steps, and rewards are of mean log-probabilities."""
    passes, logprobs = [], CausalLM.logprobs

    def counted(*args, **kwargs):
        passes.append(args)
        return logprobs(*args, **kwargs)

    monkeypatch.setattr(CausalLM, "logprobs", counted)
    trained = objective(TERMS[name], batch_size=3)
    assert trained.reference is not None and not passes and not trained.reference.any()
    for batch in trained.next_batches(9):
        trained.loss(batch, 5)
    assert len(passes) == 2
    scalars = trained.scalars([trained.measurements()])
    means = torch.stack([
        logp(trained.trained, answer) / answer.num_loss_tokens
        for pair in PAIRS for answer in pair.answers
    ]).detach().view(-1, 2)  # fmt: skip
    beta = trained.dpo_options.beta
    assert scalars["reward_rejected"] == pytest.approx(beta * float(means[:, 1].mean()), rel=1e-4)
    assert scalars["accuracy"] == pytest.approx(float((means[:, 0] > means[:, 1]).double().mean()))
    assert ("nll" in scalars) == ("log_odds" in scalars) == (name == "orpo")
    if name == "orpo":
        assert scalars["nll"] == pytest.approx(-float(means[:, 0].mean()), rel=1e-4)
        log_odds = torch.logit(means.exp())
        expected = float((log_odds[:, 0] - log_odds[:, 1]).mean())
        assert scalars["log_odds"] == pytest.approx(expected, rel=1e-3)
        with torch.no_grad():
            assert trained.validate()["val_log_odds"] == pytest.approx(expected, rel=1e-3)


def test_every_reference_is_measured_once() -> None:
    """Also of held-out rows beyond val_tokens, which a resumed training may validate on."""
    model = CausalLM(config(64), seed=3)
    trained = DPOObjective(
        model, PAIRS, PAIRS, TrainOptions(max_steps=1, val_tokens=1), DPOOptions(),
        batch_size=2, seed=4, base="", tokenizer=None, prompt=(),
    )  # fmt: skip
    trained.measure_reference(torch.float32)
    with torch.no_grad():
        expected = torch.tensor(
            [[float(logp(model, a)) for a in example.answers] for example in PAIRS]
        )
        model.model.embed_tokens.weight.mul_(2)
    for reference in (trained.reference, trained.reference_heldout):
        torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)
    state = trained.state_dict()
    resumed = objective(TERMS["sigmoid"])
    resumed.load_state_dict(state)
    assert resumed.reference is not None and torch.equal(resumed.reference, trained.reference)


def test_a_pair_has_its_prompt_once() -> None:
    """But for the token that predicts the first token of the answer: it has two labels."""
    (ids, labels, cu_seqlens), (rows, ends) = pack_groups([pair.answers for pair in PAIRS[:2]])
    assert ids.tolist() == [[5, 6, 7, 8, 7, 11, 12, 11, 14, 15, 16, 17]]
    assert labels.tolist() == [[IGNORE, IGNORE, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18]]
    assert cu_seqlens.tolist() == [0, 4, 5, 7, 12]
    assert rows.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 10, 11]
    assert ends.tolist() == [0, 4, 7, 9, 14]


@pytest.mark.parametrize("window", [None, 4])
def test_a_shared_prompt_changes_no_log_probability(window) -> None:
    """Also where the answers begin alike, a prompt differs, and attention has a window."""
    changes = {"model_type": "mistral", "sliding_window": window, "tie_word_embeddings": False}
    model = CausalLM(config(64, **changes), seed=2)
    prompt = [5, 9, 6, 30, 31, 7, 8]
    pairs = [
        (example([*prompt, 10, 11, 12], 7), example([*prompt, 10, 13], 7)),
        (example([*prompt, 10, 11], 7), example([*prompt[:4], 1, 2, 10, 13, 14], 6)),
    ]
    packed, keys = pack_groups(pairs)
    assert packed[0].shape[1] < sum(len(e.ids) - 1 for pair in pairs for e in pair)
    ids, labels, cu_seqlens = packed
    logps = model.logprobs(ids, labels, cu_seqlens=cu_seqlens, keys=keys)[0]
    actual = torch.stack([part.sum() for part in logps.tensor_split(cu_seqlens[1:-1].long())])
    expected = torch.stack([logp(model, e) for pair in pairs for e in pair])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    scale = torch.tensor([1.0, -0.5, 2.0, 0.3])
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((actual * scale).sum(), parameters),
        torch.autograd.grad((expected * scale).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_keys_that_cannot_be_are_refused() -> None:
    model = CausalLM(config(64), seed=2)
    (ids, labels, cu_seqlens), (rows, ends) = pack_groups([pair.answers for pair in PAIRS[:2]])
    model.hidden(ids, cu_seqlens=cu_seqlens, keys=(rows, ends))
    with pytest.raises(InputError, match="keys: expected with cu_seqlens, got none"):
        model.logprobs(ids, labels, keys=(rows, ends))
    swapped = rows.clone()
    swapped[4:7] = rows[4:7].flip(0)  # the second answer's own token comes first
    with pytest.raises(InputError, match="keys: expected rows in which the keys of a document end"):
        model.hidden(ids, cu_seqlens=cu_seqlens, keys=(swapped, ends))
    with pytest.raises(InputError, match="keys: expected at least as many keys as tokens"):
        model.hidden(ids, cu_seqlens=cu_seqlens, keys=(rows, ends[:-1]))


def test_an_answer_to_another_prompt_keeps_its_own_prompt() -> None:
    assert len(LABELS) == 10 and [label.desirable for label in LABELS] == [True, False] * 5
    prompts = [
        label.answers[0].ids[: label.answers[0].loss_mask.argmax()].tolist() for label in LABELS
    ]
    for i, label in enumerate(LABELS):
        answer_ids, other = label.answers
        start = len(prompts[i])
        assert other.ids[:start].tolist() == prompts[i] and other.loss_mask.argmax() == start
        (source,) = [
            j
            for j, there in enumerate(LABELS)
            if there.answers[0].ids[len(prompts[j]) :].tolist() == other.ids[start:].tolist()
        ]
        assert prompts[source] != prompts[i] and answer_ids.ids[:start].tolist() == prompts[i]
    with pytest.raises(
        InputError, match="expected answers to two prompts or more for kto, got one"
    ):
        add_mismatched_answers([PreferenceExample((answer,)) for answer in PAIRS[0].answers], 64)
    # in as many tokens as fit, and at least one of the answer
    (short, _) = add_mismatched_answers(
        [PreferenceExample((PAIRS[2].answers[0],)), PreferenceExample((LABELS[3].answers[0],))], 4
    )
    assert len(short.answers[1].ids) == 4 and short.answers[1].num_loss_tokens == 2


# ---- training


@pytest.mark.parametrize("loss, dtype", [("sigmoid", "float32"), ("sigmoid", "bfloat16"),
                                         ("ipo", "bfloat16"), ("kto", "float32")])  # fmt: skip
def test_before_the_first_update_policy_and_reference_are_equal(
    base, data, tmp_path, loss, dtype
) -> None:
    """To the last bit, in whatever micro-batches they are."""
    events: list[dict] = []
    stage = options(data=(data,), loss_type=loss, dtype=dtype, epochs=1)
    stage(tmp_path / "out", model=base, on_event=events.append)
    first = next(e for e in events if "loss" in e)
    validation = next(e for e in events if "val_loss" in e)
    expected = {"sigmoid": math.log(2), "ipo": 25.0, "kto": 0.5}[loss]
    for line, name in ((first, ""), (validation, "val_")):
        assert line[f"{name}loss"] == pytest.approx(expected, rel=1e-6)
        assert line[f"{name}accuracy"] == 0.5  # all tied
        assert line[f"{name}margin"] == line[f"{name}reward_chosen"] == 0.0
        assert loss != "kto" or name or line["kl"] == 0.0
    later = [e for e in events if "loss" in e][-1]
    assert later["margin"] != 0.0


@pytest.mark.parametrize("loss, beta", [("sigmoid", 0.1), ("kto", 0.1), ("simpo", 2), ("orpo", 1)])
def test_the_model_learns_the_better_answer(base, tmp_path, loss, beta) -> None:
    rows = write(tmp_path / "pairs.jsonl", polite_pairs(60))
    changes = {"epochs": 4, "lr": 5e-3, "sample_at": (0.0, 1.0), "sample_tokens": 8, "beta": beta}
    stage = options(data=(rows,), loss_type=loss, **changes)
    events: list[dict] = []
    result = stage(tmp_path / "out", model=base, on_event=events.append)
    assert result["metrics"]["val_accuracy"] > 0.9
    assert result["metrics"]["val_margin"] > 0.5
    assert result["pairs"] + result["heldout"] == 60 * (2 if loss == "kto" else 1)
    assert len([e for e in events if "sample" in e]) == 2
    # measured by another way: the trained model against the base
    trained, before = (CausalLM.from_pretrained(p) for p in (tmp_path / "out", base))
    from fastlm.tokenizer.tokenizer import Tokenizer

    words = Tokenizer.load(tmp_path / "out" / "model")
    right = 0
    for row in polite_pairs(75)[60:]:
        gains = []
        for side in ("chosen", "rejected"):
            messages = [{"role": "user", "content": row["prompt"]},
                        {"role": "assistant", "content": row[side]}]  # fmt: skip
            ((ids, mask),) = words.encode_conversation(messages)
            pair = Example(np.array(ids), np.array(mask))
            with torch.no_grad():
                gains.append(float(logp(trained, pair) - logp(before, pair)))
        right += gains[0] > gains[1]
    assert right >= 14


@pytest.mark.parametrize(
    "loss, kill_step", [("sigmoid", 2), ("sigmoid", 7), ("kto", 5), ("orpo", 3)]
)
def test_the_same_command_continues_to_the_same_bits(base, data, tmp_path, loss, kill_step) -> None:
    """Stopped by Ctrl-C within an epoch. The reference is that of before, though the weights that
    training continues from are others.
    """
    stage = options(data=(data,), loss_type=loss, epochs=3, gradient_accumulation_steps=2)
    uninterrupted = stage(tmp_path / "whole", model=base)

    def interrupt(event) -> None:
        if "loss" in event and event["step"] == kill_step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        stage(tmp_path / "cut", model=base, on_event=interrupt)
    cut = stage(tmp_path / "cut", model=base)
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert cut["metrics"] == uninterrupted["metrics"] and cut["steps"] == uninterrupted["steps"]
    lines = [
        [
            {k: v for k, v in json.loads(line).items()
             if k not in ("seconds", "tokens_per_second", "progress")}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "cut")
    ]  # fmt: skip
    assert lines[0] == lines[1]


def test_another_loss_is_another_training(base, data, tmp_path) -> None:
    options(data=(data,), epochs=1)(tmp_path / "out", model=base)
    with pytest.raises(InputError, match=r"with these options, got another: beta was 0.1, now 0.2"):
        options(data=(data,), epochs=1, beta=0.2)(tmp_path / "out", model=base)


def test_ranked_lists_give_every_pair(base, tmp_path) -> None:
    rows = [
        {"prompt": "what is tree", "answers": ["bird", "road", "lamp", "boat"],
         "ranks": [2, 0, 1, 1]},
        {"prompt": "what is stone", "chosen": "song", "rejected": "field"},
    ]  # fmt: skip
    data = write(tmp_path / "lists.jsonl", rows)
    result = options(data=(data,), heldout=0.0)(tmp_path / "out", model=base)
    assert result["rows_read"] == 2 and result["pairs"] == 5 + 1  # all of four but the tied pair


def test_long_answers_are_counted(base, tmp_path) -> None:
    rows = [
        {"prompt": "tree", "chosen": "bird", "rejected": "road"},
        {"prompt": "x " * 150, "chosen": "bird", "rejected": "road"},
        {"prompt": "stone", "chosen": "y " * 150, "rejected": "road"},
        {"prompt": "lamp", "chosen": "y " * 150 + "a", "rejected": "y " * 150 + "b"},
    ]
    data = write(tmp_path / "long.jsonl", rows)
    for how, counts, pairs in (
        ("skip", {"too long": 3}, 1),
        (
            "truncate",
            {"nothing left to learn": 1, "truncated": 2, "equal after truncation": 1},
            2,
        ),
    ):
        stage = options(data=(data,), truncation=how, heldout=0.0, epochs=1)
        result = stage(tmp_path / how, model=base)
        assert result["counts"] == counts and result["pairs"] == pairs


# ---- what is refused

REFUSED = {
    "loss_type: expected one of sigmoid, ipo, hinge, simpo, orpo, kto, got 'rrhf'": {
        "loss_type": "rrhf",
    },
    "simpo_gamma: expected none with loss_type = 'orpo', got 1.0 (an option of simpo)": {
        "loss_type": "orpo", "simpo_gamma": 1.0,
    },
    "simpo_gamma: expected 0 or more, got -1": {"loss_type": "simpo", "simpo_gamma": -1},
    "beta: expected a positive number, got 0": {"beta": 0},
    "label_smoothing: expected a number in [0, 0.5), got 0.5": {"label_smoothing": 0.5},
    "label_smoothing: expected none with loss_type = 'ipo', got 0.1 (an option of sigmoid,"
    " simpo)": {
        "label_smoothing": 0.1, "loss_type": "ipo",
    },
    "desirable_weight: expected none with loss_type = 'sigmoid', got 2.0 (an option of kto)": {
        "desirable_weight": 2.0,
    },
    "sft_weight: expected 0 or more, got -1": {"sft_weight": -1},
    "truncation: expected one of skip, truncate, got 'split'": {"truncation": "split"},
    "batch_size: expected 2 labels or more per step with loss_type = 'kto', whose reference point"
    " is a mean, got 1": {
        "loss_type": "kto", "batch_size": 1, "gradient_accumulation_steps": 1,
    },
    "batch_size: expected 2 labels or more per step with loss_type = 'kto', whose reference point"
    " is a mean, got 1 at the beginning of batch_warmup": {
        "loss_type": "kto", "batch_size": 1, "gradient_accumulation_steps": 4, "batch_warmup": 0.5,
        "max_steps": 3, "epochs": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused_options(message) -> None:
    with pytest.raises(InputError) as refusal:
        options(**REFUSED[message]).check()
    assert str(refusal.value) == message


ROWS = {
    "line 1: expected different answers, chosen and rejected are equal": (
        {"prompt": "a", "chosen": "b", "rejected": "b"}, {},
    ),
    "line 1: rejected: expected text from the assistant, got an empty message": (
        {"prompt": "a", "chosen": "b", "rejected": ""}, {},
    ),
    "line 1: expected a comparison of answers, got one answer with a label": (
        {"prompt": "a", "completion": "b", "label": True}, {},
    ),
    "line 1: expected different answers, got two that the chat template renders alike": (
        {"prompt": "a", "chosen": "b", "rejected": "b \n"},
        {"chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}"
         "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
         "{% endif %}"},
    ),
    "expected answers to two prompts or more for kto, got one prompt": (
        {"prompt": "a", "completion": "b", "label": True}, {"loss_type": "kto"},
    ),
    "data: expected pairs to learn from, got none in 1 rows (1 held out)": (
        {"prompt": "a", "chosen": "b", "rejected": "c"}, {"heldout": 0.9999999},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", ROWS)
def test_refused_data(base, tmp_path, message) -> None:
    row, changes = ROWS[message]
    if "chat_template" in changes:
        template = tmp_path / "chat.jinja"
        template.write_text(changes["chat_template"])
        changes = {**changes, "chat_template": str(template)}
    data = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError) as refusal:
        options(data=(data,), **{"heldout": 0.0, **changes})(tmp_path / "out", model=base)
    assert message in str(refusal.value)


def test_the_command_and_a_recipe(base, data, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ["dpo", data, "--model", str(base), "--out", str(out), "--batch-size", "4"]
    done = CliRunner().invoke(app, [*arguments, "--sample-tokens", "4"])
    assert done.exit_code == 0, done.output
    assert "pairs, " in done.stdout and "held-out accuracy" in done.stdout
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "r"\n[[stage]]\nkind = "dpo"\nfrom = "{base}"\ndata = [{json.dumps(data)}]\n'
        "sample_tokens = 4\n"
        f'[[stage]]\nname = "kto"\nkind = "dpo"\nloss_type = "kto"\ndata = [{json.dumps(data)}]\n'
        "sample_tokens = 4\n"
    )
    done = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Preference training" in page and "accuracy, held-out" in page
    assert "accuracy of pairs" in page


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge"])
def test_loss_and_gradient_are_those_of_trl(base, tmp_path, name) -> None:
    """TRL's DPOTrainer on its own padded batch of the same tokens, of a model that has moved."""
    import datasets
    import transformers
    import trl

    terms = DPOOptions(loss_type=name, beta=0.3, length_normalise=name == "ipo")
    words = transformers.AutoTokenizer.from_pretrained(base)
    words.pad_token = words.pad_token or words.eos_token
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    arguments = trl.DPOConfig(
        str(tmp_path / "trl"), beta=terms.beta, loss_type=[name], report_to=[], use_cpu=True,
        per_device_train_batch_size=6, disable_tqdm=True, disable_dropout=True, bf16=False,
    )  # fmt: skip
    rows = [{**row, "rejected": row["rejected"] + " now" * i} for i, row in
            enumerate(polite_pairs(6))]  # fmt: skip
    trainer = trl.DPOTrainer(
        theirs, reference, arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    with torch.no_grad():
        for parameter in theirs.parameters():
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
            parameter.add_(0.05 * draw)
    features = list(trainer.train_dataset)
    loss = trainer.compute_loss(theirs, trainer.data_collator(features))
    loss.backward()
    examples = [
        PreferenceExample(tuple(
            example(row["prompt_ids"] + row[side], len(row["prompt_ids"]))
            for side in ("chosen_ids", "rejected_ids")
        ))
        for row in features
    ]  # fmt: skip
    model = CausalLM.from_pretrained(base, dtype=torch.float32)
    trained = DPOObjective(
        model, examples, [], TrainOptions(max_steps=1), terms, batch_size=4, seed=0, base="",
        tokenizer=None, prompt=(),
    )  # fmt: skip
    trained.measure_reference(torch.float32)
    model.load_state_dict(theirs.state_dict(), strict=False)
    actual, _ = step(trained, 2)
    assert actual == pytest.approx(float(loss.detach()), rel=1e-4)
    expected = dict(theirs.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[parameter_name].grad, rtol=2e-3, atol=2e-6,
            msg=lambda m, n=parameter_name: f"{n}: {m}",
        )  # fmt: skip
