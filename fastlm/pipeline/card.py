"""A model card in Hugging Face's form, from what the registry has recorded and nothing else.

What was not recorded is said to be so. Every text that comes from outside (names, sources,
licences, options) is escaped, so that it cannot become markup of the card.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import read_json
from fastlm.pipeline.funnel import FUNNEL, Funnel
from fastlm.pipeline.lineage import NOT_RECORDED
from fastlm.pipeline.registry import HERE, SHORT, Known, Registry
from fastlm.pipeline.scores import figure, scores
from fastlm.pipeline.text import seconds_text

CARD = "README.md"
MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&-])")
TRAININGS = ("pretrain", "sft", "distill", "reward", "dpo", "ppo", "grpo")
SAFETY = "safety"
ERRORS = ("error", "stderr", "low", "high", "interval", "ci")  # in names of figures: intervals


def card(
    registry: Registry, record: Known, *, licence: str | None = None, language: str | None = None
) -> str:
    """Return the text of README.md for the model that ``record`` made. ``licence`` (an id of
    Hugging Face's) and ``language`` (an ISO 639 code) are what its owner states.

    InputError: the record made no model.
    """
    if record.model is None:
        raise InputError(
            f"{record.name}: wanted a model, got {record.entry.kind}"
            + ("" if record.entry.made else ", recorded by an older fastlm")
        )
    text = "\n".join([*_front(registry, record, licence, language), *_body(registry, record)])
    return text.encode("utf-8", "replace").decode() + "\n"


def escape(value: Any) -> str:
    """Return text as one line of Markdown that shows it as it is."""
    text = " ".join(str(value).split())
    return MARKUP.sub(r"\\\1", text)


def code_span(value: Any) -> str:
    """Return text as code, whatever backticks it has."""
    text = " ".join(str(value).split()) or " "
    fence = "`" * (max(map(len, re.findall(r"`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _front(
    registry: Registry, record: Known, licence: str | None, language: str | None
) -> Iterator[str]:
    """The YAML. Its strings are JSON's, which are YAML's, too."""
    line = registry.ancestors(record)
    bases = [read["name"] for _, read in _outside_models(registry, line)]
    specs = list(dict.fromkeys(s["spec"] for r in line for s in _sources(r)))
    front: dict[str, Any] = {
        "license": licence or "unknown", "library_name": "fastlm",
        "pipeline_tag": "text-generation",
    }  # fmt: skip
    if language:
        front["language"] = [language]
    if bases:
        front["base_model"] = bases
    if specs:
        front["datasets"] = specs
    measured = list(_measured(registry, record))
    if measured:
        names = dict.fromkeys(
            k.rpartition(".")[2] for _, found in measured for k in _figures(found)
        )
        front["metrics"] = list(names)
        front["model-index"] = [_index(record, measured)]
    front["tags"] = ["fastlm", f"fastlm-id:{record.model}"]
    yield "---"
    for key, value in front.items():
        yield f"{key}: {_yaml(value)}"
    yield "---"
    yield ""


def _yaml(value: Any) -> str:
    """JSON that is YAML, too, which wants some characters escaped that JSON does not."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda c: f"\\u{ord(c[0]):04x}", text
    )


def _index(record: Known, measured: Sequence[tuple[Known, dict[str, float]]]) -> dict[str, Any]:
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": made.name, "name": _data_of(made)},
            "metrics": [
                {"type": key.rpartition(".")[2], "name": key, "value": value}
                for key, value in _figures(found).items()
            ],
        }
        for made, found in measured
    ]  # fmt: skip
    return {"name": record.name, "results": results}


def _body(registry: Registry, record: Known) -> Iterator[str]:
    made, line = record.entry.made, registry.ancestors(record)
    assert made is not None  # it has a model's id
    yield f"# {escape(record.name)}"
    yield ""
    yield f"Made by the stage {code_span(record.entry.kind)} of fastlm on {made.finished}."
    yield f"Content id: `{record.model}` (the hash of its files, docs/runs.md)."
    yield ""
    yield "## Intended use"
    yield ""
    yield f"Intended use: {NOT_RECORDED}."
    yield ""
    yield "## Training data"
    yield ""
    yield from _data(registry, line)
    yield "## Training procedure"
    yield ""
    yield from _procedure(registry, line)
    yield "## Evaluation"
    yield ""
    yield from _evaluation(registry, record, SAFETY, False)
    yield "## Safety"
    yield ""
    yield from _evaluation(registry, record, SAFETY, True)
    yield "## Limitations"
    yield ""
    yield from _limits(registry, record, line)
    yield "## How to reproduce"
    yield ""
    yield from _reproduce(line)


