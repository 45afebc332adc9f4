"""Canaries: sentences with a random number, planted in the training text a known number of times.

They are planted in the training part of prepared text, after de-duplication and the split.
Rejected: a source for ``fastlm data prepare`` with a number before each copy. Preparation would
remove equal copies. Where copies are separate documents, the split would hold some out, and the
held-out texts would contain near-copies.

A model that has memorised a canary finds its number likelier than other numbers at this position.
The exposure is log2 of the count of numbers minus log2 of the rank of the planted one (Carlini et
al. 2019, arXiv:1802.08232). It is 1.4 bits on average for a canary that was not memorised,
whatever the model, and all bits for one that was.
"""

import json
import math
import random
import shutil
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Predicate

from fastlm.data.corpus import (
    SPLITS,
    SUFFIX,
    UNITS,
    PartRecord,
    corpus_parts,
    is_corpus,
    list_parts,
    part_record,
    read_units,
)
from fastlm.errors import InputError
from fastlm.evals.safety.texts import SENTENCES
from fastlm.files import atomic_file, make_folder, save_atomic, write_json, write_text
from fastlm.pipeline.funnel import FUNNEL, Funnel, StepCounts
from fastlm.schema import Count, read_lines
from fastlm.sources.streams import ZSTD_MAGIC, compressed, open_stream

DIGITS = 9
CANARIES_FILE = "canaries.jsonl"
SOURCE = STEP = "canaries"  # of the documents, and in the funnel
RIVALS = 255  # numbers to rank the planted one with: the exposure is at most 8 bits


@dataclass(frozen=True)
class Canary:
    """A planted sentence. ``copies``: how often it was planted; 0 for a control."""

    prefix: str
    secret: Annotated[str, Predicate(str.isdigit)]
    copies: Count

    @property
    def text(self) -> str:
        return self.prefix + self.secret


def make_canaries(count: int, copies: Sequence[int], seed: int) -> list[Canary]:
    """Return ``count`` canaries for each number of copies, and ``count`` controls."""
    if count < 1 or not copies or min(copies) < 1:
        raise InputError(
            f"canaries: expected 1 or more of 1 or more copies, got {count} of {list(copies)}"
        )
    texts, draw = SENTENCES["canaries"], random.Random(seed)
    first, last = texts["first_names"].split(), texts["last_names"].split()
    names = [f"{a} {b}" for a in first for b in last]
    copy_counts = [n for n in sorted({0, *copies}) for _ in range(count)]
    if len(copy_counts) > len(names):
        raise InputError(f"canaries: expected at most {len(names)} in all, got {len(copy_counts)}")
    draw.shuffle(names)
    forms = texts["forms"]
    return [
        Canary(forms[i % len(forms)].format(name=name), draw_secret(draw, DIGITS), n)
        for i, (name, n) in enumerate(zip(names, copy_counts, strict=False))
    ]


def draw_secret(draw: random.Random, digits: int) -> str:
    return "".join(str(draw.randrange(10)) for _ in range(digits))


