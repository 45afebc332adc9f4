"""How a Triton kernel is started, and with which tile sizes.

    launch(kernel, grid, *tensors_and_numbers, config=Config({"BLOCK": 1024}, num_warps=4), N=..)

- On a GPU: on the device of the first tensor.
- Interpreted (``TRITON_INTERPRET=1``, read when a kernel is decorated): on CPU tensors, by numpy.
- Compiled without a GPU: `compiling(target)` sends every launch, made from tensors on the meta
  device, to a list of machine code that tests/triton_gate reads. What runs there is the whole
  host function: one that asks a tensor for its value fails.

Tile sizes come from a table beside each kernel, `{80: .., 90: .., 100: ..}` by compute capability,
so that a first call compiles one variant and measures none. Rejected: `triton.autotune`, which
measures in every process, and whose first call takes minutes.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

INTERPRETED: bool = knobs.runtime.interpret


@dataclass(frozen=True)
class Config:
    """Compile-time sizes of a kernel and Triton's two knobs."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def arguments(self) -> dict[str, int]:
        return {**self.sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


class Compiled(NamedTuple):
    """One launch under `compiling`."""

    name: str
    config: Config
    constants: dict[str, Any]
    kernel: Any  # triton's CompiledKernel


_compiled: list[Compiled] | None = None  # where launches go under `compiling`
_target: GPUTarget | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any
) -> None:
    """Starts `kernel` on `grid`; an empty grid starts nothing. Floats enter as float32."""
    if 0 in grid:
        return
    options = {**constants, **config.arguments(), "enable_fp_fusion": True}
    if _compiled is not None:
        made = kernel.warmup(*args, grid=grid, **options)
        _compiled.append(Compiled(kernel.__name__, config, constants, made))
        return
    if INTERPRETED:
        kernel[grid](*args, **options)
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **options)


def arch(tensor: torch.Tensor) -> int:
    """Compute capability, 90 for 9.0; the interpreter takes 80's tables."""
    if _target is not None:
        return int(_target.arch)
    if INTERPRETED:
        return 80
    return _capability(tensor.device.index)


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run at a time at least; a fixed number where there is no device."""
    if device.type != "cuda":
        return 4 if INTERPRETED else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def of_arch(table: Mapping[int, Config], tensor: torch.Tensor) -> Config:
    """The entry of the newest architecture in the table that is not newer than the tensor's."""
    have = arch(tensor)
    return table[max((a for a in table if a <= have), default=min(table))]


# ---- compiling without a GPU ---------------------------------------------------------------------


class _NoDevice:
    """A Triton driver that compiles for an architecture and cannot run anything."""

    launcher_cls = None
    utils = None

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Every `launch` inside compiles for sm_<capability> and runs nothing; yields what was made."""
    global _compiled, _target
    _target, _compiled = GPUTarget("cuda", capability, 32), []
    driver.set_active(_NoDevice(_target))
    try:
        yield _compiled
    finally:
        _target = _compiled = None
        with contextlib.suppress(RuntimeError):  # where there is no GPU, there is no driver
            driver.reset_active()
