"""Read a prepared corpus: a folder of parts, or the two files that older versions wrote.

| path | content |
|---|---|
| ``OUT/train/NNNNN.jsonl.zst`` | documents to train on |
| ``OUT/heldout/NNNNN.jsonl.zst`` | documents that are held out |
| ``OUT/removed/NNNNN.jsonl.zst`` | why documents were removed (`RemovedRecord`) |
| ``OUT/units.json`` | documents, bytes and SHA-256 of each part (`PartRecord`) |
| ``OUT/funnel.json`` | counts of every step; written last, so a folder without it is unfinished |
| ``OUT/train.jsonl.zst``, ``OUT/heldout.jsonl.zst`` | in older corpora, instead of the parts |

A line of a part is {"text", "id", "source", "meta"}. The number of a part is that of the unit of
work that wrote it. A unit without documents writes no part, so numbers may be missing; units.json
tells whether a part is missing. ``OUT`` may be on object storage (``s3://BUCKET/PREFIX``).

Rejected: Parquet. A part that is read from start to end needs no columns, `zstdcat` shows a line of
JSON, and a killed `data forget` needs only one rename per part.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.files import write_json
from fastlm.pipeline.funnel import FUNNEL
from fastlm.pipeline.units import file_sha256
from fastlm.schema import Count, Finite, RelativePath, parse
from fastlm.sources.remote import is_file, is_remote, list_sizes, read_small
from fastlm.sources.source_files import Document
from fastlm.sources.streams import open_stream

SPLITS = ("train", "heldout")
SUFFIX = ".jsonl.zst"
REMOVED = "removed"  # folder of the records of removed documents
UNITS = "units.json"
PLAN = "plan.json"  # written before the first part
CARD_FILES = ("card.md", "card.html", "card.json")  # of `fastlm.data.data_card`
UNFINISHED_SHARDS = ".encoding"  # in a folder of shards: `fastlm.tokenizer.corpus_encoding`
MAX_PLAN_BYTES = 1 << 30  # some 200 bytes per input file
MAX_UNITS_BYTES = 1 << 28  # some 150 bytes per part


class PartRecord(TypedDict):
    """What units.json says about a part. ``part``: its path below the corpus. ``bytes``: of text,
    as in the funnel. ``sha256``: of the file.
    """

    part: RelativePath
    documents: Count
    bytes: Count
    sha256: str


class RemovedRecord(TypedDict):
    """Why a document was removed. ``detail``: the document it is a copy of, the question it
    contains, ... ``text``: the beginning of its text in a sample of the records, else "".
    """

    id: str
    source: str
    url: str | None
    step: str
    reason: str
    detail: str | None
    text: str


class PolicyCounts(TypedDict):
    """The policy files that decided about consent: how many, fetched from when to when."""

    files: Count
    sites: Count
    first: str | None
    last: str | None
    sha256: str


class PlannedFile(TypedDict):
    size: Count


class PlanMix(TypedDict, total=False):
    max_epochs: Finite


class PlanOptions(TypedDict, total=False):
    """Options of a plan that its readers use; the others have any value."""

    consent: str
    unknown: str
    crawler_names: list[str]
    near_duplicates: Finite | None
    mix: PlanMix | None


class PlanFacts(TypedDict, total=False):
    """What readers use of plan.json; the build compares all of it with its own plan."""

    date: str
    version: Count
    libraries: dict[str, str]
    options: PlanOptions
    policies: PolicyCounts | str | None  # earlier plans have the hash alone
    files: list[PlannedFile]
    forgotten: list[str]


def read_plan(out: Path) -> PlanFacts:
    """Return plan.json of a corpus; {} for older ones. InputError names the field that is wrong."""
    path = out / PLAN
    if not is_file(path):
        return {}
    return parse(read_small(path, MAX_PLAN_BYTES), PlanFacts, str(path), extra="allow")


def part_name(number: int) -> str:
    """Return the file name of the part that unit ``number`` writes."""
    return f"{number:05d}{SUFFIX}"


def is_part_name(name: str) -> bool:
    """Return True if `part_name` gives parts such names."""
    return re.fullmatch(r"\d{5,9}\.jsonl\.zst", name, re.ASCII) is not None


def is_corpus(path: str | Path) -> bool:
    """Return True if ``path`` is the folder of a finished corpus, in either layout."""
    return is_file(Path(path) / FUNNEL)


def is_split(path: str | Path) -> bool:
    """Return True if ``path`` is a split of a corpus: ``OUT/train``, ``OUT/heldout``, or a file
    such as ``OUT/train.jsonl.zst``. A file counts by its name, even if it does not exist.
    """
    path = Path(path)
    if path.name.endswith(SUFFIX) and not path.is_dir():
        return True
    out = _absolute(path).parent
    if path.name not in SPLITS or not (is_remote(path) or path.is_dir()):
        return False
    in_corpus = is_corpus(out) or is_file(out / PLAN)
    return (is_corpus(out) and is_file(out / UNITS)) or (in_corpus and bool(list_parts(path)))


def has_split(path: str | Path, split: str) -> bool:
    """Return True if the corpus ``path`` has documents of ``split``, as far as its files show."""
    path = Path(path)
    return is_file(path / f"{split}{SUFFIX}") or bool(list_parts(path / split))


def list_parts(folder: Path) -> list[Path]:
    """Return the parts in a folder, by number. Temporary and other files are ignored."""
    if is_remote(folder):
        names = list(list_sizes(folder))
    else:
        names = os.listdir(folder) if folder.is_dir() else []
    parts = [folder / name for name in names if is_part_name(name)]
    return sorted(parts, key=lambda path: (int(path.name.partition(".")[0]), path.name))


def split_files(out: Path) -> dict[str, list[Path]]:
    """Return the files of each split of the corpus ``out``, in either layout, in the order of their
    documents. Unlike `corpus_parts`, it does not compare them with units.json.

    InputError: both layouts in one folder.
    """
    files = {split: [out / f"{split}{SUFFIX}"] for split in SPLITS}
    files = {split: paths for split, paths in files.items() if is_file(paths[0])}
    parts = {split: list_parts(out / split) for split in SPLITS}
    if files and any(parts.values()):
        names = ", ".join(paths[0].name for paths in files.values())
        raise InputError(
            f"{out}: expected one corpus, got parts and {names} of another one: prepare into"
            " another folder"
        )
    return files or parts


def corpus_parts(path: str | Path, split: str | None = None) -> list[Path]:
    """Return the files of a corpus in the order of their documents.

    Args:
        path: the folder of a corpus, one of its splits (``OUT/train``) or one file.
        split: "train" or "heldout"; needed, and only used, if ``path`` is the folder of a corpus.

    Returns:
        The files that `read_documents` reads; none for a split without documents.

    InputError: no corpus, an unfinished one, parts that units.json does not list, or the reverse.
    """
    path = Path(path)
    if path.name.endswith(SUFFIX) if is_remote(path) else not path.is_dir():
        stem = path.name.removesuffix(SUFFIX)
        if stem in SPLITS and not is_file(path) and list_parts(path.with_name(stem)):
            raise InputError(
                f"{path}: expected a file, got a corpus of parts: {path.parent / stem}"
            )
        return [path]
    if is_corpus(path):
        if split not in SPLITS:
            raise InputError(f"split: expected {' or '.join(SPLITS)} of {path}, got {split!r}")
        files = split_files(path)
        if not any(files.values()) and not is_file(path / UNITS):
            raise InputError(f"{path}: expected a corpus, got no {split}/ and no {split}{SUFFIX}")
        _check_units(path, split, files.get(split, []))
        return files.get(split, [])
    parts, out = list_parts(path), _absolute(path).parent
    in_split = path.name in SPLITS
    for folder in (path, out) if in_split else (path,):
        if is_file(folder / PLAN) and not is_corpus(folder):
            raise InputError(
                f"{path}: expected a finished corpus, {FUNNEL} is missing: run fastlm data prepare"
                " again"
            )
    if in_split and is_corpus(out) and is_file(out / UNITS):
        _check_units(out, path.name, parts)
    elif not parts:
        raise InputError(
            f"{path}: expected a corpus of fastlm data prepare, a split of it such as"
            f" {path / 'train'}, or one {SUFFIX} file"
        )
    return parts


def read_documents(path: str | Path, split: str | None = None) -> Iterator[Document]:
    """Yield the documents of a corpus, in order.

    Args:
        path: the folder of a corpus, one of its splits (``OUT/train``) or one file.
        split: "train" or "heldout"; needed, and only used, if ``path`` is the folder of a corpus.

    InputError: as `corpus_parts`; a file is missing, truncated, corrupt or of another kind.
    """
    for part in corpus_parts(path, split):
        yield from _read_part(part)


def _read_part(path: Path) -> Iterator[Document]:
    with open_stream(path) as stream:
        for number, line in enumerate(stream, 1):
            location = f"{path}, line {number}"
            try:
                document = parse(line, Document, "it", extra="forbid")
                document.text.encode()  # no lone surrogate
            except (InputError, UnicodeError) as e:
                raise InputError(f"{location}: expected a prepared document: {e}") from None
            yield document


def read_units(out: Path) -> list[PartRecord]:
    """Return what units.json says about the parts of a corpus; nothing if there is no such file.
    InputError: damaged.
    """
    path = out / UNITS
    if not is_file(path):
        return []
    return parse(read_small(path, MAX_UNITS_BYTES), list[PartRecord], str(path))


def update_units(out: Path, counts: Mapping[str, tuple[int, int]]) -> None:
    """Update units.json after parts of a corpus were written again or deleted.

    Args:
        counts: (documents, bytes of text) of parts, by their path below ``out``. A part with
            the same numbers is not read. The entry of a part that does not exist is removed.

    Does nothing if there is no units.json. A killed call is completed by the next one.
    """
    records = read_units(out)
    updated = []
    for record in records:
        path = out / record["part"]
        if record["part"] in counts and not path.is_file():
            continue
        documents, size = counts.get(record["part"], (record["documents"], record["bytes"]))
        if (documents, size) != (record["documents"], record["bytes"]):
            record = part_record(out, record["part"], documents, size)
        updated.append(record)
    if updated != records:
        write_json(out / UNITS, updated)


def part_record(out: Path, part: str, documents: int, size: int) -> PartRecord:
    """Return the entry of units.json for a part, whose file is hashed here."""
    sha256 = file_sha256(out / part)
    return {"part": part, "documents": documents, "bytes": size, "sha256": sha256}


def _absolute(path: Path) -> Path:
    return path if is_remote(path) else path.absolute()


def _check_units(out: Path, split: str, parts: list[Path]) -> None:
    """Compare the parts of a split with units.json, if there is one. InputError: others."""
    if not is_file(out / UNITS):
        return
    names = {r["part"] for r in read_units(out) if r["part"].startswith(f"{split}/")}
    differences = names ^ {f"{split}/{path.name}" for path in parts}
    for name in sorted(differences):
        state = f"{UNITS} has it, the folder does not" if name in names else f"not in {UNITS}"
        raise InputError(
            f"{out / name}: expected the parts of {UNITS}, this one differs ({state}): repeat the"
            " command that stopped (fastlm data forget, data prepare)"
        )
