"""Token shards: packed tokens on disk, memory-mapped, and the sampler that makes batches of them.

``NNNNN.bin``: tokens of complete documents, each followed by end-of-text, little-endian uint16 (or
uint32 if the vocabulary needs it). ``NNNNN.starts``: int64 offset of each document in its shard.
``index.json``, written last, holds the sizes and SHA-256 sums; without it there is no data set.

Rejected: Arrow and .npy containers. A raw array is mapped in one line, and a checksum finds damage
that a container would not.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
from annotated_types import Interval, MinLen, Predicate
from typing_extensions import TypedDict

from fastlm.data.corpus import UNFINISHED_SHARDS
from fastlm.data.split import batches
from fastlm.errors import InputError
from fastlm.files import atomic_file, remove, write_json
from fastlm.progress import silent
from fastlm.schema import Count, read_document, validate

if TYPE_CHECKING:  # torch takes seconds, and processes that write shards do not need it
    import torch

    from fastlm.tokenizer.tokenizer import Tokenizer

INDEX = "index.json"
FORMAT = "fastlm-shards-1"
# A batch for the tokenizer's threads; larger ones gain nothing and need more memory
ENCODE_BYTES = 1 << 20
SHARD_TOKENS = 2**24  # 32 MiB of uint16: few files, and a checksum of one takes 20 ms
Positive = Annotated[int, Interval(ge=1, le=2**63 - 1)]


def is_shard_name(name: str) -> bool:
    """Return True if `write_shards` gives shards such names."""
    return re.fullmatch(r"\d{5,9}\.bin", name, re.ASCII) is not None


class Shard(TypedDict):
    file: Annotated[str, Predicate(is_shard_name)]
    tokens: Positive
    documents: Positive
    bytes_of_text: Count
    sha256: str
    starts_sha256: str


@dataclass
class ShardIndex:
    """The content of index.json. ``tokenizer``: the `Tokenizer.vocabulary_id` of the
    ``vocab_size`` ids.
    """

    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    eos_id: Count
    tokens: int
    documents: int
    bytes_of_text: int
    shards: Annotated[list[Shard], MinLen(1)]
    tokenizer: str
    format: Literal["fastlm-shards-1"] = FORMAT

    @property
    def fingerprint(self) -> str:
        """Return the hash of the tokens."""
        return hashlib.sha256("".join(s["sha256"] for s in self.shards).encode()).hexdigest()


@dataclass
class _SamplerState:
    data: str
    seed: int
    seq_len: int
    shuffle: bool
    epoch: Count
    position: Count


def write_shards(
    docs: Iterable[str],
    tokenizer: "Tokenizer",
    out: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    track=silent,
) -> ShardIndex:
    """Write the tokens of ``docs`` to ``out``. A shard ends with the document that brings it to
    ``shard_tokens``. `fastlm.tokenizer.corpus_encoding` does the same in several processes.

    InputError: no end-of-text token, ids outside the vocabulary, no documents, ``out`` not
    writable, disk full.
    """
    out = Path(out)
    dtype = token_dtype(tokenizer, shard_tokens)
    encoded = _encode(track(docs, "tokenizing", unit="documents"), tokenizer, dtype)
    first = next(encoded, None)
    if first is None:
        raise InputError("docs: expected at least one document, got none")
    # without its index the old set is invalid; the new one is valid once its index is written
    (out / INDEX).unlink(missing_ok=True)
    shards = _write_files(chain([first], encoded), out, shard_tokens)
    return write_index(out, tokenizer, dtype, shards)


def token_dtype(tokenizer: "Tokenizer", shard_tokens: int = SHARD_TOKENS) -> np.dtype:
    """Return the type of the tokens in shards. InputError: no end-of-text token, a bad size."""
    vocab_size, eos_id = tokenizer.vocab_size, tokenizer.eos_id
    if eos_id is None or not 0 <= eos_id < vocab_size:
        raise InputError(
            f"tokenizer: expected an end-of-text token within the vocabulary of {vocab_size}, "
            f"got {eos_id}"
        )
    if shard_tokens < 1:
        raise InputError(f"shard_tokens: expected 1 or more, got {shard_tokens}")
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_shard_files(
    docs: Iterable[str], tokenizer: "Tokenizer", out: Path, shard_tokens: int = SHARD_TOKENS
) -> list[Shard]:
    """Write shards of ``docs`` without an index, from number 0; none if there are no documents.
    InputError: as `write_shards`.
    """
    dtype = token_dtype(tokenizer, shard_tokens)
    return _write_files(_encode(docs, tokenizer, dtype), out, shard_tokens)


def _write_files(
    encoded: Iterator[tuple[np.ndarray, int]], out: Path, shard_tokens: int
) -> list[Shard]:
    shards: list[Shard] = []
    document = next(encoded, None)
    while document is not None:
        name, starts, tokens, size = f"{len(shards):05d}", [], 0, 0
        digest = hashlib.sha256()
        with atomic_file(out / f"{name}.bin") as f:
            while document is not None and tokens < shard_tokens:
                ids, text_bytes = document
                starts.append(tokens)
                tokens += len(ids)
                size += text_bytes
                digest.update(ids.data)
                f.write(ids.data)
                document = next(encoded, None)
        offsets = np.asarray(starts, "<i8").tobytes()
        with atomic_file(out / f"{name}.starts") as f:
            f.write(offsets)
        shards.append({
            "file": f"{name}.bin", "tokens": tokens, "documents": len(starts),
            "bytes_of_text": size,
            "sha256": digest.hexdigest(), "starts_sha256": hashlib.sha256(offsets).hexdigest(),
        })  # fmt: skip
    return shards


def write_index(
    out: Path, tokenizer: "Tokenizer", dtype: np.dtype, shards: list[Shard]
) -> ShardIndex:
    """Delete the files of an earlier set, and write the index of the shards in ``out``."""
    for stale in set(out.glob("[0-9]*.bin")) - {out / s["file"] for s in shards}:
        stale.unlink()
        stale.with_suffix(".starts").unlink(missing_ok=True)
    vocab_size = tokenizer.vocab_size
    info = ShardIndex(
        cast(Any, dtype.name), vocab_size, cast(int, tokenizer.eos_id), *_totals(shards), shards,
        tokenizer=tokenizer.vocabulary_id(vocab_size),
    )  # fmt: skip
    write_json(out / INDEX, asdict(info))
    return info


def remove_shards(folder: Path) -> None:
    """Delete the token shards in ``folder``, also unfinished ones, the index last: the next call
    completes one that was killed.
    """
    remove(folder / UNFINISHED_SHARDS)
    patterns = ("[0-9]*.bin", "[0-9]*.starts", ".[0-9]*.part", INDEX)
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink(missing_ok=True)


def _encode(
    docs: Iterable[str], tokenizer: "Tokenizer", dtype: np.dtype
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (tokens of a document with end-of-text, bytes of its text)."""
    for texts in batches(docs, len, ENCODE_BYTES):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            wide = np.asarray([*ids, tokenizer.eos_id], np.int64)
            bad = wide[(wide < 0) | (wide >= tokenizer.vocab_size)]
            if len(bad):
                raise InputError(
                    f"tokenizer: expected token ids from 0 to {tokenizer.vocab_size - 1},"
                    f" got {int(bad[0])}"
                )
            yield wide.astype(dtype), len(text.encode())


