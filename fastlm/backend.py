"""Check what hardware and extras exist, and select the implementation of an op.

Every op (`fastlm.operator`) has up to four implementations of the same signature. A backend is one
row of `BACKENDS`:

- ``cuda``       CUDA C++ (`fastlm._cuda`), on CUDA devices;
- ``triton``     Triton (`fastlm.kernels`), on CUDA devices, or on CPU tensors with
                 ``TRITON_INTERPRET=1`` (numpy emulates the GPU, for tests);
- ``cpu``        C++ (`fastlm._cpu`);
- ``simt``       the CUDA C++ on CPU tensors, in an emulator (`fastlm._simt`); only when forced, for
                 tests;
- ``reference``  plain PyTorch (`fastlm.reference`); the definition; every device and float dtype.

`select` takes the first row that has the op, is available, and supports the tensors' device and
dtype and, where the op has a predicate for it, the arguments. ``FASTLM_BACKEND=name`` or
``with use_backend("name"):`` forces one backend. An op that the forced backend cannot run raises:
nothing falls back silently. `add` adds a row from outside this package.

No other file checks for hardware or extensions.
"""

import contextlib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple, get_args

import torch

from fastlm.errors import InputError

# The extension, or None where it is not built; a broken one raises here. It is imported after torch
# because it shares torch's OpenMP runtime.
cpu_extension: Any = importlib.import_module("fastlm._cpu") if find_spec("fastlm._cpu") else None

_HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
_FLOATS = (*_HALVES_AND_FLOAT, torch.float64)


