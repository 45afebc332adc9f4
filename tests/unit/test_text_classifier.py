"""Linear classifiers of texts: features, files, quality and toxicity of documents."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from fastlm.data import quality, text_classifier
from fastlm.data.quality import (
    BUCKETS,
    DEFAULT_WEIGHTS,
    QualityModel,
    auc,
    check_weights,
    train_quality,
)
from fastlm.data.text_classifier import (
    BITS,
    FACTOR,
    METADATA_KEY,
    SPREAD,
    Ngrams,
    TextClassifier,
    feature_matrix,
    hash_ngrams,
)
from fastlm.data.toxicity import PIECE_WORDS, ToxicityModel
from fastlm.errors import InputError

GOOD = "ladder kettle pencil bridge window basket candle mirror hammer violin compass".split()
OTHER = "bottle saddle anchor lantern pillow carpet bucket needle ribbon shovel magnet".split()
COMMON = "the a of and with under over is was has".split()
FROZEN = [99506, 68242, 196742, 60624, 243994, 66459, 165066, 190077, 179941]
HOSTILE = ["", "\0", "\ud800\udfff", "." * 9999, "a" * 99_999, "\U0010ffff" * 99, "\u200b \u0301"]


def document(words: list[str], seed: int, count: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice([*words, *COMMON, *COMMON]) for _ in range(count))


def write_source(folder: Path, words: list[str], count: int, seed: int = 0) -> str:
    folder.mkdir(parents=True)
    rows = [{"text": document(words, seed + i)} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def slow_ngrams(text: str, ngrams: Ngrams) -> list[tuple[int, int]]:
    """Return the (bucket, word index) of all n-grams, by the definition, for ASCII."""
    words, word = [], ""
    for c in text.lower() + " ":
        if c in text_classifier.ASCII_WORD:
            word += c
        elif word:
            words.append(word)
            word = ""

    def bucket(value: int, kind: int) -> int:
        value = (value + kind * SPREAD) % 2**64
        for shift in (32, 29):
            value = (value ^ value >> shift) * SPREAD % 2**64
        return value >> 64 - BITS

    result = []
    characters = [(ord(c), i) for i, w in enumerate(words) for c in f"{w} "]
    if not (text[-1:] and text[-1].lower() not in text_classifier.ASCII_WORD):
        characters = characters[:-1]
    for n in ngrams.characters:
        for i in range(len(characters) - n + 1):
            value = sum(c * FACTOR ** (n - 1 - k) for k, (c, _) in enumerate(characters[i : i + n]))
            result.append((bucket(value, 16 + n), characters[i][1]))
    hashes = [sum((ord(c) + 1) * FACTOR ** min(i, 63) for i, c in enumerate(w)) for w in words]
    for n in range(1, ngrams.words + 1):
        for i in range(len(words) - n + 1):
            value = sum(h * FACTOR ** (n - 1 - k) for k, h in enumerate(hashes[i : i + n]))
            result.append((bucket(value, n), i))
    return sorted(result)


@given(
    st.text("ab Z.9\n'#", max_size=60),
    st.sampled_from([Ngrams(1), Ngrams(3, (2, 4)), Ngrams(2, (3,))]),
)
@example("x" * 200 + " y", Ngrams(2, (5,)))
@settings(deadline=None, max_examples=150)
def test_ngrams_are_those_of_the_definition(text, ngrams):
    buckets, words = hash_ngrams(text, ngrams)
    assert sorted(zip(buckets.tolist(), words.tolist())) == slow_ngrams(text, ngrams)
    if words.size:
        assert words[-1] == words.max() == len(slow_ngrams(text, Ngrams(1))) - 1


def test_buckets_never_change():
    # a saved model reads these: another value needs another version of its file
    assert hash_ngrams("The cat's", Ngrams(2, (4,)))[0].tolist() == FROZEN
    assert hash_ngrams("THE \u2014 cat\u2019s", Ngrams(2, (4,)))[0].tolist() == FROZEN


def test_scripts_without_spaces_have_a_word_per_character():
    for text, count in (
        ("你好 世界", 4), ("ขอบ", 3), ("한국어 말", 2), ("naïve Ωmega", 2), ("a。b、c", 3),
        ("𠀀𠀁", 2),
    ):  # fmt: skip
        buckets, words = hash_ngrams(text, Ngrams(1))
        assert len(buckets) == count and words.tolist() == list(range(count))


@given(st.text(max_size=100))
@settings(deadline=None, max_examples=100)
def test_any_text_has_features_and_logits(text):
    classifier = TextClassifier(np.ones(2**BITS, np.int32), 0.5, Ngrams(2, (3,)))
    logits = classifier.logits([text])
    assert logits.shape == (1,) and np.isfinite(logits).all()
    pieces = classifier.piece_logits(text, 3)
    assert len(pieces) == math.ceil(len(hash_ngrams(text, Ngrams(1))[0]) / 3)
    assert classifier.piece_logits(text, 10**6).tolist() == (logits.tolist() if len(pieces) else [])


def test_a_logit_is_the_product_of_weights_and_features():
    draw = np.random.default_rng(0)
    ngrams = Ngrams(2, (3, 4))
    classifier = TextClassifier(
        draw.integers(-(2**20), 2**20, 2**BITS).astype(np.int32), -0.25, ngrams
    )
    texts = [document(GOOD, i) for i in range(20)] + ["", "one"]
    matrix = feature_matrix(texts, ngrams)
    expected = matrix @ (classifier.weights * 2.0**-16 / text_classifier.SCALE) - 0.25
    assert np.allclose(classifier.logits(texts), expected, atol=1e-9)
    norms = np.sqrt((matrix * matrix).sum(1))
    assert np.allclose(norms[:-2], text_classifier.SCALE, rtol=1e-3) and norms[-2] == 0
    # many copies of one word, more than the table of roots has
    repeated = hash_ngrams("x " * 5000, Ngrams(1))[0]
    (bucket,) = set(repeated.tolist())
    logit = TextClassifier(classifier.weights, 0.0, Ngrams(1)).logits(["x " * 5000])[0]
    root = (2**14 - 1) / 2**8  # the largest
    expected = classifier.weights[bucket] * 2.0**-16 * root / 5000**0.5
    assert logit == pytest.approx(expected, rel=1e-3)


def test_pieces_are_scored_like_texts_of_their_own():
    classifier = TextClassifier(
        np.random.default_rng(1).integers(-9999, 9999, 2**BITS).astype(np.int32), 0.1, Ngrams(1)
    )
    text = document(GOOD, 3, count=50)
    words = text.split()
    expected = classifier.logits([" ".join(words[i : i + 20]) for i in (0, 20, 40)])
    assert classifier.piece_logits(text, 20).tolist() == expected.tolist()


def fit_small() -> TextClassifier:
    texts = [document(words, i) for i in range(40) for words in (GOOD, OTHER)]
    return TextClassifier.fit(texts, [True, False] * 40, Ngrams(2))


def test_a_classifier_learns_what_tells_texts_apart():
    classifier = fit_small()
    assert (classifier.logits(document(GOOD, 100 + i) for i in range(20)) > 0).all()
    assert (classifier.logits(document(OTHER, 100 + i) for i in range(20)) < 0).all()
    assert (fit_small().weights == classifier.weights).all()
    for labels in ([True], [False]):
        with pytest.raises(InputError, match="labels: expected examples with both labels, got 1"):
            TextClassifier.fit(["a"], labels, Ngrams(2))


def test_a_file_has_the_classifier_and_the_same_bytes_each_time(tmp_path):
    classifier = fit_small()
    for name in ("one", "new/folder/two"):
        classifier.save(tmp_path / name, "quality", {"x": [1.5, "ä"]})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "new/folder/two").read_bytes()
    loaded, info = TextClassifier.load(tmp_path / "one", "quality")
    assert info == {"x": [1.5, "ä"]} and loaded.ngrams == Ngrams(2) and loaded.packages["fastlm"]
    texts = [*HOSTILE, document(GOOD, 9)]
    assert (loaded.logits(texts) == classifier.logits(texts)).all()


def damaged(tmp_path: Path) -> dict[str, tuple[bytes | None, str]]:
    """Return name -> (bytes of a file or None for no file, the message)."""
    path = tmp_path / "model"
    classifier = fit_small()
    classifier.save(path, "quality", {})
    good = path.read_bytes()

    def rebuild(change, weights=classifier.weights, names=("weights",)) -> bytes:
        length = int.from_bytes(good[:8], "little")
        metadata = json.loads(json.loads(good[8 : 8 + length])["__metadata__"][METADATA_KEY])
        change(metadata)
        save_file(dict.fromkeys(names, weights), path, {METADATA_KEY: json.dumps(metadata)})
        return path.read_bytes()

    def nothing(metadata):
        pass

    return {
        "missing": (None, "expected a quality model of fastlm, got: No such file"),
        "empty": (b"", "expected a quality model of fastlm, got"),
        "truncated": (good[:-1], "expected a quality model of fastlm, got"),
        "text": (b"weights = 1", "expected a quality model of fastlm, got"),
        "huge": (good + bytes(2**23), "of at most 8,388,608 bytes"),
        "header": (b"\xff" * 8 + good[8:], "expected a quality model of fastlm, got"),
        "kind": (rebuild(lambda m: m.update(kind="toxicity")), "got a model of 'toxicity'"),
        "version": (rebuild(lambda m: m.update(version=2)), "version: expected"),
        "bias": (rebuild(lambda m: m.update(bias="x")), "bias: expected"),
        "infinite": (rebuild(lambda m: m.update(bias=math.inf)), "bias: expected a finite number"),
        "ngrams": (rebuild(lambda m: m["ngrams"].update(words=99)), "ngrams.words: expected"),
        "lengths": (
            rebuild(lambda m: m["ngrams"].update(characters=[10**9])), "characters.0.: expected",
        ),
        "dtype": (
            rebuild(nothing, np.zeros(2**BITS, np.float32)), r"expected I32.*got \('F32'",
        ),
        "shape": (rebuild(nothing, np.zeros(8, np.int32)), r"weights: expected I32.*\(8,\)"),
        "names": (rebuild(nothing, names=("weights", "w")), "got another file of safetensors"),
    }  # fmt: skip


def test_damaged_files_are_refused(tmp_path):
    for name, (content, message) in damaged(tmp_path).items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            TextClassifier.load(path, "quality")
    with pytest.raises(InputError, match="a folder or a device"):
        TextClassifier.load(tmp_path, "quality")


def test_no_damage_of_the_header_raises_another_error(tmp_path):
    path = tmp_path / "model"
    fit_small().save(path, "quality", {"borders": [0.0] * 19, "weights": [1.0] * 20, "sources": []})
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(0)
    refused = 0
    for i in range(300):
        changed = bytearray(content)
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(length)] = draw.choice(b'0129"{}[]:,IFB\x00\xff')
        if i % 3 == 0:
            changed = content.replace(b"I32", draw.choice([b"F16", b"U32", b"F64", b"I16"]), 1)
        elif i == 1:
            changed = content.replace(b'"I32"', b'"BF16"', 1)
        path.write_bytes(changed)
        try:
            QualityModel.load(path).score(["a text"])
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 250


# quality


@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=30),
    st.lists(st.integers(-5, 5), min_size=1, max_size=30),
)
@settings(deadline=None, max_examples=100)
def test_auc_is_that_of_scikit_learn_and_of_mann_and_whitney(positive, negative):
    value = auc(np.array(positive, float), np.array(negative, float))
    labels = [1] * len(positive) + [0] * len(negative)
    assert value == pytest.approx(roc_auc_score(labels, positive + negative))
    statistic = mannwhitneyu(positive, negative, method="asymptotic").statistic
    assert value == pytest.approx(statistic / (len(positive) * len(negative)))


@pytest.fixture(scope="module")
def model_sources(tmp_path_factory) -> tuple[list[str], list[str]]:
    folder = tmp_path_factory.mktemp("sources")
    good = [write_source(folder / "g1", GOOD, 120), write_source(folder / "g2", GOOD[:6], 80, 1000)]
    other = [write_source(folder / "o1", OTHER, 150, 2000)]
    return good, other


@pytest.fixture(scope="module")
def model(model_sources) -> QualityModel:
    return train_quality(*model_sources)


def test_quality_separates_documents_it_has_not_seen(model, model_sources):
    good = model.score(document(GOOD, 5000 + i) for i in range(30))
    other = model.score(document(OTHER, 5000 + i) for i in range(30))
    assert good.min() > 0 > other.max()
    assert model.bucket(good).min() > model.bucket(other).max()
    first, second, third = model.sources
    assert [s["source"] for s in model.sources] == [*model_sources[0], *model_sources[1]]
    assert [s["documents"] for s in model.sources] == [120, 80, 150]
    assert all(0.1 < s["heldout"] / s["documents"] < 0.35 for s in model.sources)
    assert all(s["auc"] > 0.99 for s in model.sources)
    assert first["left_out_auc"] > 0.9 and second["left_out_auc"] > 0.9
    assert third["left_out_auc"] is None  # the only source of its side


def test_a_model_that_knows_the_source_shows_it(tmp_path):
    # each good source has a word of its own; else it is like one half of the other side
    good = [write_source(tmp_path / "a", ["foreword"] * 3 + ["left"] * 6, 100)]
    good += [write_source(tmp_path / "b", ["afterword"] * 3 + ["right"] * 6, 100, 1000)]
    other = write_source(tmp_path / "c", ["left", "right"] * 4, 100, 2000)
    records = train_quality(good, [other]).sources
    assert all(record["auc"] > 0.99 for record in records)
    assert records[0]["left_out_auc"] < 0.9 and records[1]["left_out_auc"] < 0.9


def test_buckets_have_the_same_size_and_order(model):
    assert len(model.borders) == BUCKETS - 1 and (np.diff(model.borders) >= 0).all()
    scores = np.array([-np.inf, *model.borders, np.inf])
    buckets = model.bucket(scores)
    assert buckets[0] == 0 and buckets[-1] == BUCKETS - 1 and (np.diff(buckets) >= 0).all()
    mixed = [document(words, 9000 + i) for i in range(300) for words in (GOOD, OTHER)]
    counts = Counter(model.bucket(model.score(mixed)).tolist())
    assert len(counts) > BUCKETS / 2
    assert model.score(HOSTILE).shape == (len(HOSTILE),) and np.isfinite(model.score(HOSTILE)).all()
    assert model.score([]).shape == (0,)


def test_a_quality_model_survives_its_file(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = QualityModel.load(tmp_path / "model")
    texts = [document(GOOD, i) for i in range(5)]
    assert (loaded.score(texts) == model.score(texts)).all()
    assert (loaded.borders == model.borders).all()
    assert loaded.weights == DEFAULT_WEIGHTS and sum(loaded.weights) == pytest.approx(BUCKETS)
    assert loaded.sources == model.sources
    with pytest.raises(InputError, match="a toxicity model of fastlm, got a model of 'quality'"):
        ToxicityModel.load(tmp_path / "model")
    info = {"sources": [], "borders": [0.0] * 19, "weights": [1.0] * 20}
    for change, message in (
        ({"borders": [0.0] * 18}, "info.borders: expected"),
        ({"borders": [1.0] + [0.0] * 18}, "borders: expected them in ascending order"),
        ({"weights": [-1.0] * 20}, "info.weights"), ({"weights": [0.0] * 20}, "weights: expected"),
        ({"sources": [{"source": "x"}]}, "info.sources"),
    ):  # fmt: skip
        model.classifier.save(tmp_path / "bad", "quality", info | change)
        with pytest.raises(InputError, match=message):
            QualityModel.load(tmp_path / "bad")


def test_the_order_of_documents_changes_no_byte(model_sources, tmp_path):
    (first, *_), (other,) = model_sources
    lines = Path(first, "rows.jsonl").read_text().splitlines(keepends=True)
    for i in range(2):
        folder = tmp_path / f"{i}/same"
        folder.mkdir(parents=True)
        random.Random(i).shuffle(lines)
        (folder / "rows.jsonl").write_text("".join(lines))
        shuffled = train_quality([str(folder)], [other], max_documents=60)
        for record in shuffled.sources:
            record["source"] = ""
        shuffled.save(tmp_path / f"{i}/model")
        assert [record["documents"] for record in shuffled.sources] == [60, 60]
    assert (tmp_path / "0/model").read_bytes() == (tmp_path / "1/model").read_bytes()


def test_a_text_counts_once(model_sources, tmp_path):
    (first, _), (other,) = model_sources
    copy = tmp_path / "copy.jsonl"
    copy.write_text(Path(first, "rows.jsonl").read_text().upper().replace('"TEXT"', '"text"'))
    more = write_source(tmp_path / "more", OTHER, 60, 7000)
    Path(more, "again.jsonl").write_text(Path(more, "rows.jsonl").read_text() * 2)
    records = train_quality([first], [other, more]).sources
    assert (records[2]["documents"], records[2]["same_text"]) == (60, 120)
    with pytest.raises(InputError, match=r"source .*copy.jsonl: expected text, got none"):
        train_quality([first], [other, str(copy)])


def test_bad_options_are_refused(model_sources, tmp_path):
    good, other = model_sources
    few = write_source(tmp_path / "few", OTHER, 49, 8000)
    for arguments, options, message in (
        ((good, []), {}, "other: expected at least one source, got none"),
        (([], other), {}, "good: expected at least one source"),
        ((good, [other[0], good[0]]), {}, "good, other: expected each source once, got"),
        ((good, [few]), {}, "other: expected 50 documents or more, got 49"),
        ((good, [str(tmp_path / "nothing")]), {}, "not found"),
        ((good, other), {"max_documents": 49}, "documents: expected 50 or more, got 49"),
        ((good, other), {"weights": [1.0] * 19}, "weights: expected 20 numbers, got 19"),
        ((good, other), {"weights": [math.nan] * 20}, "weights: expected numbers from 0 on"),
    ):
        with pytest.raises(InputError, match=message):
            train_quality(*arguments, **options)
    assert check_weights([0] * 19 + [1]) == (*[0.0] * 19, 1.0)


def test_a_missing_package_is_named(monkeypatch, model_sources):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"scikit-learn, which is not installed \(pip install"):
        train_quality(*model_sources)


def test_long_documents_are_sampled(model):
    page = f"{document(GOOD, 1, 3000)} "
    long = page * 30
    assert abs(model.score([long])[0] - model.score([page])[0]) < 1
    half = document(OTHER, 2, 30_000) + document(GOOD, 2, 30_000)
    assert abs(model.score([half])[0]) < min(abs(model.score([page])[0]), 3)
    assert quality.PIECES * quality.PIECE < len(long)


# toxicity


def test_toxicity_is_that_of_the_worst_pieces():
    texts = [" ".join(draw) for draw in (random.Random(i).choices(GOOD, k=11) for i in range(60))]
    rude = [f"you rotten {word}, you filthy {word}" for word in OTHER] * 5
    labels = [False] * len(texts) + [True] * len(rude)
    judge = ToxicityModel(TextClassifier.fit([*texts, *rude], labels, Ngrams(1, (4,))))
    clean = document(GOOD, 1, 400)
    assert len(clean.split()) == 20 * PIECE_WORDS
    words = clean.split()
    words[0:40] = ("you rotten magnet you filthy magnet " * 7).split()[:40]  # 2 of 20 pieces
    tenth, none, whole, two_words = judge.score([" ".join(words), clean, rude[0], "you rotten"])
    assert none < 0.3 and tenth > 0.7 and whole > 0.7 and two_words > 0.5
    less = clean.split()
    less[0:20] = words[:20]  # 1 of 20: half of what counts
    assert none < judge.score([" ".join(less)])[0] < tenth
    scores = judge.score([*HOSTILE, "...", clean * 200])
    assert ((0 <= scores) & (scores <= 1)).all() and scores[0] == scores[-2] == 0.0
    assert (np.round(scores, 4) == scores).all() and judge.score([]).shape == (0,)


def test_a_toxicity_model_survives_its_file(tmp_path):
    judge = ToxicityModel(fit_small(), {"sensitivity": [4, 5]})
    judge.save(tmp_path / "model")
    loaded = ToxicityModel.load(tmp_path / "model")
    assert loaded.accuracy == {"sensitivity": [4, 5]}
    texts = [document(GOOD, 1), document(OTHER, 2)]
    assert (loaded.score(texts) == judge.score(texts)).all()