class TokenDataset:
    """The tokens of a shard folder as one long sequence, read on demand.

    ``verify`` compares every shard with its checksum (about 1.5 GB/s). ``vocab_size``: the
    vocabulary of the tokenizer or model that will use the tokens. InputError: no such data set, a
    shard missing, cut short or changed, another vocabulary.
    """

    def __init__(self, path: str | Path, *, verify: bool = True, vocab_size: int | None = None):
        self.path = Path(path)
        self._stamp = _stamp(self.path / INDEX)
        info = load_index(self.path)
        if vocab_size is not None and vocab_size != info.vocab_size:
            raise InputError(
                f"{self.path}: expected tokens of a vocabulary of {vocab_size}, got "
                f"{info.vocab_size}"
            )
        self.info = info
        self.tokens, self.documents = info.tokens, info.documents
        self.bytes_of_text = info.bytes_of_text
        self.vocab_size, self.eos_id = info.vocab_size, info.eos_id
        dtype = np.dtype(info.dtype).newbyteorder("<")
        self._shards = [
            self._map(s["file"], s["tokens"], dtype, s["sha256"] if verify else None)
            for s in info.shards
        ]
        self._ends = np.cumsum([len(s) for s in self._shards])
        self.fingerprint = info.fingerprint

    def check_tokenizer(self, tokenizer: "Tokenizer", name: str) -> None:
        """Raise InputError, about the argument ``name``, if the tokens are another tokenizer's."""
        expected = tokenizer.vocabulary_id(self.vocab_size)
        if self.info.tokenizer != expected:
            raise InputError(
                f"{name}: expected tokens of the tokenizer {expected[:12]}, got {self.path} of"
                f" {self.info.tokenizer[:12]}: make the shards again with this one (fastlm data"
                " shards)"
            )

    def check_unchanged(self) -> None:
        """Raise InputError if these shards were deleted (documents were forgotten) or replaced
        since they were opened. The mapped tokens are still the old ones.
        """
        stamp = _stamp(self.path / INDEX)
        if stamp == self._stamp:
            return
        if stamp is None or load_index(self.path).fingerprint != self.fingerprint:
            raise InputError(
                f"{self.path}: expected the same shards as at the start, they have changed"
                " (fastlm data forget, or data shards): start the training again"
            )
        self._stamp = stamp

    def _map(self, name: str, count: int, dtype: np.dtype, sha256: str | None) -> np.ndarray:
        file = self.path / name
        try:
            size = file.stat().st_size
            if size != count * dtype.itemsize:
                raise InputError(f"{file}: expected {count * dtype.itemsize:,} bytes, got {size:,}")
            if sha256 is not None:
                with open(file, "rb") as f:
                    actual = hashlib.file_digest(f, "sha256").hexdigest()
                if actual != sha256:
                    raise InputError(f"{file}: expected sha256 {sha256}, got {actual}")
            return np.memmap(file, dtype, mode="r", shape=(count,))
        except OSError as e:
            raise InputError(f"{file}: cannot be read: {e.strerror}") from None

    def read(self, start: int, n: int) -> np.ndarray:
        """Return tokens ``start .. start + n`` as int64 (n,), across shard boundaries."""
        if n < 0 or start < 0 or start + n > self.tokens:
            raise InputError(
                f"read: expected a range within 0..{self.tokens}, got {start}..{start + n}"
            )
        out, filled = np.empty(n, np.int64), 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while filled < n:
            tokens = self._shards[shard]
            position = start + filled - (int(self._ends[shard]) - len(tokens))
            count = min(n - filled, len(tokens) - position)
            out[filled : filled + count] = tokens[position : position + count]
            filled, shard = filled + count, shard + 1
        return out

    def document_starts(self) -> np.ndarray:
        """Return the position of every document's first token, int64 (documents,), ascending."""
        parts, base = [], 0
        for s in self.info.shards:
            name = Path(s["file"]).with_suffix(".starts").name
            parts.append(
                self._map(name, s["documents"], np.dtype("<i8"), s["starts_sha256"]) + base
            )
            base += s["tokens"]
        return np.concatenate(parts)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with a file; None if there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _totals(shards: list[Shard]) -> tuple[int, int, int]:
    tokens, documents, size = (
        sum(s[key] for s in shards) for key in ("tokens", "documents", "bytes_of_text")
    )
    return tokens, documents, size


