"""The steps of preparing text that work on a unit of input (`fastlm.pipeline.units`).

    read     clean its documents; write them, and the keys by which all documents are compared
    apply    drop its duplicates, and cut paragraphs that earlier documents have
    write    divide its documents into training and held-out text

Between ``read`` and ``apply`` are the steps of `fastlm.data.matching`.
"""

import json
from array import array
from collections import Counter
from collections.abc import Container, Iterator
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.clean import EXCERPT, CleanDocument, Cleaner, Removal
from fastlm.data.consent import PolicyIndex
from fastlm.data.corpus import read_documents
from fastlm.data.dedup import content_key, paragraph_keys, strip_paragraphs
from fastlm.data.filter import first_failed
from fastlm.data.forget_log import text_key
from fastlm.data.matching import PARTS_PER_MILLION, gathered, has_near
from fastlm.data.mix import MixWeights, copies, mix_keys
from fastlm.data.near_duplicates import band_keys
from fastlm.data.options import DataOptions
from fastlm.data.plan import POLICIES, UnchangedFiles, options_of_plan, ranges_of_unit
from fastlm.data.shingles import shingles
from fastlm.data.unit_files import (
    DOCUMENT,
    REMOVED,
    ROWS,
    Counts,
    document_row,
    json_lines,
    link,
    load,
    load_name,
    raw_lines,
    read_lines,
    removal_record,
    rows_of_unit,
    save_names,
    save_sorted,
)
from fastlm.errors import InputError
from fastlm.pipeline.units import BuildError, Work, first_difference
from fastlm.sources.document import FAULTS, Document
from fastlm.sources.source_files import read_files
from fastlm.sources.streams import ZSTD_MAGIC, compressed

# A document that loses more than half of its text to repeats is a copy of another one: only
# headings without text remain.
MIN_REMAINING = 0.5
# Steps of the funnel that count each document that the steps before left
ALONE = (
    "exact duplicates", "language", "quality rules", "quality", "toxicity", "contamination",
    "scrub",
)  # fmt: skip
SIGNING_BATCH = 256  # documents whose shingles are in memory at once
MIX = "mix.json"
MAX_EXCERPTS = 5  # of removed texts, per unit and reason


