"""Token sequences that begin alike, packed so that one forward computes a common beginning once.

The questions of a set share their few-shot examples, and the answers to one question share it. The
sequences are sorted; each becomes a document of only those tokens that the sequence before it does
not begin with, and attends to the others where they stand (``keys`` of
`fastlm.model.causal_lm.CausalLM.hidden`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One forward over the sequences ``members``, indices into what was packed.

    ``ids`` (1, total) int64; ``cu_seqlens`` (documents + 1,) int32; ``keys``: (rows, cu_seqlens_k)
    of `CausalLM.hidden`, None where nothing is shared; ``rows[i]`` (tokens of member i,): where
    each of its tokens stands among the ``total``.
    """

    members: list[int]
    ids: Tensor
    cu_seqlens: Tensor
    keys: tuple[Tensor, Tensor] | None
    rows: list[np.ndarray]


def batches(
    sequences: Sequence[list[int]], *, tokens: int, keys: int, most: int | None = None
) -> Iterator[Batch]:
    """Yield all sequences, none of them empty, in batches.

    Args:
        tokens: computed in a batch, unless one sequence alone is longer.
        keys: attended to by all documents of a batch, counted once for each; they are copied in
            each layer.
        most: sequences of a batch.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    part = _Part()
    for i in order:
        sequence = sequences[i]
        new = len(sequence) - part.shared(sequence)
        full = part.total + new > tokens or part.key_count + len(sequence) > keys
        if part.members and (full or len(part.members) == most):
            yield part.batch()
            part = _Part()
        part.add(i, sequence)
    if part.members:
        yield part.batch()


class _Part:
    """A batch that grows."""

    def __init__(self) -> None:
        self.members: list[int] = []
        self.rows: list[np.ndarray] = []
        self.ids: list[int] = []
        self.ends = [0]
        self.keys: list[np.ndarray] = []  # per document
        self.key_count = 0
        self.last: list[int] = []

    @property
    def total(self) -> int:
        return len(self.ids)

    def shared(self, sequence: list[int]) -> int:
        """How many tokens the sequence has in common with the last one: with any, as they are
        sorted."""
        length = min(len(sequence), len(self.last))
        if sequence[:length] == self.last[:length]:
            return length
        return next(n for n in range(length) if sequence[n] != self.last[n])

    def add(self, index: int, sequence: list[int]) -> None:
        shared = self.shared(sequence)
        own = np.arange(self.total, self.total + len(sequence) - shared)
        rows = np.concatenate([self.rows[-1][:shared], own]) if shared else own
        if len(own):
            self.ids += sequence[shared:]
            self.ends.append(self.total)
            self.keys.append(rows)
            self.key_count += len(rows)
        self.members.append(index)
        self.rows.append(rows)
        self.last = sequence

    def batch(self) -> Batch:
        keys = None
        if self.key_count > self.total:
            ends = np.cumsum([0, *map(len, self.keys)])
            keys = (
                torch.from_numpy(np.concatenate(self.keys)),
                torch.from_numpy(ends.astype(np.int32)),
            )
        ends = torch.tensor(self.ends, dtype=torch.int32)
        return Batch(self.members, torch.tensor([self.ids]), ends, keys, self.rows)
