"""Collect what is recorded about a corpus, for its card: one pass over the documents and records.

Memory does not grow with the corpus: each table has at most MAX_KEYS rows, the rest is counted as
OTHERS. What was not recorded is left out of the tables, not guessed.
"""

import heapq
from collections import Counter
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastlm.data.corpus import PLAN, SPLITS, SUFFIX, corpus_parts, read_documents, read_plan
from fastlm.data.removals import read_removed
from fastlm.errors import InputError
from fastlm.machine import code_version
from fastlm.pipeline.funnel import Funnel
from fastlm.pipeline.registry import RunRecord, open_registry
from fastlm.pipeline.units import file_sha256
from fastlm.sources.document import Document
from fastlm.sources.remote import is_remote

FORMAT = 1
MAX_KEYS = 10_000  # rows of a table, some 1 MB
OTHERS = "others"
MAX_EXAMPLES = 3  # removed documents that are quoted per reason
EXCERPT = 160  # characters of a quoted text
LARGEST = 10  # clusters that are listed
BUCKETS = 20  # of `fastlm.data.quality`
TOXICITY_BINS = 10


@dataclass
class DocumentTable:
    """Documents and bytes of text by a value of their metadata."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, key: str, size: int) -> None:
        if key not in self.documents and len(self.documents) >= MAX_KEYS:
            key = OTHERS
        self.documents[key] += 1
        self.bytes[key] += size

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows, the most bytes first."""
        names = sorted(self.bytes, key=lambda name: (-self.bytes[name], name))
        return [
            {"name": name, "documents": self.documents[name], "bytes": self.bytes[name]}
            for name in names
        ]


class DocumentScan:
    """What is counted over the documents of a corpus."""

    def __init__(self) -> None:
        names = ("language", "licence", "consent", "consent_rule", "site", "year")
        self.tables = {name: DocumentTable() for name in names}
        self.documents = self.bytes = 0
        self.lengths: Counter[int] = Counter()  # exponent of 2 -> documents
        self.quality = [0] * BUCKETS
        self.toxicity = [0] * TOXICITY_BINS
        self.clusters: Counter[int] = Counter()  # size -> documents that remain
        self.largest: list[tuple[int, str, str, str]] = []  # heap of (size, cluster, source, id)

    def add(self, document: Document) -> None:
        """Count a document. A value of another type than expected counts as not recorded."""
        meta, size = document.meta, len(document.text.encode())
        self.documents += 1
        self.bytes += size
        self.lengths[max(1, len(document.text)).bit_length() - 1] += 1
        for name in ("language", "licence", "consent", "consent_rule"):
            value = meta.get(name, meta.get("license") if name == "licence" else None)
            if isinstance(value, str) and value:
                if name == "consent_rule":
                    value = value.partition(" [")[0]  # without the line of the file
                self.tables[name].add(value[:200], size)
        if site := _site(meta.get("url")):
            self.tables["site"].add(site, size)
        if isinstance(date := meta.get("date"), str) and date[:4].isdecimal():
            self.tables["year"].add(date[:4], size)
        bucket, toxicity = meta.get("quality_bucket"), meta.get("toxicity")
        if isinstance(bucket, int) and 0 <= bucket < BUCKETS:
            self.quality[bucket] += 1
        if isinstance(toxicity, int | float) and isfinite(toxicity):
            bin = int(max(0, min(TOXICITY_BINS - 1, toxicity * TOXICITY_BINS)))
            self.toxicity[bin] += 1
        cluster, cluster_size = meta.get("cluster"), meta.get("cluster_size")
        if isinstance(cluster_size, int) and cluster_size > 0:
            self.clusters[cluster_size] += 1
            self._add_cluster(cluster_size, str(cluster), document)

    def _add_cluster(self, size: int, cluster: str, document: Document) -> None:
        if size < 2 or any(cluster == other for _, other, _, _ in self.largest):
            return
        entry = (size, cluster, document.source, document.id)
        if len(self.largest) < LARGEST:
            heapq.heappush(self.largest, entry)
        else:
            heapq.heappushpop(self.largest, entry)


def _site(url: Any) -> str | None:
    try:
        return urlsplit(url).hostname if isinstance(url, str) else None
    except ValueError:
        return None