def read(work: Work, number: int, out: Path) -> dict[str, Any]:
    """Clean the documents of one unit of input.

    Writes ``rows.jsonl.zst`` (documents that passed alone), ``removed.jsonl.zst``,
    ``documents.npy`` (a `DOCUMENT` for each text that was extracted), the documents' names, and
    sorted keys: of texts (``text_key``, ``text_low``: `content_key`), paragraphs and MinHash bands.
    """
    cleaner = _cleaner(work)
    options, is_earlier = cleaner.options, number < work.plan["earlier_units"]
    counts, excerpts = Counts(), Counter()
    table: list[tuple[int, int, int, bool]] = []
    names: list[tuple[str, str]] = []
    text_keys: list[bytes] = []
    paragraphs, paragraph_positions = array("Q"), array("I")
    sets: list[np.ndarray] = []
    bands = [np.empty((0, 1), "<u8")]

    def sign() -> None:
        bands.append(band_keys(sets, options.near_duplicates))
        sets.clear()

    with json_lines(out / ROWS) as rows, json_lines(out / REMOVED) as removed:
        for result in (
            _read_earlier(work, number) if is_earlier
            else _clean(cleaner, _gather(work, number, options, counts), counts)
        ):  # fmt: skip
            position = len(table) if result.key else None
            if result.removal is not None:
                reason = result.removal.step, result.removal.reason
                excerpts[reason] += 1
                is_sampled = excerpts[reason] <= MAX_EXCERPTS
                excerpt = cleaner.excerpt(result.rejected_text) if is_sampled else ""
                record = removal_record(document_row(result.document), result.removal, excerpt)
                removed.write({**record, "position": position})
            if position is None:
                assert result.removal is not None
                counts.remove(result.removal.step, result.removal.reason)
                continue
            text, passed = result.document.text, result.removal is None
            names.append((result.document.source, result.document.id))
            text_keys.append(result.key)
            count = 0
            if passed:
                if not is_earlier:
                    rows.write({**document_row(result.document), "replaced": result.replacements})
                paragraphs.extend(paragraph_keys(text, options.min_paragraph))
                missing = len(paragraphs) - len(paragraph_positions)
                paragraph_positions.extend(repeat(position, missing))
                if options.near_duplicates:
                    sets.append(shingles(text))
                    count = len(sets[-1])
                    if len(sets) == SIGNING_BATCH:
                        sign()
            table.append((len(text.encode()), result.extracted_bytes, count, passed))
    documents = np.array(table, DOCUMENT)
    np.save(out / "documents.npy", documents)
    save_names(out, names)
    halves = np.frombuffer(b"".join(text_keys), ">u8").reshape(-1, 2).astype("<u8")
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    np.save(out / "text_key.npy", halves[order, 0])
    np.save(out / "text_low.npy", halves[order, 1])
    np.save(out / "text_position.npy", order.astype("<u4"))
    save_sorted(out, "paragraph", np.array(paragraphs, "<u8"), np.array(paragraph_positions, "<u4"))
    if sets:
        sign()
    band_rows = np.concatenate(bands[1:] or bands)
    positions = np.repeat(np.flatnonzero(documents["passed"]), band_rows.shape[1])
    save_sorted(out, "band", band_rows.ravel(), positions[: band_rows.size])
    passed_bytes = int(documents["size"][documents["passed"]].sum())
    return {**counts.to_json(), "documents": len(table), "passed_bytes": passed_bytes,
            "paragraphs": len(paragraphs), "bands": band_rows.size}  # fmt: skip


_CLEANERS: dict[tuple, Cleaner] = {}  # the last one of this process: lists and models are large


def _cleaner(work: Work) -> Cleaner:
    """Return the cleaner of a build. BuildError: lists or models have changed since the plan."""
    key = work.folder, work.session, work.digest
    if key not in _CLEANERS:
        plan, options = work.plan, options_of_plan(work.plan)
        now = datetime.fromisoformat(plan["date"]).replace(tzinfo=UTC)
        policies = PolicyIndex.open(work.file(POLICIES), now)
        cleaner = Cleaner(options, plan["forgotten"], policies, now, plan["licences"])
        identity = json.loads(json.dumps(options.identity()))  # after they were loaded
        if (difference := first_difference(plan["options"], identity, "options")) is not None:
            raise BuildError(f"{work.folder}: expected the files of the plan, but {difference}")
        _CLEANERS.clear()
        _CLEANERS[key] = cleaner
    return _CLEANERS[key]


def _read_earlier(work: Work, number: int) -> Iterator[CleanDocument]:
    """Yield the documents of an earlier build, which are compared and not written again."""
    for file, _ in ranges_of_unit(work, number):
        for document in read_documents(file.path):
            size = len(document.text.encode())
            yield CleanDocument(document, content_key(document.text), size)


BATCH, BATCH_CHARACTERS = 64, 1 << 22  # documents that are cleaned together


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Yield the documents in groups of up to BATCH, which end after BATCH_CHARACTERS."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _clean(
    cleaner: Cleaner, documents: Iterator[Document], counts: Counts
) -> Iterator[CleanDocument]:
    cleaned = (pair for batch in _batches(documents) for pair in zip(batch, cleaner.clean(batch)))
    for document, results in cleaned:
        if all(r.removal is None or r.removal.step != "consent" for r in results):
            counts.keep("consent", len(document.text.encode("utf-8", "replace")))
        if len(results) > 1:
            counts.add("cut", {"document cut": 1, "part produced": len(results)})
        if fallback := results[0].fallback:
            counts.add("fallbacks", {fallback: 1})
        yield from results


