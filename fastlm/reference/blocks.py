"""Split scores and logits into blocks, so that not all of them exist at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

# Scores or logits that exist at once: 32 MB per temporary in float64, so that the reference result
# for 2048 x 2048 scores or 32768 classes fits in memory along with what is tested.
SCORES = 1 << 22


_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Treat all rows as one block inside the ``with``: its tensors have no memory."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def row_blocks(rows: int, classes: int) -> list[slice]:
    if _shapes_only.get():
        return [slice(None)]
    step = max(1, SCORES // max(1, classes))
    return [slice(i, i + step) for i in range(0, max(1, rows), step)]


def concatenate(parts: Iterator[Tensor], rows: int) -> Tensor:
    """Return torch.cat(parts), which has `rows` rows.

    A part is copied before the next one is computed, so that not all of them exist at once.
    """
    part = next(parts)
    if part.shape[0] == rows:
        return part
    # created from a part: under vmap it is batched as all parts are, under forward-mode AD it gets
    # their tangents
    result, at = part.new_empty(rows, *part.shape[1:]), 0
    while at < rows:
        result[at : at + part.shape[0]] = part
        at += part.shape[0]
        part = next(parts, part)
    return result
