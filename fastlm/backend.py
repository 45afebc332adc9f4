"""The only file that asks what hardware and extras exist, and picks the implementation of an op.

Every op is one torch operator, ``torch.ops.fastlm.<name>``, with up to four implementations of the
same signature:

- ``reference``  plain PyTorch (`fastlm.reference`); the definition; every device and float dtype;
- ``cpu``        C++ (`fastlm._cpu`); float32, bfloat16, float16;
- ``triton``     Triton (`fastlm.kernels`), on CUDA devices; on CPU tensors where
                 ``TRITON_INTERPRET=1`` (numpy stands in for the GPU: for tests);
- ``cuda``       CUDA C++ (`fastlm._cuda`), on CUDA devices;
- ``simt``       the same CUDA C++ on CPU tensors, by an emulator (`fastlm._simt`), where forced:
                 for tests.

`pick` takes the first of `ORDER[device]` that the op has and that is available and serves the
dtype. ``FASTLM_BACKEND=name`` or ``with use_backend("name"):`` forces one, and raises where it
cannot serve: nothing falls back silently.

Ops register with ``torch.library.Library`` (1.8 us a call here) and not with
``torch.library.custom_op`` (7.6 us).
"""

import contextlib
import functools
import importlib
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import forward_ad, profiler

from fastlm import flops as flop_formulas
from fastlm import transforms
from fastlm.errors import InputError

# The extension, or None where it is not built; one that is broken raises here. After torch, whose
# OpenMP runtime it shares.
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
_PICKED_BY: dict[str, str] = {}  # the argument whose device and dtype choose
_FAKES: dict[str, Callable] = {}  # what tensors without memory run: shapes
# What an operator called without the dispatcher may be given: FakeTensor, DTensor and other
# subclasses in any place dispatch.
_PLAIN = frozenset(
    (torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype)
)
_get_num_threads = torch.get_num_threads
_library = torch.library.Library("fastlm", "DEF")
_picked: dict[tuple, Callable] = {}


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


def _why_not_here(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
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
    # torch hands its number of threads to OpenMP once per thread of Python, when it is asked here;
    # a kernel that came before that would take every core
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
    """A function of ``fastlm.kernels.<module>``, imported when it is first picked: Triton may be
    missing, and takes half a second.
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


def is_eager(*tensors: torch.Tensor) -> bool:
    """Whether these are plain tensors and nothing traces or transforms: values may be asked for."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
        and transforms.innermost() is None
        and forward_ad._current_level < 0
        and _PLAIN.issuperset(map(type, tensors))
    )


