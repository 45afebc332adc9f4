"""Contamination: planted questions are found with their share; bits per byte by source."""

import io
import itertools
import json
import random
import textwrap

import numpy as np
import pytest
import zstandard
from paths import ROOT
from preference_models import make_base
from rich.console import Console

from fastlm.data.ngrams import hashes
from fastlm.data.shards import write_shards
from fastlm.errors import InputError
from fastlm.evals import contamination
from fastlm.evals.contamination import overlap, question_texts
from fastlm.evals.registry import load_task
from fastlm.evals.sets.mmlu import subject_questions
from fastlm.evals.stage import Eval
from fastlm.evals.task import MultipleChoice
from fastlm.evals.text_bits_per_byte import text_bits_per_byte
from fastlm.model.load import load_model
from fastlm.sources.packages import default_cache

WORDS = "tree river stone bird cloud house light paper sand glass wind bread".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def sentence(rng: random.Random, count: int = 24) -> str:
    return " ".join(rng.choices(WORDS, k=count))


class Tokens:
    """A dataset of these tokens."""

    def __init__(self, tokens):
        self.all, self.tokens = tokens, len(tokens)

    def read(self, start, n):
        return self.all[start : start + n].astype(np.int64)


def test_hashes_are_those_of_the_ngrams():
    tokens = np.random.default_rng(0).integers(0, 3, 3000)
    for n in (1, 2, 8, 13):
        actual = hashes(tokens, n)
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        assert len(actual) == len(grams)
        assert len(set(zip(grams, actual.tolist()))) == len(set(grams)) == len(set(actual.tolist()))
    assert len(hashes(tokens[:12], 13)) == 0 and len(hashes(tokens[:13], 13)) == 1


class Letters:
    """A decoder that maps each token to one letter."""

    def decode(self, tokens):
        return tokens.astype(np.uint8)


