"""Run a recipe in a folder: finished stages are skipped, interrupted ones continue, changed ones
run again (`fastlm.pipeline.execution_plan`).

Each stage has a folder of its own name. A training that is replaced is not deleted but archived,
together with everything made from it (`fastlm.pipeline.archive`). The alternative was to compare
file times, as make does: that reruns everything after the folder is copied.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import (
    leftovers,
    make_folder,
    read_json,
    remove,
    temporary_name,
    try_lock,
    write_json,
)
from fastlm.pipeline.archive import archive, finish_moving
from fastlm.pipeline.execution_plan import PlannedStage, fingerprints, make_plan
from fastlm.pipeline.provenance import describe, json_hash
from fastlm.pipeline.recipe import Kinds, Recipe, RecipeStep, is_outside, load_recipe
from fastlm.pipeline.record import StageRecord, file_sizes_of, load_record, new_record, save_record
from fastlm.pipeline.registry import index_run
from fastlm.pipeline.report import REPORT, SUMMARY, FinishedStage, write_report
from fastlm.pipeline.run_folder import STAGES
from fastlm.pipeline.stage import Input, StageContext
from fastlm.progress import silent
from fastlm.sources.input_digest import InputDigest
from fastlm.sources.remote import is_remote
from fastlm.torchrun import check_single_process

RECIPE = "recipe.json"
SOURCES = "sources.json"  # hashes of local files (`fastlm.sources.input_digest`)
REPORT_VERSION = 8


@dataclass
class _Run:
    """A run in progress."""

    recipe: Recipe
    out: Path
    cache: Path
    track: Callable
    emit: Callable[[dict[str, Any]], None]
    record: dict[str, StageRecord]
    input_digest: InputDigest
    command: str

    def context(self, step: RecipeStep) -> StageContext:
        inputs = {
            key: tuple(self.input(step, key, name) for name in names)
            for key, names in step.inputs.items()
        }
        return StageContext(
            step.name, self.out / step.name, inputs, self.cache, self.track, self.emit, True
        )

    def input(self, step: RecipeStep, key: str, name: str) -> Input:
        if is_outside(name):
            return Input(name, name)
        producer = self.recipe.step(name)
        assert producer is not None  # the recipe is checked
        outputs = producer.stage.outputs
        kind = next(t for t in step.stage.inputs[key].types if t in outputs)
        return Input(name, str(self.out / name / outputs[kind]))

    def id_of(self, step: RecipeStep, key: str, input: Input) -> str | None:
        """Return the recorded content id of an input that a stage of this run made."""
        entry = None if is_outside(input.name) else self.record.get(input.name)
        ids = entry.provenance.ids if entry and entry.provenance else {}
        return next((ids[t] for t in step.stage.inputs[key].types if t in ids), None)

    def save(self) -> None:
        save_record(self.out, self.record, self.recipe)


def run_recipe(
    path: str | Path,
    out: str | Path | None = None,
    *,
    kinds: Kinds,
    overrides: Sequence[str] = (),
    cache: Path | None = None,
    until: str | None = None,
    dry_run: bool = False,
    command: str | None = None,
    track=silent,
    on_plan: Callable[[list[PlannedStage]], None] | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run those stages of the recipe at ``path`` that have not run yet into ``out`` (default
    runs/NAME).

    Args:
        kinds: the stages that a recipe may have.
        overrides: "NAME.key=value", as `fastlm.pipeline.recipe.load_recipe` accepts them.
        until: the name of the last stage.
        dry_run: only plan.
        on_plan: receives what will be done with every stage, before the first one runs.
        on_event: receives {"stage", "state": "archived" | "skipped" | "started" | "done"} and the
            lines of metrics. "archived" comes with "path", the new place of the training, which
            no longer fits the recipe or its data.

    Returns:
        The content of summary.json, {} for a dry run.

    Raises:
        InputError: the recipe, its data, a run folder that is in use or cannot be written.
    """
    from fastlm.sources.packages import default_cache

    check_single_process("run", "start its trainings one by one")
    recipe = load_recipe(path, overrides, kinds=kinds)
    names = [step.name for step in recipe.steps]
    if until is not None and until not in names:
        raise InputError(f"until: expected one of {', '.join(names)}, got {until!r}")
    selected = names[: names.index(until) + 1] if until else names
    out = Path("runs") / recipe.name if out is None else Path(out)
    if is_remote(out):
        raise InputError(f"out: expected a folder of this machine, got {out}")
    cache = cache or default_cache()
    report_plan = on_plan or (lambda plan: None)
    input_digest = InputDigest(out / SOURCES, cache=cache, track=track)
    if dry_run and not out.exists():
        prints = fingerprints(recipe, input_digest, may_miss=True)
        report_plan(make_plan(recipe, selected, prints, {}, out))
        return {}
    make_folder(out)
    with locked(out):
        finish_moving(out)
        record = load_record(out, recipe)
        _check_folder(out, names, record)
        emit = on_event or (lambda event: None)
        command = command or f"fastlm run {path}"
        run = _Run(recipe, out, cache, track, emit, record, input_digest, command)
        prints = fingerprints(recipe, input_digest, may_miss=dry_run)
        plan = make_plan(recipe, selected, prints, record, out)
        report_plan(plan)
        if dry_run:
            return {}
        if (
            input_digest.changed
            or input_digest.current_records.keys() != input_digest.records.keys()
        ):
            write_json(out / SOURCES, input_digest.current_records)
        _remove_leftovers(out, names)
        _archive_stale(run, plan)
        write_json(out / RECIPE, recipe.table)
        for planned in plan:
            if planned.action == "skip":
                run.emit({"stage": planned.step.name, "state": "skipped"})
            elif planned.action not in ("archive", "later"):
                _run_step(run, planned)
        summary = _report(run, prints, until)
    index_run(out)
    return summary


