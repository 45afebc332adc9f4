"""Draw random cases of every op, and run them (fuzz_cases.py defines a case)."""

from random import Random

import torch
from cases import OPS
from cases.base import DTYPES, SLOW, Case
from fuzz_cases import check_case, use_kernels
from poison import guarded_memory

from fastlm import backend


def split_cases() -> dict[str, Case]:
    """Return the cases of all ops with enough work for several threads, by `op row`."""
    return {
        f"{name} {row}": op.rows[row].case
        for name, op in OPS.items()
        for row in op.rows
        if op.rows[row].split
    }


# The sizes by which host functions divide work. These values also divide the work of small cases.
HOST = {
    "cross_entropy": {"CROSS_ENTROPY_PART_BYTES": 128},
    "paged_attention": {"PAGED_MIN_TILES": 1},
    "quantized_linear": {"quantized_linear.FUSED_ROWS": 8, "quantized_linear._BLOCK_WEIGHTS": 3000},
    "rope": {"rope._POSITIONS": 0, "rope._HEADS": 3},
}


def ops_of(kernels: str) -> list[str]:
    """Return the ops that have kernels of this kind: cpu or simt."""
    kernels = "cuda" if kernels == "simt" else kernels
    return [name for name, op in OPS.items() if kernels in op.kernels]


def draw(op: str, seed: int, kernels: str = "cpu") -> Case:
    r = Random(f"{op} {seed}")
    forced = [i for i in OPS[op].forced_isas if not backend.cpu_extension.unavailable_reason(i)]
    isas = [isa for isa in (*backend.cpu_isas(), *forced) for _ in range(1 if isa in SLOW else 2)]
    isa = r.choice(isas) if kernels == "cpu" else kernels
    common = {"op": op, "seed": seed, "isa": isa, "threads": r.choice([1, 2, 3, 4])}
    if isa == "simt":
        host = {"emulated_multiprocessors": r.choice([1, 4, 40])}
        host |= HOST.get(op, {}) if r.random() < 0.5 else {}
        common |= {"order": r.randrange(1000), "races": r.random() < 0.3, "host": host}
    return common | {"dtype": r.choice(list(DTYPES))} | OPS[op].draw(r, isa)


def run(case: Case) -> None:
    """Raise if the op is wrong on this case."""
    r, dtype = Random(case["seed"]), DTYPES[case["dtype"]]
    op = OPS[case["op"]]
    with use_kernels(case), guarded_memory() as memory:
        torch.manual_seed(case["seed"])
        language = "cuda" if case["isa"] == "simt" else "cpu"
        check_case(op.build_for(case, dtype, language), case, r, memory)
