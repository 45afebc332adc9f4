"""pytest-benchmark over the same cases: ``pytest bench/ --benchmark-only``."""

import importlib
from pathlib import Path

import pytest

OPS = sorted(
    p.stem
    for p in Path(__file__).parent.glob("*.py")
    if "def cases()" in p.read_text() and p.stem not in ("harness", "test_bench")
)


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        rows = [
            (op, c.name, c.shape, v)
            for op in OPS
            for c in importlib.import_module(op).cases()
            for v in c.variants
        ]
        metafunc.parametrize(
            ("op", "name", "shape", "variant"), rows, ids=["-".join(r) for r in rows]
        )


@pytest.mark.benchmark(warmup=True)
def test_case(benchmark, op, name, shape, variant):
    case = next(
        c for c in importlib.import_module(op).cases() if (c.name, c.shape) == (name, shape)
    )
    benchmark.group = f"{op} {name} {shape}"
    benchmark(case.variants[variant])
