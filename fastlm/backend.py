"""The only file that checks what hardware and extras exist, and picks the implementation of an op.

Every op is one torch operator, ``torch.ops.fastlm.<name>``, with up to four implementations of the
same signature:

- ``reference``  plain PyTorch (`fastlm.reference`); the definition; every device and float dtype;
- ``cpu``        C++ (`fastlm._cpu`); float32, bfloat16, float16;
- ``triton``     Triton (`fastlm.kernels`), on CUDA devices, or on CPU tensors with
                 ``TRITON_INTERPRET=1`` (numpy emulates the GPU, for tests);
- ``cuda``       CUDA C++ (`fastlm._cuda`), on CUDA devices;
- ``simt``       the same CUDA C++ on CPU tensors, in an emulator (`fastlm._simt`); only when
                 forced, for tests.

`pick` takes the first backend of `ORDER[device]` that implements the op, is available and supports
the dtype. ``FASTLM_BACKEND=name`` or ``with use_backend("name"):`` forces one backend. An op that
it cannot run raises: nothing falls back silently.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from fastlm.errors import InputError

# The extension, or None where it is not built; a broken one raises here. It is imported after torch
# because it shares torch's OpenMP runtime.
cpu_extension: Any = importlib.import_module("fastlm._cpu") if find_spec("fastlm._cpu") else None

BACKENDS = ("cuda", "simt", "triton", "cpu", "reference")
# Best first, per device type. A device that is not listed runs the reference.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
DTYPES["simt"] = DTYPES["cuda"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {}  # callables, or `Kernel` until first picked
_picked_by: dict[str, str] = {}  # op -> the argument whose device and dtype decide
_fakes: dict[str, Callable] = {}  # op -> its shape function, for tensors without memory
_get_num_threads = torch.get_num_threads
# A forked process has none of OpenMP's threads and waits for them for ever, in torch's parallel
# loops as in ours. With one thread it needs none.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
_picked: dict[tuple, Callable] = {}


def add_op(
    op: str, implementations: dict[str, Any], *, picked_by: str = "", fake: Callable | None = None
) -> None:
    """Add an op to the table that `pick` reads.

    Args:
        implementations: backend -> a callable or a `Kernel`; "cuda" serves "simt" too.
        picked_by: the name of the argument whose device and dtype decide.
        fake: runs on tensors without memory.
    """
    IMPLEMENTATIONS[op] = dict(implementations)
    if "cuda" in implementations:
        IMPLEMENTATIONS[op]["simt"] = implementations["cuda"]
    _picked_by[op] = picked_by
    if fake is not None:
        _fakes[op] = fake


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"{source}: wanted one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced: str | None = os.environ.get("FASTLM_BACKEND") or None
if _forced is not None:
    _checked_backend(_forced, "FASTLM_BACKEND")


def why_not(backend: str) -> str | None:
    """Why this backend cannot run on this machine, or None when it can."""
    if backend == "cpu":
        if cpu_extension is None:
            return (
                "the C++ extension fastlm._cpu is not built"
                " (pip install -e . builds it; it needs a C++17 compiler)"
            )
    elif backend == "triton":
        if find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not _triton_is_interpreted():
            return "no CUDA device is visible to torch"
    elif backend == "cuda":
        if find_spec("fastlm._cuda") is None:
            return "the CUDA extension fastlm._cuda is not built"
        if not torch.cuda.is_available():
            return "no CUDA device is visible to torch"
    elif backend == "simt" and find_spec("fastlm._simt") is None:
        return "the emulator fastlm._simt is not built (FASTLM_SIMT=1 pip install -e .)"
    return None


def _triton_is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_here(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve `op` on tensors of this device type and dtype, or None."""
    if backend not in IMPLEMENTATIONS[op]:
        return f"{op} has no {backend} implementation"
    if backend != "reference":
        on_cpu = backend == "simt" or (backend == "triton" and _triton_is_interpreted())
        if not (on_cpu and device == "cpu") and backend not in ORDER.get(device, ()):
            return f"{backend} does not run on {device} tensors"
        if dtype not in DTYPES[backend]:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES[backend])
            return f"{backend} serves {wanted}, not {str(dtype).removeprefix('torch.')}"
    return why_not(backend)


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


def serves_by(backend: str, op: str, tensor: torch.Tensor) -> bool:
    """Whether `op` runs on this backend for tensors like this one."""
    return pick(op, tensor) is IMPLEMENTATIONS[op].get(backend)


class Kernel:
    """A function of ``fastlm.kernels.<module>``, imported when it is first picked, because Triton
    may be missing and takes half a second to import.
    """

    package = "fastlm.kernels"

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def load(self) -> Callable:
        return getattr(importlib.import_module(f"{self.package}.{self.module}"), self.name)


class CudaKernel(Kernel):
    """A function of ``fastlm.cuda.<module>``, run on its tensors' device; serves ``cuda`` and
    ``simt``.
    """

    package = "fastlm.cuda"

    def load(self) -> Callable:
        function = super().load()

        @functools.wraps(function)
        def on_its_device(*args: Any) -> Any:
            first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
            if not first.is_cuda or first.device.index == torch.cuda.current_device():
                return function(*args)
            with torch.cuda.device(first.device):
                return function(*args)

        return on_its_device


def _loaded(op: str, backend: str) -> Callable:
    implementation = IMPLEMENTATIONS[op][backend]
    if isinstance(implementation, Kernel):
        implementation = IMPLEMENTATIONS[op][backend] = implementation.load()
    return implementation


def _choose(op: str, device: str, dtype: torch.dtype) -> Callable:
    if dtype.is_floating_point and dtype not in _FLOATS:  # float8 is left to torch's own products
        names = ", ".join(str(d).removeprefix("torch.") for d in _FLOATS)
        raise InputError(f"{_picked_by[op]}: wanted {names}, got {dtype}")
    if device == "meta":
        return _fakes[op]
    if _forced is not None:
        if reason := why_not_here(op, _forced, device, dtype):
            raise InputError(f"backend: {_forced!r} is forced but cannot serve: {reason}")
        return _loaded(op, _forced)
    for backend in ORDER.get(device, ("reference",)):
        if why_not_here(op, backend, device, dtype) is None:
            return _loaded(op, backend)
    raise InputError(f"{op}: no implementation for {device} tensors of {dtype}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the ``with`` onto one backend, process-wide.

    An op that this backend cannot run raises.
    """
    global _forced
    before = _forced
    _forced = _checked_backend(name, "use_backend")
    _picked.clear()
    try:
        yield
    finally:
        _forced = before
        _picked.clear()


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