class Support(NamedTuple):
    """The arguments of an op that a backend supports: a text for `fastlm info` and a predicate.

    The predicate gets the op's arguments before the host function does. It must be cheap and must
    not read values of tensors. `backend_for` passes only the first arguments, so the others need
    defaults.
    """

    text: str
    predicate: Callable[..., bool]


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    Args:
        name: the name that `use_backend` takes.
        package: the package of the host functions. The host function of an op has the name and
            the module name of its definition: that of `fastlm.reference.rms_norm.rms_norm_forward`
            is ``<package>.rms_norm.rms_norm_forward``.
        devices: the device types whose tensors it runs on. (The reference runs on any.)
        unavailable_reason: returns why it cannot run on this machine, or None.
        dtypes: the dtypes of the dispatch argument that it supports.
        can_emulate: returns True where it also runs on CPU tensors when it is forced.
        ops_from: the name of another row; this row has the same ops.
        ops: op -> the arguments that it supports (None: all). Only for a backend from outside;
            fastlm's own backends are named in the declarations of `fastlm.ops`.
        wrap: decorates each host function.
    """

    name: str
    package: str
    devices: tuple[str, ...]
    unavailable_reason: Callable[[], str | None] = lambda: None
    dtypes: tuple[torch.dtype, ...] = _HALVES_AND_FLOAT
    can_emulate: Callable[[], bool] = lambda: False
    ops_from: str = ""
    ops: Mapping[str, Support | None] = field(default_factory=dict)
    wrap: Callable[[Callable], Callable] = lambda function: function


@dataclass
class OpEntry:
    """An op in the table `OPS`, with its implementations."""

    name: str
    module: str  # of the host functions, within each backend's package
    function: str
    supports: dict[str, Support | None]  # backend -> supported arguments; None: all
    dispatch_arg: str  # the argument by whose device and dtype `select` chooses
    fake: Callable | None  # runs on tensors without memory
    implementations: dict[str, Callable] = field(default_factory=dict)  # loaded so far

    def is_in(self, row: Backend) -> bool:
        return row.name in self.supports or self.name in row.ops or row.ops_from in self.supports

    def support_of(self, row: Backend) -> Support | None:
        support = row.ops.get(self.name) or self.supports.get(row.name)
        return support or self.supports.get(row.ops_from)

    def load(self, row: Backend) -> Callable:
        """Return the row's implementation. It is imported at first use, because Triton may be
        missing and takes half a second to import."""
        if row.name not in self.implementations:
            if self.name in row.ops:  # of a backend from outside
                function = self.checked_host(row)
            else:
                module = importlib.import_module(f"{row.package}.{self.module}")
                function = getattr(module, self.function)
            self.implementations[row.name] = row.wrap(function)
        return self.implementations[row.name]

    def checked_host(self, row: Backend) -> Callable:
        """Return the host function of a backend from outside. It checks its results.

        Raises:
            InputError: there is no such function; its parameters are not the definition's.
        """
        path = f"{row.package}.{self.module}"
        try:
            host = getattr(importlib.import_module(path), self.function)
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"package: expected a host function {path}.{self.function}, got: {error}"
            ) from None
        definition = self.load(BACKENDS["reference"])
        names = [*inspect.signature(definition).parameters]
        try:
            parameters = [*inspect.signature(host).parameters.values()]
        except (TypeError, ValueError) as error:  # no function; a C function without a signature
            raise InputError(f"{path}.{self.function}: expected a function, got: {error}") from None
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        accepts_all = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        parameters = [p for p in parameters if p.kind not in variadic]
        host_names = [p.name for p in parameters]
        expected = names[: len(host_names)] if accepts_all else names
        if host_names[: len(names)] != expected or any(
            p.default is p.empty for p in parameters[len(names) :]
        ):
            raise InputError(
                f"{path}.{self.function}: expected the definition's parameters"
                f" ({', '.join(names)}), got ({', '.join(host_names)})"
            )
        returns = inspect.signature(definition).return_annotation
        if returns is None:  # it writes its arguments
            return host
        count = len(get_args(returns)) or 1

        @functools.wraps(host)
        def run(*args: Any) -> Any:
            results = host(*args)
            types = [type(r) for r in (results if isinstance(results, tuple) else (results,))]
            if len(types) != count or not all(issubclass(t, torch.Tensor) for t in types):
                raise InputError(
                    f"{path}.{self.function}: expected to return {count} tensors (an empty one for"
                    f" none), got {', '.join(t.__name__ for t in types)}"
                )
            return results

        return run


def _unavailable_reason_cpu() -> str | None:
    if cpu_extension is not None:
        return None
    return (
        "the C++ extension fastlm._cpu is not built"
        " (pip install -e . builds it; it needs a C++17 compiler)"
    )


def _unavailable_reason_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not _triton_is_interpreted():
        return "no CUDA device is visible to torch"
    return None


def _triton_is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unavailable_reason_cuda() -> str | None:
    if find_spec("fastlm._cuda") is None:
        return "the CUDA extension fastlm._cuda is not built"
    return None if torch.cuda.is_available() else "no CUDA device is visible to torch"


def _unavailable_reason_simt() -> str | None:
    if find_spec("fastlm._simt") is None:
        return "the emulator fastlm._simt is not built (FASTLM_SIMT=1 pip install -e .)"
    return None


def guard_device(function: Callable) -> Callable:
    """Wrap a host function so that its tensors' device is the current one: kernels launch there."""

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
        Backend("cuda", "fastlm.cuda", ("cuda",), _unavailable_reason_cuda, wrap=guard_device),
        Backend(
            "simt", "fastlm.cuda", (), _unavailable_reason_simt, can_emulate=lambda: True,
            ops_from="cuda", wrap=guard_device,
        ),
        Backend(
            "triton", "fastlm.kernels", ("cuda",), _unavailable_reason_triton,
            can_emulate=_triton_is_interpreted,
        ),
        Backend("cpu", "fastlm.cpu", ("cpu",), _unavailable_reason_cpu),
        Backend("reference", "fastlm.reference", (), dtypes=_FLOATS),
    )
}  # fmt: skip
OPS: dict[str, OpEntry] = {}

_get_num_threads = torch.get_num_threads
# A forked process has none of OpenMP's threads and waits for them for ever, in torch's parallel
# loops as in fastlm's. With one thread it needs no others.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
# by op, device type and dtype
_selected: dict[tuple, Callable] = {}
_rows: dict[tuple, list[Backend]] = {}


