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
from fastlm.data.corpus import (
    CARD_FILES,
    PLAN,
    REMOVED,
    SPLITS,
    SUFFIX,
    UNITS,
    is_corpus,
    is_part_name,
    part_name,
    read_units,
)
from fastlm.data.mix import MixWeights
from fastlm.data.options import WORK, DataOptions, parse_size
from fastlm.data.plan import make_plan, options_of_plan
from fastlm.data.unit_files import REMOVED as REMOVED_ROWS
from fastlm.data.unit_files import Counts
from fastlm.errors import InputError
from fastlm.files import json_text, remove, save_atomic, sync, write_error, write_json
from fastlm.pipeline.executors import shared_pool
from fastlm.pipeline.funnel import FUNNEL, Funnel, MixCounts, StepCounts
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
from fastlm.sources.source_files import printable

STEPS = (
    "gather", "consent", "extract", "exact duplicates", "language", "quality rules", "quality",
    "toxicity", "contamination", "scrub", "near duplicates", "repeated paragraphs", "mix",
    "train", "heldout",
)  # fmt: skip
# Steps that are shown if an option makes them remove documents
LIMITS = {
    "language": "languages", "quality": "min_quality_bucket", "toxicity": "max_toxicity",
    "contamination": "decontaminate", "mix": "mix",
}  # fmt: skip
EXTRA_COUNTS = {
    "replaced": "scrub",
    "cut": "extract",
    "fallbacks": "extract",
    "repeated": "mix",
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
    options.check_mix_names([printable(source) for source in sources])
    out = Path(out)
    work = Work(out / WORK)
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        # before the downloads, so that a read-only folder is reported at once
        with work.locked(), shared_pool():
            return _prepare(work, sources, options, cache, track, forgotten)
    except OSError as error:  # a write error: read errors are already InputError
        raise write_error(out, error) from None
    finally:
        for folder in (work.folder, *new_folders):
            with suppress(OSError):  # ignore folders that are not empty
                folder.rmdir()
        work.close(options.executor)


def _prepare(
    work: Work, sources: Sequence[str], options: DataOptions, cache: Path, track, forgotten
) -> Funnel:
    out = work.folder.parent
    if is_file(work.folder / PLAN):
        if _finished(out, work.plan) is not None:  # killed while its work was being deleted
            work.delete()
        elif _has_arranged(work):
            _publish(work, out)
    elif not work.is_remote:
        remove(work.folder / PUBLISHING)
        _check_folder(out)
    begun = is_file(work.folder / PLAN)
    try:
        plan = make_plan(work, sources, options, cache=cache, forgotten=forgotten, track=track)
        if not begun and (funnel := _finished(out, plan)) is not None:
            work.delete()
            return funnel
        work.begin(plan)
        _build(work, options, track)
    except InputError as error:
        if not begun and not isinstance(error, BuildError | StoreError):
            work.delete()
        raise
    _arrange(work)
    return _publish(work, out)


def _has_arranged(work: Work) -> bool:
    """Return True if the build of this plan is complete, and its parts are being moved."""
    path = work.folder / PUBLISHING
    return is_file(path) and read_state(path).get("plan") == work.digest


def _finished(out: Path, plan: Mapping[str, Any]) -> Funnel | None:
    """Return the funnel of the corpus in ``out`` if it has this plan and all its parts. The plan
    may be of another day.
    """
    try:
        work = Work(out)
        if {**work.plan, "date": plan["date"]} != plan:
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


def _check_folder(out: Path) -> None:
    """Check that ``out`` has nothing that publishing would replace, except another corpus.
    InputError: names it.
    """
    for name in (*SPLITS, REMOVED):
        if (folder := out / name).is_dir():
            for path in folder.iterdir():
                if not is_part_name(path.name) and not path.name.startswith("."):
                    raise InputError(
                        f"{folder}: expected parts of a corpus, got {path.name}: write to another"
                        " folder"
                    )
        elif os.path.lexists(folder):
            raise InputError(f"{folder}: expected a folder, or none, got something else")
    for name in (*(f"{split}{SUFFIX}" for split in SPLITS), PLAN, UNITS):
        is_other = name in (PLAN, UNITS) and (out / REMOVED).is_dir()  # killed while publishing
        if os.path.lexists(out / name) and not is_corpus(out) and not is_other:
            raise InputError(
                f"{out / name}: expected no file of that name beside a new corpus: write to another"
                " folder, or delete it"
            )


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
    if not any(work.counts("apply", unit)["documents"] for unit in outputs):
        removed = {s["step"]: s["removed"] for s in _funnel(work).steps if s["removed"]}
        names = ", ".join(name for name, _ in work.plan["sources"])
        raise InputError(
            f"sources {names}: expected text, nothing is left after cleaning: {removed}"
        )
    heldout = steps.choose_heldout(work, outputs, options)
    work.begin_step("write", units=inputs, heldout=heldout)
    run(steps.write, outputs, "writing")


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
    if work.has_begun("near"):
        units = range(work.parameters("near")["units"])
        markers = [work.marker("near", unit) for unit in units]
        if limited := sum(marker["counts"]["limited"] for marker in markers if marker):
            entry = cast(dict[str, Any], next(s for s in funnel.steps if s["step"] == NEAR))
            entry["limited"] = limited
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
    if options.mix:
        funnel.mix = _mix_counts(counts, MixWeights(options.mix))
    for message in counts.messages:
        funnel.add_skipped(message)
    return funnel


def _mix_counts(counts: Counts, mixture: MixWeights) -> dict[str, dict[str, MixCounts]]:
    """Return the text before the mix and after it, by source, language and bucket."""
    result: dict[str, dict[str, MixCounts]] = {}
    total = max(1, counts.remaining["repeated paragraphs bytes"])
    train_total = max(1, counts.remaining["train bytes"])
    for full_name, tally in sorted(counts.mixture.items()):
        table, _, name = full_name.partition(" ")
        documents, size = tally["before documents"], tally["before bytes"]
        result.setdefault(table, {})[name] = {
            "weight": mixture.key_weight(table, name),
            "documents": documents, "bytes": size, "share": round(size / total, 4),
            "train_documents": tally["train documents"], "train_bytes": tally["train bytes"],
            "train_share": round(tally["train bytes"] / train_total, 4),
            "epochs": round(tally["train documents"] / documents, 3),
        }  # fmt: skip
    if buckets := result.get("buckets"):
        result["buckets"] = {name: buckets[name] for name in sorted(buckets, key=int)}
    return result


NEAR = "near duplicates"
MAX_NEAR_SHARE = 0.5  # of a source's documents; more is a template, or the source is a copy
PUBLISHING = "publishing.json"  # funnel and parts of a complete build, which are being moved


PARTS = (
    ("train", "write", f"train{SUFFIX}"), ("heldout", "write", f"heldout{SUFFIX}"),
    (REMOVED, "apply", REMOVED_ROWS),
)  # fmt: skip


def _arrange(work: Work) -> None:
    """Write `PUBLISHING`; link the files of the last steps into ``work/parts``, as they will be in
    the corpus.
    """
    parts = work.folder / "parts"
    if not work.is_remote:
        remove(parts)
    records = []
    for folder, step, name in PARTS:
        if not work.is_remote:
            (parts / folder).mkdir(parents=True)
        for unit in _outputs(work):
            marker = work.marker(step, unit)
            if marker is None:
                raise BuildError(
                    f"{work.folder}: expected unit {unit} of the step {step!r}, it is missing"
                )
            if name not in marker["files"]:
                continue
            part = f"{folder}/{part_name(unit)}"
            if not work.is_remote:
                steps.link(work.path(step, unit, name), parts / part)
                sync(parts / part)
            if folder in SPLITS:
                remaining = marker["counts"]["remaining"]
                records.append({
                    "part": part, "documents": remaining[f"{folder} documents"],
                    "bytes": remaining[f"{folder} bytes"],
                    "sha256": marker["files"][name]["sha256"],
                })  # fmt: skip
        if not work.is_remote:
            sync(parts / folder)
    state = {"plan": work.digest, "funnel": _funnel(work).__dict__, "units": records}
    write_durably(work.folder / PUBLISHING, state)


def _publish(work: Work, out: Path) -> Funnel:
    """Move the parts of a complete build to their place; the funnel is written last.

    Killed in between, it is completed by the next call. Until it begins, an earlier corpus in
    ``out`` is untouched.
    """
    path = work.folder / PUBLISHING
    state = read_state(path)
    if work.is_remote:
        return _publish_objects(work, out, state)
    (out / FUNNEL).unlink(missing_ok=True)  # a mix of old and new files does not look finished
    for name in CARD_FILES:  # of an earlier corpus
        (out / name).unlink(missing_ok=True)
    before = work.folder / "replaced"
    before.mkdir(exist_ok=True)
    for name in (*SPLITS, REMOVED):
        source, target = work.folder / "parts" / name, out / name
        if source.is_dir():
            if os.path.lexists(target):
                remove(before / name)
                os.rename(target, before / name)
            os.rename(source, target)
        (out / f"{name}{SUFFIX}").unlink(missing_ok=True)  # of an older version
    for record in state["units"]:
        if not (out / record["part"]).is_file():
            raise BuildError(f"{out / record['part']}: expected a part of the build, it is missing")
    try:
        save_atomic(out / PLAN, lambda part: shutil.copyfile(work.folder / PLAN, part))
        write_json(out / UNITS, state["units"])
        write_json(out / FUNNEL, state["funnel"])
    except InputError as error:
        raise BuildError(str(error)) from error
    path.unlink()
    work.delete()
    return Funnel.load(out)


def _publish_objects(work: Work, out: Path, state: Mapping[str, Any]) -> Funnel:
    """Copy the parts of a complete build to their names; object storage cannot rename."""
    delete_objects([out / name for name in (FUNNEL, *CARD_FILES)])
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
