"""Write the same corpus in both layouts: one file per split, as older versions did, and parts."""

import json
from pathlib import Path

import zstandard

from fastlm.data.corpus import SPLITS, SUFFIX, UNITS, part_name, part_record

LAYOUTS = ("files", "parts")


def pack(lines: list[bytes]) -> bytes:
    return zstandard.ZstdCompressor().compress(b"".join(lines))


def split_into_parts(folder: Path, num_parts: int = 3) -> Path:
    """Turn the files of a prepared folder into ``num_parts`` parts per split, with units.json. The
    numbers of the parts have gaps.
    """
    units = []
    for split in SPLITS:
        file = folder / f"{split}{SUFFIX}"
        reader = zstandard.ZstdDecompressor().stream_reader(file.read_bytes())
        lines = reader.read().splitlines(keepends=True)
        (folder / split).mkdir()
        size = max(1, -(-len(lines) // num_parts))
        for number, start in enumerate(range(0, len(lines), size)):
            part = f"{split}/{part_name(3 * number)}"
            rows = lines[start : start + size]
            (folder / part).write_bytes(pack(rows))
            text_bytes = sum(len(json.loads(row)["text"].encode()) for row in rows)
            units.append(part_record(folder, part, len(rows), text_bytes))
        file.unlink()
    (folder / UNITS).write_text(json.dumps(units))
    return folder


def split_path(folder: Path, split: str) -> Path:
    """Return the path that names a split of a prepared folder, in either layout."""
    parts = folder / split
    return parts if parts.is_dir() else folder / f"{split}{SUFFIX}"
