"""The only file that checks what hardware and extras exist, and chooses an op's implementation.

Every op (`fastlm.operator`) has up to four implementations of the same signature. A backend is one
row of `BACKENDS`:

- ``cuda``       CUDA C++ (`fastlm._cuda`), on CUDA devices;
- ``triton``     Triton (`fastlm.kernels`), on CUDA devices, or on CPU tensors with
                 ``TRITON_INTERPRET=1`` (numpy emulates the GPU, for tests);
- ``cpu``        C++ (`fastlm._cpu`);
- ``simt``       the CUDA C++ on CPU tensors, in an emulator (`fastlm._simt`); only when forced, for
                 tests;
- ``reference``  plain PyTorch (`fastlm.reference`); the definition; every device and float dtype.

`pick` takes the first row that has the op, is available, and serves the tensors' device and dtype
and, where the op has a predicate for it, the arguments. ``FASTLM_BACKEND=name`` or
``with use_backend("name"):`` forces one backend. An op that it cannot run raises: nothing falls
back silently. `add` adds a row from outside this package.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from fastlm.errors import InputError

# The extension, or None where it is not built; a broken one raises here. It is imported after torch
# because it shares torch's OpenMP runtime.
cpu_extension: Any = importlib.import_module("fastlm._cpu") if find_spec("fastlm._cpu") else None

_HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
_FLOATS = (*_HALVES_AND_FLOAT, torch.float64)


class Serves(NamedTuple):
    """What a backend serves of an op: words for `fastlm info`, and the predicate, which gets the
    op's arguments. It is called before the host function: it must be cheap and read no values.
    `picked` calls it with the first arguments alone, so the others need defaults."""

    text: str
    holds: Callable[..., bool]


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    Args:
        name: as in `use_backend`.
        package: holds the host functions. That of an op is the function of the definition's name in
            the module of the definition's name: `fastlm.reference.rms_norm.rms_norm_forward` has
            its host in ``<package>.rms_norm``.
        devices: types of the devices whose tensors it runs on. (The reference runs on any.)
        dtypes: of the argument that decides.
        why_not: why it cannot run on this machine, or None.
        emulates: whether it runs on CPU tensors as well, when it is forced.
        ops_of: has the ops of this other row.
        ops: name of an op -> what it serves of it (None: everything). For a backend from outside;
            what those of fastlm have is in the declarations of `fastlm.ops`.
        around: makes of a host function what is called.
    """

    name: str
    package: str
    devices: tuple[str, ...]
    why_not: Callable[[], str | None] = lambda: None
    dtypes: tuple[torch.dtype, ...] = _HALVES_AND_FLOAT
    emulates: Callable[[], bool] = lambda: False
    ops_of: str = ""
    ops: Mapping[str, Serves | None] = field(default_factory=dict)
    around: Callable[[Callable], Callable] = lambda function: function


@dataclass
class Entry:
    """An op in the table: where its implementations are."""

    name: str
    module: str  # of the host functions, within each backend's package
    function: str
    serves: dict[str, Serves | None]  # backend -> what it serves; None: everything
    chosen_by: str  # the argument whose device and dtype decide
    fake: Callable | None  # runs on tensors without memory
    implementations: dict[str, Callable] = field(default_factory=dict)  # loaded so far

    def has(self, row: Backend) -> bool:
        return row.name in self.serves or self.name in row.ops or row.ops_of in self.serves

    def serves_of(self, row: Backend) -> Serves | None:
        served = row.ops.get(self.name) or self.serves.get(row.name)
        return served or self.serves.get(row.ops_of)

    def load(self, row: Backend) -> Callable:
        """The row's implementation, imported at first use: Triton may be missing and takes half a
        second."""
        if row.name not in self.implementations:
            module = importlib.import_module(f"{row.package}.{self.module}")
            self.implementations[row.name] = row.around(getattr(module, self.function))
        return self.implementations[row.name]


def _why_not_cpu() -> str | None:
    if cpu_extension is not None:
        return None
    return (
        "the C++ extension fastlm._cpu is not built"
        " (pip install -e . builds it; it needs a C++17 compiler)"
    )


def _why_not_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not _triton_is_interpreted():
        return "no CUDA device is visible to torch"
    return None


def _triton_is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_cuda() -> str | None:
    if find_spec("fastlm._cuda") is None:
        return "the CUDA extension fastlm._cuda is not built"
    return None if torch.cuda.is_available() else "no CUDA device is visible to torch"


