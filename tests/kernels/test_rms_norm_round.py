"""Tests of rms_norm_round beyond its table of cases (cases/joined_rounding.py)."""

import pytest
import torch
from contract import (  # noqa: F401
    test_matches_float64,
    test_repeats_bit_for_bit,
    test_strides_do_not_matter,
)

from fastlm import InputError, backend, ops
from fastlm.cuda import extension, quantized_linear, stream
from fastlm.ops.rms_norm import rms_norm_round


def codes(k, device):
    weight = ops.quantize_weight(torch.randn(16, k, device=device), 8, group_size=32)
    return weight.qdata, weight.scales


def test_a_row_with_nan_is_nan(kernel):
    x, weight = torch.randn(2, 64, device=kernel.device), torch.ones(64, device=kernel.device)
    x[1, 5] = torch.nan
    of = codes(64, kernel.device)
    q, scale, _, _ = rms_norm_round(x, None, weight, *of, 1e-6, 0.0, 8, 32)
    assert scale[:, :2].isnan().tolist() == [[False, True]] * 2
    assert (q[1] == 0).all() and (q[0] != 0).any()


def test_rows_that_do_not_fit_are_refused(kernel):
    x, weight = torch.zeros(1, 12296, device=kernel.device), torch.ones(12296, device=kernel.device)
    assert not backend.has_kernel("rms_norm_round", x)
    assert backend.has_kernel("rms_norm_round", x[:, :12288])
    with pytest.raises(InputError, match="it supports rows of up to 48 KiB"):
        rms_norm_round(x, None, weight, *codes(12296, kernel.device), 1e-6, 0.0, 8, 32)


def test_opcheck():
    """Where no kernel serves, the definition does."""
    x, weight = torch.randn(3, 40), torch.randn(40)
    for residual in (x, None):
        operands = x, residual, weight, *codes(40, "cpu"), 1e-6, 0.0, 8, 32
        torch.library.opcheck(torch.ops.fastlm.rms_norm_round, operands)


def test_refusals(kernel):
    x, weight = torch.zeros(2, 64, device=kernel.device), torch.ones(64, device=kernel.device)
    rows = quantized_linear.empty_int8_rows(x, 32)
    rest = None, *codes(64, kernel.device), 8, 32, *rows, stream(x)
    with pytest.raises(ValueError, match="weight: expected size 64, got 63"):
        extension().rms_norm_round(x, None, weight[:63], 1e-6, 0.0, *rest)
    with pytest.raises(ValueError, match="x: expected elements 128, got 64"):
        extension().rms_norm_round(x[:1], None, weight, 1e-6, 0.0, *rest)
