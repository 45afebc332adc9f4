"""pytest-benchmark over the same cases: ``pytest bench/ --benchmark-only``."""

import importlib
from functools import lru_cache
from pathlib import Path

import pytest

OPS = sorted(
    p.stem
    for p in Path(__file__).parent.glob("*.py")
    if "def cases()" in p.read_text() and p.stem not in ("harness", "test_bench")
)


@lru_cache(maxsize=1)  # tests come op by op, and the tensors of one op fit in memory
def cases_of(op):
    return importlib.import_module(op).cases()


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        rows = [(op, c.name, c.shape, v) for op in OPS for c in cases_of(op) for v in c.variants]
        metafunc.parametrize(
            ("op", "name", "shape", "variant"), rows, ids=["-".join(r) for r in rows]
        )


@pytest.mark.benchmark(warmup=True)
def test_case(benchmark, op, name, shape, variant):
    case = next(c for c in cases_of(op) if (c.name, c.shape) == (name, shape))
    benchmark.group = f"{op} {name} {shape}"
    benchmark(case.variants[variant])