def plant(corpus: Path, out: Path, canaries: Sequence[Canary], seed: int) -> None:
    """Copy the prepared folder ``corpus`` to ``out`` and plant each canary's copies at random
    positions of the training split. Also write ``canaries.jsonl`` for ``fastlm safety --canaries``.
    The held-out split is unchanged. The files in ``out`` have the names of those in ``corpus``.

    InputError: ``corpus`` is not a prepared folder, has no documents to train on, or is ``out``.
    """
    if corpus.resolve() == out.resolve():
        raise InputError(f"out: expected another folder than the corpus, got {out}")
    funnel = Funnel.load(corpus) if is_corpus(corpus) else Funnel()
    steps = {step["step"]: step for step in funnel.steps}
    if not {"train", "heldout"} <= steps.keys():
        raise InputError(f"corpus: expected a folder of fastlm data prepare, got {corpus}")
    train, heldout = steps["train"], steps["heldout"]
    draw = random.Random(seed)
    documents = [
        {"text": f"{canary.text}.", "id": f"{i}:{copy}", "source": SOURCE, "meta": {}}
        for i, canary in enumerate(canaries)
        for copy in range(canary.copies)
    ]
    draw.shuffle(documents)
    positions = sorted(draw.randrange(train["documents"] + 1) for _ in documents)
    pending = deque(zip(positions, documents, strict=True))
    files = {split: corpus_parts(corpus, split) for split in SPLITS}
    if not files["train"]:
        raise InputError(f"corpus: expected documents to train on, got none in {corpus}")
    make_folder(out)
    _remove_corpus(out)
    planted_in: dict[str, list[dict[str, Any]]] = {}  # by the name of the file
    number = 0
    for path in files["train"]:
        name, start = path.relative_to(corpus).as_posix(), len(documents) - len(pending)
        with (
            open_stream(path) as lines,
            atomic_file(out / name) as new,
            compressed(new, ZSTD_MAGIC) as writer,
        ):
            for line in lines:
                while pending and pending[0][0] <= number:
                    writer.write(_line(pending.popleft()[1]))
                writer.write(line)
                number += 1
            while pending and path == files["train"][-1]:
                writer.write(_line(pending.popleft()[1]))
        planted_in[name] = documents[start : len(documents) - len(pending)]
    for path in files["heldout"]:
        target = out / path.relative_to(corpus)
        make_folder(target.parent)
        save_atomic(target, partial(shutil.copyfile, path))
    if units := [unit for unit in read_units(corpus) if (out / unit["part"]).is_file()]:
        units = [_unit(out, unit, planted_in.get(unit["part"], [])) for unit in units]
        write_json(out / UNITS, units)
    rows = [json.dumps(asdict(canary), ensure_ascii=False) + "\n" for canary in canaries]
    write_text(out / CANARIES_FILE, "".join(rows))
    size = _text_bytes(documents)
    train["documents"] += len(documents)
    train["bytes"] += size
    funnel.sources[SOURCE] = {"files": 1, "documents": len(documents), "bytes": size}
    planted: StepCounts = {
        "step": STEP, "documents": train["documents"] + heldout["documents"],
        "bytes": train["bytes"] + heldout["bytes"], "removed": {},
    }  # fmt: skip
    funnel.steps.insert(funnel.steps.index(train), planted)
    write_json(out / FUNNEL, asdict(funnel))


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _text_bytes(rows: Iterable[dict[str, Any]]) -> int:
    return sum(len(row["text"].encode()) for row in rows)


def _unit(out: Path, unit: PartRecord, rows: list[dict[str, Any]]) -> PartRecord:
    """Return the entry of units.json for a part in which ``rows`` were planted."""
    counts = unit["documents"] + len(rows), unit["bytes"] + _text_bytes(rows)
    return part_record(out, unit["part"], *counts)


def _remove_corpus(out: Path) -> None:
    """Delete what an earlier corpus left in ``out``, the funnel first."""
    for name in (FUNNEL, UNITS, *(f"{split}{SUFFIX}" for split in SPLITS)):
        (out / name).unlink(missing_ok=True)
    for split in SPLITS:
        for part in list_parts(out / split):
            part.unlink()


def read_canaries(path: Path) -> list[Canary]:
    """Read ``canaries.jsonl``, from the file or a folder of `plant`. InputError names the line."""
    file = path / CANARIES_FILE if path.is_dir() else path
    canaries = [canary for _, canary in read_lines(file, Canary)]
    if not canaries:
        raise InputError(f"{path}: expected at least one canary, got none")
    return canaries


def exposure(planted: float, rivals: Sequence[float]) -> float:
    """Return log2(candidates) - log2(rank of the planted log-probability); ties count half."""
    above = sum(r > planted for r in rivals) + sum(r == planted for r in rivals) / 2
    return math.log2(len(rivals) + 1) - math.log2(above + 1)