def add_op(
    definition: Callable,
    backends: str,
    *,
    dispatch_arg: str,
    supports: Mapping[str, Support] | None = None,
    fake: Callable | None = None,
) -> OpEntry:
    """Add an op to the table; `fastlm.operator.declare` describes the arguments."""
    name = definition.__name__.removesuffix("_forward")
    supports = supports or {}
    OPS[name] = OpEntry(
        name,
        module=definition.__module__.rsplit(".", 1)[1],
        function=definition.__name__,
        supports={b: supports.get(b) for b in (*backends.split(), "reference")},
        dispatch_arg=dispatch_arg,
        fake=fake,
    )
    return OPS[name]


def add(row: Backend) -> None:
    """Add a backend with the ops that it names, in front of all others for its devices.

    Raises:
        InputError: a backend with this name exists; an op of the row is not in `OPS`, or has no
            host function with the definition's parameters. (Only a backend that can run here is
            imported.)
    """
    if row.name in BACKENDS:
        raise InputError(f"name: expected a name that no backend has, got {row.name!r}")
    if unknown := sorted(row.ops.keys() - OPS.keys()):
        raise InputError(f"ops: expected some of {', '.join(OPS)}, got {', '.join(unknown)}")
    if row.unavailable_reason() is None:
        for op in row.ops:
            OPS[op].checked_host(row)
    others = dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update({row.name: row} | others)
    _clear_caches()


def remove(name: str) -> None:
    """Remove a backend that `add` added."""
    del BACKENDS[name]
    for entry in OPS.values():
        entry.implementations.pop(name, None)
    _clear_caches()


def _clear_caches() -> None:
    """Forget the selections so far, because the rows have changed."""
    _selected.clear()
    _rows.clear()


def _check_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced_name: str | None = os.environ.get("FASTLM_BACKEND") or None
if _forced_name is not None:
    _check_backend(_forced_name, "FASTLM_BACKEND")


def unavailable_reason(backend: str) -> str | None:
    """Return why this backend cannot run on this machine, or None if it can."""
    return BACKENDS[backend].unavailable_reason()


