"""Questions in training data are found, and their share; bits per byte by source; the stage."""

import io
import json
import random

import numpy as np
import pytest
import zstandard
from preference_models import make_base
from rich.console import Console

from fastlm.data.prepare import HELDOUT
from fastlm.data.shards import write_shards
from fastlm.errors import InputError
from fastlm.evals import contamination
from fastlm.evals.catalog import load_task
from fastlm.evals.contamination import overlap, question_texts
from fastlm.evals.ngrams import hashes
from fastlm.evals.sets.mmlu import subject_questions
from fastlm.evals.stage import Eval
from fastlm.evals.texts import text_bits_per_byte
from fastlm.serve.chat import load_model

WORDS = "tree river stone bird cloud house light paper sand glass wind bread".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def sentence(rng: random.Random, count: int = 24) -> str:
    return " ".join(rng.choices(WORDS, k=count))


class Tokens:
    """Data of these tokens."""

    def __init__(self, tokens):
        self.all, self.tokens = tokens, len(tokens)

    def read(self, start, n):
        return self.all[start : start + n].astype(np.int64)


def test_hashes_are_those_of_the_ngrams():
    tokens = np.random.default_rng(0).integers(0, 3, 3000)
    for n in (1, 2, 8, 13):
        found = hashes(tokens, n)
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        assert len(found) == len(grams)
        assert len(set(zip(grams, found.tolist()))) == len(set(grams)) == len(set(found.tolist()))
    assert len(hashes(tokens[:12], 13)) == 0 and len(hashes(tokens[:13], 13)) == 1


def test_overlap_is_that_of_a_plain_search(monkeypatch):
    """Random questions and data of few tokens, so that n-grams of all kinds are shared."""
    monkeypatch.setattr(contamination, "BLOCK", 100)
    rng = np.random.default_rng(1)
    data = rng.integers(0, 40, 2000).astype(np.uint16)
    questions = []
    for length in (5, 8, 12, 13, 14, 30, 60):
        at = int(rng.integers(0, 2000 - length))
        for changed in ((), (length // 2,), (3, length - 4)):
            question = data[at : at + length].astype(np.int64)
            question[list(changed)] = 99
            questions.append(question)
    found = overlap(questions, Tokens(data))
    for question, share in zip(questions, found.share):
        n = 13 if len(question) >= 13 else 8
        grams = {tuple(data[i : i + n]) for i in range(len(data) - n + 1)}
        covered = np.zeros(len(question), bool)
        for i in range(len(question) - n + 1):
            if tuple(question[i : i + n]) in grams:
                covered[i : i + n] = True
        if len(question) < 8:
            assert np.isnan(share)
        else:
            assert share == covered.mean()
    assert found.share[-3] == 1 and 0 < found.share[-2] < 1


def test_examples_are_no_part_of_a_question(tmp_path):
    rows = [
        {"question": f"How {w} is it?", "choices": ["so", "no", "ever", w], "answer": 3}
        for w in WORDS
    ]
    asked = subject_questions("anatomy", rows[:5], rows[5:], letters=False)
    texts = question_texts(asked)
    assert texts[0] == f"Question: How {WORDS[5]} is it?\nAnswer: {WORDS[5]}"
    assert question_texts(asked[:1]) == texts[:1]
    without = subject_questions("anatomy", [], rows, letters=False)
    assert question_texts(without) == [f"Question: How {w} is it?\nAnswer: {w}" for w in WORDS]
    needle = load_task("needle:128", tmp_path)
    assert question_texts(needle.questions)[0].endswith(needle.questions[0].gold)


@pytest.fixture(scope="module")
def planted(base, tmp_path_factory):
    """A task in a file, and shards in which its questions 0 and 1 stand, 1 but for a word."""
    folder, rng = tmp_path_factory.mktemp("planted"), random.Random(5)
    # words of random letters: the small tokenizer needs a token for each
    asked = [" ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(24)) for _ in range(6)]
    rows = [{"text": text, "names": ["yes", "no"], "label": i % 2} for i, text in enumerate(asked)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: text\n"
        "doc_to_choice: names\ndoc_to_target: label\n"
    )
    words = asked[1].split()
    words[11] = "moon"
    texts = [sentence(rng, 200) for _ in range(8)]
    texts[3] += f" {asked[0]} yes and on"
    texts[5] += f" {' '.join(words)} no and on"
    write_shards(texts, load_model(base)[1], folder / "shards" / "train")
    return folder


def test_planted_questions_are_caught(base, planted):
    out = planted / "out"
    scores = Eval(tasks=(str(planted / "own.yaml"),))(
        out, model=[str(base)], against=str(planted / "shards")
    )
    found = scores["tasks"][0]["contamination"]
    shares = {one["id"]: one["share"] for one in found["named"]}
    assert found["questions"] == 6 and found["short"] == 0
    assert found["touched"] == 2 and shares.keys() == {"0", "1"}
    assert shares["0"] > 0.9 and found["dirty"] >= 1
    assert shares["1"] < shares["0"]  # all but what is near the other word
    (parts,) = found["models"].values()
    assert set(parts) == {"clean", "dirty"}
    assert 0 <= parts["clean"]["acc"]["value"] <= 1 and "bits_per_byte" in parts["dirty"]
    clean = Eval(tasks=(str(planted / "own.yaml"),))(out, model=[str(base)])
    assert "contamination" not in clean["tasks"][0]
    stage = Eval(tasks=(str(planted / "own.yaml"),))
    with pytest.raises(InputError, match="against: wanted tasks"):
        Eval()(out, model=[str(base)], data=str(planted / "shards"), against=str(out))
    console = Console(width=100, file=io.StringIO())
    console.print(stage.shown(scores, stage.job(out, model=[str(base)])))
    assert "touched" in console.file.getvalue()


def test_bits_per_byte_of_each_source(base, tmp_path):
    """The sources' bits make up the whole, which is that without sources."""
    model, tokenizer = load_model(base)
    rng = random.Random(2)
    rows = [
        {"text": sentence(rng, 90), "id": str(i), "source": f"deb:{'ab'[i % 2]}", "meta": {}}
        for i in range(5)
    ]
    path = tmp_path / HELDOUT
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(body))
    options = {"seq_len": 32, "stride": 16, "batch_size": 3, "compressors": False}
    for mask in (False, True):
        found = text_bits_per_byte(model, tokenizer, path, document_mask=mask, **options)
        own = found["domains"]
        assert own["deb:a"]["documents"] == 3 and own["deb:b"]["documents"] == 2
        assert sum(d["bytes"] for d in own.values()) == found["bytes"]
        assert sum(d["tokens"] for d in own.values()) == found["tokens"]
        bits = sum(d["bits_per_byte"] * d["bytes"] for d in own.values())
        assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"])
        same = b"".join(json.dumps({**r, "source": "one"}).encode() + b"\n" for r in rows)
        path.with_name("one.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(same))
        one = text_bits_per_byte(
            model, tokenizer, path.with_name("one.jsonl.zst"), document_mask=mask, **options
        )
        assert "domains" not in one
        assert one["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-5)
