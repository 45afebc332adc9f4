"""Decode steps: each row is a token of a sequence."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MAX_ROWS = 64  # of a step; with more rows the modules' matrix products are as fast


class DecodeRow(NamedTuple):
    """A token at ``position`` of its sequence. Its key and value are written to the blocks of
    ``block_table``. ``needs_logits``: compute the logits that follow it."""

    token: int
    position: int
    block_table: list[int]
    needs_logits: bool


class DecodeRunner(Protocol):
    """Runs decode steps of a model (`fastlm.model.model_runner`)."""

    def logits(
        self, tokens: Tensor, lengths: Tensor, table: Tensor, *, logits_indices: Tensor
    ) -> Tensor:
        """Compute a token per row; see `fastlm.model.cpu_decode.CpuDecodeRunner.logits`."""
        ...


class DecodeBatch:
    """Computes rows with ``runner``. The tensor of their block tables is kept from step to step. A
    row of it is rewritten where another sequence has its index, or where the sequence has more
    blocks."""

    def __init__(self, runner: DecodeRunner):
        self.runner = runner
        self._table = torch.zeros(0, 0, dtype=torch.int32)
        self._written: list[tuple[list[int], int]] = []  # per row: its block table and its length

    @torch.inference_mode()
    def logits(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Compute rows, `MAX_ROWS` at a time. Return the logits (L, V) of those with
        `needs_logits`."""
        out: list[Tensor] = []
        for begin in range(0, len(rows), MAX_ROWS):
            part = rows[begin : begin + MAX_ROWS]
            logits_indices = [i for i, row in enumerate(part) if row.needs_logits]
            out.append(
                self.runner.logits(
                    torch.tensor([row.token for row in part]),
                    torch.tensor([row.position for row in part]),
                    self._build_table(part),
                    logits_indices=torch.tensor(logits_indices, dtype=torch.int64),
                )
            )
        return out[0] if len(out) == 1 else torch.cat(out)

    def _build_table(self, rows: Sequence[DecodeRow]) -> Tensor:
        width = max(len(row.block_table) for row in rows)
        if self._table.shape != (len(rows), width):
            self._table = torch.zeros(len(rows), width, dtype=torch.int32)
            self._written = [([], 0)] * len(rows)
        for i, row in enumerate(rows):
            block_table, count = self._written[i]
            if block_table is not row.block_table or count != len(row.block_table):
                count = len(row.block_table)
                self._table[i, :count] = torch.tensor(row.block_table, dtype=torch.int32)
                self._written[i] = row.block_table, count
        return self._table
