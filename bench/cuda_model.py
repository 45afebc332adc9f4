"""Model the times of the CUDA kernels on cards that are not available, next to measured times.

    python bench/cuda_model.py [quantized_linear ...]

For each case the host code runs on the emulator without running its kernels, which yields the real
launches: blocks, threads, shared memory. The time of a launch is the largest of

- bytes / bandwidth and operations / peak, at the fractions of the public figures that good kernels
  reach (BANDWIDTH, PEAK), in whole waves of blocks: the last wave takes as long as a full one;
- bytes by latency: each resident warp has IN_FLIGHT bytes in flight per memory latency;
- LATENCY for every wave;

plus LAUNCH for each launch in a stream. A decode step, as a CUDA graph, takes its bytes over the
bandwidth, plus GRAPH_LAUNCH for each of fastlm's launches (torch's few are left out), plus LATENCY
for each launch that reads no weights and no cache. Registers and threads come from
tests/gates/cuda_gate.json. "Measured" is the time in bench/results/gpu.jsonl for the card; without
it, "not measured".
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gpu
import torch

from fastlm import AdamW, backend, cuda, ops

ROOT = Path(__file__).resolve().parent.parent
BF16 = torch.bfloat16


class Card(NamedTuple):
    """A card's public figures: GB/s, dense bf16 and int8 TFLOP/s, multiprocessors, architecture."""

    bandwidth: float
    bf16: float
    int8: float
    multiprocessors: int
    arch: int


CARDS = {
    "A100": Card(2039, 312, 624, 108, 80),
    "H100": Card(3350, 989, 1979, 132, 90),
    "H200": Card(4800, 989, 1979, 132, 90),
    "B200": Card(8000, 2250, 4500, 148, 100),
}
BANDWIDTH, PEAK = 0.9, 0.7
LATENCY = 1e-6  # per wave: the start of a block, one trip to memory, its end
IN_FLIGHT = 2048  # bytes that a warp has in flight: four 16-byte loads per lane
MEMORY_LATENCY = 0.7e-6
LAUNCH = 2.5e-6
GRAPH_LAUNCH = 1.2e-6  # from the end of a kernel to the start of the next, which waits for it


class Case(NamedTuple):
    op: str
    shape: str
    call: Callable[[], object]
    bytes: float
    flops: float = 0
    kind: str = "bf16"  # selects the peak for the operations
    graph: bool = False  # many launches that share the bytes


class Kernel(NamedTuple):
    name: str
    blocks: int
    threads: int
    shared: int


def launches(case: Case, multiprocessors: int) -> list[Kernel]:
    from fastlm import _simt  # pyright: ignore[reportAttributeAccessIssue]

    cuda.emulated_multiprocessors = multiprocessors
    _simt.set_options(dry=True)
    try:
        with backend.use_backend("simt"):
            case.call()
    finally:
        _simt.set_options()
    return [Kernel(*launch) for launch in _simt.dry_launches()]


KERNELS = {  # launch name -> kernel name, where they differ
    "quantized_linear vector": "vector_kernel",
    "quantized_linear matrix": "matrix_kernel",
    "quantized_linear add_parts": "add_parts",
    "quantized_linear round": "round_kernel",
    "rms_norm round": "rms_norm_round_kernel",
    "glu round": "glu_round_kernel",
    "paged_attention": "paged::paged_",
    "paged_attention combine": "paged::paged_combine_kernel",
}


def registers(name: str, arch: int) -> int:
    """The largest register count among the kernels of this launch."""
    of_arch = json.loads((ROOT / "tests/gates/cuda_gate.json").read_text())["kernels"][f"sm_{arch}"]
    prefix = KERNELS.get(name, name)
    return max(k["registers"] for full, k in of_arch.items() if full.startswith(prefix))


