"""Compare two models, or two runs, and everything that they come from."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from fastlm.errors import InputError
from fastlm.pipeline.provenance import combined_id
from fastlm.pipeline.recipe import Kinds
from fastlm.pipeline.record import is_figure, models_in, scores
from fastlm.pipeline.registry import SHORT, Registry, RunRecord
from fastlm.pipeline.stage import options_of
from fastlm.pipeline.text import figure

Row = dict[str, Any]  # stage, what, a, b; of scores also difference


def diff(registry: Registry, a: str, b: str, *, kinds: Kinds) -> list[Row]:
    """Return the rows in which two runs, stages or models differ: options, inputs, code, machine,
    counts of documents, scores. Stages are compared with those of the same kind, in their order.
    ``kinds`` has the defaults of options that a record leaves out.

    InputError: as `Registry.find`; two names of one record.
    """
    a_stages, b_stages = _stages(registry, a), _stages(registry, b)
    if [r.id for r in a_stages] == [r.id for r in b_stages]:
        raise InputError(f"{b}: expected another run or model than {a}, got the same")
    rows: list[Row] = []
    for kind in dict.fromkeys(r.entry.kind for r in (*a_stages, *b_stages)):
        mine = [r for r in a_stages if r.entry.kind == kind]
        theirs = [r for r in b_stages if r.entry.kind == kind]
        for first, second in zip_longest(mine, theirs):
            rows += _compare(kind, kinds, first, second)
    return rows


def _stages(registry: Registry, name: str) -> list[RunRecord]:
    """Return all stages of a run and their ancestors. For one stage: that stage, its ancestors and
    the stages that measured it.
    """
    records = registry.find(name)
    ids = {r.id for record in records for r in registry.ancestors(record)}
    if len(records) == 1:
        artifacts = set(records[0].ids.values())
        measured = (r for r in registry.records if r.ids.keys() == {"scores"})
        ids |= {r.id for r in measured if artifacts & set(r.input_ids())}
    return [r for r in registry.records if r.id in ids]


def _compare(kind: str, kinds: Kinds, a: RunRecord | None, b: RunRecord | None) -> Iterator[Row]:
    name = " | ".join(dict.fromkeys(r.name for r in (a, b) if r is not None))
    if a is None or b is None:
        yield {"stage": name, "what": "stage", "a": a and kind, "b": b and kind}
        return
    if a.id == b.id:
        return
    defaults = {o.name: o.default for o in options_of(kinds[kind])} if kind in kinds else {}
    recorded = a.entry.options | b.entry.options
    defaults = {key: defaults.get(key) for key in recorded}
    first, second = _facts(a, defaults), _facts(b, defaults)
    for fact in dict.fromkeys((*first, *second)):
        was, now = first.get(fact), second.get(fact)
        if was != now:
            row = {"stage": name, "what": fact, "a": was, "b": now}
            if is_figure(was) and is_figure(now):
                row["difference"] = now - was
            yield row


def _facts(record: RunRecord, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the compared facts of a record, by their name in the table."""
    provenance, models = record.provenance, models_in(record.entry)
    figures = scores(record.entry, models if len(models) == 1 else None)
    return {
        **defaults,
        **record.entry.options,
        **{f"input {key}": _ids(inputs) for key, inputs in provenance.inputs.items()},
        **{f"source {source['spec']}": _source(source) for source in provenance.sources},
        **{f"code {key}": value for key, value in provenance.code.items()},
        **{f"machine {key}": value for key, value in provenance.machine.items()},
        "stage version": record.entry.version,
        **{f"result {key}": value for key, value in figures.items()},
    }


def _ids(inputs: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join((input["id"] or input["name"])[:SHORT] for input in inputs) or "none"


def _source(source: Mapping[str, Any]) -> str:
    files = source.get("files")
    hashes = combined_id((), files.items())[:SHORT] if files else "hashes not recorded"
    return source.get("package") or f"{source.get('count') or 0:,} files, {hashes}"


def render(rows: Sequence[Row], a: str, b: str) -> Any:
    """Return the rows as a table for a terminal, or one line if there are none."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return "no recorded fact differs"
    table = Table("stage", "what", escape(a), escape(b), "difference", box=None)
    before = None
    for row in rows:
        change = row.get("difference")
        name = row["stage"] if row["stage"] != before else ""
        signed = "" if change is None else f"{'+' if change >= 0 else ''}{figure(change)}"
        cells = (name, row["what"], _text(row["a"]), _text(row["b"]), signed)
        table.add_row(*map(Text, cells))
        before = row["stage"]
    return table


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return figure(value) if isinstance(value, float) else f"{value}"[:80]
