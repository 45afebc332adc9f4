"""The plan of preparing text: inputs with their hashes, how they are split, options, versions.

The plan says everything that decides the result, so the same plan gives the same bytes. A large
file is split into ranges, and small files are grouped, so that each unit has about ``unit_bytes``
of input. All files are read once before, by the workers, to be hashed and split.
"""

import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import cache as cached
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastlm.data.consent import policy_problems, write_policies
from fastlm.data.consent.opt_out import OptOut
from fastlm.data.corpus import (
    CARD_FILES,
    PLAN,
    REMOVED,
    SPLITS,
    SUFFIX,
    UNITS,
    corpus_parts,
)
from fastlm.data.forget_log import FORGET_LOG
from fastlm.data.language import PACKAGES
from fastlm.data.options import VERSION, WORK, DataOptions
from fastlm.errors import InputError
from fastlm.pipeline.funnel import FUNNEL
from fastlm.pipeline.units import BuildError, Work, file_sha256, group_by_size, run_step
from fastlm.progress import silent
from fastlm.sources.document import FAULTS, UNREADABLE
from fastlm.sources.licences import read_licence
from fastlm.sources.remote import StoreError, file_size, is_remote, remote_state
from fastlm.sources.scan import scan_file
from fastlm.sources.source_files import (
    WHOLE_FILE,
    FileRange,
    SourceFile,
    list_files,
    printable,
)
from fastlm.sources.warc import PolicyFile

RECORD = "record.json"  # of the command (`fastlm.pipeline.record`)
POLICIES = "policies.db"  # the policy files of all sites
SCAN_BYTES = 1 << 24  # in one unit: half a second for a compressed archive, which is read
SCAN_OVERHEAD = 1 << 17  # of opening a file
MAX_FILES = 2048  # in a unit: a file costs about as much as 4 KB of text


