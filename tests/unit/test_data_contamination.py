"""Questions of evaluation sets are found in documents, by the rule of the evaluation."""

import json
import random
import re
import textwrap
import unicodedata

import numpy as np
import pytest

from fastlm.data.contamination import (
    EvaluationQuestion,
    QuestionIndex,
    letters,
    questions_sha256,
    read_questions,
)
from fastlm.data.ngrams import NgramIndex, covered_mask, hashes
from fastlm.errors import InputError
from fastlm.evals.contamination import overlap, question_texts
from fastlm.evals.task import OpenQuestion

WORDS = [a + b for a in "ba ce di fo gu ".split() for b in "rn st lm nd rk mp lt".split()]
QUESTION = (
    "Which of the seven moons that the probe photographed in March has the oldest surface,"
    " and how did the team count the craters?"
)


def sentences(seed: int, count: int = 40) -> str:
    draw = random.Random(seed)
    return " ".join(" ".join(draw.choices(WORDS, k=12)).capitalize() + "." for _ in range(count))


@pytest.fixture(scope="module")
def index():
    others = [EvaluationQuestion("other", str(i), sentences(i, 2)) for i in range(50)]
    return QuestionIndex([EvaluationQuestion("moons", "m1", f"Q: {QUESTION}\nA: Io", QUESTION),
                          *others])  # fmt: skip


@pytest.mark.parametrize("change", [
    str, str.upper, str.lower, lambda q: textwrap.fill(q, 20), lambda q: "> * " + q,
    lambda q: q.replace(" ", "\u00a0 — ").replace(",", "”"), lambda q: "_".join(q.split()),
])  # fmt: skip
def test_copies_are_found_in_any_typography(index, change):
    page = f"{sentences(900)}\n\n{change(QUESTION)}\n\n{sentences(901)}"
    found = index.find(page)
    assert (found.set, found.id, round(found.share, 2)) == ("moons", "m1", 1.0)
    assert found.first == QUESTION[:60]


