"""Launch of a Triton kernel, and the choice of its tile sizes.

    launch(kernel, grid, *tensors_and_numbers, config=Config({"BLOCK": 1024}, num_warps=4), N=..)

- On a GPU: on the device of the first tensor.
- Interpreted (``TRITON_INTERPRET=1``, read when a kernel is decorated): on CPU tensors, by numpy.
- Compiled without a GPU: `compiling(capability)` collects the machine code of every launch in a
  list that triton_gate reads. Tensors are on the meta device. The whole host function runs
  there, so one that asks a tensor for its value fails.

Tile sizes come from the `Tiles` next to each kernel: a fixed table by compute capability, so that a
first call compiles one variant and measures none. What `python -m fastlm.kernels.tune` measured on
this machine's GPU takes precedence, read from a file in the user's cache. Rejected:
`triton.autotune`, whose first call of every shape takes minutes.
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
    """`triton.jit(do_not_specialize=unspecialized)`, also for the integers inside a tuple: new
    values of these parameters compile no new variant of the kernel."""

    def decorate(function: Callable) -> Any:
        if INTERPRETED:
            return triton.jit(function)
        return _Kernel(function, do_not_specialize=unspecialized)

    return decorate


class _Kernel(JITFunction):
    """Triton (3.6 to 3.9) ignores `do_not_specialize` within a tuple. This binder heeds it."""

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
            for place, plain in unspecialize.items():
                types, values = specialization[place]
                if isinstance(types, tuple):
                    specialization[place] = plain(types, values)
            return bound, specialization, options

        return *caches, bind_unspecialized


def _unspecialize(types: Any, values: Any) -> tuple[Any, Any]:
    """Triton's pair for an argument, where integers have their type only. `values` has 1 for a 1,
    "D" for a multiple of 16; those of tensors stay, for their alignment."""
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


_launches: list[Compiled] | None = None  # collects them under `compiling` and `recording`
_target: GPUTarget | None = None  # under `compiling`


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any
) -> None:
    """Launch `kernel` on `grid`; an empty grid launches nothing. Floats are passed as float32."""
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
    """Yield a list of the launches inside the `with` block."""
    global _launches
    before, _launches = _launches, []
    try:
        yield _launches
    finally:
        _launches = before


def arch(tensor: torch.Tensor) -> int:
    """Compute capability, 90 for 9.0; the interpreter uses the tables of 80."""
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
    """How many blocks run at the same time at least; a fixed number where there is no device."""
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
        """Return the sizes measured on this machine, or the table's entry for the newest
        architecture that is not newer than the tensor's.
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
        """Make `of` return `config` for this key and device inside the `with` block."""
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
        """Forget the chosen sizes, so that the measurements are read again."""
        self._chosen.clear()

    def label(self, key: Key) -> str:
        return " ".join(map(str, (self.kernel, *key)))

    def _measured(self, key: Key, tensor: torch.Tensor) -> Config | None:
        if _target is not None:
            return None
        found = measured(cache_file(tensor)).get(self.label(key))
        # measured before an update that changed which sizes the kernel has
        if found is None or found.sizes.keys() != self.fixed(key, arch(tensor)).sizes.keys():
            return None
        return found


_asked: list[tuple[Tiles, Key, torch.Tensor]] | None = None  # under `asking`


@contextlib.contextmanager
def asking() -> Iterator[list[tuple[Tiles, Key, torch.Tensor]]]:
    """Yield a list of the arguments of every `Tiles.of` inside the `with` block."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


def cache_file(tensor: torch.Tensor) -> Path:
    """The file in which `fastlm.kernels.tune` stores its measurements for this kind of GPU."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"
    folder = Path(os.environ.get("FASTLM_CACHE") or default)
    card = "interpreter" if INTERPRETED else torch.cuda.get_device_name(tensor.device)
    card = re.sub(r"\W+", "-", card)
    return folder / f"tiles-{card}-triton-{triton.__version__}.json"


@functools.cache
def measured(file: Path) -> dict[str, Config]:
    """The entries of a file of measurements; none if the file does not exist."""
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
        return int(self._target.arch)  # kernels are cached per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Make every `launch` inside compile for sm_<capability> and run nothing; yield the results."""
    global _target
    _target = GPUTarget("cuda", capability, 32)
    driver.set_active(_NoDevice(_target))
    try:
        with recording() as made:
            yield made
    finally:
        _target = None
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver
            driver.reset_active()
