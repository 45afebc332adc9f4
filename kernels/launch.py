"""How a Triton kernel is started, and with which tile sizes.

    launch(kernel, grid, *tensors_and_numbers, config=Config({"BLOCK": 1024}, num_warps=4), N=..)

- On a GPU: on the device of the first tensor.
- Interpreted (``TRITON_INTERPRET=1``, read when a kernel is decorated): on CPU tensors, by numpy.
- Compiled without a GPU: `compiling(target)` sends every launch, made from tensors on the meta
  device, to a list of machine code that tests/triton_gate reads. What runs there is the whole
  host function: one that asks a tensor for its value fails.

Tile sizes come from `Tiles` beside each kernel: a fixed table by compute capability, so that a
first call compiles one variant and measures none; what `python -m fastlm.kernels.tune` measured on
this machine's GPU goes before it, from a file in the user's cache. Rejected: `triton.autotune`,
whose first call of every shape takes minutes.
"""

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
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
    """One launch under `compiling` or `recording`."""

    name: str
    config: Config
    constants: dict[str, Any]
    kernel: Any  # triton's CompiledKernel; None where interpreted


_launches: list[Compiled] | None = None  # where they go under `compiling` and `recording`
_target: GPUTarget | None = None  # under `compiling`


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any
) -> None:
    """Starts `kernel` on `grid`; an empty grid starts nothing. Floats enter as float32."""
    if 0 in grid:
        return
    options = {**constants, **config.arguments(), "enable_fp_fusion": True}
    if _target is not None:
        made = kernel.warmup(*args, grid=grid, **options)
    elif INTERPRETED:
        made = kernel[grid](*args, **options)
    else:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        if device.index == torch.cuda.current_device():
            made = kernel[grid](*args, **options)
        else:
            with torch.cuda.device(device):
                made = kernel[grid](*args, **options)
    if _launches is not None:
        _launches.append(Compiled(kernel.__name__, config, constants, made))


@contextlib.contextmanager
def recording() -> Iterator[list[Compiled]]:
    """Yields the launches made inside."""
    global _launches
    before, _launches = _launches, []
    try:
        yield _launches
    finally:
        _launches = before


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


# ---- tile sizes ----------------------------------------------------------------------------------

Key = tuple[Hashable, ...]


class Tiles:
    """Tile sizes of one kernel, by class of shapes (`key`), then by compute capability."""

    def __init__(self, kernel: str, table: Mapping[Key, Mapping[int, Config]]):
        self.kernel, self.table = kernel, table
        self._chosen: dict[tuple[Key, int, int | None], Config] = {}

    def of(self, key: Key, tensor: torch.Tensor) -> Config:
        """What was measured here, or the entry of the newest architecture in the table that is not
        newer than the tensor's.
        """
        if _asked is not None:
            _asked.append((self, key, tensor))
        have = arch(tensor)
        at = key, have, tensor.device.index
        if (chosen := self._chosen.get(at)) is None:
            chosen = self._chosen[at] = self._measured(key, tensor) or self.fixed(key, have)
        return chosen

    def fixed(self, key: Key, have: int) -> Config:
        table = self.table[key]
        return table[max((a for a in table if a <= have), default=min(table))]

    @contextlib.contextmanager
    def trying(self, key: Key, config: Config, tensor: torch.Tensor) -> Iterator[None]:
        """`of` answers `config` for this key and device inside."""
        at = key, arch(tensor), tensor.device.index
        before = self._chosen.pop(at, None)
        self._chosen[at] = config
        try:
            yield
        finally:
            del self._chosen[at]
            if before is not None:
                self._chosen[at] = before

    def forget(self) -> None:
        """Reads again what was measured."""
        self._chosen.clear()

    def label(self, key: Key) -> str:
        return " ".join(map(str, (self.kernel, *key)))

    def _measured(self, key: Key, tensor: torch.Tensor) -> Config | None:
        if _target is not None:
            return None
        found = measured(cache_file(tensor)).get(self.label(key))
        # of a kernel that has other sizes by now: measured before an update
        if found is None or found.sizes.keys() != self.fixed(key, arch(tensor)).sizes.keys():
            return None
        return found


_asked: list[tuple[Tiles, Key, torch.Tensor]] | None = None  # under `asking`


@contextlib.contextmanager
def asking() -> Iterator[list[tuple[Tiles, Key, torch.Tensor]]]:
    """Yields what `Tiles.of` is asked inside."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


def cache_file(tensor: torch.Tensor) -> Path:
    """Where `fastlm.kernels.tune` leaves what it measured on this kind of GPU."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"
    folder = Path(os.environ.get("FASTLM_CACHE") or default)
    card = "interpreter" if INTERPRETED else torch.cuda.get_device_name(tensor.device)
    card = re.sub(r"\W+", "-", card)
    return folder / f"tiles-{card}-triton-{triton.__version__}.json"


@functools.cache
def measured(file: Path) -> dict[str, Config]:
    """The entries of a file of measurements; none where there is no file."""
    try:
        entries = json.loads(file.read_text())
        return {label: Config(**entry) for label, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{file}: not tile sizes, fixed ones serve: {error}", stacklevel=2)
        return {}


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
    global _target
    _target = GPUTarget("cuda", capability, 32)
    driver.set_active(_NoDevice(_target))
    try:
        with recording() as made:
            yield made
    finally:
        _target = None
        with contextlib.suppress(RuntimeError):  # where there is no GPU, there is no driver
            driver.reset_active()