def _why_not_simt() -> str | None:
    if find_spec("fastlm._simt") is None:
        return "the emulator fastlm._simt is not built (FASTLM_SIMT=1 pip install -e .)"
    return None


def on_its_device(function: Callable) -> Callable:
    """The function, run with its tensors' device as the current one: kernels launch there."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        first = args[0]
        while isinstance(first, list | tuple):  # AdamW's list of named tuples
            first = first[0]
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(first.device):
            return function(*args)

    return run


# Best first
BACKENDS: dict[str, Backend] = {
    row.name: row
    for row in (
        Backend("cuda", "fastlm.cuda", ("cuda",), _why_not_cuda, around=on_its_device),
        Backend(
            "simt", "fastlm.cuda", (), _why_not_simt, emulates=lambda: True, ops_of="cuda",
            around=on_its_device,
        ),
        Backend(
            "triton", "fastlm.kernels", ("cuda",), _why_not_triton,
            emulates=_triton_is_interpreted,
        ),
        Backend("cpu", "fastlm.cpu", ("cpu",), _why_not_cpu),
        Backend("reference", "fastlm.reference", (), dtypes=_FLOATS),
    )
}  # fmt: skip
OPS: dict[str, Entry] = {}

_get_num_threads = torch.get_num_threads
# A forked process has none of OpenMP's threads and waits for them for ever, in torch's parallel
# loops as in ours. With one thread it needs none.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
# by op, device type and dtype
_picked: dict[tuple, Callable] = {}
_rows: dict[tuple, list[Backend]] = {}


def add_op(
    definition: Callable,
    backends: str,
    *,
    chosen_by: str,
    serves: Mapping[str, Serves] | None = None,
    fake: Callable | None = None,
) -> Entry:
    """Add an op to the table; `fastlm.operator.declare` describes the arguments."""
    name = definition.__name__.removesuffix("_forward")
    serves = serves or {}
    OPS[name] = Entry(
        name,
        module=definition.__module__.rsplit(".", 1)[1],
        function=definition.__name__,
        serves={b: serves.get(b) for b in (*backends.split(), "reference")},
        chosen_by=chosen_by,
        fake=fake,
    )
    return OPS[name]


def add(row: Backend) -> None:
    """Add a backend, the best for its devices, with the ops that it names.

    Raises:
        InputError: a backend has the name already; an op of the row is in no table.
    """
    if row.name in BACKENDS:
        raise InputError(f"name: expected one that no backend has, got {row.name!r}")
    if unknown := sorted(row.ops.keys() - OPS.keys()):
        raise InputError(f"ops: expected some of {', '.join(OPS)}, got {', '.join(unknown)}")
    others = dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update({row.name: row} | others)
    _forget()


def remove(name: str) -> None:
    """Take back `add`."""
    del BACKENDS[name]
    for entry in OPS.values():
        entry.implementations.pop(name, None)
    _forget()


def _forget() -> None:
    """Choose anew from now on."""
    _picked.clear()
    _rows.clear()


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced: str | None = os.environ.get("FASTLM_BACKEND") or None
if _forced is not None:
    _checked_backend(_forced, "FASTLM_BACKEND")


def why_not(backend: str) -> str | None:
    """Why this backend cannot run on this machine, or None when it can."""
    return BACKENDS[backend].why_not()


def why_not_here(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve `op` on tensors of this device type and dtype, or None."""
    row = BACKENDS[backend]
    if not OPS[op].has(row):
        return f"{op} has no {backend} implementation"
    if backend != "reference":
        if device not in row.devices and not (device == "cpu" and row.emulates()):
            return f"{backend} does not run on {device} tensors"
        if dtype not in row.dtypes:
            return f"{backend} serves {_names(row.dtypes)}, not {_names((dtype,))}"
    return row.why_not()


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def order(device: str) -> list[str]:
    """The backends that serve tensors of this device type without being forced, best first."""
    return [n for n, row in BACKENDS.items() if n == "reference" or device in row.devices]


def pick(op: str, tensor: torch.Tensor) -> Callable:
    """The implementation that `op` runs on tensors like this one."""
    # The first call in each Python thread makes torch pass its number of threads to OpenMP; a
    # kernel that ran before it would use every core.
    _get_num_threads()
    key = (op, "cpu" if tensor.is_cpu else tensor.device.type, tensor.dtype)
    if (chosen := _picked.get(key)) is None:
        chosen = _picked[key] = _choose(*key)
    return chosen


