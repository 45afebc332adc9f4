"""AdamW by csrc/cuda/adamw.cu: one launch for all tensors, after two or three small ones."""

import torch
from torch import Tensor

from fastlm.cuda import constants, extension, stream
from fastlm.cuda.adamw_tables import CHUNK, build_tables
from fastlm.reference import AdamWTensor


def _pointed_at(tensors: list[AdamWTensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that the table points to, (read, written), for the emulator's checks."""
    written = [
        tensor
        for t in tensors
        for tensor in (
            t.param, t.step, t.exp_avg, t.exp_avg_sq, t.exp_avg_scale, t.exp_avg_sq_scale, t.master,
        )
        if tensor is not None
    ]  # fmt: skip
    return [t.grad for t in tensors], written


def adamw(
    tensors: list[AdamWTensor], max_grad_norm: float, grad_norm: Tensor | None, have_norm: bool
) -> None:
    """Run `reference.adamw`, in place. Everything is checked before anything is written."""
    tables = build_tables(tensors, by_variant=False)
    device, (_, chunks) = tables.tensors.device, tables.chunks[0]
    count = len(tables.tensors)
    size = count, constants().ADAMW_SCALARS
    scalars = torch.empty(size, dtype=torch.float32, device=device)
    keys = torch.empty(count, dtype=torch.int32, device=device)
    clip = sums = None
    if grad_norm is not None:
        clip = torch.empty(1, dtype=torch.float32, device=device)
        if not have_norm:
            # at least one: with none the kernel would take the norm as already computed
            sums = torch.empty(max(len(chunks), 1), dtype=torch.float64, device=device)
    read, written = ([], []) if device.type == "cuda" else _pointed_at(tensors)
    extension().adamw(
        tables.tensors, tables.settings, chunks, CHUNK, scalars, keys, sums, grad_norm, clip,
        max_grad_norm, read, written, stream(tables.tensors),
    )  # fmt: skip
