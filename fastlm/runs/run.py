"""A recipe run in a folder: what is done is skipped, what was cut off continues, what changed is
run again.

Each stage has a folder of its name. Its fingerprint covers its options, the files they name, the
version of its code and the fingerprints of the stages it takes from: a change reaches what depends
on it and nothing else. A stage that stages.json records with the same fingerprint, and whose files
are still there, is skipped. One that was cut off continues (a training) or starts again. One that
has changed starts from nothing; if it is a training, what it had is not deleted but archived
together with all that was made from it (`fastlm.runs.previous`). A make-like comparison of times
was the alternative: it reruns everything after a copy of the folder.
"""

import fcntl
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastlm.checkpoint.run_folder import STAGES
from fastlm.data.content import Contents
from fastlm.errors import InputError
from fastlm.files import make_folder, read_json, save_atomic
from fastlm.progress import silent
from fastlm.runs.previous import finish_moving, set_aside
from fastlm.runs.recipe import Recipe, Step, is_outside, load_recipe
from fastlm.runs.report import REPORT, SUMMARY, Done, write_report
from fastlm.runs.stage import Input, Job
from fastlm.typed import build, check

RECIPE = "recipe.json"
SOURCES = "sources.json"  # hashes of local files (`fastlm.data.content`)
LAYOUT = 2  # of a run folder: one folder a stage
KEPT = (STAGES, RECIPE)
REPORT_VERSION = 3


@dataclass
class Entry:
    """What stages.json says of a stage; one that has only begun has neither result nor outputs."""

    kind: str
    fingerprint: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, list[str]] = field(default_factory=dict)
    leaves: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    result: dict[str, Any] | None = None
    outputs: dict[str, int] | None = None


@dataclass(frozen=True)
class Planned:
    """A step, and what a run would do with it: "skip", "continue" or "run", and why."""

    step: Step
    fingerprint: str
    do: str
    why: str


@dataclass
class _Run:
    """A run under way."""

    recipe: Recipe
    out: Path
    cache: Path
    track: Callable
    tell: Callable[[dict[str, Any]], None]
    record: dict[str, Entry]

    def job(self, step: Step) -> Job:
        inputs = {
            key: tuple(self.input(step, key, name) for name in names)
            for key, names in step.inputs.items()
        }
        return Job(step.name, self.out / step.name, inputs, self.cache, self.track, self.tell, True)

    def input(self, step: Step, key: str, name: str) -> Input:
        if is_outside(name):
            return Input(name, name)
        made = self.recipe.step(name)
        assert made is not None  # the recipe is checked
        kind = next(t for t in step.stage.reads[key].types if t in made.stage.leaves)
        return Input(name, str(self.out / name / made.stage.leaves[kind]))


