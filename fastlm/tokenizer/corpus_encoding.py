"""Turn a split of a corpus into token shards, in units of work that any process can do.

A unit is some consecutive parts of the corpus, or a slice of a large file; it writes its own
shards, so the shards do not depend on the number of workers. The work is in ``OUT/.encoding``
(`fastlm.pipeline.units`): a killed call is continued by the next one, which encodes only the units
that are missing. At the end the shards are linked to their names in ``OUT``, and index.json is
written last.

Rejected: shards that end at the same documents as those of one process (`write_shards`). Where a
shard ends depends on the tokens of all documents before it, so a second pass over all tokens would
be needed. A corpus below `UNIT_BYTES` is one unit, and its shards are those of `write_shards`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

from fastlm.data.corpus import (
    UNFINISHED_SHARDS,
    corpus_parts,
    is_corpus,
    read_documents,
    read_units,
)  # fmt: skip
from fastlm.data.shards import (
    INDEX,
    SHARD_TOKENS,
    Shard,
    ShardIndex,
    token_dtype,
    write_index,
    write_shard_files,
)
from fastlm.errors import InputError
from fastlm.files import make_folder, read_json, reason, remove, sync, write_error
from fastlm.pipeline.funnel import Funnel
from fastlm.pipeline.units import Work, file_sha256, run_step, write_durably
from fastlm.progress import silent
from fastlm.sources.remote import file_size, is_remote
from fastlm.sources.streams import open_stream
from fastlm.threads import default_threads
from fastlm.tokenizer.tokenizer import Tokenizer

VERSION = 1  # of the plan; a larger one makes unfinished work start again
# Compressed bytes of a unit: some 15 M tokens, 5 to 10 seconds of one core. Smaller units would
# leave smaller shards, larger ones lose more work to a kill.
UNIT_BYTES = 1 << 24
SLICE_BYTES = 1 << 26  # of the lines of a large file: about as much text as UNIT_BYTES hold
SETTINGS = "settings.json"  # of this call, not of the plan: where things are, how many workers


class Slice(TypedDict):
    """Lines of a file: its name below the corpus, the first line, and how many (None: all)."""

    file: str
    first: int
    lines: int | None


def encode_corpus(
    corpus: Path,
    split: str | None,
    tokenizer: str | Path,
    out: Path,
    *,
    executor: str = "pool",
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    keep_work: bool = False,
    track=silent,
) -> ShardIndex:
    """Write the token shards of a split of a corpus to ``out``.

    Args:
        corpus, split: as in `fastlm.data.corpus.read_documents`.
        tokenizer: as in `Tokenizer.load`.
        executor, workers: as in `fastlm.pipeline.executors.run_calls`. One worker uses all threads
            of this process, several share the cores.
        shard_tokens: as in `fastlm.data.shards.write_shards`.
        keep_work: leave ``OUT/.encoding``, so that another call with the same text only checks it:
            for a caller that can be killed after this split.

    InputError: as `write_shards`; a damaged corpus, or one whose documents are not as many as
    units.json or the funnel say; units that failed.
    """
    loaded = Tokenizer.load(tokenizer)
    dtype = token_dtype(loaded, shard_tokens)
    _TOKENIZERS.clear()
    _TOKENIZERS[tokenizer_id := _tokenizer_id(loaded)] = loaded  # for units in this process
    root, units = _plan_units(corpus, corpus_parts(corpus, split), track)
    work = Work(make_folder(out / UNFINISHED_SHARDS))
    plan = {
        "version": VERSION, "tokenizer": tokenizer_id, "shard_tokens": shard_tokens,
        **units,
    }  # fmt: skip
    try:
        work.begin(plan)
    except InputError:  # of an earlier text or tokenizer, and never finished
        remove(work.folder)
        work = Work(make_folder(out / UNFINISHED_SHARDS))
        work.begin(plan)
    settings = {
        "corpus": str(root if is_remote(root) else root.absolute()), "pid": os.getpid(),
        "tokenizer": str(Path(tokenizer).absolute() if Path(tokenizer).exists() else tokenizer),
        "threads": max(1, default_threads() // workers) if executor == "pool" else 1,
    }  # fmt: skip
    write_durably(work.folder / SETTINGS, settings)
    numbers = range(len(plan["units"]))
    work.begin_step(encode.__name__, units=len(numbers))
    run_step(
        work, encode, numbers, executor=executor, workers=workers, track=track,
        description="tokenizing",
    )  # fmt: skip
    shards = [(n, shard) for n in numbers for shard in work.counts(encode.__name__, n)["shards"]]
    if not shards:
        raise InputError("docs: expected at least one document, got none")
    _check_totals(corpus, split, [shard for _, shard in shards])
    info = _publish(work, out, shards, loaded, dtype)
    if not keep_work:
        remove(work.folder)
    return info


def encode(work: Work, number: int, out: Path) -> Mapping[str, Any]:
    """Encode one unit of the plan: write its shards to ``out`` and return their entries."""
    settings = read_json(work.folder / SETTINGS)
    if settings["pid"] != os.getpid():
        _limit_threads(settings["threads"])
    tokenizer = _load_tokenizer(settings["tokenizer"], work.plan["tokenizer"])
    texts = (
        document.text
        for part in work.plan["units"][number]
        for document in _read_slice(Path(settings["corpus"]), part)
    )
    return {"shards": write_shard_files(texts, tokenizer, out, work.plan["shard_tokens"])}


def _read_slice(root: Path, part: Slice) -> Iterator[Any]:
    documents = read_documents(root / part["file"])
    end = None if part["lines"] is None else part["first"] + part["lines"]
    return islice(documents, part["first"], end)


def _limit_threads(threads: int) -> None:
    """Limit the threads of the tokenizers library, which are started at its first use."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)


