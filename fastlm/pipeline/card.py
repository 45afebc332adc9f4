"""A model card in Hugging Face's form, from what the registry has recorded and nothing else.

What was not recorded is said to be so. Every text that comes from outside (names, sources,
licences, options) is escaped, so that it cannot become markup of the card: huggingface_hub writes
the YAML, and the template (parts/card.md.jinja) escapes each value.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import read_json
from fastlm.pipeline.funnel import FUNNEL, Funnel
from fastlm.pipeline.lineage import NOT_RECORDED
from fastlm.pipeline.recipe import Kinds
from fastlm.pipeline.registry import GONE, HERE, SHORT, Known, Registry
from fastlm.pipeline.scores import figure, scores
from fastlm.pipeline.stage import Stage
from fastlm.pipeline.text import seconds_text

CARD = "README.md"
MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&-])")
ERRORS = ("error", "stderr", "low", "high", "interval", "ci")  # in names of figures: intervals
ROWS = ("read", "conversations", "pairs", "comparisons", "prompts", "heldout")
Figures = Mapping[str, float]


def card(
    registry: Registry,
    record: Known,
    *,
    kinds: Kinds,
    licence: str | None = None,
    language: str | None = None,
) -> str:
    """Return the text of README.md for the model that ``record`` made. ``licence`` (an id of
    Hugging Face's) and ``language`` (an ISO 639 code) are what its owner states.

    InputError: the record made no model.
    """
    if record.model is None:
        raise InputError(f"{record.name}: wanted a model, got {record.entry.kind}")
    line = registry.ancestors(record)
    outside = [*_outside_models(registry, line)]
    measured = [*_measured(registry, record)]
    sources = dict.fromkeys(source["spec"] for r in line for source in r.made.sources)
    bases = [read["name"] for _, read in outside]
    front = _front(record, measured, licence, language, base_model=bases, datasets=[*sources])
    sections: dict[str, list[tuple[Known, Figures]]] = {"Evaluation": [], "Safety": []}
    for made, figures in measured:
        sections[_kind(made, kinds).card_section].append((made, figures))
    body = _template(registry, kinds).render(
        name=record.name, kind=record.entry.kind, finished=record.finished, id=record.model,
        not_recorded=NOT_RECORDED, outside=outside, sections=sections.items(),
        data=[r for r in reversed(line) if r.made.sources],
        stages=[r for r in reversed(line) if not {"scores", "corpus"} & r.entry.leaves.keys()],
        instructed=outside or any(_kind(r, kinds).instructs for r in line),
        gone=", ".join(r.name for r in line if r.state != HERE),
        commands=[*dict.fromkeys(r.made.command for r in reversed(line) if r.made.command)],
        code=_facts(record.made.code) if all(r.made.code == record.made.code for r in line) else "",
        recipe=_recipe(line),
    )  # fmt: skip
    return f"---\n{front}\n---\n\n{body}".encode("utf-8", "replace").decode()


def _front(
    record: Known,
    measured: Sequence[tuple[Known, Figures]],
    licence: str | None,
    language: str | None,
    *,
    base_model: list[str],
    datasets: list[str],
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation", dataset_type=made.name, dataset_name=_data_of(made),
            metric_type=key.rpartition(".")[2], metric_name=key, metric_value=value,
        )
        for made, found in measured
        for key, value in _figures(found).items()
    ]  # fmt: skip
    return ModelCardData(
        license=licence or "unknown", library_name="fastlm", pipeline_tag="text-generation",
        language=[language] if language else None,
        model_name=record.name, eval_results=results or None,
        metrics=[*dict.fromkeys(result.metric_type for result in results)] or None,
        tags=["fastlm", f"fastlm-id:{record.model}"],
        base_model=base_model or None, datasets=datasets or None,
    ).to_yaml()  # fmt: skip


class Safe(str):
    """Text that is Markdown already."""


def escape(value: Any) -> str:
    """Return text as one line of Markdown that shows it as it is."""
    return value if isinstance(value, Safe) else MARKUP.sub(r"\\\1", " ".join(str(value).split()))


def code_span(value: Any) -> Safe:
    """Return text as code, whatever backticks it has."""
    text = " ".join(str(value).split()) or " "
    fence = "`" * (max(map(len, re.findall(r"`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return Safe(f"{fence}{pad}{text}{pad}{fence}")


def _block(lines: Sequence[str], language: str) -> Safe:
    """Return lines as a block of code, which no backticks in them end."""
    text = "\n".join(" ".join(line.split()) if language == "sh" else line for line in lines)
    return Safe(f"```{language}\n{text.replace('```', chr(39) * 3)}\n```")


def _template(registry: Registry, kinds: Kinds) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "parts"), finalize=escape,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "code": code_span, "block": _block, "facts": _facts, "funnel": _funnel, "rows": _rows,
        "parents": registry.parents, "data_of": _data_of, "table": _table, "counts": _counts,
        "short": lambda id: code_span((id or NOT_RECORDED)[:SHORT]),
        "count": lambda count: f"{count:,}" if count else NOT_RECORDED,
        "seconds": lambda value: NOT_RECORDED if value is None else seconds_text(value),
        "options": lambda table: Safe(", ".join(code_span(f"{k} = {v}") for k, v in table.items())),
        "training": lambda record: bool(_kind(record, kinds).scratch),
        "trained": lambda record: _numbers(record, ("steps", "tokens", "loss")),
    }  # fmt: skip
    return environment.get_template("card.md.jinja")


def _kind(record: Known, kinds: Kinds) -> type[Stage]:
    return kinds.get(record.entry.kind, Stage)


def _facts(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in table.items() if v is not None)


def _numbers(record: Known, names: Sequence[str]) -> str:
    return ", ".join(f"{k} {figure(v)}" for k, v in scores(record.entry).items() if k in names)


def _funnel(record: Known) -> list[tuple[str, str, str, str]] | None:
    try:
        if record.state == GONE:
            return None
        steps = Funnel.load(record.place / FUNNEL).steps
    except InputError:
        return None
    rows = []
    for step in steps:
        removed = {**step["removed"], **step.get("replaced", {}), **step.get("cut", {})}
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in removed.items() if n)
        rows.append(
            (step["step"], f"{step['documents']:,}", f"{step['bytes'] / 1e6:,.2f}", reasons)
        )
    return rows


def _rows(record: Known) -> str:
    result = record.entry.result or {}
    numbers = [(result.get(name), name) for name in ROWS]
    counts = result.get("counts")
    if isinstance(counts, Mapping):
        numbers += [(n, reason) for reason, n in counts.items()]
    return ", ".join(f"{n:,} {name}" for n, name in numbers if isinstance(n, int))


def _measured(registry: Registry, record: Known) -> Iterator[tuple[Known, dict[str, float]]]:
    """The stages that measured this model, each with its figures."""
    for made in registry.records:
        if made.ids.keys() != {"scores"} or record.model not in set(made.read()):
            continue
        found, models = scores(made.entry), (made.entry.result or {}).get("models")
        if isinstance(models, Mapping):  # of several, only this one's
            reads = made.made.reads.get("model", [])
            own = {read["name"] for read in reads if read["id"] == record.model}
            others = tuple(f"models.{name}." for name in models if name not in own)
            found = {k: v for k, v in found.items() if not k.startswith(others)}
            mine = tuple(f"models.{name}." for name in own)
            found = {k[len(_start(k, mine)) :]: v for k, v in found.items()}
        if found:
            yield made, found


def _start(key: str, starts: Sequence[str]) -> str:
    return next((start for start in starts if key.startswith(start)), "")


def _table(found: Figures) -> Iterator[tuple[str, str, str]]:
    for key, value in _figures(found).items():
        bounds = [f"{b[len(key) + 1 :]} {figure(found[b])}" for b in found if _bounds(b, key)]
        yield key, figure(value), ", ".join(sorted(bounds))


def _counts(found: Figures) -> str:
    return ", ".join(f"{k} {v:,}" for k, v in found.items() if isinstance(v, int))


def _figures(found: Figures) -> dict[str, float]:
    """The measurements, without counts (whole numbers) and bounds of other figures."""
    measured = {k: v for k, v in found.items() if isinstance(v, float)}
    return {k: v for k, v in measured.items() if not any(_bounds(k, key) for key in measured)}


def _bounds(bound: str, key: str) -> bool:
    """Whether a figure is an interval or an error of another: accuracy_error, accuracy.low."""
    last = bound.rpartition(".")[2].rpartition("_")[2]
    return last in ERRORS and bound.startswith((f"{key}_", f"{key}."))


def _data_of(made: Known) -> str:
    return ", ".join(read["name"] for read in made.made.reads.get("data", [])) or NOT_RECORDED


def _recipe(line: Sequence[Known]) -> list[str]:
    """The lines of the recipe where there is one."""
    for record in line:
        path = record.place.parent / "recipe.json"
        if record.made.recipe and path.is_file():
            return json.dumps(read_json(path), indent=1, ensure_ascii=False).splitlines()
    return []


def _outside_models(
    registry: Registry, line: Sequence[Known]
) -> Iterator[tuple[Known, Mapping[str, Any]]]:
    """(stage, what it read) of every model that no stage here made."""
    for record in line:
        for key, read, maker in registry.parents(record):
            if maker is None and key in ("model", "teacher", "reward_model", "base"):
                yield record, read


def place_of(record: Known) -> Path:
    """The folder beside whose files a card belongs: that of the model."""
    leaves = record.entry.leaves
    kind = next(kind for kind in leaves if kind in record.ids and kind != "scores")
    return record.place / leaves[kind]