def load_index(path: Path) -> ShardIndex:
    file, inner = path / INDEX, path / "train"
    if not file.exists():
        hint = f"{inner} is one" if (inner / INDEX).exists() else "'fastlm data shards' makes them"
        raise InputError(f"{path}: expected a folder of token shards ({hint}), {INDEX} is missing")
    try:
        info = read_document(file, ShardIndex, extra="forbid")
        if info.eos_id >= info.vocab_size:
            raise InputError(f"eos_id: expected one below {info.vocab_size}, got {info.eos_id}")
        totals = _totals(info.shards)
        if (stated := (info.tokens, info.documents, info.bytes_of_text)) != totals:
            raise InputError(f"expected the totals of the shards, {totals}, got {stated}")
        return info
    except InputError as e:
        raise InputError(f"{file}: expected the index of token shards: {e}") from None


def document_offsets(input_ids: "torch.Tensor", eos_id: int) -> "torch.Tensor | None":
    """Return ``cu_seqlens`` (int32) of the documents in packed windows (B, S); None where each
    window is inside one document.

    A document begins with the end-of-text token before it: its first token is predicted from that
    token alone. Every token is thus predicted once, and generation can begin with end-of-text. A
    window begins a document of its own.
    """
    import torch

    is_start = input_ids == eos_id
    is_start[:, 0] = True
    offsets = is_start.flatten().nonzero()[:, 0]
    if len(offsets) == len(input_ids):
        return None
    end = offsets.new_tensor([input_ids.numel()])
    return torch.cat([offsets, end]).int()