def make_plan(
    work: Work,
    sources: Sequence[str],
    options: DataOptions,
    *,
    cache: Path,
    forgotten: Collection[str] = (),
    track=silent,
) -> dict[str, Any]:
    """Fetch, list, hash and split the sources. Return the plan, JSON-serialisable.

    Files are hashed in units of work, in the folder ``scan`` of ``work``, so a restart does not
    read them again if their sizes and times are the same. The policy files of sites are written to
    `POLICIES` there.

    InputError: a source that does not exist, a file that the user named and that is of an
    unsupported type or empty.
    """
    skipped: Counter[str] = Counter()
    unsupported: Counter[str] = Counter()
    files: list[SourceFile] = []
    counts = []
    outputs = output_paths(work.folder.parent)
    for source in track(sources, "fetching", unit="sources"):
        source_files, reasons = list_files(
            source, cache=cache, unsupported=unsupported, leave_out=outputs
        )
        files += source_files
        skipped.update({f"file: {reason}": n for reason, n in reasons.items()})
        counts.append([printable(source), len(source_files)])
    policy_files = [
        file for source in options.policies
        for file in list_files(source, cache=cache)[0] if file.format == "warc"
    ]  # fmt: skip
    if options.policies and not policy_files:
        raise InputError(
            f"policies: expected WARC files, which say where and when a policy file was fetched;"
            f" got none in {', '.join(options.policies)}"
        )
    scanned = [*files, *policy_files]
    inner = _scan_all(work, scanned, options, track)
    policies = write_policies(
        work.local / POLICIES,
        (PolicyFile(**policy) for result in _scans(inner) for policy in result["policies"]),
    )
    work.add_file(POLICIES)
    entries, ranges, sizes, messages = [], [], [], []
    for number, (file, result) in enumerate(zip(scanned, _scans(inner))):
        if "error" in result:
            if file.explicit or options.strict:
                raise InputError(result["error"])
            messages.append(result["error"])
        if options.strict and (faults := sorted(FAULTS & result["skipped"].keys())):
            raise InputError(f"strict: expected no fault, got {faults[0]}: {file.path}")
        skipped.update(result["skipped"])
        policy_files_read = [PolicyFile(**policy) for policy in result["policies"]]
        # a site without the file answers with a status of 400 to 499: that is no fault
        messages += policy_problems(p for p in policy_files_read if not 400 <= p.status < 500)
        if number < len(files):
            entries.append({**_entry(file), "size": result["size"], "sha256": result["sha256"]})
            share = result["text_size"] // max(1, len(result["ranges"]))
            for part in result["ranges"]:
                ranges.append([number, *part.values()])
                sizes.append(share + options.unit_bytes // MAX_FILES)
    if not ranges:
        raise InputError(f"sources: expected files that can be read, got none: {messages[0]}")
    groups = group_by_size(sizes, options.unit_bytes)
    licences = {source: read_licence(source, cache)[1] for source in sources}
    messages += OptOut.load(*options.opt_out).problems
    earlier = _earlier_files(options, work.folder.parent)
    first = len(entries)
    entries += earlier
    units = [[[first + index, *asdict(WHOLE_FILE).values()]] for index in range(len(earlier))]
    plan = {
        "format": 1,
        "version": VERSION,
        "libraries": {name: version(name) for name in libraries(options)},
        "options": options.identity(),
        "sources": counts,
        "skipped": dict(skipped),
        "unsupported_types": dict(unsupported.most_common()),
        "messages": messages,
        "forgotten": sorted(forgotten),
        "policies": policies,
        "licences": {printable(source): name for source, name in licences.items() if name},
        "files": entries,
        "earlier_units": len(units),  # the first ones
        "units": units + [[ranges[index] for index in group] for group in groups],
        # with which dates of policy files are compared; the day on which the plan was made first
        "date": _date(work),
    }
    return json.loads(json.dumps(plan))  # as it is read again


def libraries(options: DataOptions) -> list[str]:
    """Return the packages whose versions may change the result."""
    names = ["resiliparse", "fastwarc", "rensa"]
    if options.extract == "precise":
        names.append("trafilatura")
    if options.language_method != "off":
        names.append(PACKAGES[options.language_method])
    if "phone" in options.scrub:
        names.append("phonenumbers")
    if "national" in options.scrub:
        names.append("python-stdnum")
    return names


def output_paths(out: Path) -> frozenset[Path]:
    """Return what a build in ``out`` writes, which is no input of it, as resolved paths."""
    names = {*SPLITS, REMOVED, WORK, PLAN, UNITS, FUNNEL, *CARD_FILES, FORGET_LOG, RECORD}
    names |= {f"{split}{SUFFIX}" for split in SPLITS}
    return frozenset() if is_remote(out) else frozenset(out.resolve() / name for name in names)


def _date(work: Work) -> str:
    """Return the date of the plan that was begun here, or today."""
    with suppress(InputError):
        return str(Work(work.folder).plan["date"])
    return datetime.now(UTC).date().isoformat()


def _scan_all(work: Work, files: Sequence[SourceFile], options: DataOptions, track) -> Work:
    """Do the step `scan` of all files, in a folder of its own."""
    stamps = [_stamp(file) for file in files]
    groups = group_by_size((stamp[0] + SCAN_OVERHEAD for stamp in stamps), SCAN_BYTES)
    plan = {
        "unit_bytes": options.unit_bytes, "stamps": stamps,
        "files": [_entry(file) for file in files], "units": groups,
    }  # fmt: skip
    inner = work.inner("scan")
    try:
        inner.begin(plan)
    except BuildError:  # files have changed
        inner.delete()
        inner.begin(plan)
    inner.begin_step("scan", units=len(groups))
    run_step(
        inner, scan, range(len(groups)), executor=options.executor, workers=options.workers,
        track=track, description="hashing",
    )  # fmt: skip
    return inner


def _scans(inner: Work) -> Iterator[dict[str, Any]]:
    """Yield what `scan` wrote about each file."""
    for number in range(len(inner.plan["units"])):
        yield from json.loads(inner.path("scan", number, "scans.json").read_bytes())


def _stamp(file: SourceFile) -> list[Any]:
    """Return the size of a file, and its times or the store's tag of its content."""
    if is_remote(file.path):
        return [*remote_state(file.path), 0]
    try:
        stat = file.path.stat()
    except OSError:
        return [0, time.time_ns(), 0]
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def scan(work: Work, number: int, out: Path) -> dict[str, Any]:
    """Hash and split some files. Writes ``scans.json``: of each file its `FileScan`, or why it
    cannot be read.
    """
    results = []
    for index in work.plan["units"][number]:
        file = _source_file(work.plan["files"][index])
        try:
            results.append(asdict(scan_file(file, unit_bytes=work.plan["unit_bytes"])))
        except StoreError:
            raise
        except (InputError, OSError) as error:
            results.append({
                "size": 0, "text_size": 0, "sha256": "unreadable", "ranges": [], "policies": [],
                "skipped": {UNREADABLE: 1}, "error": str(error),
            })  # fmt: skip
    (out / "scans.json").write_text(json.dumps(results))
    return {}


def _earlier_files(options: DataOptions, out: Path) -> list[dict[str, Any]]:
    """Return an entry for each file of the corpora of earlier builds."""
    files = []
    for corpus in options.earlier:
        if not is_remote(corpus) and not Path(corpus).exists():
            raise InputError(f"earlier: expected a corpus of an earlier build, {corpus} not found")
        resolved = Path(corpus) if is_remote(corpus) else Path(corpus).resolve()
        if (out if is_remote(out) else out.resolve()) in (resolved, *resolved.parents):
            raise InputError(f"earlier: expected another corpus than {out}, which is replaced")
        for split in SPLITS:
            for path in corpus_parts(corpus, split):
                file = SourceFile(path, path.name, printable(corpus), "corpus", explicit=True)
                size = file_size(path)
                files.append({**_entry(file), "size": size, "sha256": file_sha256(path)})
    return files


def _entry(file: SourceFile) -> dict[str, Any]:
    return {
        "path": str(file.path), "name": file.name, "source": file.source,
        "format": file.format, "explicit": file.explicit, "package": file.package,
    }  # fmt: skip


def ranges_of_unit(work: Work, number: int) -> Iterator[tuple[SourceFile, FileRange]]:
    """Yield the files, or parts of files, of one unit of input.

    BuildError: this process has other versions of libraries, or another file, than the plan says.
    """
    for name, planned in work.plan["libraries"].items():
        if (actual := _version(name)) != planned:
            raise BuildError(
                f"{name}: expected version {planned} of the plan on every node, got {actual}"
            )
    for index, *part in work.plan["units"][number]:
        file = _source_file(entry := work.plan["files"][index])
        if entry["sha256"] != "unreadable" and not is_remote(file.path):
            size = file.path.stat().st_size if file.path.is_file() else None
            if size != entry["size"]:
                raise BuildError(
                    f"{file.path}: expected the {entry['size']:,} bytes that were planned, got"
                    f" {'no file' if size is None else f'{size:,}'}: every node needs the sources"
                )
        yield file, FileRange(*part)


class UnchangedFiles:
    """Compares the files of a unit of input with the plan, before and after they are read. A file
    with other times and the same content is the same one.
    """

    def __init__(self, work: Work, number: int):
        self._work = work
        self._numbers = list(dict.fromkeys(index for index, *_ in work.plan["units"][number]))
        self._stamps = [self._stamp(index) for index in self._numbers]
        planned = _planned_stamps(work)
        for index, stamp in zip(self._numbers, self._stamps):
            entry = work.plan["files"][index]
            key = entry["path"], entry["sha256"], *stamp
            if stamp == planned[index] or entry["sha256"] == "unreadable" or key in _EQUAL:
                continue
            path = Path(entry["path"])
            if is_remote(path) or file_sha256(path) != entry["sha256"]:
                raise self._error(index)
            _EQUAL.add(key)

    def _stamp(self, index: int) -> list[Any]:
        return _stamp(_source_file(self._work.plan["files"][index]))

    def check(self) -> None:
        """BuildError: a file has changed since this object was made."""
        for index, stamp in zip(self._numbers, self._stamps):
            is_readable = self._work.plan["files"][index]["sha256"] != "unreadable"
            if is_readable and self._stamp(index) != stamp:
                raise self._error(index)

    def _error(self, index: int) -> BuildError:
        return BuildError(
            f"{self._work.plan['files'][index]['path']}: expected the file that was planned, it"
            f" has changed since: restore it and start again, or delete {self._work.folder}"
        )


_EQUAL: set[tuple] = set()  # files with other times that have the planned content
_STAMPS: dict[tuple, list[Any]] = {}  # of the last build


def _planned_stamps(work: Work) -> list[Any]:
    inner = work.inner("scan")
    key: tuple = (inner.folder, inner.session)
    if not inner.is_remote:
        key = inner.folder, (inner.folder / PLAN).stat().st_mtime_ns
    if key not in _STAMPS:
        _STAMPS.clear()
        _STAMPS[key] = inner.plan["stamps"]
    return _STAMPS[key]


@cached
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _source_file(entry: dict[str, Any]) -> SourceFile:
    values = {f.name: entry[f.name] for f in fields(SourceFile)}
    return SourceFile(**{**values, "path": Path(entry["path"])})


def options_of_plan(plan: dict[str, Any]) -> DataOptions:
    """Return the options of a plan; how the work is spread is not among them."""
    names = {f.name for f in fields(DataOptions)}
    values = {k: v for k, v in plan["options"].items() if k in names}
    options: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return DataOptions(**options)
