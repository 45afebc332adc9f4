"""The harness every benchmark runs on.

A `Case` is one op at one shape with named variants that do the same work. `measure` runs them in
turn, round after round, so that a slow second of the machine hits all of them, and takes the
median and the spread (interquartile range over median). What a variant reaches is compared with
the ceilings of this machine, measured on the spot. Nothing is timed while the op's tests are red.
The last line of every script is JSON.

    python -P bench/attention.py                 all cases of the file
    python -P bench/attention.py causal          cases whose name contains "causal"
    python -P bench/run.py --isa avx2 attention  both sides held to AVX2
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastlm import backend

# a case of its own shape is a compilation of its own: behind the limit of 8 the peer would be eager
torch._dynamo.config.recompile_limit = 256

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 9  # medians of 9 interleaved rounds repeat within a few percent on a shared machine
MAX_SECONDS = 15  # of one variant of one case: a peer of seconds a call takes part in 3 rounds
MIN_ROUND_SECONDS = 0.01  # a round repeats a short call until the clock's noise is below 1 %


@dataclass
class Case:
    """One op at one shape. `flops` and `bytes` are what the work needs at least, for the share of
    the ceiling. A variant named "floor ..." does less than the work: it is shown, not compared.
    """

    name: str
    shape: str
    variants: dict[str, Callable[[], object]]
    flops: float | None = None
    bytes: float | None = None
    dtype: str = "bf16"  # which matrix ceiling `flops` is divided by
    missing: dict[str, str] = field(default_factory=dict)  # peers that are not here, and why


@dataclass
class Row:
    name: str
    shape: str
    milliseconds: dict[str, float]
    spread: dict[str, float]
    ratio: float | None  # best peer's time / fastlm's
    best_peer: str | None
    of_ceiling: float | None
    ceiling: str
    missing: dict[str, str]


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(
    variants: dict[str, Callable[[], object]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds per call, per variant and round; variants take turns inside each round."""
    repeats, turns = {}, {}
    for name, call in variants.items():
        call()  # compile, fault pages in, fill caches
        once = max(_seconds(call, 1), 1e-7)
        repeats[name] = max(1, int(MIN_ROUND_SECONDS / once))
        turns[name] = max(min(rounds, 3), min(rounds, int(MAX_SECONDS / once)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        for name, call in variants.items():
            if i < turns[name]:
                times[name].append(_seconds(call, repeats[name]))
    return times


def ceilings() -> dict[str, float]:
    """FLOP/s of the matrix core on operands in the L1 (bf16, fp32), bytes/s of reading
    memory; best of several.
    """
    buffer = torch.rand(64 << 20)  # 256 MiB: beyond the caches of most machines
    best = {"bf16": 0.0, "fp32": 0.0, "read": 0.0}
    for _ in range(7):
        for key, flag in (("bf16", True), ("fp32", False)):
            start = time.perf_counter()
            flops = backend.cpu_extension.multiply_in_l1(flag, 500)
            best[key] = max(best[key], flops / (time.perf_counter() - start))
        start = time.perf_counter()
        backend.cpu_extension.read_all(buffer)
        best["read"] = max(best["read"], buffer.numel() * 4 / (time.perf_counter() - start))
    return best


def run_case(
    case: Case, limits: dict[str, float], rounds: int = ROUNDS, timed: Callable = measure
) -> Row:
    times = timed(case.variants, rounds)
    median = {name: statistics.median(t) for name, t in times.items()}
    spread = {}
    for name, t in times.items():
        low, _, high = statistics.quantiles(t, n=4)
        spread[name] = (high - low) / median[name]
    peers = {n: s for n, s in median.items() if not n.startswith(("fastlm", "floor"))}
    best_peer = min(peers, key=peers.__getitem__, default="")
    mine = median.get("fastlm")
    share, unit = None, ""
    runs_here = mine or peers[best_peer]  # some work is left to torch: the row says how it does
    if case.flops or case.bytes:
        # the work needs both: whichever ceiling takes longer is the one that binds
        compute = (case.flops or 0) / limits[case.dtype]
        memory = (case.bytes or 0) / limits["read"]
        share, unit = (
            max(compute, memory) / runs_here,
            f"{case.dtype} matrix" if compute >= memory else "memory read",
        )
    return Row(
        case.name,
        case.shape,
        {n: s * 1e3 for n, s in median.items()},
        spread,
        peers[best_peer] / mine if best_peer and mine else None,
        best_peer or None,
        share,
        unit,
        case.missing,
    )


def gate(op: str) -> None:
    """Refuse to time an op whose quick tests fail."""
    test = ROOT / "tests" / f"test_{op}.py"
    if not test.exists():
        sys.exit(f"bench: no tests/test_{op}.py: an op without tests is not timed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", str(test)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-15:]), file=sys.stderr)
        sys.exit(
            f"bench: tests/test_{op}.py is red: no speedup is reported on a red gate "
            "(--no-gate to profile)"
        )


def machine() -> dict[str, object]:
    """What a number needs beside it: machine, versions, commit."""
    info = backend.info()
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    except OSError:  # a machine without git
        commit = ""
    keys = ("cpu", "cpu_isa", "threads", "torch", "python", "fastlm")
    return {
        **{k: info[k] for k in keys},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "aten": os.environ.get("ATEN_CPU_CAPABILITY", "default"),
        "system": platform.system(),
    }


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line a case, all peers with their times, the ratio to the best of them."""
    lines = [
        "| op | shape | fastlm ms | peers, ms | ratio to the best | share of ceiling | spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        mine = r.milliseconds.get("fastlm")
        peers = sorted((ms, n) for n, ms in r.milliseconds.items() if n != "fastlm")
        cells = [f"{n} {ms:.3g}" for ms, n in peers] + [
            f"({n}: {why})" for n, why in r.missing.items()
        ]
        ratio = "-" if r.ratio is None else f"{r.ratio:.2f}x"
        share = "-" if r.of_ceiling is None else f"{r.of_ceiling:.0%} {r.ceiling}"
        own = "-" if mine is None else f"{mine:.3g}"
        spread = f"{max(r.spread.values(), default=0):.0%}"
        columns = (r.name, r.shape, own, ", ".join(cells) or "-", ratio, share, spread)
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main(op: str, cases: Callable[[], list[Case]]) -> None:
    """The command line of one op's file."""
    parser = argparse.ArgumentParser(description=f"Time fastlm's {op} against its peers.")
    parser.add_argument(
        "filter", nargs="?", default="", help="only cases whose name or shape contains this"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--no-gate", action="store_true", help="skip the op's tests (for profiling, not for claims)"
    )
    options = parser.parse_args()
    if not options.no_gate:
        gate(op)
    limits = ceilings()
    rows = [
        run_case(c, limits, options.rounds)
        for c in cases()
        if options.filter in f"{c.name} {c.shape}"
    ]
    print(machine())
    print(
        f"ceilings: bf16 {limits['bf16'] / 1e9:.0f} GFLOP/s, "
        f"fp32 {limits['fp32'] / 1e9:.0f} GFLOP/s, read {limits['read'] / 1e9:.1f} GB/s"
    )
    print(table(rows))
    print(
        json.dumps(
            {"op": op, "machine": machine(), "ceilings": limits, "rows": [vars(r) for r in rows]}
        )
    )
