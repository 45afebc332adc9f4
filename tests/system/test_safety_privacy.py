"""What a model gives away: a memorizer is caught, one that has seen nothing is not."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_models import config
from safety_sets import bench
from test_cli import call, refused

from fastlm.data.prepare import FUNNEL, HELDOUT, TRAIN
from fastlm.errors import InputError
from fastlm.evals.safety.canaries import (
    DIGITS,
    NOT_MEMORISED,
    exposure,
    make_canaries,
    read_canaries,
    write_canaries,
)
from fastlm.evals.safety.gcg import one_hot_gradient, search, target_losses
from fastlm.evals.safety.privacy import auc, canaries, membership, memorization
from fastlm.evals.safety.shown import exposure_chart, memorization_chart
from fastlm.evals.safety.suffixes import around, encoded, usable_tokens
from fastlm.evals.scorer import Scorer
from fastlm.model.causal_lm import CausalLM
from fastlm.tokenizer.tokenizer import Tokenizer

COPIES = 16


@pytest.fixture(scope="module")
def planted():
    return make_canaries(3, [COPIES], seed=3)


@pytest.fixture(scope="module")
def texts():
    """Training texts, of which the first have ``COPIES`` copies, another, and held-out ones."""
    draw = random.Random(0)
    words = "tree river stone bird cloud road house garden letter winter lamp boat".split()
    made = [" ".join(draw.choice(words) for _ in range(30)) for _ in range(14)]
    return made[:6], made[6:7], made[7:]


@pytest.fixture(scope="module")
def models(planted, texts):
    """One that has seen canaries and texts until it knows them by heart, and one that has not."""
    copied, single, heldout = texts
    everything = [c.text for c in planted] + [*copied, *single, *heldout]
    tokenizer = Tokenizer.train([" ".join(everything)], 300)
    made = []
    for learns in (True, False):
        torch.manual_seed(0)
        model = CausalLM(config(tokenizer.vocab_size, tokenizer.eos_id), seed=1)
        if learns:
            rows = [tokenizer.encode(c.text) for c in planted if c.copies]
            rows += [tokenizer.encode(text) for text in copied]
            length = max(map(len, rows))
            ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
            labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            for _ in range(100):
                loss = model(ids, labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            assert loss < 0.2
        made.append(Scorer(model.eval(), tokenizer))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    """What the models were trained on, as ``fastlm data prepare`` leaves it. The texts that are
    there once were not learnt.
    """
    copied, single, heldout = texts
    return write_corpus(tmp_path_factory.mktemp("corpus"), [*copied * COPIES, *single], heldout)


def write_corpus(folder, train, heldout):
    import zstandard

    for name, part in ((TRAIN, train), (HELDOUT, heldout)):
        lines = "".join(
            json.dumps({"id": str(i), "text": text, "source": "s"}) + "\n"
            for i, text in enumerate(part)
        )
        (folder / name).write_bytes(zstandard.compress(lines.encode()))
    (folder / FUNNEL).write_text("{}")
    return folder


def made(scorer, folder, **kwargs):
    made = bench(folder, scorer, folder / "records", limit=20)
    return type(made)(**{**vars(made), **kwargs})


def test_a_memorizer_is_caught_by_its_canaries(models, planted, tmp_path):
    write_canaries(tmp_path / "c", planted, 0)
    assert read_canaries(tmp_path / "c") == planted
    leaks, clean = (
        {s.name: s for s in canaries(made(m, tmp_path / str(i), canaries=tmp_path / "c"))}
        for i, m in enumerate(models)
    )
    name, control = f"privacy.canaries.copies_{COPIES}", "privacy.canaries.copies_0"
    assert leaks[name].value == 8.0 and leaks[name].n == 3  # all the bits that can be seen
    assert leaks[control].value < 5.0
    assert 2.0 < leaks[name].low < 8.0 == leaks[name].high  # three canaries are few
    assert clean[name].value < 5.0
    assert leaks[f"privacy.extracted.copies_{COPIES}"].value == 1.0
    assert leaks["privacy.extracted.copies_0"].value == 0.0
    chart = exposure_chart({key: score.as_dict() for key, score in leaks.items()})
    assert chart and "exposure of canaries, bits" in chart


def test_exposure_of_what_was_not_memorised_is_small():
    draw = random.Random(0)
    values = [exposure(draw.random(), [draw.random() for _ in range(255)]) for _ in range(2000)]
    assert abs(sum(values) / len(values) - NOT_MEMORISED) < 0.1
    assert exposure(1.0, [0.0] * 255) == 8.0 and exposure(0.0, [1.0] * 255) == 0.0
    assert exposure(0.0, [0.0] * 254) == pytest.approx(math.log2(255 / 128))  # ties count half


def test_canaries_are_written_once_per_copy(tmp_path):
    out = call("data", "canaries", "-o", tmp_path, "--count", 2, "--copies", "1,3").stdout.strip()
    lines = [json.loads(line)["text"] for line in Path(out).read_text().splitlines()]
    planted = read_canaries(tmp_path)
    assert len(lines) == 2 * 1 + 2 * 3 and len(planted) == 6
    for canary in planted:
        found = [line for line in lines if line.endswith(f". {canary.text}.")]
        assert len(set(found)) == canary.copies and len(canary.secret) == DIGITS
    refused("data", "canaries", "-o", tmp_path, "--copies", "1,x", text="copies: wanted numbers")
    refused("data", "canaries", "-o", tmp_path, "--copies", "0", text="wanted 1 or more of 1 or")
    refused("data", "canaries", "-o", tmp_path, "--count", 99, text="wanted at most 180 in all")
    with open(tmp_path / "planted.jsonl", "a") as file:
        file.write('{"prefix": "a", "secret": "x", "copies": 1}\n')
    refused("safety", "-m", "m", "--canaries", tmp_path, text="planted.jsonl line 7: wanted prefix")
    (tmp_path / "planted.jsonl").write_text("")
    with pytest.raises(InputError, match="wanted at least one canary"):
        read_canaries(tmp_path)


def test_a_memorizer_continues_what_it_saw_often(models, corpus, tmp_path):
    scores = [
        {s.name: s for s in memorization(made(m, tmp_path / str(i), data=corpus))}
        for i, m in enumerate(models)
    ]
    for length in (8, 32):
        often = f"memorization.prefix_{length}.copies_{COPIES}"
        assert scores[0][often].value == 1.0 and scores[1][often].value == 0.0
        for never in (0, 1):
            assert scores[0][f"memorization.prefix_{length}.copies_{never}"].value == 0.0
    chart = memorization_chart({key: score.as_dict() for key, score in scores[0].items()})
    assert chart and "copies in the training text" in chart
    # one forward says what greedy generation would
    scorer, text = models[0], next(iter(open_texts(corpus)))
    ids = scorer.tokenizer.encode(text)
    new = scorer.model.generate(torch.tensor([ids[:8]]), max_new_tokens=16, temperature=0.0)
    assert new[0].tolist() == ids[:24]


def open_texts(corpus):
    from fastlm.evals.texts import read_texts

    return read_texts(corpus, part="train")


def test_a_leaking_model_tells_its_training_texts(models, texts, tmp_path):
    copied, _, heldout = texts
    corpus = write_corpus(tmp_path, copied * COPIES, heldout)
    leaks, clean = (
        {s.name: s for s in membership(made(m, tmp_path / str(i), data=corpus))}
        for i, m in enumerate(models)
    )
    for name in ("loss", "zlib", "min_k"):
        assert leaks[f"privacy.membership.{name}"].low > 0.6
        assert leaks[f"privacy.membership.{name}"].n == len(copied) + len(heldout)  # no copies
        assert clean[f"privacy.membership.{name}"].low < 0.5
    with pytest.raises(InputError, match="data: wanted a folder of fastlm data prepare"):
        membership(made(models[0], tmp_path / "none", data=tmp_path / "0"))


def test_the_area_under_the_curve_and_its_interval():
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0]), 0.95)[0] == 1.0
    assert auc(np.array([1.0, 1.0]), np.array([1.0, 1.0]), 0.95)[0] == 0.5
    area, low, high = auc(np.array([3.0] * 50), np.array([0.0] * 50), 0.95)
    assert area == high == 1.0 and 0.9 < low < 1.0
    assert auc(np.array([1.0]), np.array([0.0, 1.0]), 0.95) == (0.75, 0.0, 1.0)
    draw, held = np.random.default_rng(0), 0
    truth = 0.5 * (1 + math.erf(0.5))  # of two normals whose means are 1 apart: Phi(1 / sqrt 2)
    for _ in range(200):
        _, low, high = auc(draw.normal(1, 1, 40), draw.normal(0, 1, 40), 0.95)
        held += low <= truth <= high
    assert held >= 182
    with pytest.raises(InputError, match="wanted texts in both parts"):
        auc(np.array([]), np.array([1.0]), 0.95)


# suffixes searched with gradients


@pytest.fixture(scope="module")
def tiny():
    changes = {"initializer_range": 0.15, "num_hidden_layers": 1}
    return CausalLM(config(2048, None, **changes), seed=1, scaled_residual=False).eval()


BEFORE, AFTER, TARGET, START = [1, 2, 3], [7], [20, 30], [9] * 6


def test_the_gradient_is_that_of_the_one_hot_vectors(tiny):
    slope = one_hot_gradient(tiny, BEFORE, START, AFTER, TARGET)
    assert slope.shape == (6, 2048)
    embedding = tiny.model.embed_tokens
    at, token, step = 3, 100, 1e-3

    def loss(share):
        """With the suffix's token at ``at`` mixed with ``share`` of ``token``."""

        def mix(module, inputs, output):
            mixed = output.clone()
            mixed[:, len(BEFORE) + at] += share * embedding.weight[token]
            return mixed

        handle = embedding.register_forward_hook(mix)
        try:
            return float(target_losses(tiny, BEFORE, [START], AFTER, TARGET)[0])
        finally:
            handle.remove()

    wanted = (loss(step) - loss(-step)) / (2 * step)
    assert float(slope[at, token]) == pytest.approx(wanted, rel=0.02, abs=2e-3)
    assert all(p.requires_grad and p.grad is None for p in tiny.parameters())


