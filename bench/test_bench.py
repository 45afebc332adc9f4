"""Run the cases of bench/ under pytest-benchmark, to compare two commits:

pytest bench --benchmark-save=before
pytest bench --benchmark-compare=0001 -k "rope and fastlm"
"""

import importlib
from functools import lru_cache

import pytest
from harness import calibrate_repeats
from run import OPS

CASES = [(op, case) for op in OPS for case in importlib.import_module(op).cases()]
VARIANTS = [(op, i, variant) for i, (op, case) in enumerate(CASES) for variant in case.variants]


def label(op: str, index: int, variant: str) -> str:
    return f"{op}-{CASES[index][1].name}-{CASES[index][1].shape}-{variant}"


@lru_cache(maxsize=1)  # the tests of a case are consecutive
def calls_of(index: int):
    return CASES[index][1].calls()


@pytest.mark.parametrize(
    ("op", "index", "variant"), VARIANTS, ids=[label(*values) for values in VARIANTS]
)
def test_case(benchmark, op, index, variant):
    call = calls_of(index)[variant]
    benchmark.group = f"{op} {CASES[index][1].name} {CASES[index][1].shape}"
    iterations, seconds = calibrate_repeats(call)
    benchmark.pedantic(call, rounds=9 if seconds < 1 else 3, iterations=iterations)
