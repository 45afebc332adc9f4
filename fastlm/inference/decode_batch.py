"""Tokens of sequences as rows of decode steps."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MAX_ROWS = 64  # of a step: beyond, the modules' matrix products are as fast


class DecodeRow(NamedTuple):
    """A token behind ``position`` others of its sequence, whose ``pages`` get its key and value.
    ``needs_logits``: what follows it is asked for."""

    token: int
    position: int
    pages: list[int]
    needs_logits: bool


class DecodeRunner(Protocol):
    """Runs decode steps of a model (`fastlm.model.model_runner`)."""

    def logits(
        self, tokens: Tensor, lengths: Tensor, table: Tensor, *, logits_indices: Tensor
    ) -> Tensor: ...


class DecodeBatch:
    """Computes rows with ``runner``. The table of their pages stays from step to step; a row of it
    is written again where the sequence in that place has changed or has more pages."""

    def __init__(self, runner: DecodeRunner):
        self.runner = runner
        self._table = torch.zeros(0, 0, dtype=torch.int32)
        self._written: list[tuple[list[int], int]] = []  # pages of each row, and how many

    @torch.inference_mode()
    def logits(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Compute rows, `MAX_ROWS` at a time. Return logits (L, V) of those with `needs_logits`."""
        out: list[Tensor] = []
        for begin in range(0, len(rows), MAX_ROWS):
            part = rows[begin : begin + MAX_ROWS]
            logits_indices = [i for i, row in enumerate(part) if row.needs_logits]
            out.append(
                self.runner.logits(
                    torch.tensor([row.token for row in part]),
                    torch.tensor([row.position for row in part]),
                    self._table_of(part),
                    logits_indices=torch.tensor(logits_indices, dtype=torch.int64),
                )
            )
        return out[0] if len(out) == 1 else torch.cat(out)

    def _table_of(self, rows: Sequence[DecodeRow]) -> Tensor:
        width = max(len(row.pages) for row in rows)
        if self._table.shape != (len(rows), width):
            self._table = torch.zeros(len(rows), width, dtype=torch.int32)
            self._written = [([], 0)] * len(rows)
        for i, row in enumerate(rows):
            pages, count = self._written[i]
            if pages is not row.pages or count != len(row.pages):
                count = len(row.pages)
                self._table[i, :count] = torch.tensor(row.pages, dtype=torch.int32)
                self._written[i] = row.pages, count
        return self._table
