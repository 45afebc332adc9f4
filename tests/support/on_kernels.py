"""The kernels on which a test runs: C++ on every instruction set of this machine and on emulated
AMX tiles, Triton and CUDA. Without a GPU, Triton is interpreted, and CUDA C++ runs on an emulator,
in several orders of the GPU's threads.

A test of `tests/kernels/test_<op>.py` with the argument `kernel` runs on every kernel of the op, on
tensors of `kernel.device`. `on("triton", "cuda")` above it names some.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases.base import Op
from fuzz_cases import threads
from interpreter import repair_bfloat16
from poison import guarded_memory

from fastlm import backend

GPU = torch.cuda.is_available()
SEEDS = range(1, 1 + int(os.environ.get("FASTLM_SIMT_SEEDS") or 2))


@contextlib.contextmanager
def cpu(isa: str) -> Iterator[None]:
    with backend.use_backend("cpu"), backend.use_cpu_isa(isa), threads(2):
        yield


@contextlib.contextmanager
def interpreted(_: str) -> Iterator[None]:
    repair_bfloat16()
    # masked-off lanes also compute; numpy warns where a GPU returns inf or NaN
    with backend.use_backend("triton"), np.errstate(all="ignore"):
        yield


@contextlib.contextmanager
def emulated(seed: str) -> Iterator[None]:
    """Run CUDA kernels on the emulator. Even seeds also look for races in global memory."""
    with backend.use_backend("simt"):
        thread_order(int(seed))
        yield


def thread_order(seed: int) -> None:
    importlib.import_module("fastlm._simt").set_options(seed=seed, races=seed % 2 == 0)


class Kernel(NamedTuple):
    """Kernels of one language, on one instruction set or in one order of threads."""

    language: str  # cpu, triton or cuda
    variant: str  # an instruction set, an order of threads
    use: Callable[[str], contextlib.AbstractContextManager]
    device: str = "cpu"
    setting: str = (
        ""  # name of an op's setting, with which the host divides the work of small cases
    )
    set: Callable[[Any], None] | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.language, self.variant, self.setting)))

    __repr__ = __str__  # pairs.py takes it for the value


# A new backend needs a line here, and one in the tables of its ops.
KERNELS = [
    *(Kernel("cpu", isa, cpu) for isa in backend.cpu_isas()),
    Kernel("triton", "", lambda _: backend.use_backend("triton"), "cuda")
    if GPU
    else Kernel("triton", "", interpreted),
    *(
        [Kernel("cuda", "", lambda _: backend.use_backend("cuda"), "cuda")]
        if GPU
        else [Kernel("cuda", str(seed), emulated) for seed in SEEDS]
    ),
]


@contextlib.contextmanager
def use_kernel(kernel: Kernel) -> Iterator[Kernel]:
    """Run every op on this kernel. Nothing may be written outside an allocation."""
    with kernel.use(kernel.variant), pytest.MonkeyPatch.context() as patch:
        if kernel.set:
            kernel.set(patch)
        with guarded_memory() as memory:
            yield kernel
            memory.check()


def kernels_of(op: Op, languages: Sequence[str] | None = None) -> list[Kernel]:
    kernels = [k for k in KERNELS if k.language in op.kernels]
    if not op.multiplies_int8 and "avx512_fma" in backend.cpu_isas():  # which is the same code
        kernels = [k for k in kernels if k.variant != "avx512f"]
    forced = [isa for isa in op.forced_isas if not backend.cpu_extension.unavailable_reason(isa)]
    kernels += [Kernel("cpu", isa, cpu) for isa in forced]
    kernels = [k for k in kernels if languages is None or k.language in languages]
    return [
        kernel._replace(setting=name, set=change)
        for kernel in kernels
        for name, change in {"": None, **op.settings.get(kernel.language, {})}.items()
    ]


def on(*languages: str) -> Callable:
    """Run a test on the kernels of these languages alone."""

    def mark(test: Callable) -> Callable:
        test.__dict__["languages"] = languages
        return test

    return mark


def parametrize(metafunc: pytest.Metafunc, op: Op) -> None:
    """Give a test the kernels of an op, or the rows of its table with the kernels that each row
    names (`rows` of contract.py).
    """
    kernels = kernels_of(op, getattr(metafunc.function, "languages", None))
    if which := getattr(metafunc.function, "rows", None):
        pairs = [
            pytest.param(row, kernel, id=f"{name}-{kernel}")
            for name, row in op.rows.items()
            for kernel in kernels
            if which(row) and kernel.language in row.on and not (row.shipped and kernel.setting)
        ]
        metafunc.parametrize("row, kernel", pairs, indirect=["kernel"])
    elif "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", kernels, ids=str, indirect=True)
