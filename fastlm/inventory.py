"""`info`: versions, hardware, and which implementation of every op runs here."""

import platform
from typing import Any

import torch

import fastlm
import fastlm.ops  # declares every op
from fastlm import backend
from fastlm.machine import cpu_name


def info() -> dict[str, Any]:
    """Versions, hardware, extensions, and per op what runs here, why the others do not, and what a
    backend serves of it where that is not everything.

    JSON-serialisable.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops, forced = {}, backend.forced()
    for op in sorted(backend.OPS):
        dtype = torch.bfloat16
        rows = {b: backend.why_not_here(op, b, device, dtype) for b in backend.BACKENDS}
        candidates = backend.order(device) if forced is None else (forced,)
        served = {b: backend.OPS[op].serves_of(row) for b, row in backend.BACKENDS.items()}
        order = [b for b in candidates if rows[b] is None]
        ops[op] = {
            "picked": order[0] if order else None,
            "why_not": {
                b: f"{forced} is forced" for b in backend.BACKENDS if forced not in (None, b)
            }
            | {b: r for b, r in rows.items() if r is not None},
            "serves": {b: s.text for b, s in served.items() if s is not None},
        }
    isas: dict[str, str] = {}
    if backend.why_not("cpu") is None:
        names = ("amx", "avx512", "avx512_fma", "avx2", "scalar")
        isas = {name: why for name in names if (why := backend.cpu_extension.why_not(name))}
    return {
        "fastlm": fastlm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_isa": backend.cpu_isa(),
        "cpu_isa_why_not": isas,
        "bf16_products": _products_of_bf16(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "forced_backend": forced,
        "backends": {b: backend.why_not(b) for b in backend.BACKENDS},
        "ops": ops,
    }


def _products_of_bf16() -> str | None:
    """How the C++ kernels multiply bfloat16 by default, why, and the rate of each way here."""
    if backend.why_not("cpu") is not None:
        return None
    by, because, dot, fma = backend.cpu_extension.products_of_bf16()
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in (("dot", dot), ("FMA", fma)) if rate)
    return f"{by} ({because}{f'; GFLOPS of a core: {rates}' if rates else ''})"


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