def _gather(work: Work, number: int, options: DataOptions, counts: Counts) -> Iterator[Document]:
    """Yield the documents of a unit of input. A bad file that the user did not name is counted and
    reported; documents before its fault remain. InputError: with ``strict``, any fault.
    """
    skipped: Counter[str] = Counter()
    files, ranges = zip(*ranges_of_unit(work, number))
    unchanged = UnchangedFiles(work, number)
    for document in read_files(
        files, ranges=ranges, field=options.text_field, skipped=skipped,
        on_skip=counts.messages.append,
    ):  # fmt: skip
        counts.keep("gather", len(document.text.encode("utf-8", "replace")))
        yield document
    unchanged.check()
    for reason, count in skipped.items():
        counts.remove("gather", reason, count)
    faults = sorted(FAULTS & skipped.keys())
    if options.strict and faults:
        raise InputError(f"strict: expected no fault, got {faults[0]}: {counts.messages[0]}")


def documents_within(work: Work, unit: int, size: int) -> int:
    """Return how many documents of a unit have ``size`` bytes of text that passed, the last one
    included.
    """
    table = load(work, "read", unit, "documents")
    total = np.cumsum(np.where(table["passed"], table["size"], 0), dtype="<u8")
    return int(np.searchsorted(total, size)) + 1


def apply(work: Work, number: int, out: Path) -> dict[str, Any]:
    """Drop the duplicates of one unit of input, and cut repeated paragraphs.

    Writes ``rows.jsonl.zst``, ``removed.jsonl.zst`` and ``rows.npy``: uint64 rows (content key,
    bytes, cluster) of the documents that remain. With a mix, documents without a copy are dropped,
    and ``mix.json`` has [copies, `mix_keys`] of each other one.
    """
    options, forgotten = options_of_plan(work.plan), frozenset(work.plan["forgotten"])
    counts, excerpts = Counts(), Counter()
    table = gathered(work, number)
    all_documents = load(work, "read", number, "documents")

    def rows_by_position(step: str, name: str) -> dict[int, tuple[int, ...]]:
        rows = rows_of_unit(work, step, name, number).tolist()
        return {document & 0xFFFFFFFF: tuple(rest) for document, *rest in rows}

    same_text = rows_by_position("exact", "duplicates")
    near = rows_by_position("near", "duplicates") if has_near(work) else {}
    clusters = rows_by_position("near", "clusters") if has_near(work) else {}
    repeats: dict[int, set[int]] = {}
    for document, key in rows_of_unit(work, "paragraphs", "repeats", number).tolist():
        repeats.setdefault(document & 0xFFFFFFFF, set()).add(key)
    keys = np.empty(len(all_documents), "<u8")
    keys[load(work, "read", number, "text_position")] = load(work, "read", number, "text_key")
    entries: list[tuple[int, int, int]] = []
    weights = MixWeights(options.mix) if options.mix else None
    mix_rows: list[tuple[int, dict[str, str]]] = []

    with json_lines(out / ROWS) as rows, json_lines(out / REMOVED) as removed:

        def remove(row: dict[str, Any], step: str, reason: str, detail: str = "") -> None:
            counts.remove(step, reason)
            excerpts[step, reason] += 1
            text = row.get("text", "")[:EXCERPT] if excerpts[step, reason] <= MAX_EXCERPTS else ""
            removed.write(removal_record(row, Removal(step, reason, detail), text))

        def remove_same_text(row: dict[str, Any], position: int) -> None:
            (first,) = same_text[position]
            detail = "same text as {} {}".format(*load_name(work, first))
            remove(row, "exact duplicates", "same text", detail)

        _count_alone(counts, table, same_text)
        if len(table) < len(all_documents):
            counts.remove("extract", "after max_bytes", len(all_documents) - len(table))
        for record in read_lines(work.path("read", number, REMOVED)):
            position = record.pop("position")
            if position in same_text:
                remove_same_text({**record, "meta": {"url": record["url"]}}, position)
            elif position is None or position < len(table):
                removed.write(record)
                if position is not None:
                    step = record["step"]
                    counts.remove(step, record["reason"])
                    for earlier_step in ALONE[: ALONE.index(step)]:
                        counts.keep(earlier_step, int(table[position]["extracted"]))
        positions = np.flatnonzero(all_documents["passed"]).tolist()
        for position, row in zip(positions, read_lines(work.path("read", number, ROWS))):
            if position >= len(table):
                continue
            if position in same_text:
                remove_same_text(row, position)
                continue
            before, source = row["text"], row["source"]
            counts.add_to_source(source, compared=1)
            if position in near:
                first, similarity = near[position]
                detail = "{:.3f} like {} {}".format(
                    similarity / PARTS_PER_MILLION, *load_name(work, first)
                )
                remove(row, "near duplicates", "near duplicate", detail)
                counts.add_to_source(source, near_duplicates=1)
                continue
            counts.keep("near duplicates", len(before.encode()))
            text, paragraph_count = before, 0
            if position in repeats:
                text, paragraph_count = strip_paragraphs(
                    before, repeats[position], options.min_paragraph
                )
                counts.remove("repeated paragraphs", "paragraph", paragraph_count)
            language = row["meta"].get("language", "en")
            if paragraph_count and (
                reason := _rejection(text, before, options, forgotten, language)
            ):
                remove(row, "repeated paragraphs", reason)
                continue
            counts.add("replaced", row.pop("replaced"))
            document = number << 32 | position
            cluster, cluster_size = clusters.get(position, (document, 1))
            row["text"] = text
            row["meta"] |= {"cluster": f"{cluster:016x}", "cluster_size": cluster_size}
            size = len(text.encode())
            counts.keep("repeated paragraphs", size)
            counts.add_to_source(source, documents=1, bytes=size)
            if weights is not None:
                mix = mix_keys(source, row["meta"])
                counts.mix("before", mix, size)
                weight = weights.weight(mix)
                count = copies(weight, int(keys[position]))
                if not count:
                    remove(row, "mix", weights.drop_reason(mix), f"weight {weight:.3f}")
                    continue
                mix_rows.append((count, mix))
            rows.write(row)
            entries.append((int(keys[position]), size, cluster))
    np.save(out / "rows.npy", np.array(entries, "<u8").reshape(-1, 3))
    if weights is not None:
        (out / MIX).write_text(json.dumps(mix_rows))
    return {**counts.to_json(), "documents": len(entries)}