def test_overlap_is_that_of_a_plain_search(monkeypatch):
    """Questions and data are random over few letters, so that they share runs of all sizes."""
    monkeypatch.setattr(contamination, "BLOCK", 100)
    rng = np.random.default_rng(1)
    data = rng.integers(97, 123, 2000).astype(np.uint8)
    questions = []
    for length in (20, 25, 39, 40, 50, 90, 150):
        at = int(rng.integers(0, 2000 - length))
        for changed in ((), (length // 2,), (3, length - 4)):
            question = data[at : at + length].copy()
            question[list(changed)] = ord("0")
            questions.append(("", question.tobytes().decode(), "000"))
    actual = overlap(questions, Tokens(data), Letters())
    text = data.tobytes().decode()
    for (_, body, end), share in zip(questions, actual):
        full_text, n = body + end, 40 if len(body) >= 40 else 25
        covered = np.zeros(len(full_text), bool)
        for i in range(len(full_text) - n + 1):
            if full_text[i : i + n] in text:
                covered[i : i + n] = True
        if len(full_text) < 25:
            assert np.isnan(share)
        else:
            without_frame = covered[: len(body)].mean() if len(body) >= n else 0
            assert share == max(covered.mean(), without_frame)
    assert actual[-3] == 1 and 0 < actual[-2] < 1


QUESTIONS = [
    (f"Why do {animal} of {index} sleep through the long winter?", f" since {food} is rare there")
    for animal, index, food in (("bears", "Norway", "fish"), ("hedgehogs", "Kent", "worms"),
                                ("bats", "the Alps", "insects"), ("dormice", "Wales", "fruit"))
]  # fmt: skip
COPIES = {
    "as it is": lambda question, answer: f"Question: {question}\nAnswer:{answer}",
    "wrapped": lambda question, answer: "\n".join(textwrap.wrap(f"{question} A:{answer}", 30)),
    "lower case": lambda question, answer: f"{question} {answer}".lower(),
    "capitals": lambda question, answer: f"{question} {answer}".upper(),
    "marked": lambda question, answer: f'* "{question.replace(" ", "  ")}" --{answer}.',
    "alone": lambda question, answer: question,
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_found_however_they_are_set(copy, base):
    """The tokens differ, the letters do not. A question without its answer is a copy too."""
    model, tokenizer = load_model(base)
    rows = [MultipleChoice(str(i), ((f"Question: {q}\nAnswer:", a),), 0) for i, (q, a) in
            enumerate(QUESTIONS)]  # fmt: skip
    rng = random.Random(3)
    planted = [COPIES[copy](*QUESTIONS[i]) for i in (0, 2)]
    texts = [f"{sentence(rng)} {text} {sentence(rng)}" for text in planted]
    ids = [*itertools.chain(*([*tokenizer.encode(text), tokenizer.eos_id] for text in texts))]
    speller = contamination.LetterDecoder(tokenizer, model.config.vocab_size)
    actual = overlap(question_texts(rows), Tokens(np.array(ids)), speller)
    assert (actual >= contamination.DIRTY).tolist() == [True, False, True, False]


SETS = ("arc_easy", "arc_easy:mc_5shot", "hellaswag")


@pytest.mark.parametrize("name", SETS)
def test_real_questions_are_found_however_they_are_set_and_clean_ones_are_not(name, base):
    """40 questions of a set of the package, planted in fastlm's docs, and 120 that are not."""
    model, tokenizer = load_model(base)
    task = load_task(name, default_cache())
    stems = load_task(name.partition(":")[0], default_cache())  # without choices
    ids = sorted(q.id for q in stems.questions)
    random.Random(0).shuffle(ids)
    by_id = dict(zip((q.id for q in task.questions), question_texts(task.questions)))
    stem_of = dict(zip((q.id for q in stems.questions), question_texts(stems.questions)))
    rows = [by_id[id] for id in ids[:160]]
    text = "\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))[:200_000]
    pages = [text[i : i + 5000] for i in range(0, len(text), 5000)]
    assert len(pages) == 40
    decoder = contamination.LetterDecoder(tokenizer, model.config.vocab_size)
    copies = {
        "wrapped": lambda full, alone: textwrap.fill(full, 50),
        "lower case": lambda full, alone: full.lower(),
        "compatibility forms": lambda full, alone: "".join(
            chr(ord(c) + 0xFEE0) if c.isascii() and c.isalnum() else c for c in full
        ),
        "alone": lambda full, alone: alone,
        "alone, wrapped, lower case": lambda full, alone: textwrap.fill(alone.lower(), 50),
    }
    for kind, copy in copies.items():
        tokens = []
        for page, id, parts in zip(pages, ids, rows):
            copied = copy("".join(parts).strip(), stem_of[id][1].strip())
            page_text = f"{page[:2500]}\n\n{copied}\n\n{page[2500:]}"
            tokens += [*tokenizer.encode(page_text), tokenizer.eos_id]
        share = overlap(rows, Tokens(np.array(tokens)), decoder)
        found = share >= contamination.DIRTY
        assert found[:40].mean() >= 0.95, kind
        assert found[40:].mean() <= 0.01, kind


def test_letters_of_tokens_are_those_of_the_text(base):
    model, tokenizer = load_model(base)
    speller = contamination.LetterDecoder(tokenizer, model.config.vocab_size)
    text = "The TREE's 3rd «river»: Straße, naïve — 水.\n\tstone"
    spelled = speller.decode(np.array(tokenizer.encode(text))).tobytes()
    assert spelled.decode() == contamination.letters(text).tobytes().decode()
    ids = np.array([*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")])
    assert speller.decode(ids).tobytes() == b"a\0b"  # documents do not touch


def test_examples_are_no_part_of_a_question(tmp_path):
    rows = [
        {"question": f"How {w} is it?", "choices": ["so", "no", "ever", w], "answer": 3}
        for w in WORDS
    ]
    questions = subject_questions("anatomy", rows[:5], rows[5:], letters=False)
    texts = question_texts(questions)
    assert texts[0] == ("Question:", f" How {WORDS[5]} is it?", f"\nAnswer: {WORDS[5]}")
    assert "".join(*question_texts(questions[:1])).strip() == "".join(texts[0])
    without = subject_questions("anatomy", [], rows, letters=False)
    assert ["".join(text) for text in question_texts(without)] == [
        f"Question: How {w} is it?\nAnswer: {w}" for w in WORDS
    ]
    needle = load_task("needle:128", tmp_path)
    assert question_texts(needle.questions)[0][2].endswith(needle.questions[0].gold)


@pytest.fixture(scope="module")
def planted(base, tmp_path_factory):
    """Return a task's file and shards with its questions 0 and 1, the latter without a word."""
    folder, rng = tmp_path_factory.mktemp("planted"), random.Random(5)
    # words of random letters: the small tokenizer needs a token for each
    questions = [
        " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(24)) for _ in range(6)
    ]
    rows = [
        {"text": text, "names": ["yes", "no"], "label": i % 2} for i, text in enumerate(questions)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: text\n"
        "doc_to_choice: names\ndoc_to_target: label\n"
    )
    words = questions[1].split()
    words[11] = "moon"
    texts = [sentence(rng, 200) for _ in range(8)]
    texts[3] += f" {questions[0]} yes and on"
    texts[5] += f" {' '.join(words)} no and on"
    write_shards(texts, load_model(base)[1], folder / "shards" / "train")
    return folder


def test_planted_questions_are_caught(base, planted):
    out = planted / "out"
    scores = Eval(tasks=(str(planted / "own.yaml"),))(
        out, model=[str(base)], training_data=str(planted / "shards")
    )
    actual = scores["tasks"][0]["contamination"]
    shares = {entry["id"]: entry["share"] for entry in actual["touched_questions"]}
    assert actual["questions"] == 6 and actual["short"] == 0
    assert actual["touched"] == 2 and shares.keys() == {"0", "1"}
    assert shares["0"] > 0.9 and actual["dirty"] >= 1
    assert shares["1"] < shares["0"]  # all but what is near the other word
    (parts,) = actual["models"].values()
    assert set(parts) == {"clean", "dirty", "at_most"}
    assert [(row["share"], row["questions"]) for row in parts["at_most"]] == [
        (0, 4), (0.2, 4), (0.5, 5 - (shares["1"] > 0.5)),
    ]  # fmt: skip
    clean_rows = parts["at_most"][0]["metrics"]
    assert clean_rows.keys() == parts["clean"].keys() and clean_rows["acc"]["value"] in (0, 0.5, 1)
    assert 0 <= parts["clean"]["acc"]["value"] <= 1 and "bits_per_byte" in parts["dirty"]
    clean = Eval(tasks=(str(planted / "own.yaml"),))(out, model=[str(base)])
    assert "contamination" not in clean["tasks"][0]
    stage = Eval(tasks=(str(planted / "own.yaml"),))
    with pytest.raises(InputError, match="training_data: expected tasks"):
        Eval()(out, model=[str(base)], data=str(planted / "shards"), training_data=str(out))
    console = Console(width=100, file=io.StringIO())
    console.print(stage.render(scores, stage.context(out, model=[str(base)])))
    assert "touched" in console.file.getvalue()


def test_bits_per_byte_of_each_source(base, tmp_path):
    """The bits of all sources sum to the total, which is that without sources."""
    model, tokenizer = load_model(base)
    rng = random.Random(2)
    rows = [
        {"text": sentence(rng, 90), "id": str(i), "source": f"deb:{'ab'[i % 2]}", "meta": {}}
        for i in range(5)
    ]
    path = tmp_path / "heldout.jsonl.zst"
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(body))
    options = {"seq_len": 32, "stride": 16, "batch_size": 3, "compressors": False}
    for mask in (False, True):
        actual = text_bits_per_byte(model, tokenizer, path, document_mask=mask, **options)
        values = actual["domains"]
        assert values["deb:a"]["documents"] == 3 and values["deb:b"]["documents"] == 2
        assert sum(d["bytes"] for d in values.values()) == actual["bytes"]
        assert sum(d["tokens"] for d in values.values()) == actual["tokens"]
        bits = sum(d["bits_per_byte"] * d["bytes"] for d in values.values())
        assert actual["bits_per_byte"] == pytest.approx(bits / actual["bytes"])
        same = b"".join(json.dumps({**r, "source": "one"}).encode() + b"\n" for r in rows)
        path.with_name("one.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(same))
        entry = text_bits_per_byte(
            model, tokenizer, path.with_name("one.jsonl.zst"), document_mask=mask, **options
        )
        assert "domains" not in entry
        assert entry["bits_per_byte"] == pytest.approx(actual["bits_per_byte"], rel=1e-5)


def test_a_filter_that_the_harness_cannot_apply_is_one_line(base, planted):
    text = (planted / "own.yaml").read_text() + (
        "filter_list:\n- name: x\n  filter:\n  - {function: regex, regex_pattern: '([a-z]+)'}\n"
        "  - {function: take_first}\n"
        "metric_list:\n- {metric: f1, aggregation: f1, higher_is_better: true}\n"
    )
    (planted / "filtered.yaml").write_text(text.replace("task: own", "task: filtered"))
    with pytest.raises(InputError, match=r"filtered\.yaml: ") as raised:
        Eval(tasks=(str(planted / "filtered.yaml"),))(planted / "out-filtered", model=[str(base)])
    assert "\n" not in str(raised.value)