class BatchSampler:
    """Batches of packed windows: ``next_batch() -> (input_ids, labels)``, both int64 (batch_size,
    seq_len).

    ``labels[b, i]`` is the token after ``input_ids[b, i]``. An epoch cuts the data into consecutive
    windows that start at a random offset below ``seq_len``, so the windows differ in every epoch.
    It yields each window once, in an order that depends only on ``seed`` and epoch. The last batch
    of an epoch is filled with windows of the next one. ``shuffle=False``: in order, offset 0. The
    state is the position: with the same data, seed and seq_len the sampler resumes exactly, at any
    batch size.

    InputError: fewer than seq_len + 1 tokens, sizes below 1, a state of other data.
    """

    def __init__(
        self, dataset: TokenDataset, batch_size: int, seq_len: int, *, seed: int,
        shuffle: bool = True,
    ):  # fmt: skip
        for name, value, minimum in (
            ("batch_size", batch_size, 1), ("seq_len", seq_len, 1), ("seed", seed, 0),
        ):  # fmt: skip
            if value < minimum:
                raise InputError(f"{name}: expected {minimum} or more, got {value}")
        if dataset.tokens < seq_len + 1:
            raise InputError(
                f"dataset: expected at least seq_len + 1 = {seq_len + 1} tokens, got "
                f"{dataset.tokens}"
            )
        self.dataset, self.batch_size, self.seq_len = dataset, batch_size, seq_len
        self.seed, self.shuffle = seed, shuffle
        self._begin(epoch=0)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        windows = (self.dataset.tokens - 1) // self.seq_len
        self._offset, self._order = 0, np.arange(windows)
        if self.shuffle:
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._offset = int(rng.integers(min(self.seq_len, self.dataset.tokens - self.seq_len)))
            self._order = rng.permutation((self.dataset.tokens - 1 - self._offset) // self.seq_len)

    def next_batch(self) -> "tuple[torch.Tensor, torch.Tensor]":
        return self.read(self.next_windows())

    def next_windows(self) -> np.ndarray:
        """Return the start positions of the windows of the next batch, without reading them."""
        starts = np.empty(self.batch_size, np.int64)
        for row in range(self.batch_size):
            if self.position == len(self._order):
                self._begin(self.epoch + 1)
            starts[row] = self._offset + int(self._order[self.position]) * self.seq_len
            self.position += 1
        return starts

    def read(self, starts: np.ndarray) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return the batch of these windows. InputError: the shards have changed."""
        self.dataset.check_unchanged()
        rows = np.stack([self.dataset.read(int(start), self.seq_len + 1) for start in starts])
        import torch

        batch = torch.from_numpy(rows)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "epoch": self.epoch, "position": self.position}

    def _identity(self) -> dict[str, Any]:
        options = {"seed": self.seed, "seq_len": self.seq_len, "shuffle": self.shuffle}
        return {"data": self.dataset.fingerprint, **options}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restored = validate(state, _SamplerState, "sampler state", extra="forbid")
        for key, expected in self._identity().items():
            if state[key] != expected:
                raise InputError(
                    f"sampler state: expected {key} {expected!r}, got {state[key]!r:.80}"
                )
        self._begin(restored.epoch)
        if restored.position > len(self._order):
            raise InputError(
                f"sampler state: expected a position within 0..{len(self._order)}, "
                f"got {restored.position}"
            )
        self.position = restored.position
