"""Pack token sequences so that one forward computes a common prefix once.

The questions of a set share their few-shot examples, and the answers to a question share the
question. The sequences are sorted. Each becomes a document of only the tokens that it does not
share with the sequence before it, and attends to the keys of the shared tokens (``keys`` of
`fastlm.model.causal_lm.CausalLM.hidden`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixBatch:
    """The input of one forward over the sequences with the indices ``members``.

    ids: (1, total) int64.
    cu_seqlens: (documents + 1,) int32.
    keys: (rows, cu_seqlens_k) of `CausalLM.hidden`; None where nothing is shared.
    rows: for each member the positions of its tokens among the ``total``.
    """

    members: list[int]
    ids: Tensor
    cu_seqlens: Tensor
    keys: tuple[Tensor, Tensor] | None
    rows: list[np.ndarray]


def prefix_batches(
    sequences: Sequence[list[int]], *, tokens: int, keys: int, max_sequences: int | None = None
) -> Iterator[PrefixBatch]:
    """Yield all sequences in batches. No sequence may be empty.

    Args:
        tokens: maximum number of computed tokens per batch, unless one sequence has more.
        keys: maximum number of keys of a batch, counted per document; each layer copies them.
        max_sequences: maximum number of sequences of a batch.
    """
    members: list[tuple[int, int]] = []  # (index, tokens shared with the sequence before)
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
    """Return the length of the prefix shared with the last sequence. As sequences are sorted, no
    earlier one shares more."""
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
