"""Look up why documents were removed from a corpus: the records in OUT/removed, one at a time.

A record is `fastlm.data.corpus.RemovedRecord`. Every removed document has one; a sample of them has
the beginning of its text. The counts are those of the funnel, which also has what has no record:
files, paragraphs, documents after ``max_bytes``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastlm.data.corpus import (
    REMOVED,
    SPLITS,
    RemovedRecord,
    corpus_parts,
    list_parts,
    read_documents,
)
from fastlm.data.forget_log import document_id
from fastlm.errors import InputError
from fastlm.pipeline.funnel import FUNNEL, Funnel
from fastlm.schema import parse
from fastlm.sources.remote import is_remote
from fastlm.sources.source_files import Document
from fastlm.sources.streams import open_stream
from fastlm.terminal import console, visible


class Reason(NamedTuple):
    """A reason of a step of the funnel, and how many it removed."""

    step: str
    reason: str
    count: int


def read_removed(out: Path) -> Iterator[RemovedRecord]:
    """Yield the records of the documents that were removed from a corpus, in order. InputError: a
    damaged record.
    """
    for path in list_parts(out / REMOVED):
        with open_stream(path) as lines:
            for number, line in enumerate(lines, 1):
                yield parse(line, RemovedRecord, f"{path}, line {number}")


def reasons_of(funnel: Funnel) -> list[Reason]:
    """Return every reason for which something was removed, by step."""
    return [
        Reason(step["step"], reason, count)
        for step in funnel.steps
        for reason, count in sorted(step["removed"].items(), key=lambda item: -item[1])
    ]


def select_reasons(reasons: list[Reason], rule: str) -> list[Reason]:
    """Return the reasons that ``rule`` names: a step, a reason, "step: reason", or the beginning
    of one. A complete name excludes those that only begin with it. Case, "_" and "-" do not count.
    """
    query = _normal(rule)
    names = [
        (r, [_normal(name) for name in (r.step, r.reason, f"{r.step}: {r.reason}")])
        for r in reasons
    ]
    return [r for r, forms in names if query in forms] or [
        r for r, forms in names if query and any(form.startswith(query) for form in forms)
    ]


def _normal(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


@dataclass(frozen=True)
class RemovalQuery:
    """Which records to look up; all that are not None have to match.

    rule: as in `select_reasons`. id: of a document, also of one that was cut into parts. url: its
    address.
    """

    rule: str | None = None
    id: str | None = None
    url: str | None = None

    def match(self, id: str, url: Any) -> bool:
        """Return whether a document has the id and the address that are looked up."""
        return self.id in (None, id, document_id(id)) and self.url in (None, url)


def corpus_folder(path: Path) -> Path:
    """Return the folder of a corpus that is named by itself or by its funnel.json."""
    return path.parent if path.name == FUNNEL else path


def find_removed(out: Path, query: RemovalQuery) -> Iterator[RemovedRecord]:
    """Yield the records that match, in order.

    None match a step that removed no documents. InputError, before the first one: no corpus; no
    records, as in corpora of older versions; no such step or reason, with those that there are.
    """
    funnel = Funnel.load(out)
    reasons = reasons_of(funnel)
    out = corpus_folder(out)
    if not is_remote(out) and not (out / REMOVED).is_dir():
        raise InputError(
            f"{out}: expected the records of removed documents ({REMOVED}/), got none: only fastlm"
            " data prepare writes them, since corpora are folders of parts"
        )
    pairs = None
    if query.rule is not None:
        selected = select_reasons(reasons, query.rule)
        all_steps = [Reason(step["step"], step["step"], 0) for step in funnel.steps]
        if not selected and not select_reasons(all_steps, query.rule):
            raise InputError(
                f"dropped: expected a step or the reason of a removal, got"
                f" {query.rule!r:.80}; {out} has {describe_reasons(reasons) or 'none'}"
            )
        pairs = {(r.step, r.reason) for r in selected}
    return (
        record for record in read_removed(out)
        if (pairs is None or (record["step"], record["reason"]) in pairs)
        and query.match(record["id"], record["url"])
    )  # fmt: skip


def describe_reasons(reasons: list[Reason]) -> str:
    """Return all reasons with their counts in one line."""
    steps: dict[str, list[str]] = {}
    for step, reason, count in reasons:
        steps.setdefault(step, []).append(f"{reason} {count:,}")
    return "; ".join(f"{step}: {', '.join(texts)}" for step, texts in steps.items())


def find_document(out: Path, query: RemovalQuery) -> tuple[str, Document] | None:
    """Return a document of a corpus and its part, "train/00003.jsonl.zst"; None if it is in none.
    Reads documents until it is found.
    """
    for split in SPLITS:
        for path in corpus_parts(out, split):
            for document in read_documents(path):
                if query.match(document.id, document.meta.get("url")):
                    return str(path.relative_to(out)), document
    return None


def facts_text(document: Document) -> str:
    """Return source and metadata of a document, a line each: consent, licence, scores, cluster."""
    facts = {"source": document.source} | document.meta
    width = max(map(len, facts))
    return "".join(
        f"  {visible(name):<{width}}  {' '.join(visible(str(value)).split())}\n"
        for name, value in facts.items()
    )


def record_fields(record: RemovedRecord) -> list[tuple[str, str]]:
    """Return the title of a record ("step", "reason") and its fields, without control characters.

    The first pair is the title; the others have a value.
    """
    fields = [(name, record[name]) for name in ("id", "source", "url", "detail", "text")]
    title = (visible(record["step"]), visible(record["reason"]))
    return [title, *((name, visible(value)) for name, value in fields if value and value.strip())]


def plain_text(record: RemovedRecord) -> str:
    """Return a record as lines of text: complete, without colours."""
    (step, reason), *fields = record_fields(record)
    lines = [f"{step}: {reason}"]
    for name, value in fields:
        first, *rest = filter(str.strip, value.splitlines())
        lines += [f"  {name:<7} {first}", *(" " * 10 + line for line in rest)]
    return "\n".join(line.rstrip() for line in lines) + "\n\n"


def styled_text(record: RemovedRecord, width: int) -> str:
    """Return a record for a terminal of ``width`` columns."""
    import io

    from rich.table import Table
    from rich.text import Text

    output = console(file=io.StringIO(), force_terminal=True, width=width, highlight=False)
    (step, reason), *fields = record_fields(record)
    grid = Table.grid(padding=(0, 2))
    for name, value in fields:
        lines = filter(str.strip, value.splitlines())
        grid.add_row(Text(f"  {name}", "dim"), Text("\n".join(lines)))
    with output.capture() as capture:
        output.print(Text.assemble((step, "bold"), ": ", (reason, "bold yellow")))
        output.print(grid)
        output.print()
    return capture.get()