def unsupported_reason(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Return why `backend` cannot run `op` on tensors of this device type and dtype, or None."""
    row = BACKENDS[backend]
    if not OPS[op].is_in(row):
        return f"{op} has no {backend} implementation"
    if backend != "reference":
        if device not in row.devices and not (device == "cpu" and row.can_emulate()):
            return f"{backend} does not run on {device} tensors"
        if dtype not in row.dtypes:
            return f"{backend} supports {_names(row.dtypes)}, not {_names((dtype,))}"
    return row.unavailable_reason()


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def backends_for(device: str) -> list[str]:
    """Return the backends for tensors of this device type, best first. Emulators are left out."""
    return [n for n, row in BACKENDS.items() if n == "reference" or device in row.devices]


def select(op: str, tensor: torch.Tensor) -> Callable:
    """Return the implementation of `op` for tensors with the device and dtype of this one."""
    # The first call in each Python thread makes torch pass its number of threads to OpenMP; a
    # kernel that ran before it would use every core.
    _get_num_threads()
    key = (op, "cpu" if tensor.is_cpu else tensor.device.type, tensor.dtype)
    if (implementation := _selected.get(key)) is None:
        implementation = _selected[key] = _select(*key)
    return implementation


def forced_backend() -> str | None:
    """Return the backend that ``FASTLM_BACKEND`` or `use_backend` forces, or None."""
    return _forced_name


def backend_for(op: str, tensor: torch.Tensor, *others: Any) -> str | None:
    """Return the name of the backend that runs `op`, or None if the forced one cannot.

    Args:
        tensor: the dispatch argument.
        others: the next arguments, where the op has a predicate that reads them.
    """
    key = (op, "cpu" if tensor.is_cpu else tensor.device.type, tensor.dtype)
    if (rows := _rows.get(key)) is None:
        rows = _rows[key] = _candidates(*key)
    entry = OPS[op]
    for row in rows:
        support = entry.support_of(row)
        if support is None or support.predicate(tensor, *others):
            return row.name
    return None


def has_kernel(op: str, tensor: torch.Tensor, *others: Any) -> bool:
    """Return whether a kernel runs `op`, and not its definition. Arguments as for `backend_for`.

    Model code checks this for fused ops: without a kernel, calling their parts is faster.
    """
    return backend_for(op, tensor, *others) not in (None, "reference")


def _select(op: str, device: str, dtype: torch.dtype) -> Callable:
    entry = OPS[op]
    if dtype.is_floating_point and dtype not in _FLOATS:  # float8 is left to torch's own products
        raise InputError(f"{entry.dispatch_arg}: expected {_names(_FLOATS)}, got {dtype}")
    if device == "meta":
        assert entry.fake is not None
        return entry.fake
    if _forced_name is not None and (reason := unsupported_reason(op, _forced_name, device, dtype)):
        raise InputError(
            f"backend: expected one that can run {op}, got {_forced_name!r}, which is forced: "
            f"{reason}"
        )
    rows = _candidates(op, device, dtype)
    if not rows:
        raise InputError(
            f"{op}: expected tensors that a backend supports, got {device} tensors of {dtype}"
        )
    return _dispatcher(entry, rows)


def _candidates(op: str, device: str, dtype: torch.dtype) -> list[Backend]:
    """Return the rows that have `op` for this device and dtype, best first. Predicates are not
    called."""
    names = backends_for(device) if _forced_name is None else [_forced_name]
    return [BACKENDS[b] for b in names if unsupported_reason(op, b, device, dtype) is None]


def _dispatcher(entry: OpEntry, rows: list[Backend]) -> Callable:
    """Return the implementation of the first row. If that row has a predicate, return a function
    that runs the first row that supports its arguments."""
    row, *rest = rows
    implementation, support = entry.load(row), entry.support_of(row)
    if support is None:
        return implementation
    predicate, fallback = support.predicate, None

    def run(*args: Any) -> Any:
        nonlocal fallback
        if predicate(*args):
            return implementation(*args)
        if not rest:
            raise InputError(
                f"backend: expected one that can run {entry.name} with these arguments, got"
                f" {row.name!r}, which is forced: it supports"
                f" {support.text}"
            )
        if fallback is None:
            fallback = _dispatcher(entry, rest)
        return fallback(*args)

    return run


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Force every op inside the ``with`` onto one backend, process-wide.

    An op that this backend cannot run raises.
    """
    return _force(_check_backend(name, "use_backend"))


@contextlib.contextmanager
def _force(name: str) -> Iterator[None]:
    global _forced_name
    before = _forced_name
    _forced_name = name
    _clear_caches()
    try:
        yield
    finally:
        _forced_name = before
        _clear_caches()


def cpu_isa() -> str | None:
    """Return the instruction set that the C++ kernels run on, or None without the extension."""
    if unavailable_reason("cpu"):
        return None
    try:
        return cpu_extension.isa()
    except ValueError as error:
        raise InputError(str(error)) from None


if os.environ.get("FASTLM_CPU_ISA"):
    cpu_isa()  # refuse a name that cannot run here now, not in the first kernel


def multiplies_bf16() -> bool:
    """Return whether the C++ kernels multiply bfloat16 directly. If not, they widen it to
    float32."""
    return cpu_isa() in ("amx", "avx512", "amx_emulated")


def cpu_isas() -> Sequence[str]:
    """Return all instruction sets that the C++ kernels can run on here, best first."""
    if unavailable_reason("cpu"):
        return ()
    return cpu_extension.supported_isas()


@contextlib.contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """Force the C++ kernels onto one instruction set, process-wide.

    `name` is amx, avx512, avx512_fma (bfloat16 products in float32), avx512f (without VNNI), avx2
    or scalar. Never chosen without this: avx512_fp16 (`linear` in fp16 sums), amx_emulated and
    avx512_fp16_emulated.
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
