"""Fixtures for all tests: poisoned memory, the instruction sets of this machine, seeds."""

import pytest
import torch

from fastlm import backend

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """``torch.empty`` and its kin return NaN (or the largest integer).

    An output that a kernel leaves unwritten is seen.
    """

    def poisoned(make):
        def wrapper(*args, **kwargs):
            t = make(*args, **kwargs)
            if torch.compiler.is_compiling() or type(t) is not torch.Tensor or t.is_meta:
                return t
            return t.fill_(
                float("nan")
                if t.is_floating_point()
                else (1 if t.dtype == torch.bool else torch.iinfo(t.dtype).max)
            )

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(params=backend.cpu_isas())
def isa(request):
    """Runs the test on every instruction set that this machine has, and on emulated AMX tiles."""
    with backend.use_cpu_isa(request.param):
        yield request.param


@pytest.fixture(params=FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param
