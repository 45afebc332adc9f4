"""What differs between two models (or two runs) and everything that they come from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastlm.errors import InputError
from fastlm.pipeline.content_id import combined
from fastlm.pipeline.recipe import Kinds
from fastlm.pipeline.registry import SHORT, Known, Registry
from fastlm.pipeline.scores import figure, is_figure, scores
from fastlm.pipeline.stage import Stage, options_of

Row = dict[str, Any]  # stage, what, a, b; of scores also difference


def diff(registry: Registry, a: str, b: str, *, kinds: Kinds) -> list[Row]:
    """The rows in which two runs, stages or models differ: options, inputs, code, machine, counts
    of documents, scores. Stages are compared with those of the same kind, in their order.
    ``kinds`` has the defaults of options that a record leaves out.

    InputError: as `Registry.find`; two names of one record.
    """
    one, other = _stages(registry, a), _stages(registry, b)
    if [r.id for r in one] == [r.id for r in other]:
        raise InputError(f"{b}: wanted another run or model than {a}, got the same")
    rows: list[Row] = []
    for kind in dict.fromkeys([*(r.entry.kind for r in one), *(r.entry.kind for r in other)]):
        mine = [r for r in one if r.entry.kind == kind]
        theirs = [r for r in other if r.entry.kind == kind]
        for i in range(max(len(mine), len(theirs))):
            first = mine[i] if i < len(mine) else None
            second = theirs[i] if i < len(theirs) else None
            rows += _compare(kind, kinds, first, second)
    return rows


def _stages(registry: Registry, what: str) -> list[Known]:
    """All stages of a run and what they come from; of one stage, it and its ancestors, and the
    stages that measured it.
    """
    found = registry.find(what)
    if len(found) == 1:
        (record,) = found
        kept = {r.id: r for r in registry.ancestors(record)}
        own = set(record.ids.values())
        measured = (r for r in registry.records if r.ids.keys() == {"scores"})
        kept |= {r.id: r for r in measured if own & set(r.read())}
    else:
        kept = {r.id: r for record in found for r in registry.ancestors(record)}
    return [r for r in registry.records if r.id in kept]


def _compare(kind: str, kinds: Kinds, a: Known | None, b: Known | None) -> Iterator[Row]:
    name = " | ".join(dict.fromkeys(r.name for r in (a, b) if r is not None))
    if a is None or b is None:
        yield {"stage": name, "what": "stage", "a": a and kind, "b": b and kind}
        return
    if a.id == b.id:
        return
    for what, first, second in (*_facts(kinds.get(kind), a, b), *_scores(a, b)):
        if first != second:
            row = {"stage": name, "what": what, "a": first, "b": second}
            if is_figure(first) and is_figure(second):
                row["difference"] = second - first
            yield row


def _facts(cls: type[Stage] | None, a: Known, b: Known) -> Iterator[tuple[str, Any, Any]]:
    defaults = {o.name: o.default for o in options_of(cls)} if cls else {}
    for key in dict.fromkeys([*a.entry.options, *b.entry.options]):
        default = defaults.get(key)
        yield key, a.entry.options.get(key, default), b.entry.options.get(key, default)
    first, second = a.made, b.made
    for key in dict.fromkeys([*first.reads, *second.reads]):
        yield f"input {key}", _ids(first.reads.get(key, ())), _ids(second.reads.get(key, ()))
    files, others = ({s["spec"]: s for s in made.sources} for made in (first, second))
    for spec in dict.fromkeys([*files, *others]):
        yield f"source {spec}", _source(files.get(spec)), _source(others.get(spec))
    for key in dict.fromkeys([*first.code, *second.code]):
        yield f"code {key}", first.code.get(key), second.code.get(key)
    for key in dict.fromkeys([*first.machine, *second.machine]):
        yield f"machine {key}", first.machine.get(key), second.machine.get(key)
    yield "stage version", first.version, second.version


def _ids(reads: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join((read["id"] or read["name"])[:SHORT] for read in reads) or "none"


def _source(source: Mapping[str, Any] | None) -> str | None:
    if source is None:
        return None
    package = source.get("package")
    return package or f"{source.get('count') or 0:,} files, {_hash(source.get('files', {}))}"


def _hash(files: Mapping[str, str]) -> str:
    return combined((), files.items())[:SHORT] if files else "hashes not recorded"


def _scores(a: Known, b: Known) -> Iterator[tuple[str, Any, Any]]:
    first, second = _named(a), _named(b)
    for key in dict.fromkeys([*first, *second]):
        yield f"result {key}", first.get(key), second.get(key)


def _named(record: Known) -> dict[str, float]:
    """The scores; where one model was measured, without its name."""
    found = scores(record.entry)
    models = (record.entry.result or {}).get("models")
    if isinstance(models, Mapping) and len(models) == 1:
        before = f"models.{next(iter(models))}."
        found = {key.removeprefix(before): value for key, value in found.items()}
    return found


def shown(rows: Sequence[Row], a: str, b: str) -> Any:
    """The rows as a table for a terminal; one line if there are none."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return "nothing that is recorded differs"
    table = Table("stage", "what", escape(a), escape(b), "difference", box=None)
    before = None
    for row in rows:
        change = row.get("difference")
        cells = [row["stage"] if row["stage"] != before else "", row["what"]]
        cells += [_text(row["a"]), _text(row["b"])]
        cells.append("" if change is None else f"{'+' if change >= 0 else ''}{figure(change)}")
        table.add_row(*map(Text, cells))
        before = row["stage"]
    return table


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return figure(value) if isinstance(value, float) else f"{value}"[:80]
