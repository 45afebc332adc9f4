"""Find documents in token shards, and write the shards again without them.

The new files get new names, and index.json, which names the files, is replaced in one step: a
reader has the old set or the new one. Then the old files are deleted; those that a kill has left
are deleted by the next call.
"""

import hashlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from fastlm.data.shards import INDEX, Shard, TokenDataset, load_index
from fastlm.errors import InputError
from fastlm.files import remove, replacing, sync, write_json

OURS = re.compile(r"\d+(-[0-9a-f]+)?\.(bin|starts)")
UNFINISHED = re.compile(r"\.\d+(-[0-9a-f]+)?\.(bin|starts)\.fastlm-[0-9a-f]{16}\.part")
Found = dict[str, list[tuple[int, int]]]  # file -> (number of a document, bytes of its text)


def token_hash(ids: np.ndarray) -> bytes:
    """The hash of a document's tokens, without the end-of-text token. ids: integers (n,)."""
    return hashlib.blake2b(np.ascontiguousarray(ids, "<i8").data, digest_size=16).digest()


def find_documents(
    folder: Path,
    by_tokens: Mapping[bytes, int],
    wanted: Callable[[str], bool] | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> Found:
    """Return the documents whose tokens have a hash of ``by_tokens`` (-> bytes of their text), and,
    with ``decode``, those whose text is ``wanted``. InputError: as `TokenDataset`.
    """
    found: Found = {}
    for file, number, ids in documents(folder):
        size = by_tokens.get(token_hash(ids))
        if size is None and wanted is not None and decode is not None:
            text = decode(ids.tolist())
            size = len(text.encode()) if wanted(text) else None
        if size is not None:
            found.setdefault(file, []).append((number, size))
    return found


def documents(folder: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield (file, number, tokens without end-of-text) of every document."""
    data = TokenDataset(folder)
    starts, at, base = data.document_starts(), 0, 0
    for shard in data.info.shards:
        mine = starts[at : at + shard["documents"]]
        ends = [*mine[1:].tolist(), base + shard["tokens"]]
        for number, (start, end) in enumerate(zip(mine.tolist(), ends, strict=True)):
            yield shard["file"], number, data.read(start, end - start - 1)
        at, base = at + shard["documents"], base + shard["tokens"]


def remove_documents(folder: Path, found: Found) -> None:
    """Write the shards of ``folder`` again without the documents ``found``, and delete files that
    a killed call has left. If nothing is left, the set is gone. InputError: unreadable, not
    writable, disk full (then the old set stands).
    """
    info = load_index(folder)
    dtype = np.dtype(info.dtype).newbyteorder("<")
    shards = []
    for shard in info.shards:
        gone = dict(found.get(shard["file"], ()))
        if not gone:
            shards.append(shard)
        elif len(gone) < shard["documents"]:
            shards.append(_without(folder, shard, dtype, gone))
    if not shards:
        (folder / INDEX).unlink()
        sync(folder)
    elif found:
        names = ("tokens", "documents", "bytes_of_text")
        totals = {name: sum(s[name] for s in shards) for name in names}
        write_json(folder / INDEX, asdict(replace(info, shards=shards, **totals)))
    files = {shard["file"] for shard in shards}
    for path in folder.iterdir():
        stray = OURS.fullmatch(path.name) and path.with_suffix(".bin").name not in files
        if stray or UNFINISHED.fullmatch(path.name):
            remove(path)


def _without(folder: Path, shard: Shard, dtype: np.dtype, gone: Mapping[int, int]) -> Shard:
    """Write a copy of a shard without some documents; return its entry of the index."""
    old = folder / shard["file"]
    try:
        tokens = np.fromfile(old, dtype)
        starts = np.fromfile(old.with_suffix(".starts"), "<i8")
    except OSError as error:
        raise InputError(f"{old}: cannot be read: {error.strerror}") from error
    ends = np.append(starts[1:], len(tokens))
    kept = [i for i in range(len(starts)) if i not in gone]
    rest = np.concatenate([tokens[starts[i] : ends[i]] for i in kept])
    lengths = [int(ends[i] - starts[i]) for i in kept]
    offsets = np.cumsum([0, *lengths[:-1]]).astype("<i8").tobytes()
    name = f"{old.stem.partition('-')[0]}-{secrets.token_hex(4)}.bin"
    with replacing((folder / name).with_suffix(".starts")) as file:
        file.write(offsets)
    with replacing(folder / name) as file:
        file.write(rest.data)
    return {
        "file": name, "tokens": len(rest), "documents": len(kept),
        "bytes_of_text": max(0, shard["bytes_of_text"] - sum(gone.values())),
        "sha256": hashlib.sha256(rest.data).hexdigest(),
        "starts_sha256": hashlib.sha256(offsets).hexdigest(),
    }  # fmt: skip
