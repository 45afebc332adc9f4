"""Privacy: a model that memorized is detected, one that was not trained is not."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from corpus_layouts import LAYOUTS, set_layout
from preference_models import config
from safety_sets import make_target
from test_cli import call, refused

from fastlm.data.corpus import SPLITS, corpus_parts, part_record, read_documents, read_units
from fastlm.data.texts import read_texts
from fastlm.errors import InputError
from fastlm.evals.charts import copies_charts
from fastlm.evals.safety.canaries import (
    DIGITS,
    exposure,
    make_canaries,
    plant,
    read_canaries,
)
from fastlm.evals.safety.privacy import (
    NEAR_COPIES,
    auc,
    canaries,
    membership,
    memorization,
    near_copies,
)
from fastlm.evals.safety.suffixes import (
    encode_request,
    one_hot_gradient,
    search_suffix,
    split_at_suffix,
    target_losses,
    usable_tokens,
)
from fastlm.evals.scorer import Scorer
from fastlm.model.causal_lm import CausalLM
from fastlm.pipeline.funnel import FUNNEL, Funnel
from fastlm.tokenizer.tokenizer import Tokenizer

COPIES = 16


@pytest.fixture(scope="module")
def planted():
    return make_canaries(3, [COPIES], seed=3)


@pytest.fixture(scope="module")
def texts():
    """Return training texts (the first have ``COPIES`` copies), another one, and held-out ones."""
    draw = random.Random(0)
    words = "tree river stone bird cloud road house garden letter winter lamp boat".split()
    made = [" ".join(draw.choice(words) for _ in range(30)) for _ in range(14)]
    return made[:6], made[6:7], made[7:]


@pytest.fixture(scope="module")
def models(planted, texts):
    """Return a model that memorized canaries and texts, and one that was not trained on them."""
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

    steps = []
    for split, part in zip(SPLITS, (train, heldout), strict=True):
        lines = "".join(
            json.dumps({"id": str(i), "text": text, "source": "s"}) + "\n"
            for i, text in enumerate(part)
        )
        (folder / f"{split}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        count = {"documents": len(part), "bytes": sum(map(len, part)), "removed": {}}
        steps.append({"step": split, **count})
    (folder / FUNNEL).write_text(json.dumps({"steps": steps}))
    return folder


def made(scorer, folder, **kwargs):
    made = make_target(folder, scorer, folder / "records", limit=20)
    return type(made)(**{**vars(made), **kwargs})


def test_a_memorizer_is_caught_by_its_canaries(models, planted, corpus, tmp_path):
    plant(corpus, tmp_path / "c", planted, 0)
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
    (chart,) = copies_charts({key: score.as_dict() for key, score in leaks.items()})
    assert "exposure of canaries, bits" in chart


def test_exposure_of_what_was_not_memorised_is_small():
    draw = random.Random(0)
    values = [exposure(draw.random(), [draw.random() for _ in range(255)]) for _ in range(2000)]
    assert abs(sum(values) / len(values) - 1 / math.log(2)) < 0.1  # -log2 of a uniform rank
    assert exposure(1.0, [0.0] * 255) == 8.0 and exposure(0.0, [1.0] * 255) == 0.0
    assert exposure(0.0, [0.0] * 254) == pytest.approx(math.log2(255 / 128))  # ties count half


@pytest.mark.parametrize("layout", LAYOUTS)
def test_canaries_are_planted_in_the_training_split_alone(tmp_path, layout):
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"The story of number {i} and {i * i}. " * 3)
    call("data", "prepare", tmp_path / "text", "--rules", "none", "-o", tmp_path / "clean")
    set_layout(tmp_path / "clean", layout)
    words = ["data", "canaries", tmp_path / "clean", "-o", tmp_path / "c", "--copies", "1,3"]
    assert call(*words, "--count", 2).stdout.strip() == str(tmp_path / "c")
    before, after = (
        {part: [*read_texts(tmp_path / folder, split=part)] for part in ("train", "heldout")}
        for folder in ("clean", "c")
    )
    canaries = read_canaries(tmp_path / "c")
    assert len(canaries) == 6 and {len(c.secret) for c in canaries} == {DIGITS}
    texts = Counter(after["train"])
    assert {c: texts.pop(f"{c.text}.", 0) for c in canaries} == {c: c.copies for c in canaries}
    assert [t for t in after["train"] if t in texts] == before["train"]
    contents = {
        folder: {
            split: {p.name: p.read_bytes() for p in corpus_parts(tmp_path / folder, split)}
            for split in SPLITS
        }
        for folder in ("clean", "c")
    }
    assert contents["c"]["heldout"] == contents["clean"]["heldout"]
    assert contents["c"]["train"].keys() == contents["clean"]["train"].keys()
    for unit in read_units(tmp_path / "c"):
        texts_of_part = [d.text for d in read_documents(tmp_path / "c" / unit["part"])]
        size = sum(len(text.encode()) for text in texts_of_part)
        assert unit == part_record(tmp_path / "c", unit["part"], len(texts_of_part), size)
    steps = {step["step"]: step for step in Funnel.load(tmp_path / "c").steps}
    assert steps["train"]["documents"] == len(after["train"]) == len(before["train"]) + 8
    assert steps["canaries"]["documents"] == len(after["train"]) + len(after["heldout"])
    assert call(*words[:3], "-o", tmp_path / "d", *words[5:], "--count", 2).stdout
    again = {p.name: p.read_bytes() for p in corpus_parts(tmp_path / "d", "train")}
    assert again == contents["c"]["train"]
    other = set_layout(tmp_path / "clean", "files" if layout == "parts" else "parts", 2)
    assert call(*words[:2], other, "-o", tmp_path / "d", *words[5:], "--count", 2).stdout
    assert [*read_texts(tmp_path / "d", split="train")] == after["train"]
    refused(*words[:3], "-o", tmp_path / "clean", text="out: expected another folder than")
    refused("data", "canaries", tmp_path, "-o", tmp_path / "e", text="corpus: expected a folder of")
    refused(*words[:5], "--copies", "1,x", text="copies: expected numbers")
    refused(*words[:5], "--copies", "0", text="expected 1 or more of 1 or")
    refused(*words[:5], "--count", 99, text="expected at most 180 in all")
    with open(tmp_path / "c/canaries.jsonl", "a") as file:
        file.write('{"prefix": "a", "secret": "x", "copies": 1}\n')
    words = ["safety", "-m", "m", "--canaries", tmp_path / "c"]
    refused(*words, text="canaries.jsonl:7: secret: expected digits")
    (tmp_path / "c/canaries.jsonl").write_text("")
    with pytest.raises(InputError, match="expected at least one canary"):
        read_canaries(tmp_path / "c")


def test_copies_are_those_in_the_training_part(models, planted, texts, tmp_path):
    """The copies in the training text count, whatever canaries.jsonl says."""
    copied, _, heldout = texts
    canary, other, third = (c for c in planted if c.copies)
    train = [f"{canary.text}."] * 3 + [f"{other.text}. And {other.text}."] + copied
    corpus = write_corpus(tmp_path, train, heldout)
    (tmp_path / "canaries.jsonl").write_text(
        "".join(json.dumps(vars(c)) + "\n" for c in (canary, other, third))
    )
    measured = made(models[0], tmp_path / "r", data=corpus, canaries=tmp_path)
    assert {s.name.rpartition("_")[2]: s.n for s in canaries(measured)} == {"0": 1, "2": 1, "3": 1}
    # they are no training texts of the other measures, nor held-out ones
    assert {s.n for s in membership(measured)} == {len(copied) + len(heldout)}
    assert {s.name.rpartition("_")[2] for s in memorization(measured)} == {"0", "1"}
    write_corpus(tmp_path, train, [*heldout, f"Entry 7. {canary.text}."])
    with pytest.raises(InputError, match="canaries: expected them only in the training part"):
        canaries(measured)


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
    (chart,) = copies_charts({key: score.as_dict() for key, score in scores[0].items()})
    assert "copies in the training text" in chart
    # one forward says what greedy generation would
    scorer, text = models[0], next(iter(open_texts(corpus)))
    ids = scorer.tokenizer.encode(text)
    new = scorer.model.generate(torch.tensor([ids[:8]]), max_new_tokens=16, temperature=0.0)
    assert new[0].tolist() == ids[:24]


def open_texts(corpus):
    return read_texts(corpus, split="train")


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
    # near-copies of training texts among the held-out ones say nothing of membership
    near = [f"Entry {i}. {text}" for i, text in enumerate(copied)]
    write_corpus(tmp_path, copied * COPIES, [*heldout, *near, *near[0].split("stone")])
    measured = made(models[0], tmp_path / "near", data=corpus)
    for score in membership(measured):
        assert score.value >= 0.95, score.name  # 0.6 with them
        assert score.details[NEAR_COPIES] >= len(near)
    for score in memorization(measured):
        assert score.value == (0.0 if score.name.endswith("copies_0") else 1.0), score.name


@pytest.mark.parametrize(
    "text, near",
    [
        ("a b c d e f g h i j k l m n o p", True),
        ("A B c d e f g h\ni j k l m n o p", True),
        ("Entry 4. a b c d e f g h 1 2 3 4 5 6", True),  # a run of 8 of 16 words
        ("Entry 4. a b c d e f g 1 2 3 4 5 6 7", False),  # of 7
        ("Entry 4. a b c d e f", True),  # a short text, a run of 6
        ("Entry 4. a b c d 1 2", False),
        ("one two three", True),
        ("one two four", False),
        ("", False),
    ],
)
def test_near_copies(text, near):
    training = ["x y z " + " ".join("abcdefghijklmnopqrst"), "one two three"]
    (found,) = near_copies([text], training)
    assert found is near  # and no numpy.bool_, whose sum JSON does not take


def test_the_area_under_the_curve_and_its_interval():
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0]), 0.95)[0] == 1.0
    assert auc(np.array([1.0, 1.0]), np.array([1.0, 1.0]), 0.95)[0] == 0.5
    area, low, high = auc(np.array([3.0] * 50), np.array([0.0] * 50), 0.95)
    assert area == high == 1.0 and 0.9 < low < 1.0
    assert auc(np.array([1.0]), np.array([0.0, 1.0]), 0.95) == (0.75, 0.0, 1.0)
    draw, heldout = np.random.default_rng(0), 0
    truth = 0.5 * (1 + math.erf(0.5))  # of two normals whose means are 1 apart: Phi(1 / sqrt 2)
    for _ in range(200):
        _, low, high = auc(draw.normal(1, 1, 40), draw.normal(0, 1, 40), 0.95)
        heldout += low <= truth <= high
    assert heldout >= 182
    with pytest.raises(InputError, match="expected texts in both parts"):
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

    expected = (loss(step) - loss(-step)) / (2 * step)
    assert float(slope[at, token]) == pytest.approx(expected, rel=0.02, abs=2e-3)
    assert all(p.requires_grad and p.grad is None for p in tiny.parameters())


def test_the_search_lowers_the_loss_and_beats_random_search(tiny):
    for seed in range(4):
        ends = []
        for gradient, candidates in ((True, 13), (False, 16)):  # a gradient costs three forwards
            result = search_suffix(
                tiny, BEFORE, AFTER, TARGET, START, steps=8, candidates=candidates, seed=seed,
                top_k=16, gradient=gradient,
            )  # fmt: skip
            losses = result.losses
            assert losses == sorted(losses, reverse=True) and len(losses) == 9
            now = float(target_losses(tiny, BEFORE, [result.suffix], AFTER, TARGET)[0])
            assert now == pytest.approx(losses[-1], abs=1e-4)
            ends.append(losses[-1])
        assert ends[0] < losses[0] - 1.0 and ends[0] < ends[1]


def test_the_search_repeats_and_keeps_to_what_is_allowed(tiny):
    allowed = torch.zeros(2048, dtype=torch.bool)
    allowed[100:140] = True
    options = {"steps": 3, "candidates": 16, "seed": 5, "allowed": allowed}
    first = search_suffix(tiny, BEFORE, AFTER, TARGET, START, **options)
    assert first == search_suffix(tiny, BEFORE, AFTER, TARGET, START, **options)
    assert all(token == 9 or 100 <= token < 140 for token in first.suffix)
    never = search_suffix(tiny, BEFORE, AFTER, TARGET, START, valid=lambda suffix: False, **options)
    assert never.suffix == START and len(set(never.losses)) == 1
    with pytest.raises(InputError, match="suffix: expected at least one token"):
        search_suffix(tiny, BEFORE, AFTER, TARGET, [], **options)
    with pytest.raises(InputError, match="allowed: expected at least one token"):
        none = torch.zeros(2048, dtype=torch.bool)
        search_suffix(
            tiny, BEFORE, AFTER, TARGET, START, steps=1, candidates=1, seed=0, allowed=none
        )


def test_a_suffix_has_its_place_in_a_chat(models):
    tokenizer = models[0].tokenizer
    request = "please tree"
    before, start, after = split_at_suffix(tokenizer, request, 3, chat=False)
    assert len(start) == 3 and not after
    text = request + tokenizer.decode(start)
    assert encode_request(tokenizer, text, chat=False) == [*before, *start, *after]
    usable = usable_tokens(tokenizer, tokenizer.vocab_size)
    assert 0 < int(usable.sum()) < tokenizer.vocab_size and not usable[tokenizer.eos_id]
