"""flash-attn's ``bert_padding``: padded batches to packed rows and back, in plain torch::

    from fastlm.compat.flash_attn.bert_padding import pad_input, unpad_input

Names, arguments and results are those of flash-attn 2.8. There are no kernels, only gathers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.errors import InputError


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Return ``x[indices]``: rows of x (N, ...)."""
    return x.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Return (first_axis_dim, ...) with row ``indices[i]`` from ``values[i]``, zero elsewhere."""
    rows = values.new_zeros(first_axis_dim, *values.shape[1:])
    return rows.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Return the rows of hidden_states (B, S, ...) where attention_mask (B, S) is not 0.

    unused_mask: (B, S), more rows to keep, disjoint from those of attention_mask.

    Returns:
        rows (total, ...); their indices in the flat batch (total,); cu_seqlens (B + 1,) int32;
        length of the longest sequence, an int (this waits for a GPU); rows per sequence of
        attention_mask alone, (B,) int32.
    """
    if (expected := hidden_states.shape[:2]) != attention_mask.shape:
        got = tuple(attention_mask.shape)
        raise InputError(f"attention_mask: expected {tuple(expected)} as hidden_states, got {got}")
    mask = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero()[:, 0]
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, longest, attention_mask.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: (total, ...) -> (batch, seqlen, ...), zero where there was no row."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.unflatten(0, (batch, seqlen))
