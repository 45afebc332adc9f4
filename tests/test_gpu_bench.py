"""bench/gpu.py has to run the first time it meets a GPU: its small cases, interpreted here."""

import os

import gpu
import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="bench/gpu.sh runs it all")
@pytest.mark.parametrize("op", gpu.OPS)
def test_every_case_runs(triton, monkeypatch, op):
    monkeypatch.setattr(gpu, "DEVICE", triton)
    cases = list(gpu.OPS[op](True))
    assert cases
    for case in cases:
        assert "fastlm" in case.variants and len(case.variants) > 1, case.name
        for name, call in case.variants.items():
            if name != "torch.compile":
                made = call()
                assert not isinstance(made, torch.Tensor) or made.isfinite().all(), name
