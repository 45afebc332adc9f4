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
class PrefixBatch:
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


def prefix_batches(
    sequences: Sequence[list[int]], *, tokens: int, keys: int, max_sequences: int | None = None
) -> Iterator[PrefixBatch]:
    """Yield all sequences, none of them empty, in batches.

    Args:
        tokens: computed in a batch, unless one sequence alone is longer.
        keys: attended to by all documents of a batch, counted once for each; they are copied in
            each layer.
        most: sequences of a batch.
    """
    members: list[tuple[int, int]] = []  # with how many tokens each shares with the one before it
    total, key_count, last = 0, 0, []
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        sequence = sequences[i]
        shared = _common_prefix_length(last, sequence)
        full = total + len(sequence) - shared > tokens or key_count + len(sequence) > keys
        if members and (full or len(members) == max_sequences):
            yield _batch(sequences, members)
            members, total, key_count, shared = [], 0, 0, 0
        members.append((i, shared))
        total += len(sequence) - shared
        key_count += len(sequence) if len(sequence) > shared else 0
        last = sequence
    if members:
        yield _batch(sequences, members)


def _common_prefix_length(last: list[int], sequence: list[int]) -> int:
    """How many tokens a sequence has in common with the last one: with any, as they are sorted."""
    length = min(len(sequence), len(last))
    if sequence[:length] == last[:length]:
        return length
    return next(n for n in range(length) if sequence[n] != last[n])


def _batch(sequences: Sequence[list[int]], members: Sequence[tuple[int, int]]) -> PrefixBatch:
    ids: list[int] = []
    rows: list[np.ndarray] = []
    own_keys: list[np.ndarray] = []  # per document
    ends = [0]
    for i, shared in members:
        new_rows = np.arange(len(ids), len(ids) + len(sequences[i]) - shared)
        rows.append(np.concatenate([rows[-1][:shared], new_rows]) if shared else new_rows)
        if len(new_rows):
            ids += sequences[i][shared:]
            ends.append(len(ids))
            own_keys.append(rows[-1])
    keys = None
    key_ends = np.cumsum([0, *map(len, own_keys)], dtype=np.int32)
    if key_ends[-1] > len(ids):
        keys = torch.from_numpy(np.concatenate(own_keys)), torch.from_numpy(key_ends)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    return PrefixBatch([i for i, _ in members], torch.tensor([ids]), cu_seqlens, keys, rows)
