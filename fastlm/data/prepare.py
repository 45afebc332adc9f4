"""Turn sources into clean text: gather, extract, cut long documents, drop duplicates, apply quality
rules, scrub, drop repeated paragraphs, split.

The work is planned first (`fastlm.data.plan`), then done in units that may run anywhere
(`fastlm.data.steps`, `fastlm.pipeline.units`). The same plan gives the same bytes for every number
of workers, on one machine or a cluster, and after any crash: a restart does only the units that are
missing. Paragraphs are de-duplicated across the whole corpus, so the held-out part shares no
paragraph of MIN_PARAGRAPH characters or more with the training part.

While a corpus is built, everything is in its folder ``work``; an earlier corpus in the same place
stays valid until the new one is complete. Every step counts what it removed and why (``Funnel``).
"""

import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from fastlm.data import matching, steps
from fastlm.data.corpus import PLAN, REMOVED, SPLITS, SUFFIX, UNITS, part_name, read_units
from fastlm.data.options import WORK, DataOptions, parse_size
from fastlm.data.plan import make_plan, options_of_plan
from fastlm.data.unit_files import REMOVED as REMOVED_ROWS
from fastlm.data.unit_files import Counts
from fastlm.errors import InputError
from fastlm.files import json_text, remove, write_error, write_json
from fastlm.pipeline.executors import shared_pool
from fastlm.pipeline.funnel import FUNNEL, Funnel, StepCounts
from fastlm.pipeline.units import (
    BuildError,
    Work,
    file_sha256,
    read_state,
    run_step,
    step_name,
    write_durably,
)
from fastlm.progress import silent
from fastlm.sources.remote import (
    StoreError,
    copy_objects,
    delete_objects,
    is_file,
    list_sizes,
    write_object,
)

STEPS = (
    "gather", "consent", "extract", "exact duplicates", "language", "quality rules", "quality",
    "toxicity", "contamination", "scrub", "near duplicates", "repeated paragraphs", "train",
    "heldout",
)  # fmt: skip
# Steps that are shown if an option makes them remove documents
LIMITS = {
    "language": "languages", "quality": "min_quality_bucket", "toxicity": "max_toxicity",
    "contamination": "decontaminate",
}  # fmt: skip
EXTRA_COUNTS = {
    "replaced": "scrub",
    "cut": "extract",
    "fallbacks": "extract",
}  # name -> the step that shows it


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    options: DataOptions | None = None,
    cache: Path,
    track=silent,
    forgotten: Collection[str] = (),
) -> Funnel:
    """Write clean text of ``sources`` to ``out``, as `fastlm.data.corpus` describes it.

    A line is {"text", "id", "source", "meta"}; ``read_documents`` reads the lines. A bad line among
    good ones, and a bad file inside a folder or a package, are counted, reported in the funnel and
    skipped. A bad source or file that the user named raises an error. Documents with a key
    (`fastlm.data.forget_log`) in ``forgotten`` are left out and counted.

    A build that was killed, or stopped by a full disk, continues when it is called again with the
    same sources and options. Bad input leaves no new folder behind.

    InputError: no sources, bad options, nothing left after cleaning, ``out`` not writable, disk
    full, an unfinished build of another plan in ``out``.
    """
    options = options or DataOptions()
    options.check()
    if isinstance(sources, str) or not sources:
        raise InputError(f"sources: expected a list of at least one source, got {sources!r}")
    out = Path(out)
    work = Work(out / WORK)
    begun = is_file(work.folder / PLAN)
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        # before the downloads, so that a read-only folder is reported at once
        if work.is_remote:
            write_object(work.folder / BEGUN, b"")
        else:
            work.folder.mkdir(parents=True, exist_ok=True)
        with shared_pool():
            plan = make_plan(work, sources, options, cache=cache, forgotten=forgotten, track=track)
            if not begun and (funnel := _finished(out, plan)) is not None:
                work.delete()
                return funnel
            work.begin(plan)
            if not is_file(work.folder / PUBLISHING):
                _build(work, options, track)
        return _publish(work, out)
    except BaseException as error:
        can_continue = isinstance(error, BuildError | StoreError)
        if isinstance(error, InputError) and not can_continue and not begun:
            work.delete()
        for folder in (work.folder, *new_folders):
            with suppress(OSError):  # ignore folders that are not empty
                folder.rmdir()
        if isinstance(error, OSError):  # a write error: read errors are already InputError
            raise write_error(out, error) from None
        raise
    finally:
        work.close(options.executor)


BEGUN = "begun"  # an empty object