def test_clean_pages_and_short_parts_stay(index):
    assert index.find(sentences(900)) is None and index.find("") is None
    words = QUESTION.split()
    assert index.find(sentences(900) + " ".join(words[: len(words) // 2]) + sentences(901)) is None
    assert index.find(sentences(900) + " ".join(reversed(words))) is None


def test_the_threshold_is_a_share_of_the_letters(index):
    bare = letters(QUESTION).tobytes().decode()
    count = next(n for n in range(len(bare)) if n / len(bare) >= 0.8)
    assert index.find("zz " + bare[:count] + " zz").share == pytest.approx(count / len(bare))
    assert index.find("zz " + bare[: count - 1] + " zz") is None


def test_a_question_of_25_letters_is_searched_for_and_a_shorter_one_skipped():
    index = QuestionIndex(
        [
            EvaluationQuestion("s", "25", "abcde fghij klmno pqrst uvwxy"),
            EvaluationQuestion("s", "24", "zbcde fghij klmno pqrst uvwx"),
        ]
    )
    assert (len(index), index.short) == (1, 1)
    assert index.find("it says ABCDEFGHIJKLMNOPQRSTUVWXY!").id == "25"
    assert index.find("it says zbcdefghijklmnopqrstuvwx!") is None


def test_equal_questions_of_two_sets_count_as_the_first():
    index = QuestionIndex([EvaluationQuestion(name, "1", QUESTION) for name in "ab"])
    assert len(index) == 1 and index.find(QUESTION).set == "a"


def test_it_is_the_rule_of_the_evaluation():
    """For a document, the share is that which `fastlm eval` reports for the same data."""
    draw, questions = random.Random(2), []
    for i in range(60):
        texts = sentences(i, 3).split()
        body = " ".join(texts[: draw.randrange(6, 36)])
        questions.append(OpenQuestion(str(i), f"Question: {body}\nAnswer:", {}, " right"))
    texts = question_texts(questions)
    index = QuestionIndex([
        EvaluationQuestion("set", q.id, "".join(parts), parts[1])
        for q, parts in zip(questions, texts)
    ])  # fmt: skip

    class Data:
        def __init__(self, page):
            self.bytes = letters(page)
            self.tokens = len(self.bytes)

        def read(self, start, n):
            return self.bytes[start : start + n]

    class Decoder:
        def decode(self, tokens):
            return tokens

    found = 0
    for i, (prefix, body, _) in enumerate(texts):
        words = (prefix + body).split()
        kept = words[draw.randrange(4) :][: draw.randrange(5, 40)]
        page = f"{sentences(500 + i)} {' '.join(kept)} {sentences(700 + i)}"
        expected = overlap(texts, Data(page), Decoder())
        actual = index.find(page)
        best = int(np.nanargmax(expected))
        assert (actual is None) == (expected[best] < 0.8)
        if actual is not None:
            found += 1
            assert (actual.id, actual.share) == (str(best), pytest.approx(expected[best]))
    assert 10 < found < 50


def test_letters_are_what_the_pattern_leaves():
    draw = random.Random(3)
    for alphabet in ("aB1_ .-\0\t", "aß_é—“”\u0301 Ⅷ²\0", "".join(map(chr, range(0x2000, 0x2100))),
                     "한국어 \uff2d\uff4d\u3000"):  # fmt: skip
        for _ in range(50):
            text = "".join(draw.choices(alphabet, k=60))
            folded = unicodedata.normalize("NFKD", text).casefold()
            expected = unicodedata.normalize("NFC", re.sub(r"[^\w\0]+|_+", "", folded))
            assert letters(text).tobytes() == expected.encode()
            assert letters(expected).tobytes() == expected.encode()


def test_letters_in_compatibility_forms_are_equal():
    for text, plain in (("\ufb01nal ½ Ⅷ ²", "final12viii2"), ("\uff2d\uff2f\uff2f\uff2e", "moon"),
                        ("\U0001d40coon", "moon"), ("naïve İstanbul", "naiveistanbul"),
                        ("cafe\u0301 Straße", "cafestrasse")):  # fmt: skip
        assert letters(text).tobytes().decode() == plain
    assert letters("한국").tobytes() == letters(unicodedata.normalize("NFD", "한국")).tobytes()
    assert len(letters("한국")) == 6  # syllables, not their parts


def test_stored_ngrams_find_every_longer_run():
    draw = np.random.default_rng(0)
    question = draw.integers(0, 200, 300)
    index = NgramIndex([question], 40, steps=[8])
    assert len(index.ngrams) == 34  # 261 n-grams
    for start in range(0, 253):
        assert len(index.positions(question[start : start + 47]))
    hit = np.isin(hashes(question, 40), hashes(question[10:60], 40))
    assert covered_mask(hit, 40).tolist() == [10 <= i < 60 for i in range(300)]


def test_questions_are_read_from_rows_of_all_forms(tmp_path):
    rows = [
        {"question": QUESTION, "passage": "The probe flew in spring."}, {"prompt": QUESTION},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": QUESTION}]},
        {"text": f"Q: {QUESTION} A", "question": QUESTION, "set": "moons", "id": 7},
        {"text": "Alone.", "question": QUESTION},
    ]  # fmt: skip
    path = tmp_path / "mine.test.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    read = [*read_questions(path)]
    assert [q.set for q in read] == ["mine", "mine", "mine", "moons", "mine"]
    assert [q.id for q in read][2:4] == ["mine.test.jsonl:5", "7"]
    assert [q.text for q in read] == [
        f"The probe flew in spring.\n\n{QUESTION}", QUESTION, QUESTION, f"Q: {QUESTION} A",
        f"Alone.\n\n{QUESTION}",
    ]  # fmt: skip
    assert all(QuestionIndex([q]).find(f"x {QUESTION} y") for q in read[1:])


def test_a_folder_of_texts_is_a_set_of_questions(tmp_path):
    folder = tmp_path / "exam"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text(QUESTION)
    (folder / "b" / "c.md").write_text(sentences(1, 1))
    index = QuestionIndex.load([str(folder)])
    assert len(index) == 2 and index.find(QUESTION).set == "a"
    before = questions_sha256(folder)
    (folder / "a.txt").write_text(sentences(5, 2))
    assert questions_sha256(folder) != before
    assert QuestionIndex.load([str(folder)]).find(QUESTION) is None


@pytest.mark.parametrize(("content", "message"), [
    ("{}", r"mine.jsonl:1: expected an object with a prompt"),
    ('{"question": "Short?"}', "expected questions of 25 letters or more, got none in"),
    ("[1]", "mine.jsonl:1"), ("oops", "mine.jsonl:1"), ("", "got none"),
])  # fmt: skip
def test_files_without_questions_are_refused(tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        QuestionIndex.load([str(path)])
    with pytest.raises(InputError, match="expected a file of questions or a folder"):
        QuestionIndex.load([str(tmp_path / "none.jsonl")])
