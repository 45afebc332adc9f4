"""The cases that a fuzz run found (fuzz_corpus.jsonl), a few new ones, and detection of faults."""

import json

import fuzz
import fuzz_cases
import pytest
import torch
from fuzz_ops import draw, ops_of, run

from fastlm import backend

KEPT = fuzz.CORPUS.read_text().splitlines()


@pytest.mark.parametrize("line", KEPT)
def test_kept_case(line):
    case = json.loads(line)
    if case["isa"] not in (*backend.cpu_isas(), "simt"):
        pytest.skip(f"no {case['isa']} here")
    run(case)


@pytest.mark.parametrize(
    ("kernels", "op"), [(kernels, op) for kernels in ("cpu", "simt") for op in ops_of(kernels)]
)
def test_new_cases(kernels, op):
    for seed in range(10):
        case = draw(op, seed, kernels)
        assert json.loads(json.dumps(case)) == case
        run(case)


def test_every_cuda_kernel_has_cases():
    simt = backend.BACKENDS["simt"]
    cuda_ops = {name for name, entry in backend.OPS.items() if entry.is_in(simt)}
    # in the cases of quantized_linear, of cross_entropy, and of the two ops that round
    inside = {"dequantize", "cross_entropy_loss", "rounded_linear"}
    assert {op for op in cuda_ops if not op.endswith("_backward")} - inside == set(ops_of("simt"))


def broken(y: torch.Tensor, how: str, order: int) -> torch.Tensor:
    if how == "value":
        y[..., -1] += 1e-3
    elif how == "unwritten":
        y[..., -1] = float("nan")
    elif how == "beside":
        y.as_strided((1,), (1,), y.storage_offset() + y.numel()).zero_()
    elif how == "threads":
        y *= 1 + 1e-7 * order
    return y


@pytest.mark.parametrize("kernels", ["cpu", "simt"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("value", "y: error"),
        ("unwritten", "error nan"),
        ("beside", "written outside an allocation"),
        ("threads", "threads: result 0 differs"),
        ("strides", "strides: result 0"),
    ],
)
def test_sees(kernels, how, message, monkeypatch):
    case = draw("glu", 0, kernels)
    case |= {"shape": [3, 33], "spread": 1.0, "dtype": "float32", "act": "silu"}
    case |= {"threads": 1, "order": 1}
    with backend.use_backend(kernels):
        right = backend.select("glu", torch.empty(0))
    options = {}
    monkeypatch.setattr(fuzz_cases, "emulator_options", lambda **o: options.update(o))

    def wrong(gate, up, act):
        if how == "strides" and not up.is_contiguous():
            up = torch.as_strided(up, up.shape, (up.shape[1], 1))
        order = torch.get_num_threads() if kernels == "cpu" else options["seed"]
        return broken(right(gate, up, act), how, order)

    run(case)
    monkeypatch.setitem(backend.OPS["glu"].implementations, kernels, wrong)
    with backend.use_backend(kernels), pytest.raises(AssertionError, match=message):
        run(case)


def test_a_run_counts_and_keeps_what_failed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path / "corpus.jsonl")
    assert fuzz.fuzz(["rope", "glu"], minutes=0.02, seed=0) == 0
    out = capsys.readouterr().out
    assert "0 failed" in out and "rope: " in out and not fuzz.CORPUS.exists()
    fuzz.failed({"op": "glu", "seed": 1}, "AssertionError: off by 1.5", fuzz.collections.Counter())
    assert '--case \'{"op": "glu", "seed": 1}\'' in capsys.readouterr().out
    assert json.loads(fuzz.CORPUS.read_text()) == {"op": "glu", "seed": 1}