def _count_alone(counts: Counts, table: np.ndarray, same_text: Container[int]) -> None:
    """Count the documents of a unit that passed everything that depends on them alone."""
    for position, document in enumerate(table):
        size = int(document["extracted"])
        counts.keep("extract", size)
        if position not in same_text and document["passed"]:
            for step in ALONE[:-1]:
                counts.keep(step, size)
            counts.keep(ALONE[-1], int(document["size"]))


def _rejection(
    text: str, before: str, options: DataOptions, forgotten: Container[str], language: str
) -> str:
    """Return why a text without its repeated paragraphs is rejected, "" if it is not."""
    if len(text) < MIN_REMAINING * len(before):
        return "document mostly repeated"
    if "word_count" in options.rules and first_failed(text, ["word_count"], language):
        return "document left too short"
    return "forgotten" if text_key(text) in forgotten else ""


def write(work: Work, number: int, out: Path) -> dict[str, Any]:
    """Divide the documents of one unit of input into training and held-out text.

    Writes ``train.jsonl.zst`` and ``heldout.jsonl.zst``, each if it has documents. Documents for
    training are repeated as the mix says: first each one once, then those with a second copy, ...
    """
    heldout = set(work.parameters("write")["heldout"].get(str(number), ()))
    path = work.path("apply", number, ROWS)
    sizes = load(work, "apply", number, "rows")[:, 1].tolist()
    mix_rows = None
    if work.plan["options"].get("mix"):
        mix_rows = json.loads(work.path("apply", number, MIX).read_bytes())
    counts = Counts()
    for split, positions in (
        ("train", set(range(len(sizes))) - heldout), ("heldout", heldout)
    ):  # fmt: skip
        repeats = dict.fromkeys(positions, 1)
        if mix_rows is not None and split == "train":
            repeats = {position: mix_rows[position][0] for position in positions}
        for position, count in repeats.items():
            for copy in range(count):
                counts.keep(split, sizes[position])
                if mix_rows is not None:
                    counts.keep("mix", sizes[position])
                    counts.mix(split, mix_rows[position][1], sizes[position])
                    counts.add("repeated", {"copy": 1 if copy else 0})
        target = out / f"{split}.jsonl.zst"
        passes = max(repeats.values(), default=0)
        if len(positions) == len(sizes) and passes == 1:
            link(path, target)
        elif positions:
            with open(target, "wb") as file, compressed(file, ZSTD_MAGIC) as stream:
                for number_of_pass in range(passes):  # copies are far apart
                    for position, line in enumerate(raw_lines(path)):
                        if repeats.get(position, 0) > number_of_pass:
                            stream.write(line)
    return counts.to_json()