def _data(registry: Registry, line: Sequence[Known]) -> Iterator[str]:
    stages = [r for r in line if _sources(r)]
    if not stages:
        yield f"Sources: {NOT_RECORDED}."
        yield ""
    for record in reversed(stages):
        yield f"### {escape(record.name)} ({escape(record.entry.kind)})"
        yield ""
        yield "| source | package | files | licence |"
        yield "|---|---|---|---|"
        for source in _sources(record):
            files = f"{source['count']:,}" if source.get("count") else NOT_RECORDED
            yield (
                f"| {escape(source['spec'])} | {escape(source.get('package') or 'local')} | {files}"
                f" | {escape(source.get('licence') or NOT_RECORDED)} |"
            )
        yield ""
        if "corpus" in record.entry.leaves:
            yield from _funnel(record)
        else:
            yield from _counts(record)
    for record, read in _outside_models(registry, line):
        id = (read["id"] or NOT_RECORDED)[:SHORT]
        yield (
            f"{escape(record.name)} begins with a model from outside, {escape(read['name'])}"
            f" (id `{id}`); what it was trained on: {NOT_RECORDED}."
        )
        yield ""


def _funnel(record: Known) -> Iterator[str]:
    try:
        if record.state == "gone":
            raise InputError("gone")
        funnel = Funnel.load(record.place / FUNNEL)
    except InputError:
        yield f"What each step removed: {NOT_RECORDED} (the prepared folder is gone)."
        yield ""
        return
    yield "| step | documents left | MB | removed |"
    yield "|---|---|---|---|"
    for step in funnel.steps:
        taken = {**step["removed"], **step.get("replaced", {}), **step.get("cut", {})}
        why = ", ".join(f"{n:,} {escape(reason)}" for reason, n in taken.items() if n)
        yield (
            f"| {escape(step['step'])} | {step['documents']:,} | {step['bytes'] / 1e6:,.2f}"
            f" | {why or 'nothing'} |"
        )
    yield ""


def _counts(record: Known) -> Iterator[str]:
    result = record.entry.result or {}
    names = ("read", "conversations", "pairs", "comparisons", "prompts", "heldout")
    told = [f"{result[n]:,} {n}" for n in names if isinstance(result.get(n), int)]
    counts = result.get("counts")
    if isinstance(counts, Mapping):
        told += [f"{n:,} {escape(why)}" for why, n in counts.items() if isinstance(n, int)]
    yield f"Rows: {', '.join(told) or NOT_RECORDED}."
    yield ""


def _procedure(registry: Registry, line: Sequence[Known]) -> Iterator[str]:
    for record in reversed(line):
        made, entry = record.entry.made, record.entry
        if "scores" in entry.leaves or "corpus" in entry.leaves:
            continue
        yield f"### {escape(record.name)} ({escape(entry.kind)})"
        yield ""
        took = seconds_text(entry.seconds) if entry.seconds is not None else NOT_RECORDED
        yield f"- finished: {made.finished if made else NOT_RECORDED}, took {took}"
        options = ", ".join(code_span(f"{k} = {v}") for k, v in entry.options.items())
        yield f"- options (others have their defaults): {options or 'none'}"
        for key, read, maker in registry.parents(record):
            name = maker.name if maker else read["name"]
            yield f"- {escape(key)}: {escape(name)}, id `{(read['id'] or NOT_RECORDED)[:SHORT]}`"
        if entry.kind in TRAININGS:
            found = {k: v for k, v in scores(entry).items() if k in ("steps", "tokens", "loss")}
            told = ", ".join(f"{k} {figure(v)}" for k, v in found.items())
            yield f"- result: {told or NOT_RECORDED}"
        machine = made.machine if made else {}
        told = ", ".join(f"{k} {v}" for k, v in machine.items() if v is not None)
        yield f"- machine: {escape(told) if told else NOT_RECORDED}"
        code = ", ".join(f"{k} {v}" for k, v in (made.code if made else {}).items())
        yield f"- code: {escape(code) if code else NOT_RECORDED}"
        yield ""


def _measured(registry: Registry, record: Known) -> Iterator[tuple[Known, dict[str, float]]]:
    """The stages that measured this model, each with its figures."""
    for made in registry.records:
        if made.ids.keys() != {"scores"} or record.model not in set(made.read()):
            continue
        found, models = scores(made.entry), (made.entry.result or {}).get("models")
        if isinstance(models, Mapping):  # of several, only this one's
            reads = made.entry.made.reads.get("model", []) if made.entry.made else []
            own = {read["name"] for read in reads if read["id"] == record.model}
            others = tuple(f"models.{name}." for name in models if name not in own)
            found = {k: v for k, v in found.items() if not k.startswith(others)}
            mine = tuple(f"models.{name}." for name in own)
            found = {k[len(m) :] if (m := _start(k, mine)) else k: v for k, v in found.items()}
        if found:
            yield made, found


