"""Measure tile sizes on this machine's GPU and store them on disk for later processes.

    python -m fastlm.kernels.tune [attention] [quantized_linear]     common shapes, minutes
    tune(lambda: ops.attention(q, k, v, causal=True))                the shapes of one call

The sizes that the call selects from `TileConfigs` are changed one at a time to neighbours (half,
double; one pipeline stage more or less), as long as the call gets faster by a percent. A candidate
that does not compile, spills registers or changes the result is rejected. Not measured on a GPU
yet.
"""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree
from triton.errors import TritonError
from triton.testing import do_bench

from fastlm import ops
from fastlm.kernels.launch import (
    INTERPRETED,
    Config,
    Key,
    TileConfigs,
    cache_file,
    load_tuned,
    record_launches,
    record_lookups,
)

GAIN = 0.99  # of the best time so far
_MIN_SIDE, _MAX_SIDE = 16, 256  # of a tile; above _MAX_SIDE only where the fixed table is
_MAX_STAGES = 5
_TOLERANCE = 0.02  # of the largest value: tiles change the order of sums, nothing else


class TuningResult(NamedTuple):
    """The tile sizes of one kernel before and after tuning."""

    kernel: str
    before: Config
    after: Config
    seconds_before: float
    seconds_after: float


def seconds(call: Callable[[], Any]) -> float:
    """Return the median time of the call; on a GPU the L2 cache is flushed before each run."""
    if not INTERPRETED:
        return do_bench(call, return_mode="median") / 1e3
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def neighbours(config: Config) -> Iterator[Config]:
    for name, size in config.sizes.items():
        for other in (size // 2, size * 2):
            if _MIN_SIDE <= other <= max(_MAX_SIDE, size):
                yield replace(config, sizes={**config.sizes, name: other})
    for warps in (config.num_warps // 2, config.num_warps * 2):
        if 2 <= warps <= 8:
            yield replace(config, num_warps=warps)
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= _MAX_STAGES:
            yield replace(config, num_stages=stages)


def tune(
    call: Callable[[], Any], *, timer: Callable[[Callable], float] = seconds, save: bool = True
) -> list[TuningResult]:
    """Measure the tile sizes that `call` uses. `save` stores the faster ones for all processes.

    `call` takes no arguments and returns the same tensors every time: fixed seeds, no state.
    """
    with record_lookups() as lookups:
        expected = call()
    used = {
        (tiles.label(key), tensor.device): (tiles, key, tensor) for tiles, key, tensor in lookups
    }
    results = []
    for tiles, key, tensor in used.values():
        result = _hill_climb(call, expected, tiles, key, tensor, timer)
        results.append(result)
        if save and result.after != result.before:
            _save(cache_file(tensor), tiles, key, result.after)
    return results


def _hill_climb(
    call: Callable, expected: Any, tiles: TileConfigs, key: Key, tensor: torch.Tensor,
    timer: Callable,
) -> TuningResult:  # fmt: skip
    first = best = tiles.select(key, tensor)
    first_time = best_time = timer(call)
    seen = [first]
    climbing = True
    while climbing:
        climbing = False
        for config in neighbours(best):
            if config in seen:
                continue
            seen.append(config)
            with tiles.override(key, config, tensor):
                time_taken = timer(call) if _is_valid(call, expected) else math.inf
            if time_taken < GAIN * best_time:
                best, best_time, climbing = config, time_taken, True
                break
    return TuningResult(tiles.label(key), first, best, first_time, best_time)


def _is_valid(call: Callable, expected: Any) -> bool:
    try:
        with record_launches() as launches:
            actual = call()
    except TritonError:  # does not compile, or needs more than the card has
        return False
    if any(getattr(launch.kernel, "n_spills", 0) for launch in launches):
        return False
    pairs = zip(_pytree.tree_leaves(expected), _pytree.tree_leaves(actual))
    return all(_is_close(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.numel())


def _is_close(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    expected, actual = expected.double(), actual.double()
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return False
    expected, actual = expected[finite], actual[finite]
    if expected.numel() == 0:
        return True
    return bool((expected - actual).abs().max() <= _TOLERANCE * expected.abs().max())


def _save(file: Path, tiles: TileConfigs, key: Key, config: Config) -> None:
    """Write one entry to the file and keep the others. Readers see the old file or the new one."""
    load_tuned.cache_clear()
    entries = {label: asdict(c) for label, c in load_tuned(file).items()}
    entries[tiles.label(key)] = asdict(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".json")
    with os.fdopen(descriptor, "w") as f:
        json.dump(entries, f, indent=1)
    os.replace(name, file)
    load_tuned.cache_clear()
    tiles.clear_cache()


# ---- common shapes -------------------------------------------------------------------------------


def _gradients(leaves: list, upstream: torch.Tensor, options: dict) -> tuple:
    out = ops.attention(*leaves, causal=True, **options)
    return torch.autograd.grad(out, leaves, upstream)


def _attention() -> Iterator[tuple[str, Callable]]:
    for width in (64, 128, 256):
        q, k, v = (
            torch.randn(2, heads, 2048, width, dtype=torch.bfloat16, device="cuda")
            for heads in (16, 4, 4)
        )
        leaves = [t.requires_grad_() for t in (q, k, v)]
        upstream = torch.randn_like(q)
        for name, options in (("", {}), (", softcap", {"softcap": 30.0})):
            yield f"attention {width}{name}", partial(_gradients, leaves, upstream, options)
        query = torch.randn(8, 32, 1, width, dtype=torch.bfloat16, device="cuda")
        cache = torch.randn(2, 8, 8, 4096, width, dtype=torch.bfloat16, device="cuda")
        yield f"attention {width}, one query", partial(ops.attention, query, *cache)


def _quantized_linear() -> Iterator[tuple[str, Callable]]:
    weight = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    for bits, act_bits in ((4, 16), (8, 16), (8, 8), (4, 8)):
        w = ops.quantize_weight(weight, bits)
        for rows in (1, 16, 32, 64, 512):
            x = torch.randn(rows, 4096, dtype=torch.bfloat16, device="cuda")
            call = partial(ops.quantized_linear, x, w, act_bits=act_bits)
            yield f"quantized_linear w{bits}a{act_bits}, {rows} rows", call


WORKLOADS = {"attention": _attention, "quantized_linear": _quantized_linear}


def main(names: list[str]) -> None:
    for name in names:
        if name not in WORKLOADS:
            sys.exit(f"fastlm.kernels.tune: expected {' or '.join(WORKLOADS)}, got {name!r}")
    if not torch.cuda.is_available():
        sys.exit("fastlm.kernels.tune: expected a CUDA device, got none")
    torch.manual_seed(0)
    for name in names or WORKLOADS:
        for label, call in WORKLOADS[name]():
            for t in tune(call):
                gain = t.seconds_before / t.seconds_after
                print(f"{label}: {t.kernel}: {t.before} -> {t.after}, {gain:.2f}x", flush=True)
    print(f"stored in {cache_file(torch.empty(0, device='cuda'))}")


if __name__ == "__main__":
    main(sys.argv[1:])
