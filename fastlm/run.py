"""A recipe as a chain of stages in a run folder: data, tokenizer, shards, pretrain, eval, quantize,
report.

A stage's fingerprint covers its part of the recipe, the fingerprint of the stages before and the
version of its code. What stages.json records with the same fingerprint and whose files are still
there is skipped; a stage that was cut off goes on where it was (pretrain) or starts again; one
whose inputs have changed starts from nothing. A training that then has to give way is not deleted:
it moves to previous/, with all that was made from it, its recipe and its record
(`fastlm.previous`). A make-like comparison of times was the alternative: it reruns everything after
a copy of the folder.
"""

import fcntl
import hashlib
import json
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastlm.data.content import load_seen, source_states
from fastlm.errors import InputError
from fastlm.files import make_folder, read_json, save_atomic
from fastlm.previous import finish_moving, set_aside
from fastlm.progress import silent
from fastlm.recipe import Recipe, load_recipe
from fastlm.typed import build, check

STAGES = "stages.json"
RECIPE = "recipe.json"
SOURCES = "sources.json"  # hashes of local sources (`fastlm.data.content`)
SUMMARY = "summary.json"
# Raised where a stage gives other results for the same recipe
VERSIONS = {
    "data": 4, "tokenizer": 1, "shards": 1, "pretrain": 2, "eval": 1, "quantize": 1, "report": 2,
}  # fmt: skip


@dataclass
class Context:
    """What a stage sees: the recipe, the folder, the results of the stages before."""

    recipe: Recipe
    out: Path
    cache: Path
    command: str
    track: Callable = silent
    on_event: Callable[[dict[str, Any]], None] | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """``inputs``: what it depends on besides the stages before; ``outputs``: files or folders it
    leaves in the run folder; ``run`` returns a JSON-serialisable ``result`` (what it has at least
    -> its type). A stage with ``scratch``
    goes on from there when it was cut off; once it is finished nobody misses it.
    """

    name: str
    inputs: Callable[[Context], Any]
    outputs: tuple[str, ...]
    run: Callable[[Context], dict[str, Any]]
    result: Mapping[str, Any]
    scratch: tuple[str, ...] = ()