def _archive_stale(run: _Run, plan: Sequence[PlannedStage]) -> None:
    """Archive stale stages if a training is among them. Otherwise record that they are stale: a
    later start must not skip stages that depend on a stage that runs again.
    """
    stale = [planned.step.name for planned in plan if planned.stale]
    trainings = [planned.step.name for planned in plan if planned.training]
    if trainings:
        path = archive(run.out, [*stale, REPORT, SUMMARY], copies=(STAGES, RECIPE))
        for name in stale:
            run.record.pop(name, None)
        run.emit({"stage": trainings[0], "state": "archived", "path": str(path)})
    for name in stale:
        if entry := run.record.get(name):
            entry.file_sizes = entry.result = entry.provenance = None
    if stale:
        run.save()


def _run_step(run: _Run, planned: PlannedStage) -> None:
    step, stage, out = planned.step, planned.step.stage, run.out / planned.step.name
    if planned.action == "run":
        _clear(out)
    make_folder(out)
    entry = new_record(stage, planned.fingerprint, step.inputs)
    run.record[step.name] = entry  # its output belongs to this fingerprint
    run.save()
    run.emit({"stage": step.name, "state": "started"})
    start = time.perf_counter()
    ctx = run.context(step)
    try:
        result = stage.run(ctx)
    except OSError as e:  # report a full disk or a read-only folder in one line
        raise InputError(f"{step.name}: {e.filename or out}: {e.strerror or e}") from e
    except InputError as e:
        raise InputError(f"{step.name}: {e}") from e
    entry.seconds = max(time.perf_counter() - start, result.get("used_seconds", 0.0))
    entry.result, entry.file_sizes = result, file_sizes_of(out, stage.checkpoints)
    entry.provenance = describe(
        stage, ctx, entry.file_sizes, run.input_digest, recorded_id=partial(run.id_of, step),
        recipe=json_hash(run.recipe.table), command=run.command,
    )  # fmt: skip
    run.save()
    run.emit({
        "stage": step.name, "state": "done", "seconds": entry.seconds,
        "summary": stage.summary(result, ctx),
    })  # fmt: skip


def _report(run: _Run, prints: Mapping[str, str], until: str | None) -> dict[str, Any]:
    """Write report.html and summary.json of all finished stages, unless they exist and nothing has
    changed.
    """
    finished = [
        (step, entry)
        for step in run.recipe.steps
        if (entry := run.record.get(step.name))
        and entry.fingerprint == prints[step.name]
        and entry.file_sizes is not None
    ]
    entries = {step.name: asdict(entry) for step, entry in finished}
    missing = [step.name for step in run.recipe.steps if step.name not in entries]
    until = until if missing else None  # the page of a complete run does not name it
    parts = [REPORT_VERSION, run.recipe.name, run.recipe.description, entries, missing, until]
    fingerprint = json_hash(parts)
    previous = run.record.get("report")
    written = all((run.out / name).is_file() for name in (REPORT, SUMMARY))
    if previous is not None and previous.fingerprint == fingerprint and written:
        run.emit({"stage": "report", "state": "skipped"})
        return read_json(run.out / SUMMARY)
    start = time.perf_counter()
    done = [
        FinishedStage(step, run.context(step), entry.result or {}, entry.seconds or 0.0)
        for step, entry in finished
    ]
    summary = write_report(run.out, run.recipe, done, run.command, until)
    run.record["report"] = StageRecord("report", fingerprint)
    run.save()
    run.emit({
        "stage": "report", "state": "done", "seconds": time.perf_counter() - start,
        "summary": str(run.out / REPORT),
    })  # fmt: skip
    return summary


def _check_folder(out: Path, names: Sequence[str], record: dict[str, StageRecord]) -> None:
    """Refuse folders that are not this run's. A stage begins by clearing its folder, which must not
    hold the user's own data or model.
    """
    for name in (*(n for n in names if n not in record), *(() if record else (REPORT, SUMMARY))):
        path = out / name
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(
                f"{out}: expected a folder in which {name!r} is free, or a run that made it; got"
                " one with something of that name: rename it, or give the stage another name"
            )


def _remove_leftovers(out: Path, names: Sequence[str]) -> None:
    """Remove the temporary files that a killed process left next to the files of a run."""
    for name in (STAGES, RECIPE, SOURCES, REPORT, SUMMARY, *names):
        for stray in leftovers(out / name):
            remove(stray)


def _clear(folder: Path) -> None:
    """Delete a stage's folder. It is renamed first, so that an interrupted deletion leaves nothing
    under the final name.
    """
    old = temporary_name(folder)
    try:
        if os.path.lexists(folder):
            folder.rename(old)
    except OSError as e:
        raise InputError(f"{e.filename or folder}: cannot be cleared: {e.strerror}") from e
    remove(old)
    if os.path.lexists(old):
        raise InputError(f"{folder}: cannot be cleared: {old} is left")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Allow one run at a time in a folder. The lock ends with the process."""
    lock = out / ".lock"
    if lock.exists() and not lock.is_file():  # a pipe would block
        raise InputError(f"{lock}: expected a file, got something else")
    try:
        file = open(lock, "a")  # closed below
    except OSError as e:
        raise InputError(f"{out}: cannot be written: {e.strerror}") from e
    with file:
        try_lock(file, f"{out}: another fastlm run is at work in this folder")
        yield