def _start(key: str, starts: Sequence[str]) -> str:
    return next((start for start in starts if key.startswith(start)), "")


def _evaluation(registry: Registry, record: Known, kind: str, wanted: bool) -> Iterator[str]:
    any_found = False
    for made, found in _measured(registry, record):
        if (made.entry.kind == kind) is not wanted:
            continue
        any_found = True
        yield f"{escape(made.name)}, on {escape(_data_of(made))}:"
        yield ""
        yield "| figure | value | interval or standard error |"
        yield "|---|---|---|"
        for key, value in _figures(found).items():
            its = [f"{b[len(key) + 1 :]} {figure(found[b])}" for b in found if _bounds(b, key)]
            told = ", ".join(sorted(its)) or NOT_RECORDED
            yield f"| {escape(key)} | {figure(value)} | {escape(told)} |"
        yield ""
        counts = [f"{escape(k)} {v:,}" for k, v in found.items() if isinstance(v, int)]
        if counts:
            yield f"Counts and options of this measurement: {', '.join(counts)}."
            yield ""
    if not any_found:
        yield f"{'Safety' if wanted else 'Evaluation'}: {NOT_RECORDED}."
        yield ""


def _figures(found: Mapping[str, float]) -> dict[str, float]:
    """The measurements, without counts (whole numbers) and bounds of other figures."""
    measured = {k: v for k, v in found.items() if isinstance(v, float)}
    return {k: v for k, v in measured.items() if not any(_bounds(k, key) for key in measured)}


def _bounds(bound: str, key: str) -> bool:
    """Whether a figure is an interval or an error of another: accuracy_error, accuracy.low."""
    last = bound.rpartition(".")[2].rpartition("_")[2]
    return last in ERRORS and bound.startswith((f"{key}_", f"{key}."))


def _data_of(made: Known) -> str:
    reads = made.entry.made.reads.get("data", []) if made.entry.made else []
    return ", ".join(read["name"] for read in reads) or NOT_RECORDED


def _limits(registry: Registry, record: Known, line: Sequence[Known]) -> Iterator[str]:
    told = [f"Known limitations: {NOT_RECORDED}."]
    tokens = [scores(r.entry).get("tokens") for r in line if r.entry.kind == "pretrain"]
    if tokens and tokens[0]:
        told.append(f"It was pretrained on {int(tokens[0]):,} tokens.")
    if not any(r.entry.kind in ("sft", "dpo", "ppo", "grpo") for r in line):
        if not list(_outside_models(registry, line)):
            told.append("It was not tuned to follow instructions: it continues text.")
    if not any(made.entry.kind == SAFETY for made, _ in _measured(registry, record)):
        told.append("No safety test of it is recorded.")
    gone = [r.name for r in line if r.state != HERE]
    if gone:
        told.append(f"No longer as they were made: {escape(', '.join(gone))}.")
    yield from (f"- {text}" for text in told)
    yield ""


def _reproduce(line: Sequence[Known]) -> Iterator[str]:
    """The commands, and the recipe where there is one."""
    commands = dict.fromkeys(
        r.entry.made.command for r in reversed(line) if r.entry.made and r.entry.made.command
    )
    if not commands:
        yield f"Commands: {NOT_RECORDED}."
        return
    yield "```sh"
    yield from (" ".join(command.split()).replace("```", "'''") for command in commands)
    yield "```"
    yield ""
    versions = {json.dumps(r.entry.made.code) for r in line if r.entry.made}
    if len(versions) == 1:
        told = ", ".join(f"{k} {v}" for k, v in json.loads(versions.pop()).items())
        yield f"With fastlm {escape(told)}."
    else:
        yield "The stages ran on different versions of fastlm, named above."
    for record in line:
        recipe = record.place.parent / "recipe.json"
        if record.entry.made and record.entry.made.recipe and recipe.is_file():
            table = read_json(recipe)
            text = json.dumps(table, indent=1, ensure_ascii=False).replace("```", "'''")
            yield ""
            yield f"The recipe, {code_span(f'fastlm run {shlex.quote(recipe.name)}')}:"
            yield ""
            yield "```json"
            yield from text.splitlines()
            yield "```"
            return


def _sources(record: Known) -> Sequence[Mapping[str, Any]]:
    return record.entry.made.sources if record.entry.made else []


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
