"""Read and write the records of stages: stages.json of a run, record.json of a stage that ran
alone.

Every figure of a result but times is a score. One of them represents the result (`headline`).
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

from fastlm.errors import InputError
from fastlm.files import write_json
from fastlm.pipeline.provenance import Provenance, describe, output_files
from fastlm.pipeline.recipe import Recipe
from fastlm.pipeline.run_folder import STAGES
from fastlm.pipeline.stage import Stage, StageContext, options_of
from fastlm.pipeline.text import figure
from fastlm.schema import Count, Finite, RelativePath, read_document, validate
from fastlm.sources.input_digest import InputDigest

RECORD = "record.json"  # in the folder of a stage that ran alone
LAYOUT = 2  # of a run folder: one folder per stage
# the first of these in a result represents it
HEADLINES = (
    "bits_per_byte", "val_accuracy", "accuracy", "win_rate", "mean_reward", "reward", "val_score",
    "score", "val_loss", "best_loss", "loss", "quality_loss", "kl", "bytes", "train_tokens",
    "train_bytes", "vocab_size",
)  # fmt: skip
# words in the names of times and speeds, which are no scores
TIMES = ("seconds", "per_second", "load")
DEPTH = 4


@dataclass
class StageRecord:
    """The record of one stage. A stage that has begun, or has to run again, has neither result nor
    file sizes.

    version: the stage's.
    options: those that differ from their defaults.
    outputs: as in `Stage.outputs`.
    file_sizes: bytes of every file that the stage wrote.
    """

    kind: str
    fingerprint: str
    version: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, list[str]] = field(default_factory=dict)
    outputs: dict[str, RelativePath] = field(default_factory=dict)
    seconds: Finite | None = None
    result: dict[str, Any] | None = None
    file_sizes: dict[RelativePath, Count] | None = None
    provenance: Provenance | None = None


@dataclass
class StageRecords:
    """The content of stages.json and record.json. In record.json the only stage is ``.``, the
    folder.
    """

    layout: Literal[2]
    stages: dict[RelativePath, StageRecord]


def new_record(stage: Stage, fingerprint: str, inputs: Mapping[str, Sequence[str]]) -> StageRecord:
    """Return the record of a stage that has just begun."""
    names = {key: list(sources) for key, sources in inputs.items()}
    outputs = dict(stage.outputs)
    return StageRecord(
        stage.kind, fingerprint, stage.version, changed_options(stage), names, outputs
    )


def file_sizes_of(folder: Path, checkpoints: Sequence[str]) -> dict[str, int]:
    """Return the bytes of every file of a stage, except its checkpoints."""
    return {
        str(p.relative_to(folder)): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.relative_to(folder).parts[0] not in checkpoints
    }


def changed_options(stage: Stage) -> dict[str, Any]:
    """Return the options that decide the result and differ from their defaults, as JSON values: an
    option that a later fastlm adds changes no fingerprint.
    """
    defaults = {option.name: option.default for option in options_of(type(stage))}
    values = {k: v for k, v in stage.identity().items() if v != defaults.get(k, ...)}
    return json.loads(json.dumps(values, default=str))


def load_record(out: Path, recipe: Recipe) -> dict[str, StageRecord]:
    """Read the record of a run folder, {} if there is none. InputError: damaged."""
    path = out / STAGES
    if not path.exists():
        return {}
    try:
        record = read_document(path, StageRecords, extra="forbid")
        for name, entry in record.stages.items():
            step = recipe.step(name)
            if entry.file_sizes is None or step is None or step.stage.kind != entry.kind:
                continue
            if entry.seconds is None:
                raise InputError(f"{name}.seconds: expected a number, got nothing")
            for key, hint in step.stage.result.items():
                validate((entry.result or {}).get(key), hint, f"{name}.result.{key}")
    except InputError as e:
        raise InputError(
            f"{e}: expected the record of a run; choose another folder with --out, or delete"
            f" {out} to start again"
        ) from None
    return record.stages


def save_record(out: Path, record: Mapping[str, StageRecord], recipe: Recipe) -> None:
    """Write the record, in the order of the recipe; stages that it no longer has come first."""
    names = [step.name for step in recipe.steps if step.name in record]
    order = [*(name for name in record if name not in names), *names]
    stages = {name: table_of(record[name]) for name in order}
    write_json(out / STAGES, {"layout": LAYOUT, "stages": stages})


def save_stage_record(out: Path, entry: StageRecord) -> None:
    """Write the record of a stage that ran alone into its folder."""
    write_json(out / RECORD, {"layout": LAYOUT, "stages": {".": table_of(entry)}})


def record_stage(
    stage: Stage,
    ctx: StageContext,
    result: dict[str, Any],
    seconds: float,
    *,
    command: str | None = None,
) -> None:
    """Write the record of a stage that has just run in a folder of its own, for `fastlm runs`.
    ``seconds``: the time since it began.
    """
    inputs = {key: [input.source for input in names] for key, names in ctx.inputs.items()}
    entry = new_record(stage, "", inputs)
    input_digest = InputDigest(ctx.out / "sources.json", cache=ctx.cache_dir)
    # a second earlier: file systems keep times less exactly
    entry.file_sizes = output_files(stage.outputs, ctx.out, time.time() - seconds - 1)
    entry.seconds, entry.result = seconds, result
    entry.provenance = describe(stage, ctx, entry.file_sizes, input_digest, command=command)
    save_stage_record(ctx.out, entry)


def table_of(entry: StageRecord) -> dict[str, Any]:
    return {k: v for k, v in asdict(entry).items() if v is not None}


def models_in(entry: StageRecord) -> Mapping[str, Any]:
    """Return the models that a stage measured -> their results."""
    models = (entry.result or {}).get("models")
    return models if isinstance(models, Mapping) else {}


def scores(entry: StageRecord, models: Iterable[str] | None = None) -> dict[str, float]:
    """Return every finite figure of a result, without times. Names of nested tables are joined by
    dots. ``models``: return only the results of these, without their names.
    """
    result = entry.result or {}
    if models is not None and (models_results := models_in(entry)):
        result = {key: value for key, value in result.items() if key != "models"}
        for name in models:
            result |= table if isinstance(table := models_results.get(name), Mapping) else {}
    return dict(_figures(result, "", DEPTH))


def _figures(table: Mapping[str, Any], before: str, depth: int) -> Iterator[tuple[str, float]]:
    for key, value in table.items():
        if any(word in str(key) for word in TIMES):
            continue
        if isinstance(value, Mapping) and depth:
            yield from _figures(value, f"{before}{key}.", depth - 1)
        elif is_figure(value):
            yield f"{before}{key}", value


def is_figure(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number that a float can hold."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def headline(entry: StageRecord) -> str:
    """Return the figure that represents a result, as text: "loss 4.321"; "" if there is none."""
    figures = [(key.split("."), value) for key, value in scores(entry).items()]
    for name in HEADLINES:
        matches = [(path, value) for path, value in figures if path[-1] == name]
        if matches:
            names = [
                f"{path[-2]} {name}" if path[0] == "models" else name for path, _ in matches[:3]
            ]
            return ", ".join(f"{n} {figure(value)}" for n, (_, value) in zip(names, matches))
    return ""