def _choose(op: str, device: str, dtype: torch.dtype) -> Callable:
    if dtype.is_floating_point and dtype not in _FLOATS:  # float8: by torch's products elsewhere
        names = ", ".join(str(d).removeprefix("torch.") for d in _FLOATS)
        raise InputError(f"{_PICKED_BY[op]}: wanted {names}, got {dtype}")
    if device == "meta":
        return _FAKES[op]
    if _forced is not None:
        if reason := _why_not_here(op, _forced, device, dtype):
            raise InputError(f"backend: {_forced!r} is forced but cannot serve: {reason}")
        return _loaded(op, _forced)
    for backend in ORDER.get(device, ("reference",)):
        if _why_not_here(op, backend, device, dtype) is None:
            return _loaded(op, backend)
    raise InputError(f"{op}: no implementation for {device} tensors of {dtype}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the ``with`` onto one backend, process-wide.

    An op that it cannot serve raises.
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


def register(
    schema: str,
    *,
    fake: Callable,
    implementations: dict[str, Any],
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    picked_by: int = 0,
    flops: Callable | None = None,
    flops_by_values: Callable | None = None,
) -> Callable:
    """Define ``torch.ops.fastlm.<name>``: schema, shapes (`fake`), implementations and autograd.

    `picked_by` is the position of the tensor whose device and dtype choose the implementation.
    `flops` counts them from the arguments, tensors as shapes (`fastlm.flops`); `flops_by_values`
    from the tensors.

    Returns what the public function calls: the operator; or, on plain tensors with nothing tracing
    or transforming, the implementation itself (the dispatcher costs 4 us here, as much as a
    decode-size kernel), inside a `torch.autograd.Function` where a gradient is needed (10 us in all
    where the operator's derivative costs 35).
    """
    name = schema.split("(", 1)[0]
    definition = _without_autocast(implementations["reference"])
    IMPLEMENTATIONS[name] = implementations | {"reference": definition}
    if "cuda" in implementations:
        IMPLEMENTATIONS[name]["simt"] = implementations["cuda"]
    _FAKES[name] = fake
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        return pick(name, args[picked_by])(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", fake, lib=_library)

    def refuse(*_: Any) -> Any:  # without it torch warns and goes on with zeros
        raise NotImplementedError(f"fastlm::{name} has no derivative")

    packet = getattr(torch.ops.fastlm, name)
    operator = packet.default
    _PICKED_BY[name] = operator._schema.arguments[picked_by].name
    if formula := flops or flops_by_values:
        flop_formulas.add(packet, formula, raw=flops is None)
    if not operator._schema.is_mutable:  # torch has no derivative of one that writes its arguments
        transforms.register_derivative(_library, operator, setup_context, backward or refuse)
    differentiable = operator
    if backward:
        differentiable = _differentiable(name, picked_by, setup_context, backward)
    transformed = transforms.transformed(operator, definition, setup_context, backward or refuse)
    tensors = [i for i, a in enumerate(operator._schema.arguments) if "Tensor" in str(a.type)]
    is_compiling, is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
    modes, transform = torch._C._len_torch_dispatch_stack, transforms.innermost
    plain, is_tracing = _PLAIN.issuperset, torch._C._is_tracing

    def recorded(*args: Any) -> Any:  # the dispatcher takes four times as long
        with _RecordFunctionFast(f"fastlm::{name}", args):
            if is_grad_enabled() and any(
                args[i] is not None and args[i].requires_grad for i in tensors
            ):
                return differentiable(*args)
            return pick(name, args[picked_by])(*args)

    def call(*args: Any) -> Any:
        if is_compiling():
            return operator(*args)
        if (
            plain(map(type, args))
            and not modes()
            and transform() is None
            and not is_tracing()
            and forward_ad._current_level < 0
        ):
            if profiler._is_profiler_enabled:
                return recorded(*args)
            if is_grad_enabled():
                for i in tensors:
                    if (tensor := args[i]) is not None and tensor.requires_grad:
                        return differentiable(*args)
            try:
                return pick(name, args[picked_by])(*args)
            except RuntimeError:  # tensors of a batched backward look plain and have no memory
                if not transforms.in_batched_backward():
                    raise
            return operator(*args)
        return transformed(*args)

    return call


def _differentiable(name: str, picked_by: int, setup: Callable | None, backward: Callable):
    """The implementation with its derivative, for plain tensors: what `register_autograd` gives the
    operator.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = pick(name, args[picked_by])(*args)
        if setup is not None:
            setup(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    function._backward_cls.apply = backward  # torch's own looks for other kinds of derivative
    # Function.apply looks for transforms, 0.9 us a call: `call` has looked
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


def _without_autocast(function: Callable) -> Callable:
    """The reference computes in float32 or wider also where autocast would take 16 bits."""

    @functools.wraps(function)
    def wide(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return wide


def autocasts(t: torch.Tensor) -> bool:
    """Whether ``torch.autocast`` is on where t is; no memory, no autocast."""
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as ``F.linear`` takes them: in the dtype of ``torch.autocast`` where it is on.

    Ops ask `autocast_somewhere` first: 0.06 us a call, where asking for a device takes 0.25.
    """
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def promoted(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the wider of their dtypes, as torch's own sums take them."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.to(wide), b.to(wide)


autocast_somewhere: Callable[[], bool] = torch._C._is_any_autocast_enabled


def cpu_isa() -> str | None:
    """The instruction set the C++ kernels run on, or None without the extension."""
    if why_not("cpu"):
        return None
    try:
        return cpu_extension.isa()
    except ValueError as error:
        raise InputError(str(error)) from None


if os.environ.get("FASTLM_CPU_ISA"):
    cpu_isa()  # a name that cannot run here is refused now, not by the first kernel


def multiplies_bf16() -> bool:
    """Whether the C++ kernels multiply bfloat16 as such: elsewhere they widen it to float32."""
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


def info() -> dict[str, Any]:
    """Versions, hardware, extensions, and per op what runs here and why the others do not.

    JSON-serialisable.
    """
    import fastlm
    import fastlm.ops  # registers every op
    import fastlm.optim

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops = {}
    for op in sorted(IMPLEMENTATIONS):
        dtype = torch.bfloat16
        rows = {b: _why_not_here(op, b, device, dtype) for b in BACKENDS}
        candidates = ORDER[device] if _forced is None else (_forced,)
        order = [b for b in candidates if rows[b] is None]
        ops[op] = {
            "picked": order[0] if order else None,
            "why_not": {b: f"{_forced} is forced" for b in BACKENDS if _forced not in (None, b)}
            | {b: r for b, r in rows.items() if r is not None},
        }
    isas: dict[str, str | None] = {}
    if why_not("cpu") is None:
        names = ("amx", "avx512", "avx512_fma", "avx2", "scalar")
        isas = {name: cpu_extension.why_not(name) or None for name in names}
    return {
        "fastlm": fastlm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_isa": cpu_isa(),
        "cpu_isa_why_not": {k: v for k, v in isas.items() if v},
        "bf16_products": _products_of_bf16(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "forced_backend": _forced,
        "backends": {b: why_not(b) for b in BACKENDS},
        "ops": ops,
    }


def _products_of_bf16() -> str | None:
    """How the C++ kernels multiply bfloat16 by choice, why, and what either way reaches here."""
    if why_not("cpu") is not None:
        return None
    by, because, dot, fma = cpu_extension.products_of_bf16()
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in (("dot", dot), ("FMA", fma)) if rate)
    return f"{by} ({because}{f'; GFLOPS of a core: {rates}' if rates else ''})"


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The model's name, and its numbers: virtual machines say "AMD EPYC" of any generation."""
    try:
        with open("/proc/cpuinfo") as f:
            first = f.read().split("\n\n", 1)[0]
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", first, re.M))
    numbers = [
        f"{k.removeprefix('cpu ')} {fields[k]}" for k in ("cpu family", "model") if k in fields
    ]
    name = fields.get("model name", platform.machine()).strip()
    return f"{name} ({', '.join(numbers)})" if numbers else name
