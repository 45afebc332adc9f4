"""Build the tables that AdamW's GPU kernels (kernels/adamw.py, csrc/cuda/adamw.cu) read.

    tensors (T, 12) int64   pointers, elements, settings and random key of each tensor
    settings (S, 8) float64 lr, betas, eps, weight decay, sign: one row per set of options
    chunks (C, 2) int32     a program's work: CHUNK elements of one tensor

Each table is cached as long as its contents are the same (addresses; sizes and dtypes; options).
After a change it is uploaded in one copy, for which the host does not wait: a schedule of lr costs
64 bytes per step.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlm import reference
from fastlm.errors import InputError
from fastlm.reference import AdamWTensor

# elements per program: 1 MB of chunk table per 1e9 parameters, and enough programs from 1 M
# parameters on; divides the 32768 elements that share a key of random numbers
CHUNK = 8192
# columns of `tensors`: PARAM, GRAD, MOMENT, ROOT, MOMENT_SCALE, ROOT_SCALE, MASTER, SIZE, STEP,
# SETTING, SEED, ORDINAL, whose upper 32 bits are `KernelVariant.code`
COLUMNS = 12
TYPES = (torch.float32, torch.bfloat16, torch.float16)
MASTERS = {None: 0, torch.float32: 1, torch.int16: 2}
_CACHED_TABLES = 16  # of each sort: for a process's optimizers and patterns of gradient addresses


class KernelVariant(NamedTuple):
    """The properties of a tensor that are compiled into a Triton kernel."""

    param: torch.dtype
    grad: torch.dtype
    masters: int  # a value of MASTERS
    packed: bool  # 8-bit states
    rounds: bool  # stochastic rounding
    aligned: bool  # every pointer allows 128-bit accesses

    def code(self) -> int:
        flags = self.packed << 6 | self.rounds << 7 | self.aligned << 8
        return TYPES.index(self.param) | TYPES.index(self.grad) << 2 | self.masters << 4 | flags


class AdamWTables(NamedTuple):
    """The three tables on the device."""

    tensors: Tensor
    settings: Tensor
    chunks: tuple[tuple[KernelVariant | None, Tensor], ...]  # by variant; None: all variants


_captured: list[AdamWTables] = []  # a CUDA graph reads its tables as long as it exists


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device without waiting for the work that runs there."""
    if _is_capturing(device):
        raise InputError(
            "step: expected, in the capture of a CUDA graph, gradients where they were in a step"
            " before it (zero_grad(set_to_none=False)), the same options and lr as a tensor on"
            f" {device}, got others"
        )
    host = torch.from_numpy(values)
    return (
        host.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else host.to(device)
    )


@functools.lru_cache(maxsize=_CACHED_TABLES)
def _tensor_table(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    table = np.array(rows, dtype=np.int64).reshape(len(rows), COLUMNS)
    return _upload(table, device)


@functools.lru_cache(maxsize=_CACHED_TABLES)
def _chunk_tables(
    device: torch.device, sizes: tuple[int, ...], variants: tuple[KernelVariant | None, ...]
) -> tuple[tuple[KernelVariant | None, Tensor], ...]:
    chunks = []
    for variant in dict.fromkeys(variants):
        indices = np.array([i for i, v in enumerate(variants) if v == variant])
        counts = -(-np.array(sizes)[indices] // CHUNK)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        table = np.stack([np.repeat(indices, counts), np.arange(counts.sum()) - first], 1)
        chunks.append((variant, _upload(table.astype(np.int32), device)))
    return tuple(chunks)


@functools.lru_cache(maxsize=_CACHED_TABLES)
def _setting_table(
    device: torch.device, settings: tuple[tuple[float, ...], ...], tensor_lrs: tuple
) -> Tensor:
    """Upload the settings. `tensor_lrs` has the rows and addresses of learning rates in tensors,
    which are written to the table in every step."""
    padded = np.zeros((len(settings), 8))
    padded[:, :6] = settings
    return _upload(padded, device)


def _check(name: str, tensor: Tensor, device: torch.device, size: int | None = None) -> None:
    if tensor.dtype not in TYPES:
        got = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{name}: expected float32, bfloat16 or float16, got {got}")
    if tensor.device != device:
        raise InputError(
            f"{name}: expected device {device} as the first parameter, got {tensor.device}"
        )
    if size is not None and tensor.numel() != size:
        raise InputError(f"{name}: expected elements: {size}, got {tensor.numel()}")


def build_tables(tensors: list[AdamWTensor], *, by_variant: bool) -> AdamWTables:
    """Check the arguments of `reference.adamw` and return their tables.

    With `by_variant` there is a table of chunks for each variant, for kernels that are compiled for
    one variant. Otherwise there is one table.
    """
    device = tensors[0].param.device
    rows: list[tuple[int, ...]] = []
    variants: list[KernelVariant | None] = []
    settings: dict[tuple, int] = {}
    lrs: dict[int, Tensor] = {}  # row of the settings -> lr
    seeds: dict[int, int] = {}
    for t in tensors:
        param, grad, master, size = t.param, t.grad, t.master, t.param.numel()
        _check("param", param, device)
        _check("grad", grad, device, size)
        _check("step", t.step, device, 1)
        lr, *numbers, maximize, rounds = t.options
        by_tensor = isinstance(lr, Tensor)
        setting = (id(lr) if by_tensor else lr, *numbers, maximize)
        row = settings.setdefault(setting, len(settings))
        if by_tensor:
            lrs[row] = lr
        if t.seed not in seeds:
            seeds[t.seed] = reference.mix32((t.seed ^ 0x9E3779B9) & 0xFFFFFFFF)
        scales = t.exp_avg_scale, t.exp_avg_sq_scale
        optional = [0 if x is None else x.data_ptr() for x in (*scales, master)]
        pointers = [x.data_ptr() for x in (param, grad, t.exp_avg, t.exp_avg_sq)]
        address_bits = functools.reduce(int.__or__, pointers) | optional[2]
        variant = KernelVariant(
            param.dtype,
            grad.dtype,
            MASTERS[None if master is None else master.dtype],
            scales[0] is not None,
            rounds,
            address_bits % 16 == 0,
        )
        random_key = seeds[t.seed], t.ordinal | variant.code() << 32
        rows.append((*pointers, *optional, size, t.step.data_ptr(), row, *random_key))
        variants.append(variant if by_variant else None)
    numbers = tuple(
        (0.0 if row in lrs else lr, *rest, -1.0 if maximize else 1.0)
        for (lr, *rest, maximize), row in settings.items()
    )
    addresses = tuple((row, lr.data_ptr()) for row, lr in lrs.items())
    tables = AdamWTables(
        _tensor_table(device, tuple(rows)),
        _setting_table(device, numbers, addresses),
        _chunk_tables(device, tuple(t.param.numel() for t in tensors), tuple(variants)),
    )
    if _is_capturing(device):
        _captured.append(tables)
    for row, lr in lrs.items():
        tables.settings[row, 0].copy_(lr.reshape(()), non_blocking=True)
    return tables
