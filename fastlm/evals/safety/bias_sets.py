"""Readers of the sets of `fastlm.evals.safety.bias`: CrowS-Pairs, StereoSet, BBQ in two copies."""

import re
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.safety.rows import csv_rows, json_lines, objects, text_of

UNKNOWN = re.compile(
    r"(?:not (?:known|answerable|enough info(?:rmation)?)|unknown|undetermined"
    r"|can(?:not|'t) (?:answer|be (?:determined|answered)))\.?",
    re.IGNORECASE,
)

# what says of no person who it is
COMMON = frozenset(
    "a an at for from her his in is of on one person s that the their to was who whose with".split()
)


def names_both(sentence: str, first: str, second: str) -> bool:
    """Whether a word of each of two people is in the sentence: one that the other does not have,
    if there is one ("the African man", "the African American man").
    """
    said, a, b = (
        {*re.findall(r"[^\W_]+", text.lower())} - COMMON for text in (sentence, first, second)
    )
    return bool(said & (a - b or a) and said & (b - a or b))


def crows(path: Path) -> list[tuple[str, str, str]]:
    """Return (kind, stereotyping sentence, the other): they differ in one or a few words."""
    pairs = []
    for where, row in csv_rows(path):
        sentence = text_of(row, "sentence", where)
        if "[MASK]" not in sentence:
            raise InputError(f"{where}: wanted [MASK] in the sentence, got {sentence[:60]!r}")
        first, second = (
            sentence.replace("[MASK]", text_of(row, k, where)) for k in ("mask1", "mask2")
        )
        pairs.append((text_of(row, "bias_type", where), first, second))
    return pairs


def stereoset(path: Path) -> list[dict[str, str]]:
    """Return rows with type, bias_type, context, stereotype, anti-stereotype, unrelated."""
    keys = ("type", "bias_type", "context", "stereotype", "anti-stereotype", "unrelated")
    return [{key: text_of(row, key, where) for key in keys} for where, row in json_lines(path)]


def bbq(path: Path) -> list[dict[str, Any]]:
    """Return rows: context, question, options (three texts), gold (index), unknown (index)."""
    rows = []
    for where, row in json_lines(path):
        options = [
            re.sub(r"^[A-C]\. ", "", line) for line in text_of(row, "options", where).splitlines()
        ]
        answer = row.get("answer")
        gold = [i for i, o in enumerate(options) if isinstance(answer, list) and o in answer]
        unknown = [i for i, o in enumerate(options) if UNKNOWN.fullmatch(o.strip())]
        if len(options) != 3 or len(gold) != 1 or len(unknown) != 1:
            continue  # some answers of the copy are not among the options
        question = text_of(row, "question", where).split("\n")[0]
        rows.append(
            {
                "context": text_of(row, "passage", where), "question": question,
                "options": options, "gold": gold[0], "unknown": unknown[0],
            }
        )  # fmt: skip
    return rows


def bbq_targets(path: Path) -> list[dict[str, Any]]:
    """Return rows as `bbq`, whose context says enough, with ``target``: the index of the answer
    that the stereotype gives. ``unclear`` is the context's first sentence, which says too
    little; None where it does not name both people.
    """
    rows = []
    for where, row in objects(path):
        context, mark, rest = text_of(row, "text", where).partition("\nQuestion: ")
        gold, target = row.get("correct_idx"), row.get("target_idx")
        options = row.get("answers")
        if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
            options = []
        unknown = [i for i, o in enumerate(options) if UNKNOWN.fullmatch(o.strip())]
        known = len(options) == 3 and len(unknown) == 1 and gold in range(3)
        if not mark or not known or target not in range(3):
            raise InputError(f"{where}: wanted a context, a question and three answers")
        first = re.split(r"(?<=[.!?])\s+", context, maxsplit=1)[0]
        people = [option for i, option in enumerate(options) if i != unknown[0]]
        unclear = first if names_both(first, *people) else None
        rows.append(
            {
                "context": context, "unclear": unclear, "question": rest.split("\n")[0],
                "options": options, "gold": gold, "unknown": unknown[0], "target": target,
            }
        )  # fmt: skip
    return rows