def _finished(out: Path, plan: Mapping[str, Any]) -> Funnel | None:
    """Return the funnel of the corpus in ``out`` if it has this plan and all its parts."""
    try:
        work = Work(out)
        if work.plan != plan:
            return None
        if work.is_remote:  # what is there is complete
            records = {record["part"] for record in read_units(out)}
            return Funnel.load(out) if records <= list_sizes(out).keys() else None
        for record in read_units(out):
            if file_sha256(out / record["part"]) != record["sha256"]:
                return None
        return Funnel.load(out)
    except StoreError:
        raise
    except (InputError, OSError):
        return None


def _build(work: Work, options: DataOptions, track) -> None:
    """Do all steps. Each begins when the one before is complete."""
    memory = parse_size(options.memory, "memory")

    def run(function, units: Sequence[int], description: str) -> None:
        run_step(
            work, function, units, executor=options.executor, workers=options.workers,
            track=track, description=description,
        )  # fmt: skip

    count = len(work.plan["units"])
    work.begin_step("read", units=count)
    inputs, last = _read(work, options, run)
    counts = [work.counts("read", unit) for unit in range(inputs)]

    def ranges(records: str) -> int:
        return matching.ranges_for(sum(c[records] for c in counts), memory, options.workers)

    def compare(function, units: int, description: str, **parameters: Any) -> None:
        units = work.begin_step(step_name(function), units=units, **parameters)["units"]
        run(function, range(units), description)

    compare(matching.exact, ranges("documents"), "comparing texts", inputs=inputs, last=last)
    if options.near_duplicates:
        compare(matching.groups, ranges("bands"), "comparing signatures")
        compare(matching.components, 1, "connecting documents")
        size = 8 * work.counts("components", 0)["shingles"] * options.workers
        compare(matching.shingles, inputs, "reading candidates")
        compare(matching.near, max(1, -(-size // memory)), "comparing documents")
    compare(matching.paragraphs, ranges("paragraphs"), "comparing paragraphs")
    outputs = _outputs(work)
    work.begin_step("apply", units=inputs)
    run(steps.apply, outputs, "removing duplicates")
    if not any(work.counts("apply", unit)["remaining"].get(REMAINING) for unit in outputs):
        removed = {s["step"]: s["removed"] for s in _funnel(work).steps if s["removed"]}
        names = ", ".join(name for name, _ in work.plan["sources"])
        raise InputError(
            f"sources {names}: expected text, nothing is left after cleaning: {removed}"
        )
    heldout = steps.choose_heldout(work, outputs, options)
    work.begin_step("write", units=inputs, heldout=heldout)
    run(steps.write, outputs, "writing")


REMAINING = "repeated paragraphs documents"  # the count of documents that remain


def _outputs(work: Work) -> range:
    """Return the units of input whose documents are written: not those of earlier builds."""
    return range(work.plan["earlier_units"], work.parameters("exact")["inputs"])


def _read(work: Work, options: DataOptions, run) -> tuple[int, int | None]:
    """Do the units of input, as many as ``max_bytes`` needs. Return (their number, how many
    documents of the last one take part; None: all).
    """
    count = len(work.plan["units"])
    if options.max_bytes is None:
        run(steps.read, range(count), "cleaning")
        return count, None
    total, first = 0, work.plan["earlier_units"]
    run(steps.read, range(first), "reading earlier corpora")
    for unit in range(first, count):
        if work.marker("read", unit) is None:
            run(steps.read, range(unit, min(count, unit + 2 * options.workers)), "cleaning")
        size = work.counts("read", unit)["passed_bytes"]
        if total + size >= options.max_bytes:
            return unit + 1, steps.documents_within(work, unit, options.max_bytes - total)
        total += size
    return count, None


def _funnel(work: Work) -> Funnel:
    """Return the sum of what all units counted."""
    counts, plan = Counts(), work.plan
    counts.messages += plan["messages"]
    counts.removed["gather"] = Counter(plan["skipped"])
    if plan["options"]["scrub"]:
        counts.add("replaced", dict.fromkeys(plan["options"]["scrub"], 0))
    for step in ("read", "apply", "write"):
        for unit in _outputs(work):
            if (marker := work.marker(step, unit)) is not None:
                counts.update(marker["counts"])
    funnel = Funnel()
    options = options_of_plan(plan)
    for step in STEPS:
        limit = LIMITS.get(step)
        if limit and getattr(options, limit) == getattr(DataOptions, limit):
            continue
        entry: dict[str, Any] = {"step": step}
        for key in ("documents", "bytes"):
            entry[key] = counts.remaining[f"{step} {key}"]
        removed = counts.removed.get(step, {})
        entry["removed"] = dict(sorted((k, n) for k, n in removed.items() if n))
        funnel.steps.append(cast(StepCounts, entry))
    for name, step in EXTRA_COUNTS.items():
        if values := counts.extra.get(name):
            entry = cast(dict[str, Any], next(s for s in funnel.steps if s["step"] == step))
            entry[name] = dict(values)
    if plan["unsupported_types"]:
        funnel.steps[0]["unsupported_types"] = plan["unsupported_types"]
    for source, files in plan["sources"]:
        tally = counts.sources.get(source, {})
        funnel.sources[source] = {
            "files": files, "documents": tally.get("documents", 0), "bytes": tally.get("bytes", 0)
        }  # fmt: skip
        if tally.get("near_duplicates", 0) > MAX_NEAR_SHARE * tally.get("compared", 0):
            funnel.warnings.append(
                f"{source}: {tally['near_duplicates']:,} of {tally['compared']:,} documents are"
                " near duplicates of others and were removed"
            )
    for message in counts.messages:
        funnel.add_skipped(message)
    return funnel


MAX_NEAR_SHARE = 0.5  # of a source's documents; more is a template, or the source is a copy
PUBLISHING = "publishing.json"  # funnel and parts of a complete build, which are being moved


def _publish(work: Work, out: Path) -> Funnel:
    """Move the parts of a complete build to their place; the funnel is written last.

    Killed in between, it is completed by the next call. Until it begins, an earlier corpus in
    ``out`` is untouched.
    """
    path = work.folder / PUBLISHING
    if not is_file(path):
        if not work.is_remote:
            _arrange(work)
        records = []
        for split in SPLITS:
            for unit in _outputs(work):
                name = f"{split}{SUFFIX}"
                marker = work.marker("write", unit)
                if marker is None:
                    raise BuildError(
                        f"{work.folder}: expected unit {unit} to be written, it is not"
                    )
                if name in marker["files"]:
                    remaining = marker["counts"]["remaining"]
                    records.append({
                        "part": f"{split}/{part_name(unit)}",
                        "documents": remaining[f"{split} documents"],
                        "bytes": remaining[f"{split} bytes"],
                        "sha256": marker["files"][name]["sha256"],
                    })  # fmt: skip
        write_durably(path, {"funnel": _funnel(work).__dict__, "units": records})
    state = read_state(path)
    if work.is_remote:
        return _publish_objects(work, out, state)
    (out / FUNNEL).unlink(missing_ok=True)  # a mix of old and new files does not look finished
    for name in (*SPLITS, REMOVED):
        source = work.folder / "parts" / name
        if source.is_dir():
            shutil.rmtree(out / name, ignore_errors=True)
            os.rename(source, out / name)
        (out / f"{name}{SUFFIX}").unlink(missing_ok=True)  # of an older version
    shutil.copyfile(work.folder / PLAN, out / PLAN)
    write_json(out / UNITS, state["units"])
    write_json(out / FUNNEL, state["funnel"])
    remove(work.folder)
    return Funnel.load(out)


PARTS = (
    ("train", "write", f"train{SUFFIX}"), ("heldout", "write", f"heldout{SUFFIX}"),
    (REMOVED, "apply", REMOVED_ROWS),
)  # fmt: skip


def _publish_objects(work: Work, out: Path, state: Mapping[str, Any]) -> Funnel:
    """Copy the parts of a complete build to their names; object storage cannot rename."""
    delete_objects([out / FUNNEL])
    parts = []
    for folder, step, name in PARTS:
        for unit in _outputs(work):
            if name in (work.marker(step, unit) or {"files": ()})["files"]:
                parts.append((work.stored(step, unit, name), out / folder / part_name(unit)))
    copy_objects(parts)
    folders = (*SPLITS, REMOVED)
    earlier = {out / folder / name for folder in folders for name in list_sizes(out / folder)}
    earlier |= {out / f"{folder}{SUFFIX}" for folder in folders}
    delete_objects(sorted(earlier - {target for _, target in parts}))
    copy_objects([(work.folder / PLAN, out / PLAN)])
    write_object(out / UNITS, json_text(state["units"]).encode())
    write_object(out / FUNNEL, json_text(state["funnel"]).encode())
    work.delete()
    return Funnel.load(out)


def _arrange(work: Work) -> None:
    """Link the files of the last steps into ``work/parts``, as they will be in the corpus."""
    parts = work.folder / "parts"
    remove(parts)
    for split, step, name in PARTS:
        (parts / split).mkdir(parents=True)
        for unit in _outputs(work):
            file = work.path(step, unit, name)
            if file.is_file():
                steps.link(file, parts / split / part_name(unit))
