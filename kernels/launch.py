"""Launch a Triton kernel and select its tile sizes.

    launch(kernel, grid, *tensors_and_numbers, config=Config({"BLOCK": 1024}, num_warps=4), N=..)

- On a GPU: on the device of the first tensor.
- Interpreted (``TRITON_INTERPRET=1``, read when a kernel is decorated): on CPU tensors, by numpy.
- Compiled without a GPU: `compile_for(capability)` collects the machine code of every launch in a
  list that triton_gate reads. Tensors are on the meta device. The whole host function runs there,
  so a function that reads a tensor's value fails.

Tile sizes come from the `TileConfigs` next to each kernel: a fixed table by compute capability. A
first call compiles one variant and measures none. The sizes that `python -m fastlm.kernels.tune`
measured on this machine's GPU take precedence; they are read from a file in the user's cache.
Rejected: `triton.autotune`, because its first call of every shape takes minutes.
"""

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

INTERPRETED: bool = knobs.runtime.interpret


# ---- kernels whose sizes and strides are in tuples -----------------------------------------------


def jit(*unspecialized: str) -> Callable[[Callable], Any]:
    """Decorate as `triton.jit(do_not_specialize=unspecialized)`, also for integers inside a tuple.

    New values of these parameters compile no new variant of the kernel.
    """

    def decorate(function: Callable) -> Any:
        if INTERPRETED:
            return triton.jit(function)
        return _Kernel(function, do_not_specialize=unspecialized)

    return decorate


class _Kernel(JITFunction):
    """A kernel with `do_not_specialize` inside tuples, where Triton (3.6 to 3.9) ignores it."""

    def create_binder(self) -> tuple:
        *caches, bind = super().create_binder()
        # a cache per parameter: NamedTuples of two classes are equal where their values are
        unspecialize = {
            p.num: functools.lru_cache(256)(_unspecialize)
            for p in self.params
            if p.do_not_specialize
        }

        def bind_unspecialized(*args: Any, **constants: Any) -> tuple:
            bound, specialization, options = bind(*args, **constants)
            for position, remove_values in unspecialize.items():
                types, values = specialization[position]
                if isinstance(types, tuple):
                    specialization[position] = remove_values(types, values)
            return bound, specialization, options

        return *caches, bind_unspecialized


def _unspecialize(types: Any, values: Any) -> tuple[Any, Any]:
    """Return Triton's pair for an argument, where integers have only their type.

    `values` has 1 for a 1 and "D" for a multiple of 16. The values of tensors stay, because they
    describe the alignment.
    """
    if isinstance(types, tuple):
        pairs = [_unspecialize(t, v) for t, v in zip(types, values)]
        make = getattr(types, "_make", tuple)
        return make(t for t, _ in pairs), make(v for _, v in pairs)
    if types == "constexpr" and values == 1:
        types = "i32"
    return types, None if types in ("i32", "i64") else values


# ---- launch --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The compile-time sizes of a kernel and Triton's two knobs."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def arguments(self) -> dict[str, int]:
        return {**self.sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


class KernelLaunch(NamedTuple):
    """One launch under `compile_for` or `record_launches`."""

    name: str
    config: Config
    constants: dict[str, Any]
    kernel: Any  # triton's CompiledKernel; None where interpreted


_launches: list[KernelLaunch] | None = None  # filled under `compile_for` and `record_launches`
_target: GPUTarget | None = None  # set under `compile_for`


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any
) -> None:
    """Launch `kernel` on `grid`; an empty grid launches nothing. Floats are passed as float32."""
    if 0 in grid:
        return
    options = {**constants, **config.arguments(), "enable_fp_fusion": True}
    if _target is not None:
        compiled = kernel.warmup(*args, grid=grid, **options)
    elif INTERPRETED:
        compiled = kernel[grid](*args, **options)
    else:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        if device.index == torch.cuda.current_device():
            compiled = kernel[grid](*args, **options)
        else:
            with torch.cuda.device(device):
                compiled = kernel[grid](*args, **options)
    if _launches is not None:
        _launches.append(KernelLaunch(kernel.__name__, config, constants, compiled))


@contextlib.contextmanager
def record_launches() -> Iterator[list[KernelLaunch]]:
    """Yield a list of the launches inside the `with` block."""
    global _launches
    before, _launches = _launches, []
    try:
        yield _launches
    finally:
        _launches = before