def run_recipe(
    path: str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    cache: Path | None = None,
    until: str | None = None,
    command: str | None = None,
    track=silent,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Runs what has not been run of the recipe at ``path`` into ``out`` (default runs/NAME);
    -> summary.

    ``until`` names the last stage; ``on_event`` sees {"stage", "state": "set aside" | "skipped" |
    "started" | "done"} and the lines of metrics; "set aside" comes with "path", where the training
    now is that this recipe or its data no longer fit. InputError: the recipe, its data, a run
    folder that is in use or cannot be written.
    """
    from fastlm.data.packages import default_cache
    from fastlm.stages import CHAIN

    recipe = load_recipe(path, overrides)
    names = [stage.name for stage in CHAIN]
    if until is not None and until not in names:
        raise InputError(f"until: wanted one of {', '.join(names)}, got {until!r}")
    out = Path("runs") / recipe.name if out is None else Path(out)
    make_folder(out)
    chain = CHAIN[: names.index(until) + 1] if until else CHAIN
    context = Context(
        recipe, out, cache or default_cache(), command or f"fastlm run {path}", track, on_event
    )
    with _locked(out):
        _refuse_foreign(out, CHAIN)
        finish_moving(out)
        _sweep(out, CHAIN)
        record = _load_record(out, CHAIN)
        prints = _fingerprints(CHAIN, context)
        _keep_training(CHAIN, len(chain), prints, record, context)
        save_atomic(out / RECIPE, lambda p: _dump(p, asdict(recipe)))
        for stage in chain:
            _run_stage(stage, prints[stage.name], record, context)
    return context.results.get("report", {}) or dict(context.results)


def _keep_training(
    chain: Sequence[Stage],
    wanted: int,
    prints: dict[str, str],
    record: dict[str, Any],
    context: Context,
) -> None:
    """Where one of the first ``wanted`` stages starts from nothing and a training depends on it,
    all that the stages from there on have left is set aside.
    """
    out = context.out
    over = (i for i, s in enumerate(chain[:wanted]) if _starts_over(s, prints, record, out))
    stale = chain[next(over, len(chain)) :]
    held = [s for s in stale if any(_holds_something(out / n) for n in _kept_by(s))]
    if not held:
        return
    names = [name for s in stale for name in (*s.outputs, *s.scratch)]
    path = set_aside(out, names, copies=(STAGES, RECIPE))
    for s in stale:
        record.pop(s.name, None)
    _save_record(out, record)
    if context.on_event is not None:
        context.on_event({"stage": held[0].name, "state": "set aside", "path": str(path)})


def _starts_over(stage: Stage, prints: dict[str, str], record: dict[str, Any], out: Path) -> bool:
    done = record.get(stage.name, {})
    if done.get("fingerprint") != prints[stage.name]:
        return True
    lost = "outputs" in done and not _intact(out, stage, done)  # and nothing left to go on from
    return (
        lost and bool(stage.scratch) and not any(_holds_something(out / n) for n in stage.scratch)
    )


def _kept_by(stage: Stage) -> tuple[str, ...]:
    """What is worth keeping: of a stage that goes on from where it was, it took long."""
    return (*stage.outputs, *stage.scratch) if stage.scratch else ()


def _holds_something(path: Path) -> bool:
    """A folder with a model or a checkpoint; the metrics of a few steps are no loss."""
    return path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir())


def _run_stage(stage: Stage, fingerprint: str, record: dict[str, Any], context: Context) -> None:
    tell = context.on_event or (lambda event: None)
    done = record.get(stage.name, {})
    finished = done.get("fingerprint") == fingerprint and "outputs" in done
    if finished and _intact(context.out, stage, done):
        tell({"stage": stage.name, "state": "skipped"})
    else:
        if not stage.scratch or done.get("fingerprint") != fingerprint:
            _clear(context.out, stage.outputs + stage.scratch)
        record[stage.name] = {"fingerprint": fingerprint}  # begun: what it leaves belongs to this
        _save_record(context.out, record)
        tell({"stage": stage.name, "state": "started"})
        began = time.perf_counter()
        result = _writing(stage, context)
        seconds = max(time.perf_counter() - began, result.get("used_seconds", 0.0))
        done = {
            "fingerprint": fingerprint, "seconds": seconds, "result": result,
            "outputs": _sizes(context.out, stage.outputs),
        }  # fmt: skip
        record[stage.name] = done
        _save_record(context.out, record)
        tell({"stage": stage.name, "state": "done", "seconds": seconds})
    context.results[stage.name] = done["result"]
    context.seconds[stage.name] = done["seconds"]


def _writing(stage: Stage, context: Context) -> dict[str, Any]:
    """A full disk or a read-only folder is told in one line, whoever met it."""
    try:
        return stage.run(context)
    except OSError as e:
        where = e.filename or context.out
        raise InputError(f"{stage.name}: {where}: {e.strerror or e}") from e


def _fingerprints(chain: Sequence[Stage], context: Context) -> dict[str, str]:
    prints, upstream = {}, ""
    for stage in chain:
        parts = [stage.name, VERSIONS[stage.name], stage.inputs(context), upstream]
        text = json.dumps(parts, sort_keys=True, default=str)
        prints[stage.name] = upstream = hashlib.sha256(text.encode()).hexdigest()
    return prints


def local_sources(context: Context) -> list[Any]:
    """The content of the recipe's local sources; what was hashed is remembered in the folder."""
    path = context.out / SOURCES
    seen = load_seen(path)
    before = dict(seen)
    sources = context.recipe.data.sources
    states = source_states(sources, seen, cache=context.cache, track=context.track)
    if seen != before:
        save_atomic(path, lambda p: _dump(p, seen))
    return states


def _intact(out: Path, stage: Stage, done: dict[str, Any]) -> bool:
    """All that the stage left is there; what somebody has added to its folders is theirs."""
    sizes = _sizes(out, stage.outputs)
    return sizes is not None and done["outputs"].items() <= sizes.items()


def _sizes(out: Path, outputs: Sequence[str]) -> dict[str, int] | None:
    """Bytes of every file below the outputs; None where one is missing."""
    sizes = {}
    for output in outputs:
        path = out / output
        if not path.exists():
            return None
        for p in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if p.is_file():
                sizes[str(p.relative_to(out))] = p.stat().st_size
    return sizes


def _refuse_foreign(out: Path, chain: Sequence[Stage]) -> None:
    """A stage begins by clearing its names: they must not be somebody's own data or model."""
    names = [name for stage in chain for name in (*stage.outputs, *stage.scratch)]
    there = [name for name in names if (out / name).exists()]
    if there and not (out / STAGES).exists():
        raise InputError(
            f"{out}: wanted an empty folder or that of a run, got one with {there[0]!r}"
            f" and no {STAGES}"
        )


def _sweep(out: Path, chain: Sequence[Stage]) -> None:
    """Removes what a killed process was writing or deleting beside the names of a run."""
    names = [STAGES, RECIPE, SOURCES, *(n for s in chain for n in (*s.outputs, *s.scratch))]
    # .NAME.old of _clear, .NAME.RANDOM.part and .NAME.RANDOM.old of save_atomic
    ours = re.compile(rf"\.({'|'.join(map(re.escape, names))})(\.[0-9a-f]+)?\.(part|old)")
    for stray in [p for p in out.iterdir() if ours.fullmatch(p.name)]:
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


def _clear(out: Path, outputs: Sequence[str]) -> None:
    """Renamed away first: a deletion that is cut off leaves nothing under a final name."""
    try:
        for output in outputs:
            path = out / output
            old = path.with_name(f".{path.name}.old")
            if old.exists():
                shutil.rmtree(old)
            if path.is_dir():
                path.rename(old)
                shutil.rmtree(old)
            else:
                path.unlink(missing_ok=True)
    except OSError as e:
        raise InputError(f"{e.filename or out}: cannot be cleared: {e.strerror}") from e


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


@dataclass
class Entry:
    """What stages.json says of a stage; a stage that has only begun has only its fingerprint."""

    fingerprint: str
    seconds: float | None = None
    result: dict[str, Any] | None = None
    outputs: dict[str, int] | None = None


def _load_record(out: Path, chain: Sequence[Stage]) -> dict[str, Any]:
    path = out / STAGES
    if not path.exists():
        return {}
    results = {stage.name: stage.result for stage in chain}
    try:
        record = read_json(path)
        for name, entry in record.items():
            found = build(Entry, entry, f"{name}.")
            if found.outputs is not None:
                check(entry, {"seconds": float}, name)
                check(found.result, results.get(name, {}), f"{name}.result")
    except InputError as e:
        raise InputError(
            f"{path}: wanted the record of a run: {e}; delete it to start again"
        ) from None
    return record


def _save_record(out: Path, record: dict[str, Any]) -> None:
    save_atomic(out / STAGES, lambda p: _dump(p, record))


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", "utf-8")


def machine() -> dict[str, Any]:
    """What ran here, for a report."""
    from fastlm.backend import info

    have = info()
    keys = ("cpu", "cpu_isa", "threads", "device", "fastlm", "torch", "python")
    facts = {k: have.get(k) for k in keys}
    return {**facts, "commit": _commit() or "not a clone", "system": platform.platform()}


def _commit() -> str:
    """Return the commit of the clone this package runs from, "" where there is none or no git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
