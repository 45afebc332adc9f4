"""A teacher's distributions on disk: per learnt token its k likeliest tokens, their
log-probabilities, and the log of what is left over.

A folder has shards ``teacher-00000.safetensors`` and so on, each complete in itself:

- ``ids`` (rows, k), uint16 or int32; ``logprobs`` (rows, k + 1) float16, the rest last. A row is
  divided by its sum when it is read, so that rounding leaves a distribution;
- ``examples`` (E, 8) uint8, `fastlm.train.encoding.digest` of each example, and ``starts`` (E + 1)
  int64, where its rows begin. An example has a row for each learnt token;
- metadata: "format", and "header", the JSON of `Header`.

An example is found by its tokens and mask: order, held-out share and other examples do not matter.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.errors import InputError
from fastlm.files import make_folder, reason, save_atomic
from fastlm.progress import silent
from fastlm.schema import parse
from fastlm.train.encoding import IGNORE, digest, pack

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fastlm.model.causal_lm import CausalLM
    from fastlm.train.encoding import Example

FORMAT = "fastlm teacher logits 1"
SHARD_BYTES = 1 << 28  # written at once
SAVE_SECONDS = 60.0  # or what was measured in this time: what a kill loses is less
NAME = re.compile(r"teacher-(\d+)\.safetensors")
PASS_TOKENS = 4096  # of a forward of the teacher
WORKSPACE = 1 << 26  # bytes of the teacher's logits at a time
OFF = 0.02  # float16 moves the sum of a row by less


@dataclass(frozen=True)
class Header:
    """``teacher``: a digest of its weights. Logits were divided by ``temperature``."""

    teacher: str
    vocab_size: int
    top_k: int
    temperature: float


class TeacherLogits:
    """The distributions in ``folder``. InputError: no shards, damaged ones, ones of two teachers.

    ``header`` is None for a folder without shards, which ``empty`` allows.
    """

    def __init__(self, folder: Path, *, empty: bool = False):
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.header: Header | None = None
        self.places: dict[str, tuple[Any, int, int]] = {}  # digest -> shard, first row, end
        self.shards = 0
        self.next = 0  # the number of a new shard, beyond all others: any of them may be missing
        for path in sorted(folder.glob("teacher-*.safetensors")):
            try:
                self._add(path, safe_open(path, framework="np"))
            except (OSError, SafetensorError, KeyError) as error:
                raise self._bad(path, reason(error)) from None
            self.shards += 1
            if number := NAME.fullmatch(path.name):
                self.next = max(self.next, int(number[1]) + 1)
        if self.header is None and not empty:
            raise InputError(f"teacher_logits: wanted shards in {folder}, got none")

    def __contains__(self, example: "Example") -> bool:
        return digest([example]) in self.places

    def rows(self, examples: Sequence["Example"]) -> "tuple[np.ndarray, np.ndarray]":
        """Return ids (rows, k) int64 and logprobs (rows, k + 1) float32 of the learnt tokens of
        ``examples``, in order. InputError: an example that is not there, with its line, or rows
        that are no distributions.
        """
        import numpy as np

        assert self.header is not None
        found = []
        for example in examples:
            if (key := digest([example])) not in self.places:
                raise InputError(
                    f"teacher_logits: wanted the tokens of {example.place} in {self.folder}, which"
                    " holds other ones: was it made with this data, chat template, date, seq_len"
                    " and overlong?"
                )
            shard, begin, end = self.places[key]
            ids = shard.get_slice("ids")[begin:end].astype(np.int64)
            logprobs = shard.get_slice("logprobs")[begin:end].astype(np.float32)
            if (ids < 0).any() or (ids >= self.header.vocab_size).any():
                raise self._bad(self.folder, f"ids beyond {self.header.vocab_size}")
            total = np.exp(logprobs).sum(-1, dtype=np.float32)
            if not (np.abs(total - 1) < OFF).all():  # nor NaN
                raise self._bad(self.folder, "rows that are no distributions")
            found.append((ids, logprobs - np.log(total)[:, None]))
        ids, logprobs = zip(*found)
        return np.concatenate(ids), np.concatenate(logprobs)

    def identity(self, examples: Sequence["Example"]) -> str:
        """Identify the header and the rows of ``examples``, all of which are read and checked."""
        import hashlib

        assert self.header is not None
        found = hashlib.sha256(json.dumps(asdict(self.header)).encode())
        for example in examples:
            for array in self.rows([example]):
                found.update(array.tobytes())
        return found.hexdigest()[:16]

    def _add(self, path: Path, shard: Any) -> None:
        meta = shard.metadata() or {}
        if meta.get("format") != FORMAT:
            raise self._bad(path, f"the format {meta.get('format')!r:.40}")
        try:
            header = parse(meta["header"], Header, "header", extra="forbid")
        except (ValueError, InputError) as error:
            raise self._bad(path, f"a header that is none: {reason(error)}") from None
        if self.header not in (None, header):
            raise self._bad(path, "another header than in the shards before it")
        self.header = header
        examples, starts = shard.get_tensor("examples"), shard.get_tensor("starts")
        rows, k = int(starts[-1]) if starts.ndim == 1 and len(starts) else -1, header.top_k
        for name, tensor, shape in (
            ("examples", examples, [len(starts) - 1, 8]), ("ids", None, [rows, k]),
            ("logprobs", None, [rows, k + 1]),
        ):  # fmt: skip
            got = list(shard.get_slice(name).get_shape() if tensor is None else tensor.shape)
            if got != shape:
                raise self._bad(path, f"{name} of shape {got}, not {shape}")
        bounds = starts.tolist()
        if bounds[0] != 0 or sorted(bounds) != bounds or k < 1:
            raise self._bad(path, "starts out of order")
        for key, begin, end in zip(examples, bounds, bounds[1:]):
            self.places[key.tobytes().hex()] = (shard, begin, end)

    @staticmethod
    def _bad(where: Path, got: str) -> InputError:
        return InputError(f"teacher_logits: {where}: wanted shards of `fastlm distill`, got {got}")


def write_logits(
    folder: Path,
    teacher: "CausalLM",
    examples: Sequence["Example"],
    header: Header,
    *,
    track: Callable[..., Any] = silent,
    shard_bytes: int = SHARD_BYTES,
) -> TeacherLogits:
    """Measure the teacher's distributions over the learnt tokens of ``examples``, but for those
    that ``folder`` has already, and return the folder's.

    A shard is written for `SHARD_BYTES`, every `SAVE_SECONDS`, and where the call is interrupted;
    the next call keeps them. InputError: the folder's shards have another header.
    """
    import numpy as np

    known = TeacherLogits(make_folder(folder), empty=True)
    for name, wanted in asdict(header).items():
        got = wanted if known.header is None else getattr(known.header, name)
        if got != wanted:
            raise InputError(f"teacher_logits: {folder} was made with {name} {got}, not {wanted}")
    missing = {digest([e]): e for e in examples if e not in known}
    wide = header.vocab_size > 1 << 16
    row_bytes = header.top_k * (4 if wide else 2) + 2 * (header.top_k + 1)
    kept: list[tuple[str, Any, Any]] = []
    number = known.next

    def save() -> None:
        nonlocal number
        from safetensors.numpy import save_file

        keys, ids, logprobs = zip(*kept)
        tensors = {
            "examples": np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 8),
            "starts": np.cumsum([0, *map(len, ids)], dtype=np.int64),
            "ids": np.concatenate(ids).astype(np.int32 if wide else np.uint16),
            "logprobs": np.concatenate(logprobs),
        }
        meta = {"format": FORMAT, "header": json.dumps(asdict(header))}
        path = folder / f"teacher-{number:05d}.safetensors"
        save_atomic(path, lambda part: save_file(tensors, part, meta))
        number += 1
        kept.clear()

    size, saved = 0, time.monotonic()
    batches = list(_passes(missing))
    try:
        for batch in track(batches, "asking the teacher", unit="batches"):
            ids, logprobs = _measure(teacher, [missing[key] for key in batch], header)
            at = 0
            for key in batch:
                end = at + missing[key].learnt
                kept.append((key, ids[at:end], logprobs[at:end]))
                at = end
            size += at * row_bytes
            if size >= shard_bytes or time.monotonic() - saved >= SAVE_SECONDS:
                save()
                size, saved = 0, time.monotonic()
    finally:
        if kept:
            save()
    return TeacherLogits(folder)


def _passes(missing: "dict[str, Example]") -> Iterator[list[str]]:
    """Groups of examples of about `PASS_TOKENS` tokens."""
    batch: list[str] = []
    tokens = 0
    for key, example in missing.items():
        if batch and tokens + len(example.ids) > PASS_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(key)
        tokens += len(example.ids)
    if batch:
        yield batch


def _measure(
    teacher: "CausalLM", examples: Sequence["Example"], header: Header
) -> "tuple[np.ndarray, np.ndarray]":
    """Return ids (rows, k) and logprobs with the rest (rows, k + 1) float16."""
    import numpy as np
    import torch

    device = teacher.device
    with torch.no_grad():
        ids, labels, cu_seqlens = pack(examples, device)
        hidden = teacher.hidden(ids, cu_seqlens=cu_seqlens)[0][labels[0] != IGNORE]
        head = teacher.head_matrix(hidden.dtype)
        step = max(1, WORKSPACE // (4 * len(head)))
        parts = [_likeliest(teacher, h, head, header) for h in hidden.split(step)]
    ids, logprobs = (torch.cat(column).cpu().numpy() for column in zip(*parts))
    return ids, logprobs.astype(np.float16)


def _likeliest(
    teacher: "CausalLM", hidden: "Tensor", head: "Tensor", header: Header
) -> "tuple[Tensor, Tensor]":
    import torch

    from fastlm.train.topk_distillation import LEAST_REST, logprobs_at

    # 16-bit scores choose the tokens; their log-probabilities are sums in float32
    ids = torch.nn.functional.linear(hidden, head).float().topk(header.top_k).indices
    logprobs = logprobs_at(
        hidden, head, ids, temperature=header.temperature,
        softcap=teacher.config.final_logit_softcapping,
    )  # fmt: skip
    rest = 1 - logprobs.exp().sum(-1, keepdim=True)
    if header.top_k == header.vocab_size:
        rest = torch.zeros_like(rest)
    rest = torch.where(rest > LEAST_REST, rest, torch.zeros_like(rest)).log()
    return ids, torch.cat([logprobs, rest], -1)