def run_recipe(
    path: str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    cache: Path | None = None,
    until: str | None = None,
    dry_run: bool = False,
    command: str | None = None,
    track=silent,
    on_plan: Callable[[list[Planned]], None] | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run what has not been run of the recipe at ``path`` into ``out`` (default runs/NAME).

    Args:
        overrides: "NAME.key=value", as `fastlm.runs.recipe.load_recipe` takes them.
        until: the name of the last stage.
        dry_run: only plan.
        on_plan: sees what will be done with every stage, before the first one.
        on_event: sees {"stage", "state": "archived" | "skipped" | "started" | "done"} and the lines
            of metrics. "archived" comes with "path", where the training now is that the recipe or
            its data no longer fit.

    Returns:
        The content of summary.json, {} of a dry run.

    Raises:
        InputError: the recipe, its data, a run folder that is in use or cannot be written.
    """
    from fastlm.data.packages import default_cache

    recipe = load_recipe(path, overrides)
    names = [step.name for step in recipe.steps]
    if until is not None and until not in names:
        raise InputError(f"until: wanted one of {', '.join(names)}, got {until!r}")
    steps = recipe.steps[: names.index(until) + 1] if until else recipe.steps
    out = Path("runs") / recipe.name if out is None else Path(out)
    cache = cache or default_cache()
    if dry_run and not out.exists():
        prints = _fingerprints(recipe, Contents(out / SOURCES, cache=cache, track=track))
        _tell_plan(on_plan, [_planned(step, prints, {}, out) for step in steps])
        return {}
    make_folder(out)
    with _locked(out):
        _refuse_foreign(out, names)
        finish_moving(out)
        record = _load_record(out, recipe)
        run = _Run(recipe, out, cache, track, on_event or (lambda event: None), record)
        contents = Contents(out / SOURCES, cache=cache, track=track)
        prints = _fingerprints(recipe, contents)
        plan = [_planned(step, prints, record, out) for step in steps]
        _tell_plan(on_plan, plan)
        if dry_run:
            return {}
        if contents.changed or contents.used.keys() != contents.seen.keys():
            save_atomic(out / SOURCES, lambda p: _dump(p, contents.used))
        _sweep(out, names)
        _archive(run, plan)
        save_atomic(out / RECIPE, lambda p: _dump(p, recipe.table))
        for planned in plan:
            _run_step(run, planned)
        return _report(run, plan, command or f"fastlm run {path}")


def _tell_plan(on_plan: Callable[[list[Planned]], None] | None, plan: list[Planned]) -> None:
    if on_plan is not None:
        on_plan(plan)


def _fingerprints(recipe: Recipe, contents: Contents) -> dict[str, str]:
    """Stage name -> hash of all that decides what it leaves."""
    prints: dict[str, str] = {}
    for step in recipe.steps:
        upstream = {
            key: [_outside(name, contents) if is_outside(name) else prints[name] for name in names]
            for key, names in step.inputs.items()
        }
        stage = step.stage
        parts = [stage.kind, stage.version, stage.identity(), stage.contents(contents), upstream]
        text = json.dumps(parts, sort_keys=True, default=str)
        prints[step.name] = hashlib.sha256(text.encode()).hexdigest()
    return prints


def _outside(name: str, contents: Contents) -> Any:
    """The state of an input from outside the run: of a path its files, of a package its name."""
    scheme, colon, _ = name.partition(":")
    if colon and "/" not in scheme:
        return name
    path = Path(name)
    if not path.exists():
        raise InputError(f"{name}: wanted a path that exists")
    return contents.tree(path)


def _planned(
    step: Step, prints: Mapping[str, str], record: Mapping[str, Entry], out: Path
) -> Planned:
    fingerprint, done = prints[step.name], record.get(step.name)
    folder = out / step.name
    if done is None:
        do, why = "run", "new"
    elif done.fingerprint != fingerprint:
        do, why = "run", _change(step, done)
    elif done.outputs is None:
        held = any(_holds_something(folder / name) for name in step.stage.scratch)
        do, why = ("continue", "was cut off") if held else ("run", "was cut off")
    elif lost := _lost(folder, step, done):
        held = any(_holds_something(folder / name) for name in step.stage.scratch)
        do, why = ("continue" if held else "run"), f"{lost} is missing or changed"
    else:
        do, why = "skip", "done"
    return Planned(step, fingerprint, do, why)


def _change(step: Step, done: Entry) -> str:
    """What is new, for the user: the first option that differs, else what it reads."""
    if done.kind != step.stage.kind:
        return f"was {done.kind}"
    now = json.loads(json.dumps(step.stage.identity(), default=str))
    for key in [*now, *done.options]:
        if now.get(key) != done.options.get(key):
            return f"{key} was {done.options.get(key)!r:.40}, now {now.get(key)!r:.40}"
    if {k: list(v) for k, v in step.inputs.items()} != done.inputs:
        return "takes from other stages"
    return "what it reads has changed"


def _archive(run: _Run, plan: Sequence[Planned]) -> None:
    """Where one of the planned stages starts from nothing, and a training would be lost by it, all
    that it and the stages after it have left is moved to previous/.
    """
    changed = {p.step.name for p in plan if p.do == "run" and _is_other(p, run.record)}
    for step in run.recipe.steps:
        if any(name in changed for names in step.inputs.values() for name in names):
            changed.add(step.name)
    # one that was lost, but has not changed, leaves the same for those after it
    stale = changed | {p.step.name for p in plan if p.do == "run" and p.step.stage.scratch}
    held = [
        step.name
        for step in run.recipe.steps
        if step.name in stale
        and step.stage.scratch
        and _holds_something(run.out / step.name)
        and any(
            _holds_something(run.out / step.name / part)
            for part in (*step.stage.leaves.values(), *step.stage.scratch)
        )
    ]
    if not held:
        return
    names = [step.name for step in run.recipe.steps if step.name in stale]
    path = set_aside(run.out, [*names, REPORT, SUMMARY], copies=KEPT)
    for name in names:
        run.record.pop(name, None)
    _save_record(run.out, run.record)
    run.tell({"stage": held[0], "state": "archived", "path": str(path)})


def _is_other(planned: Planned, record: Mapping[str, Entry]) -> bool:
    done = record.get(planned.step.name)
    return done is not None and done.fingerprint != planned.fingerprint


def _holds_something(path: Path) -> bool:
    """A folder with a model or a checkpoint; the metrics of a few steps are no loss."""
    return path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir())


def _run_step(run: _Run, planned: Planned) -> None:
    step, stage, out = planned.step, planned.step.stage, run.out / planned.step.name
    done = run.record.get(step.name)
    if planned.do == "skip" and done is not None:
        run.tell({"stage": step.name, "state": "skipped"})
        return
    if done is None or done.fingerprint != planned.fingerprint or not stage.scratch:
        _clear(out)
    make_folder(out)
    entry = Entry(
        stage.kind, planned.fingerprint, json.loads(json.dumps(stage.identity(), default=str)),
        {key: list(names) for key, names in step.inputs.items()}, dict(stage.leaves),
    )  # fmt: skip
    run.record[step.name] = entry  # begun: what it leaves belongs to this fingerprint
    _save_record(run.out, run.record)
    run.tell({"stage": step.name, "state": "started"})
    began = time.perf_counter()
    job = run.job(step)
    try:
        result = stage.run(job)
    except OSError as e:  # a full disk or a read-only folder is told in one line
        raise InputError(f"{step.name}: {e.filename or out}: {e.strerror or e}") from e
    except InputError as e:
        raise InputError(f"{step.name}: {e}") from e
    entry.seconds = max(time.perf_counter() - began, result.get("used_seconds", 0.0))
    entry.result, entry.outputs = result, _sizes(out, stage.scratch)
    _save_record(run.out, run.record)
    run.tell({
        "stage": step.name, "state": "done", "seconds": entry.seconds,
        "told": stage.told(result, job),
    })  # fmt: skip


def _report(run: _Run, plan: Sequence[Planned], command: str) -> dict[str, Any]:
    """Write report.html and summary.json, unless they are there and nothing has changed."""
    prints = {p.step.name: p.fingerprint for p in plan}
    parts = [REPORT_VERSION, run.recipe.name, run.recipe.description, prints]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    old = run.record.get("report")
    names = (REPORT, SUMMARY)
    if (
        old is not None
        and old.fingerprint == fingerprint
        and all((run.out / name).is_file() for name in names)
    ):
        run.tell({"stage": "report", "state": "skipped"})
        return read_json(run.out / SUMMARY)
    began = time.perf_counter()
    done = []
    for planned in plan:
        entry = run.record[planned.step.name]
        assert entry.result is not None and entry.seconds is not None
        done.append(Done(planned.step, run.job(planned.step), entry.result, entry.seconds))
    summary = write_report(run.out, run.recipe, done, command)
    run.record["report"] = Entry("report", fingerprint)
    _save_record(run.out, run.record)
    seconds = time.perf_counter() - began
    run.tell(
        {"stage": "report", "state": "done", "seconds": seconds, "told": str(run.out / REPORT)}
    )
    return summary


def _lost(folder: Path, step: Step, done: Entry) -> str:
    """The first file of the stage that is gone or has another size; what somebody has added to its
    folder is theirs.
    """
    sizes = _sizes(folder, step.stage.scratch)
    changed = (n for n, size in (done.outputs or {}).items() if sizes.get(n) != size)
    return next(changed, "")


def _sizes(folder: Path, scratch: Sequence[str]) -> dict[str, int]:
    """Bytes of every file of a stage, but for its scratch."""
    return {
        str(p.relative_to(folder)): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.relative_to(folder).parts[0] not in scratch
    }


def _refuse_foreign(out: Path, names: Sequence[str]) -> None:
    """A stage begins by clearing its folder: it must not be somebody's own data or model."""
    if (out / STAGES).exists():
        return
    there = [name for name in (*names, REPORT, SUMMARY) if (out / name).exists()]
    if there:
        raise InputError(
            f"{out}: wanted an empty folder or that of a run, got one with {there[0]!r}"
            f" and no {STAGES}"
        )


def _sweep(out: Path, names: Sequence[str]) -> None:
    """Remove what a killed process was writing or deleting beside the names of a run."""
    ours = [STAGES, RECIPE, SOURCES, REPORT, SUMMARY, *names]
    # .NAME.old of _clear, .NAME.RANDOM.part and .NAME.RANDOM.old of save_atomic
    stray_name = re.compile(rf"\.({'|'.join(map(re.escape, ours))})(\.[0-9a-f]+)?\.(part|old)")
    for stray in [p for p in out.iterdir() if stray_name.fullmatch(p.name)]:
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Delete a stage's folder. It is renamed first: a deletion that is cut off leaves nothing under
    the final name.
    """
    old = folder.with_name(f".{folder.name}.old")
    try:
        if old.exists():
            shutil.rmtree(old)
        if folder.is_dir() and not folder.is_symlink():
            folder.rename(old)
            shutil.rmtree(old)
        else:
            folder.unlink(missing_ok=True)
    except OSError as e:
        raise InputError(f"{e.filename or folder}: cannot be cleared: {e.strerror}") from e


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One run at a time in a folder; the lock ends with the process."""
    lock = out / ".lock"
    if lock.exists() and not lock.is_file():  # a pipe would block
        raise InputError(f"{lock}: wanted a file, got something else")
    try:
        file = open(lock, "a")  # closed below
    except OSError as e:
        raise InputError(f"{out}: cannot be written: {e.strerror}") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another fastlm run is at work in this folder") from None
        except OSError:
            pass  # a file system without locks
        yield


def _load_record(out: Path, recipe: Recipe) -> dict[str, Entry]:
    path = out / STAGES
    if not path.exists():
        return {}
    try:
        table = read_json(path)
        if "layout" not in table and any(
            isinstance(v, Mapping) and "fingerprint" in v for v in table.values()
        ):
            raise InputError(
                f"{out}: is a run of before recipes were lists of stages; choose another folder"
                f" (fastlm run RECIPE --out NEW); its models stay readable (--model {out}/model)"
            )
        record = build(_Record, table)
    except InputError as e:
        if str(e).startswith(f"{out}: is a run of before"):
            raise
        raise _bad_record(path, e) from None
    if record.layout != LAYOUT:
        raise InputError(f"{path}: wanted layout {LAYOUT}, got {record.layout}")
    for name, entry in record.stages.items():
        step = recipe.step(name)
        if entry.outputs is None or step is None or step.stage.kind != entry.kind:
            continue
        try:
            check(asdict(entry), {"seconds": float}, name)
            check(entry.result, step.stage.result, f"{name}.result")
        except InputError as e:
            raise _bad_record(path, e) from None
    return record.stages


@dataclass
class _Record:
    layout: int
    stages: dict[str, Entry]


def _bad_record(path: Path, error: InputError) -> InputError:
    return InputError(f"{path}: wanted the record of a run: {error}; delete it to start again")


def _save_record(out: Path, record: Mapping[str, Entry]) -> None:
    stages = {
        name: {k: v for k, v in asdict(entry).items() if v is not None}
        for name, entry in record.items()
    }
    save_atomic(out / STAGES, lambda p: _dump(p, {"layout": LAYOUT, "stages": stages}))


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", "utf-8")