def arch(tensor: torch.Tensor) -> int:
    """Return the compute capability, 90 for 9.0. The interpreter uses the tables of 80."""
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
    """Return how many multiprocessors a device has; a fixed number where there is no device."""
    if device.type != "cuda":
        return 4 if INTERPRETED else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


# ---- tile sizes ----------------------------------------------------------------------------------

Key = tuple[Hashable, ...]


class TileConfigs:
    """The tile sizes of one kernel, by class of shapes (`key`), then by compute capability."""

    def __init__(self, kernel: str, table: Mapping[Key, Mapping[int, Config]]):
        self.kernel, self.table = kernel, table
        self._selected: dict[tuple[Key, int, int | None], Config] = {}

    def select(self, key: Key, tensor: torch.Tensor) -> Config:
        """Return the sizes measured on this machine, or the table's entry for the newest
        architecture that is not newer than the tensor's.
        """
        if _lookups is not None:
            _lookups.append((self, key, tensor))
        capability = arch(tensor)
        entry = key, capability, tensor.device.index
        if (config := self._selected.get(entry)) is None:
            config = self._tuned(key, tensor) or self.default(key, capability)
            self._selected[entry] = config
        return config

    def default(self, key: Key, capability: int) -> Config:
        table = self.table[key]
        return table[max((a for a in table if a <= capability), default=min(table))]

    @contextlib.contextmanager
    def override(self, key: Key, config: Config, tensor: torch.Tensor) -> Iterator[None]:
        """Make `select` return `config` for this key and device inside the `with` block."""
        entry = key, arch(tensor), tensor.device.index
        before = self._selected.pop(entry, None)
        self._selected[entry] = config
        try:
            yield
        finally:
            del self._selected[entry]
            if before is not None:
                self._selected[entry] = before

    def clear_cache(self) -> None:
        """Forget the selected sizes, so that the file of measurements is read again."""
        self._selected.clear()

    def label(self, key: Key) -> str:
        return " ".join(map(str, (self.kernel, *key)))

    def _tuned(self, key: Key, tensor: torch.Tensor) -> Config | None:
        if _target is not None:
            return None
        config = load_tuned(cache_file(tensor)).get(self.label(key))
        # measured before an update that changed which sizes the kernel has
        if config is None or config.sizes.keys() != self.default(key, arch(tensor)).sizes.keys():
            return None
        return config


_lookups: list[tuple[TileConfigs, Key, torch.Tensor]] | None = None  # under `record_lookups`


@contextlib.contextmanager
def record_lookups() -> Iterator[list[tuple[TileConfigs, Key, torch.Tensor]]]:
    """Yield a list of the arguments of every `TileConfigs.select` inside the `with` block."""
    global _lookups
    before, _lookups = _lookups, []
    try:
        yield _lookups
    finally:
        _lookups = before


def cache_file(tensor: torch.Tensor) -> Path:
    """Return the file in which `fastlm.kernels.tune` stores its measurements for this GPU model."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"
    folder = Path(os.environ.get("FASTLM_CACHE") or default)
    card = "interpreter" if INTERPRETED else torch.cuda.get_device_name(tensor.device)
    card = re.sub(r"\W+", "-", card)
    return folder / f"tiles-{card}-triton-{triton.__version__}.json"


@functools.cache
def load_tuned(file: Path) -> dict[str, Config]:
    """Return the entries of a file of measurements: none if the file does not exist."""
    try:
        entries = json.loads(file.read_text())
        return {label: Config(**entry) for label, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{file}: expected tile sizes, using the fixed ones: {error}", stacklevel=2)
        return {}


# ---- compiling without a GPU ---------------------------------------------------------------------


class _CompileOnlyDriver:
    """A Triton driver that compiles for an architecture and cannot run anything."""

    launcher_cls = None
    utils = None

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)  # kernels are cached per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextlib.contextmanager
def compile_for(capability: int) -> Iterator[list[KernelLaunch]]:
    """Make every `launch` inside compile for sm_<capability> and run nothing. Yield the results."""
    global _target
    _target = GPUTarget("cuda", capability, 32)
    driver.set_active(_CompileOnlyDriver(_target))
    try:
        with record_launches() as launches:
            yield launches
    finally:
        _target = None
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver
            driver.reset_active()