def choose_heldout(work: Work, units: range, options: DataOptions) -> dict[str, list[int]]:
    """Choose the held-out documents by the hash of their content, as long as they fit. Return the
    positions in the rows of each unit.

    All documents of a cluster go to the same side, so that no near-copy of a held-out document is
    trained on: a cluster counts as one document with the smallest of its hashes. New text changes
    few choices. Only documents with a small hash can be chosen from a large corpus, so only these
    are in memory.
    """
    total = sum(int(load(work, "apply", unit, "rows")[:, 1].sum()) for unit in units)
    budget = min(options.heldout_bytes, int(options.heldout_fraction * total))
    limit = np.uint64(min(2**64 - 1, HEADROOM * budget * 2**64 // max(1, total)))
    candidates = [_rows_of_heldout(work, unit, limit, None) for unit in units]
    chosen_clusters = np.unique(np.concatenate(candidates)[:, 2])
    rows = np.concatenate([_rows_of_heldout(work, unit, limit, chosen_clusters) for unit in units])
    if not len(rows):
        return {}
    _, cluster = np.unique(rows[:, 2], return_inverse=True)
    sizes = np.bincount(cluster, weights=rows[:, 1].astype(float)).astype("<u8")
    smallest = np.full(len(sizes), np.iinfo("<u8").max, "<u8")
    np.minimum.at(smallest, cluster, rows[:, 0])
    is_heldout = np.zeros(len(sizes), bool)
    remaining = budget
    for index in np.argsort(smallest, kind="stable"):
        if sizes[index] <= remaining:
            is_heldout[index] = True
            remaining -= int(sizes[index])
    heldout: dict[str, list[int]] = {}
    chosen = rows[is_heldout[cluster]]
    if int(chosen[:, 1].sum()) < total:
        for _, _, _, unit, position in chosen.tolist():
            heldout.setdefault(str(unit), []).append(position)
    return heldout


HEADROOM = 8  # the chosen documents are among those whose hashes have 8 times the budget


def _rows_of_heldout(
    work: Work, unit: int, limit: np.uint64, clusters: np.ndarray | None
) -> np.ndarray:
    """Return rows (content key, bytes, cluster, unit, position) of a unit: those with a hash up to
    ``limit``, or those of ``clusters``.
    """
    rows = load(work, "apply", unit, "rows")
    is_candidate = rows[:, 0] <= limit if clusters is None else np.isin(rows[:, 2], clusters)
    positions = np.flatnonzero(is_candidate).astype("<u8")
    units = np.full(len(positions), unit, "<u8")
    return np.concatenate((rows[is_candidate], units[:, None], positions[:, None]), 1)