def resident_blocks(kernel: Kernel, card: Card) -> int:
    """Count the blocks that fit a multiprocessor, by threads, registers, dynamic shared memory."""
    warps = -(-kernel.threads // 32)
    of_registers = 65536 // (-(-registers(kernel.name, card.arch) // 8) * 8 * 32 * warps)
    of_shared = {80: 164, 90: 228, 100: 228}[card.arch] * 1024 // (kernel.shared + 1024)
    return max(1, min(64 // warps, 32, of_registers, of_shared))


def seconds(case: Case, kernels: list[Kernel], card: Card) -> float:
    """Estimated seconds; the launch with the most threads has the case's bytes and operations."""
    if case.graph:
        reads = ("quantized_linear vector", "quantized_linear matrix", "paged_attention")
        idle = sum(k.name not in reads for k in kernels)
        streamed = case.bytes / (BANDWIDTH * card.bandwidth * 1e9)
        return streamed + idle * LATENCY + len(kernels) * GRAPH_LAUNCH
    main = max(kernels, key=lambda k: k.blocks * k.threads)
    total = 0.0
    for kernel in kernels:
        warps = -(-kernel.threads // 32)
        resident = resident_blocks(kernel, card) * card.multiprocessors
        waves = -(-kernel.blocks // resident)
        total += LAUNCH
        if kernel is not main:
            total += waves * LATENCY
            continue
        full = waves * resident / kernel.blocks if kernel.blocks > resident else 1.0
        busy = min(kernel.blocks, resident) * warps * IN_FLIGHT / MEMORY_LATENCY
        bandwidth = min(BANDWIDTH * card.bandwidth * 1e9, busy)
        peak = PEAK * (card.int8 if case.kind == "int8" else card.bf16) * 1e12
        peak *= min(1.0, kernel.blocks / card.multiprocessors)
        total += max(full * max(case.bytes / bandwidth, case.flops / peak), waves * LATENCY)
    return total


# ---- cases ---------------------------------------------------------------------------------------


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def rms_norm() -> Iterator[Case]:
    for rows, width in ((1, 4096), (64, 4096), (16384, 4096)):
        x, r, weight = empty(rows, width), empty(rows, width), empty(width)
        call = partial(ops.rms_norm, x, weight, residual=r)
        yield Case("rms_norm", f"{rows} x {width}, residual", call, 4 * 2 * rows * width)


def glu() -> Iterator[Case]:
    for rows, width in ((1, 14336), (64, 14336)):
        call = partial(ops.glu, empty(rows, width), empty(rows, width))
        yield Case("glu", f"{rows} x {width}", call, 3 * 2 * rows * width)


def rope() -> Iterator[Case]:
    for users in (1, 64):
        q, k = empty(users, 32, 1, 128), empty(users, 8, 1, 128)
        tables = torch.zeros(users, 1, 128), torch.zeros(users, 1, 128)
        call = partial(ops.rope, q, k, *tables)
        yield Case("rope", f"B {users} H 32/8 S 1 D 128", call, 2 * 2 * (q.numel() + k.numel()))


def cross_entropy() -> Iterator[Case]:
    for rows, classes in ((8, 128256), (8192, 128256)):
        logits, target = empty(rows, classes), torch.zeros(rows, dtype=torch.int64)
        call = partial(ops.cross_entropy, logits, target)
        yield Case("cross_entropy fwd", f"{rows} x {classes}", call, 2 * rows * classes)


def adamw() -> Iterator[Case]:
    weights = [empty(4096, 4096).requires_grad_() for _ in range(24)]
    weights += [empty(4096).requires_grad_() for _ in range(200)]
    count = sum(w.numel() for w in weights)
    for w in weights:
        w.grad = torch.empty_like(w)
    # weight and gradient: 2 bytes each; states: 4 or 1 each. All are read, all but the gradient
    # written.
    for bits, size in ((32, 2 + 4 + 16), (8, 2 + 4 + 4)):
        step = AdamW(weights, state_bits=bits).step
        yield Case("adamw step", f"{count / 1e6:.0f} M bf16, {bits}-bit states", step, size * count)


def paged_attention() -> Iterator[Case]:
    page, h, kv, d = 16, 32, 8, 128
    for users, keys in ((1, 32768), (8, 4096), (64, 1024), (256, 1024)):
        pages = users * keys // page
        block = torch.arange(pages, dtype=torch.int32).view(users, -1)
        lens = torch.full((users,), keys, dtype=torch.int32)
        q = empty(users, 1, h, d)
        for dtype in (BF16, torch.int8):
            cache = empty(2, pages, page, kv, d, dtype=dtype)
            scales = {} if dtype == BF16 else {"k_scale": 1.0, "v_scale": 1.0}
            call = partial(ops.paged_attention, q, *cache, block, lens, **scales)
            size = cache.numel() * cache.element_size()
            name = "paged_attention" if dtype == BF16 else "paged_attention int8"
            shape = f"{users} x {keys}, {h}/{kv}, {d}"
            yield Case(name, shape, call, size, 4 * users * keys * h * d)


def quantized_linear() -> Iterator[Case]:
    n, k = 14336, 4096
    codes = {bits: ops.quantize_weight(torch.zeros(n, k, dtype=BF16), bits) for bits in (4, 8)}
    for bits, act_bits in ((4, 16), (8, 16), (8, 8), (4, 8)):
        for m in (1, 4, 16, 64):
            call = partial(ops.quantized_linear, empty(m, k), codes[bits], act_bits=act_bits)
            name, kind = f"quantized_linear w{bits}a{act_bits}", "int8" if act_bits == 8 else "bf16"
            size = n * k * bits // 8 + n * k // 128 * 2
            yield Case(name, f"{m} x {k} -> {n}", call, size, 2 * m * n * k, kind)


def decode() -> Iterator[Case]:
    gpu.DEVICE = "cpu"
    for name, sizes in gpu.SHAPES.items():
        for format in ("w4a16", "w8a8"):
            model = gpu.random_model(sizes, format, filled=False)
            for users in (1, 16, 64):
                call = gpu.step_call(model, users, 1024, graph=False)
                size = gpu.step_bytes(model, users, 1024)
                shape = f"{users} users, 1024 keys"
                yield Case(f"decode step {name} {format}", shape, call, size, graph=True)


CASES = {
    f.__name__: f
    for f in (quantized_linear, paged_attention, cross_entropy, adamw, rms_norm, rope, glu, decode)
}


def read_measured() -> tuple[str, dict[tuple[str, str], float]]:
    """Return the card of bench/results/gpu.jsonl and fastlm's milliseconds by op and shape."""
    path = ROOT / "bench/results/gpu.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    card, times = "", {}
    for line in lines:
        card = line["machine"]["gpu"] if "machine" in line else card
        if row := line.get("row"):
            times[row["name"], row["shape"]] = row["milliseconds"].get("fastlm")
    return card, times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("ops", nargs="*", help=f"Model only these: {', '.join(CASES)}.")
    names = parser.parse_args().ops
    if unknown := set(names) - set(CASES):
        parser.error(f"ops: expected some of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    card_of, times = read_measured()
    rows = []
    for name in names or CASES:
        for case in CASES[name]():
            per_card = [launches(case, card.multiprocessors) for card in CARDS.values()]
            kernels = per_card[1]
            if case.graph:
                blocks = f"{len(kernels)}: " + ", ".join(
                    f"{n} {name}" for name, n in Counter(k.name for k in kernels).most_common()
                )
            else:
                card = CARDS["H100"]
                blocks = ", ".join(
                    f"{k.name} {k.blocks} x {k.threads}"
                    f" ({resident_blocks(k, card) * -(-k.threads // 32)})"
                    for k in kernels
                )
            row = [case.op, case.shape, blocks, f"{case.bytes / 2**20:.1f}"]
            row += [
                f"{seconds(case, kernels, card) * 1e6:.1f}"
                for kernels, card in zip(per_card, CARDS.values())
            ]
            milliseconds = times.get((case.op, case.shape))
            row.append(f"{milliseconds * 1e3:.1f} ({card_of})" if milliseconds else "not measured")
            rows.append(row)
    heads = [
        "op",
        "shape",
        "launches on an H100, blocks x threads (warps a multiprocessor holds, at least)",
        "MiB",
    ]
    heads += [*(f"{card} us" for card in CARDS), "measured us"]
    for row in [heads, ["---"] * len(heads), *rows]:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