def corpus_facts(out: Path) -> dict[str, Any]:
    """Return what is recorded about the corpus ``out``; JSON-serialisable.

    InputError: no finished corpus, damaged records.
    """
    if not is_remote(out) and not out.is_dir():
        raise InputError(f"{out}: expected the folder of fastlm data prepare, not found")
    funnel = Funnel.load(out)
    scan = DocumentScan()
    files = {}
    for split in SPLITS:
        parts = corpus_parts(out, split)
        is_folder = all(path.parent.name == split for path in parts)
        files[split] = f"{split}/*{SUFFIX}" if is_folder else f"{split}{SUFFIX}"
        for path in parts:
            for document in read_documents(path):
                scan.add(document)
    steps = {step["step"]: step for step in funnel.steps}
    record = _record(out)
    tables = {name: table.rows() for name, table in scan.tables.items()}
    return {
        "format": FORMAT,
        "name": out.absolute().name,
        "splits": {
            split: {**{key: steps[split][key] for key in ("documents", "bytes")},
                    "files": files[split]}
            for split in SPLITS if split in steps
        },
        "unit": funnel.unit,
        "sources": _sources(funnel, record),
        "funnel": funnel.steps,
        "warnings": funnel.warnings,
        "unreadable": funnel.unreadable,
        "removed": _removed(out, funnel),
        "personal_data": steps.get("scrub", {}).get("replaced", {}),
        "languages": tables["language"],
        "licences": tables["licence"],
        "consent": {"verdicts": tables["consent"], "rules": tables["consent_rule"]},
        "sites": tables["site"],
        "years": sorted(tables["year"], key=lambda row: row["name"]),
        "lengths": [
            {"min": 1 << n, "max": (2 << n) - 1, "documents": scan.lengths[n]}
            for n in range(min(scan.lengths, default=0), max(scan.lengths, default=-1) + 1)
        ],
        "quality_buckets": scan.quality if any(scan.quality) else [],
        "toxicity": scan.toxicity if any(scan.toxicity) else [],
        "clusters": [
            {"size": size, "documents": count} for size, count in sorted(scan.clusters.items())
        ],
        "largest_clusters": [
            {"size": size, "source": source, "id": id}
            for size, _, source, id in sorted(scan.largest, reverse=True)
        ],
        "scanned_documents": scan.documents, "scanned_bytes": scan.bytes,
        "mix": funnel.mix,
        "plan": _plan(out),
        "build": _build(record),
    }  # fmt: skip


def _removed(out: Path, funnel: Funnel) -> list[dict[str, Any]]:
    """Return the reasons, each with its count and examples: those with a text first."""
    examples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    quoted: Counter[tuple[str, str]] = Counter()
    for record in read_removed(out):
        key = record["step"], record["reason"]
        rows = examples.get(key)
        if rows is None:
            if len(examples) >= MAX_KEYS:
                continue
            rows = examples[key] = []
        if quoted[key] == MAX_EXAMPLES or (len(rows) >= MAX_EXAMPLES and not record["text"]):
            continue
        row = {name: (record[name] or "")[:1000] for name in ("id", "source", "url", "detail")}
        row["text"] = record["text"][:EXCERPT]
        quoted[key] += bool(record["text"])
        rows.append(row)
        rows.sort(key=lambda row: not row["text"])
        del rows[MAX_EXAMPLES:]
    return [
        {
            "step": step["step"], "reason": reason, "count": count,
            "examples": examples.get((step["step"], reason), []),
        }
        for step in funnel.steps
        for reason, count in sorted(step["removed"].items(), key=lambda item: -item[1])
    ]  # fmt: skip


def _record(out: Path) -> RunRecord | None:
    """Return the record of the stage that wrote the corpus, None if there is none."""
    try:
        records = open_registry([], paths=[out]).find(str(out))
    except InputError:
        return None
    path = out.absolute()
    matches = (r for r in records if r.path.absolute() == path and "corpus" in r.entry.outputs)
    return next(matches, None)


def _sources(funnel: Funnel, record: RunRecord | None) -> list[dict[str, Any]]:
    stated = {s["spec"]: s for s in record.provenance.sources} if record else {}
    return [
        {
            "source": name, **counts, "package": stated.get(name, {}).get("package"),
            "licence": stated.get(name, {}).get("licence"),
        }
        for name, counts in sorted(funnel.sources.items(), key=lambda item: -item[1]["bytes"])
    ]  # fmt: skip


def _plan(out: Path) -> dict[str, Any]:
    """Return what plan.json says, without its list of files; {} for older corpora."""
    plan = read_plan(out)
    if not plan:
        return {}
    files = plan.get("files", [])
    return {
        **{key: plan.get(key) for key in ("date", "version", "libraries", "options", "policies")},
        "sha256": file_sha256(out / PLAN), "input_files": len(files),
        "input_bytes": sum(file["size"] for file in files),
        "forgotten": len(plan.get("forgotten", [])),
    }  # fmt: skip


def _build(record: RunRecord | None) -> dict[str, Any]:
    """Return the command and conditions of the build, as far as they are recorded."""
    facts: dict[str, Any] = {"card_code": code_version()}
    if record is not None:
        provenance = record.provenance
        facts |= {
            "command": provenance.command, "finished_at": provenance.finished_at,
            "code": provenance.code, "machine": provenance.machine,
            "seconds": record.entry.seconds, "ids": provenance.ids,
            "changed_options": record.entry.options,
        }  # fmt: skip
    return facts
