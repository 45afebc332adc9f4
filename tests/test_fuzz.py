"""The cases that a fuzz run found (fuzz_corpus.jsonl), a few new ones, and that faults are seen."""

import json

import fuzz
import pytest
import torch
from fuzz_cases import OPS, draw, run

from fastlm import backend

KEPT = fuzz.CORPUS.read_text().splitlines()


@pytest.mark.parametrize("line", KEPT)
def test_kept_case(line):
    case = json.loads(line)
    if case["isa"] not in backend.cpu_isas():
        pytest.skip(f"no {case['isa']} here")
    run(case)


@pytest.mark.parametrize("op", OPS)
def test_new_cases(op):
    for seed in range(10):
        case = draw(op, seed)
        assert json.loads(json.dumps(case)) == case
        run(case)


def broken(y: torch.Tensor, how: str) -> torch.Tensor:
    if how == "value":
        y[..., -1] += 1e-3
    elif how == "unwritten":
        y[..., -1] = float("nan")
    elif how == "beside":
        y.as_strided((1,), (1,), y.storage_offset() + y.numel()).zero_()
    elif how == "threads":
        y *= 1 + 1e-7 * torch.get_num_threads()
    return y


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("value", "y glu: error"),
        ("unwritten", "y glu: error nan"),
        ("beside", "written beside an allocation"),
        ("threads", "threads: result 0 differs"),
        ("strides", "strides: result 0"),
    ],
)
def test_sees(how, message, monkeypatch):
    case = draw("glu", 0) | {"shape": [3, 33], "spread": 1.0, "dtype": "float32", "threads": 1}
    right = backend.IMPLEMENTATIONS["glu"]["cpu"]

    def wrong(gate, up, act):
        if how == "strides" and not up.is_contiguous():
            up = torch.as_strided(up, up.shape, (up.shape[1], 1))
        return broken(right(gate, up, act), how)

    run(case)
    monkeypatch.setitem(backend.IMPLEMENTATIONS["glu"], "cpu", wrong)
    with backend.use_backend("cpu"), pytest.raises(AssertionError, match=message):
        run(case)


def test_a_run_counts_and_keeps_what_failed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path / "corpus.jsonl")
    assert fuzz.fuzz(["rope", "glu"], minutes=0.02, seed=0) == 0
    out = capsys.readouterr().out
    assert "0 failed" in out and "rope: " in out and not fuzz.CORPUS.exists()
    fuzz.failed({"op": "glu", "seed": 1}, "AssertionError: off by 1.5", fuzz.collections.Counter())
    assert '--case \'{"op": "glu", "seed": 1}\'' in capsys.readouterr().out
    assert json.loads(fuzz.CORPUS.read_text()) == {"op": "glu", "seed": 1}
