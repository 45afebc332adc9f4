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

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastlm.data import matching, steps
from fastlm.data.corpus import (
    PLAN,
)
from fastlm.data.funnel_counts import build_funnel
from fastlm.data.options import WORK, DataOptions, parse_size
from fastlm.data.plan import make_plan
from fastlm.data.publish import (
    PUBLISHING,
    arrange,
    check_folder,
    find_finished,
    has_arranged,
    publish,
)
from fastlm.data.unit_files import outputs_of
from fastlm.errors import InputError
from fastlm.files import remove, write_error
from fastlm.pipeline.executors import shared_pool
from fastlm.pipeline.funnel import Funnel
from fastlm.pipeline.units import (
    BuildError,
    Work,
    run_step,
    step_name,
)
from fastlm.progress import silent
from fastlm.sources.remote import (
    StoreError,
    is_file,
)
from fastlm.sources.source_files import printable


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
    except KeyboardInterrupt:
        if is_file(work.folder / PLAN):
            raise KeyboardInterrupt(
                f"interrupted; the same command continues the build in {out}"
            ) from None
        raise
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
        if find_finished(out, work.plan) is not None:  # killed while its work was being deleted
            work.delete()
        elif has_arranged(work):
            publish(work, out)
    elif not work.is_remote:
        remove(work.folder / PUBLISHING)
        check_folder(out)
    begun = is_file(work.folder / PLAN)
    try:
        plan = make_plan(work, sources, options, cache=cache, forgotten=forgotten, track=track)
        if not begun and (funnel := find_finished(out, plan)) is not None:
            work.delete()
            return funnel
        work.begin(plan)
        _build(work, options, track)
    except InputError as error:
        if not begun and not isinstance(error, BuildError | StoreError):
            work.delete()
        raise
    arrange(work, build_funnel(work))
    return publish(work, out)


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
    outputs = outputs_of(work)
    work.begin_step("apply", units=inputs)
    run(steps.apply, outputs, "removing duplicates")
    if not any(work.counts("apply", unit)["documents"] for unit in outputs):
        removed = "; ".join(
            f"{s['step']}: " + ", ".join(f"{n:,} {reason}" for reason, n in s["removed"].items())
            for s in build_funnel(work).steps
            if s["removed"]
        )
        names = ", ".join(name for name, _ in work.plan["sources"])
        raise InputError(
            f"sources {names}: expected text, nothing is left after cleaning: {removed}"
        )
    heldout = steps.choose_heldout(work, outputs, options)
    work.begin_step("write", units=inputs, heldout=heldout)
    run(steps.write, outputs, "writing")


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
