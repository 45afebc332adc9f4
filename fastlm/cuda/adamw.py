"""AdamW through csrc/cuda/adamw.cu: one launch for all tensors, after two or three small ones."""

from typing import Any

import torch
from torch import Tensor

from fastlm.cuda import constants, extension, stream
from fastlm.cuda.adamw_tables import CHUNK, tables_of


def _pointed_at(arguments: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that the table points to, (read, written), for the emulator's access checks."""
    params, grads, *others = arguments[:8]
    return grads, [t for column in (params, *others) for t in column if t is not None]


def adamw(*arguments: Any) -> None:
    """`reference.adamw`, in place. Everything is checked before anything is written."""
    *tensors_options_keys, max_grad_norm, grad_norm, have_norm = arguments
    tables = tables_of(*tensors_options_keys, by_kind=False)
    device, (_, chunks) = tables.tensors.device, tables.chunks[0]
    count = len(tables.tensors)
    size = count, constants().ADAMW_SCALARS
    scalars = torch.empty(size, dtype=torch.float32, device=device)
    keys = torch.empty(count, dtype=torch.int32, device=device)
    clip = sums = None
    if grad_norm is not None:
        clip = torch.empty(1, dtype=torch.float32, device=device)
        if not have_norm:
            sums = torch.empty(len(chunks), dtype=torch.float64, device=device)
    read, written = ([], []) if device.type == "cuda" else _pointed_at(arguments)
    extension().adamw(
        tables.tensors, tables.settings, chunks, CHUNK, scalars, keys, sums, grad_norm, clip,
        max_grad_norm, read, written, stream(tables.tensors),
    )  # fmt: skip
