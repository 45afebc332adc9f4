"""Tokens of sequences as rows of decode steps."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MAX_ROWS = 64  # of a step: beyond, the modules' matrix products are as fast


class Row(NamedTuple):
    """A token behind ``position`` others of its sequence, whose ``pages`` get its key and value.
    ``wanted``: what follows it is asked for."""

    token: int
    position: int
    pages: list[int]
    wanted: bool


class Decoder(Protocol):
    """Runs decode steps of a model (`fastlm.model.runner`)."""

    def logits(
        self, tokens: Tensor, lengths: Tensor, table: Tensor, *, wanted: Tensor
    ) -> Tensor: ...


@torch.inference_mode()
def logits_of(decoder: Decoder, rows: Sequence[Row]) -> list[Tensor]:
    """Compute rows, in steps of `MAX_ROWS`. Return logits (V,) of those wanted, in order."""
    out: list[Tensor] = []
    for begin in range(0, len(rows), MAX_ROWS):
        part = rows[begin : begin + MAX_ROWS]
        width = max(len(row.pages) for row in part)
        table = [row.pages + [0] * (width - len(row.pages)) for row in part]
        ends = [i for i, row in enumerate(part) if row.wanted]
        out += decoder.logits(
            torch.tensor([row.token for row in part]),
            torch.tensor([row.position for row in part]),
            torch.tensor(table, dtype=torch.int32),
            wanted=torch.tensor(ends, dtype=torch.int64),
        )
    return out