def forced() -> str | None:
    """The backend that ``FASTLM_BACKEND`` or `use_backend` forces."""
    return _forced


def picked(op: str, tensor: torch.Tensor, *others: Any) -> str | None:
    """The name of the backend that runs `op`, or None where the forced one cannot.

    Args:
        tensor: the argument that decides.
        others: where the op has a predicate, the arguments behind `tensor` that it reads.
    """
    key = (op, "cpu" if tensor.is_cpu else tensor.device.type, tensor.dtype)
    if (rows := _rows.get(key)) is None:
        rows = _rows[key] = _candidates(*key)
    entry = OPS[op]
    for row in rows:
        served = entry.serves_of(row)
        if served is None or served.holds(tensor, *others):
            return row.name
    return None


def has_kernel(op: str, tensor: torch.Tensor, *others: Any) -> bool:
    """Whether more than the definition runs `op`; the arguments are those of `picked`. For ops that
    join others: without a kernel of their own, calling the others is faster."""
    return picked(op, tensor, *others) not in (None, "reference")


def _choose(op: str, device: str, dtype: torch.dtype) -> Callable:
    entry = OPS[op]
    if dtype.is_floating_point and dtype not in _FLOATS:  # float8 is left to torch's own products
        raise InputError(f"{entry.chosen_by}: expected {_names(_FLOATS)}, got {dtype}")
    if device == "meta":
        assert entry.fake is not None
        return entry.fake
    if _forced is not None and (reason := why_not_here(op, _forced, device, dtype)):
        raise InputError(f"backend: {_forced!r} is forced but cannot serve: {reason}")
    rows = _candidates(op, device, dtype)
    if not rows:
        raise InputError(f"{op}: no implementation for {device} tensors of {dtype}")
    return _first_that_serves(entry, rows)


def _candidates(op: str, device: str, dtype: torch.dtype) -> list[Backend]:
    """The rows that have `op` for tensors like these, best first; predicates are not asked."""
    names = order(device) if _forced is None else [_forced]
    return [BACKENDS[b] for b in names if why_not_here(op, b, device, dtype) is None]


def _first_that_serves(entry: Entry, rows: list[Backend]) -> Callable:
    """The implementation of the first row or, where that has a predicate, a function that runs the
    first of the rows that serves its arguments."""
    row, *rest = rows
    implementation, served = entry.load(row), entry.serves_of(row)
    if served is None:
        return implementation
    holds, other = served.holds, None

    def run(*args: Any) -> Any:
        nonlocal other
        if holds(*args):
            return implementation(*args)
        if not rest:
            raise InputError(
                f"backend: {row.name!r} is forced but cannot serve: it has {entry.name} for"
                f" {served.text}"
            )
        if other is None:
            other = _first_that_serves(entry, rest)
        return other(*args)

    return run


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the ``with`` onto one backend, process-wide.

    An op that this backend cannot run raises.
    """
    global _forced
    before = _forced
    _forced = _checked_backend(name, "use_backend")
    _forget()
    try:
        yield
    finally:
        _forced = before
        _forget()


def cpu_isa() -> str | None:
    """The instruction set the C++ kernels run on, or None without the extension."""
    if why_not("cpu"):
        return None
    try:
        return cpu_extension.isa()
    except ValueError as error:
        raise InputError(str(error)) from None


if os.environ.get("FASTLM_CPU_ISA"):
    cpu_isa()  # refuse a name that cannot run here now, not in the first kernel


def multiplies_bf16() -> bool:
    """Whether the C++ kernels multiply bfloat16 directly; otherwise they widen it to float32."""
    return cpu_isa() in ("amx", "avx512", "amx_emulated")


def cpu_isas() -> Sequence[str]:
    """Every instruction set the C++ kernels can run on here, best first."""
    if why_not("cpu"):
        return ()
    return cpu_extension.supported_isas()


@contextlib.contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """Force the C++ kernels onto one instruction set, process-wide.

    One of amx, avx512, avx512_fma (bfloat16 products in float32), avx2, scalar, amx_emulated.
    """
    before = cpu_extension.isa()
    try:
        cpu_extension.set_isa(name)
    except ValueError as error:
        raise InputError(str(error)) from None
    try:
        yield
    finally:
        cpu_extension.set_isa(before)
