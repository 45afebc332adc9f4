"""The plan of preparing text: inputs with their hashes, how they are split, options, versions.

The plan says everything that decides the result, so the same plan gives the same bytes. A large
file is split into ranges, and small files are grouped, so that each unit has about ``unit_bytes``
of input. Large files are read once to be hashed and split; that is done by the workers, too.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastlm.data.corpus import SPLITS, corpus_parts
from fastlm.data.options import DataOptions
from fastlm.errors import InputError
from fastlm.pipeline.units import Work, file_sha256, group_by_size
from fastlm.progress import silent
from fastlm.sources.scan import scan_file
from fastlm.sources.source_files import (
    WHOLE_FILE,
    FileRange,
    SourceFile,
    list_files,
    printable,
)

# Raised when the same options and inputs give another result
VERSION = 5
LIBRARIES = ("resiliparse", "fastwarc", "rensa")  # whose versions may change the result


def make_plan(
    sources: Sequence[str],
    options: DataOptions,
    *,
    cache: Path,
    forgotten: Collection[str] = (),
    track=silent,
) -> dict[str, Any]:
    """Fetch, list, hash and split the sources. Return the plan, JSON-serialisable.

    InputError: a source that does not exist, a file that the user named and that is of an
    unsupported type or empty.
    """
    skipped: Counter[str] = Counter()
    unsupported: Counter[str] = Counter()
    files: list[SourceFile] = []
    counts = []
    for source in track(sources, "fetching", unit="sources"):
        source_files, reasons = list_files(source, cache=cache, unsupported=unsupported)
        files += source_files
        skipped.update({f"file: {reason}": n for reason, n in reasons.items()})
        counts.append([printable(source), len(source_files)])
    entries, ranges, sizes, unreadable = [], [], [], []
    for number, file in enumerate(track(files, "hashing", unit="files")):
        try:
            scan = scan_file(file, unit_bytes=options.unit_bytes)
        except (InputError, OSError) as error:
            if file.explicit or options.strict:
                raise
            skipped["file: unreadable"] += 1
            unreadable.append(str(error))
            entries.append({**_entry(file), "size": 0, "sha256": "unreadable"})
            continue
        entries.append({**_entry(file), "size": scan.size, "sha256": scan.sha256})
        share = scan.size // max(1, len(scan.ranges))
        for part in scan.ranges:
            ranges.append([number, *asdict(part).values()])
            sizes.append(share)
    groups = group_by_size(sizes, options.unit_bytes)
    earlier = _earlier_files(options)
    first = len(entries)
    entries += earlier
    units = [[[first + index, *asdict(WHOLE_FILE).values()]] for index in range(len(earlier))]
    plan = {
        "format": 1,
        "version": VERSION,
        "libraries": {name: version(name) for name in LIBRARIES},
        "options": options.identity(),
        "sources": counts,
        "skipped": dict(skipped),
        "unsupported_types": dict(unsupported.most_common()),
        "unreadable": unreadable,
        "forgotten": sorted(forgotten),
        "files": entries,
        "earlier_units": len(units),  # the first ones
        "units": units + [[ranges[index] for index in group] for group in groups],
    }
    return json.loads(json.dumps(plan))  # as it is read again


def _earlier_files(options: DataOptions) -> list[dict[str, Any]]:
    """Return an entry for each file of the corpora of earlier builds."""
    files = []
    for corpus in options.earlier:
        if not Path(corpus).exists():
            raise InputError(f"earlier: expected a corpus of an earlier build, {corpus} not found")
        for split in SPLITS:
            for path in corpus_parts(corpus, split):
                file = SourceFile(path, path.name, printable(corpus), "corpus", explicit=True)
                size = path.stat().st_size
                files.append({**_entry(file), "size": size, "sha256": file_sha256(path)})
    return files


def _entry(file: SourceFile) -> dict[str, Any]:
    return {
        "path": str(file.path), "name": file.name, "source": file.source,
        "format": file.format, "explicit": file.explicit, "package": file.package,
    }  # fmt: skip


def ranges_of_unit(work: Work, number: int) -> Iterator[tuple[SourceFile, FileRange]]:
    """Yield the files, or parts of files, of one unit of input."""
    for index, *part in work.plan["units"][number]:
        entry = work.plan["files"][index]
        values = {f.name: entry[f.name] for f in fields(SourceFile)}
        yield SourceFile(**{**values, "path": Path(entry["path"])}), FileRange(*part)


def options_of_plan(plan: dict[str, Any]) -> DataOptions:
    """Return the options of a plan; how the work is spread is not among them."""
    names = {f.name for f in fields(DataOptions)}
    values = {k: v for k, v in plan["options"].items() if k in names}
    options: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return DataOptions(**options)