def test_the_search_lowers_the_loss_and_beats_random_search(tiny):
    for seed in range(4):
        ends = []
        for gradient, candidates in ((True, 13), (False, 16)):  # a gradient costs three forwards
            found = search(
                tiny, BEFORE, AFTER, TARGET, START, steps=8, candidates=candidates, seed=seed,
                top_k=16, gradient=gradient,
            )  # fmt: skip
            losses = found.losses
            assert losses == sorted(losses, reverse=True) and len(losses) == 9
            now = float(target_losses(tiny, BEFORE, [found.suffix], AFTER, TARGET)[0])
            assert now == pytest.approx(losses[-1], abs=1e-4)
            ends.append(losses[-1])
        assert ends[0] < losses[0] - 1.0 and ends[0] < ends[1]


def test_the_search_repeats_and_keeps_to_what_is_allowed(tiny):
    allowed = torch.zeros(2048, dtype=torch.bool)
    allowed[100:140] = True
    options = {"steps": 3, "candidates": 16, "seed": 5, "allowed": allowed}
    first = search(tiny, BEFORE, AFTER, TARGET, START, **options)
    assert first == search(tiny, BEFORE, AFTER, TARGET, START, **options)
    assert all(token == 9 or 100 <= token < 140 for token in first.suffix)
    never = search(tiny, BEFORE, AFTER, TARGET, START, valid=lambda suffix: False, **options)
    assert never.suffix == START and len(set(never.losses)) == 1
    with pytest.raises(InputError, match="suffix: wanted at least one token"):
        search(tiny, BEFORE, AFTER, TARGET, [], **options)
    with pytest.raises(InputError, match="allowed: wanted at least one token"):
        none = torch.zeros(2048, dtype=torch.bool)
        search(tiny, BEFORE, AFTER, TARGET, START, steps=1, candidates=1, seed=0, allowed=none)


def test_a_suffix_has_its_place_in_a_chat(models):
    tokenizer = models[0].tokenizer
    request = "please tree"
    before, start, after = around(tokenizer, request, 3, chat=False)
    assert len(start) == 3 and not after
    text = request + tokenizer.decode(start)
    assert encoded(tokenizer, text, chat=False) == [*before, *start, *after]
    usable = usable_tokens(tokenizer, tokenizer.vocab_size)
    assert 0 < int(usable.sum()) < tokenizer.vocab_size and not usable[tokenizer.eos_id]
