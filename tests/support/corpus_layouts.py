"""Turn a corpus into either layout: one file per split, as older versions wrote, or parts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from fastlm.data.corpus import (
    SPLITS,
    SUFFIX,
    UNITS,
    part_name,
    part_record,
    split_files,
)
from fastlm.sources.streams import open_stream

LAYOUTS = ("files", "parts")


def pack(lines: list[bytes]) -> bytes:
    return zstandard.ZstdCompressor().compress(b"".join(lines))


def set_layout(folder: Path, layout: str, num_parts: int = 3) -> Path:
    """Write the corpus in ``folder`` in a layout: in files, or in ``num_parts`` parts per split and
    units.json. The numbers of the parts have gaps.
    """
    lines = {split: read_lines(paths) for split, paths in split_files(folder).items()}
    (folder / UNITS).unlink(missing_ok=True)
    units = []
    for split in SPLITS:
        shutil.rmtree(folder / split, ignore_errors=True)
        (folder / f"{split}{SUFFIX}").unlink(missing_ok=True)
        if layout == "files":
            (folder / f"{split}{SUFFIX}").write_bytes(pack(lines[split]))
            continue
        (folder / split).mkdir()
        size = max(1, -(-len(lines[split]) // num_parts))
        for number, start in enumerate(range(0, len(lines[split]), size)):
            part, rows = f"{split}/{part_name(3 * number)}", lines[split][start : start + size]
            (folder / part).write_bytes(pack(rows))
            text_bytes = sum(len(json.loads(row)["text"].encode()) for row in rows)
            units.append(part_record(folder, part, len(rows), text_bytes))
    if layout == "parts":
        (folder / UNITS).write_text(json.dumps(units))
    return folder


def read_lines(paths: list[Path]) -> list[bytes]:
    lines = []
    for path in paths:
        with open_stream(path) as stream:
            lines += stream
    return lines


def prepare_in(layout: str, prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fastlm.data.prepare.prepare` with its output in a layout."""

    def run(sources: Any, out: Path, **options: Any) -> Any:
        for split in SPLITS:
            shutil.rmtree(out / split, ignore_errors=True)
            (out / f"{split}{SUFFIX}").unlink(missing_ok=True)
        (out / UNITS).unlink(missing_ok=True)
        result = prepare(sources, out, **options)
        set_layout(out, layout)
        return result

    return run


def split_path(folder: Path, split: str) -> Path:
    """Return the path that names a split of a prepared folder, in either layout."""
    parts = folder / split
    return parts if parts.is_dir() else folder / f"{split}{SUFFIX}"
