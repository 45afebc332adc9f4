"""Collect what `fastlm info` shows: versions, hardware, and the backend that runs each op."""

import platform
from typing import Any

import torch

import fastlm
import fastlm.ops  # declares every op
from fastlm import backend
from fastlm.machine import cpu_name


def info() -> dict[str, Any]:
    """Return versions, hardware, extensions and, for each op, the backend that runs it here.

    "unavailable" says why each other backend does not run the op, "supports" which arguments a
    backend supports where these are not all. The result is JSON-serialisable.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops, forced = {}, backend.forced_backend()
    for op in sorted(backend.OPS):
        dtype = torch.bfloat16
        reasons = {b: backend.unsupported_reason(op, b, device, dtype) for b in backend.BACKENDS}
        candidates = backend.backends_for(device) if forced is None else (forced,)
        supports = {b: backend.OPS[op].support_of(row) for b, row in backend.BACKENDS.items()}
        usable = [b for b in candidates if reasons[b] is None]
        ops[op] = {
            "backend": usable[0] if usable else None,
            "unavailable": {
                b: f"{forced} is forced" for b in backend.BACKENDS if forced not in (None, b)
            }
            | {b: r for b, r in reasons.items() if r is not None},
            "supports": {b: s.text for b, s in supports.items() if s is not None},
        }
    isas: dict[str, str] = {}
    if backend.unavailable_reason("cpu") is None:
        names = ("amx", "avx512", "avx512_fma", "avx512f", "avx2", "scalar")
        reason_of = backend.cpu_extension.unavailable_reason
        isas = {name: reason for name in names if (reason := reason_of(name))}
    return {
        "fastlm": fastlm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_isa": backend.cpu_isa(),
        "cpu_isa_unavailable": isas,
        "bf16_products": _products_of_bf16(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "forced_backend": forced,
        "backends": {b: backend.unavailable_reason(b) for b in backend.BACKENDS},
        "ops": ops,
    }


def _products_of_bf16() -> str | None:
    """Say how the C++ kernels multiply bfloat16 by default, why, and how fast each method is."""
    if backend.unavailable_reason("cpu") is not None:
        return None
    method, reason, dot, fma = backend.cpu_extension.products_of_bf16()
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in (("dot", dot), ("FMA", fma)) if rate)
    return f"{method} ({reason}{f'; GFLOPS of a core: {rates}' if rates else ''})"


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