_TOKENIZERS: dict[str, Tokenizer] = {}  # the last one, by its id


def _load_tokenizer(path: str, id: str) -> Tokenizer:
    """Load the tokenizer once per process. InputError: it is another one than the plan's."""
    if id not in _TOKENIZERS:
        tokenizer = Tokenizer.load(path)
        if _tokenizer_id(tokenizer) != id:
            raise InputError(f"tokenizer {path}: expected the one of the plan, got another")
        _TOKENIZERS.clear()
        _TOKENIZERS[id] = tokenizer
    return _TOKENIZERS[id]


def _tokenizer_id(tokenizer: Tokenizer) -> str:
    """Return a hash of what decides the tokens of a text."""
    state = f"{tokenizer.eos_id} {tokenizer.backend.to_str()}"
    return hashlib.sha256(state.encode()).hexdigest()


def _plan_units(corpus: Path, paths: Sequence[Path], track=silent) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the files, and {"inputs": [name, SHA-256] of each, "units": slices}.
    InputError: no documents, a file with another SHA-256 than in units.json.
    """
    if not paths:
        raise InputError("docs: expected at least one document, got none")
    root = corpus if is_corpus(corpus) else paths[0].parent
    names = [path.relative_to(root).as_posix() for path in paths]
    out = root if is_corpus(root) else root.parent
    sums = {out / r["part"]: r["sha256"] for r in read_units(out)} if is_corpus(out) else {}
    inputs, units = [], list[list[Slice]]()
    remaining = 0  # bytes that the last unit can still take
    for name, path in track(list(zip(names, paths, strict=True)), "checking", unit="files"):
        try:
            size, sha256 = file_size(path), file_sha256(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {reason(error)}") from None
        if sums.get(path, sha256) != sha256:
            raise InputError(
                f"{path}: expected the SHA-256 {sums[path]} of units.json, got {sha256}:"
                " run fastlm data prepare again"
            )
        inputs.append([name, sha256])
        if size > 2 * UNIT_BYTES:
            units += [[part] for part in _slices(name, path)]
            remaining = 0
            continue
        if remaining <= 0:
            units.append([])
            remaining = UNIT_BYTES
        units[-1].append({"file": name, "first": 0, "lines": None})
        remaining -= size
    return root, {"inputs": inputs, "units": units}


def _slices(name: str, path: Path) -> Iterator[Slice]:
    """Cut a large file into slices. A slice is read from the start of the file, because its
    compression has one frame: on average half of the file, at 1 GB/s.
    """
    first = count = size = 0
    with open_stream(path) as lines:
        for line in lines:
            count, size = count + 1, size + len(line)
            if size >= SLICE_BYTES:
                yield {"file": name, "first": first, "lines": count}
                first, count, size = first + count, 0, 0
    if count:
        yield {"file": name, "first": first, "lines": count}


def _check_totals(corpus: Path, split: str | None, shards: Sequence[Shard]) -> None:
    """Compare the documents with those of the funnel of a corpus. InputError: others."""
    if not is_corpus(corpus) or split is None:
        return
    expected = {s["step"]: s["documents"] for s in Funnel.load(corpus).steps}.get(split, 0)
    documents = sum(shard["documents"] for shard in shards)
    if documents != expected:
        raise InputError(
            f"{corpus}: expected the {expected:,} documents of {split} that its funnel has, got"
            f" {documents:,}: run fastlm data prepare again"
        )


def _publish(
    work: Work, out: Path, shards: Sequence[tuple[int, Shard]], tokenizer: Tokenizer, dtype: Any
) -> ShardIndex:
    """Link the finished files to their names in ``out``, and write the index."""
    # without its index the old set is invalid; the new one is valid once its index is written
    (out / INDEX).unlink(missing_ok=True)
    entries: list[Shard] = []
    try:
        for number, shard in shards:
            name = f"{len(entries):05d}"
            for ending in (".bin", ".starts"):
                source = Path(shard["file"]).with_suffix(ending).name
                _link(work.path(encode.__name__, number, source), out / f"{name}{ending}")
            entries.append({**shard, "file": f"{name}.bin"})
        sync(out)
    except OSError as error:
        raise write_error(out, error) from error
    return write_index(out, tokenizer, dtype, entries)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    part = source.with_name(f".{source.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
        sync(part)
    os.replace(part, target)
