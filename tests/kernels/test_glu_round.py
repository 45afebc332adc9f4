"""Tests of glu_round beyond its table of cases (cases/joined_rounding.py)."""

import pytest
import torch
from cases.base import assert_same
from contract import (  # noqa: F401
    test_matches_float64,
    test_repeats_bit_for_bit,
    test_strides_do_not_matter,
)

from fastlm import ops
from fastlm.cuda import extension, quantized_linear, stream
from fastlm.ops.glu import glu_round


def test_halves_of_one_projection(kernel, dtype):
    for k in (512, 77):
        gate, up = torch.randn(3, 2 * k, device=kernel.device).to(dtype).chunk(2, -1)
        into = ops.quantize_weight(torch.randn(5, k, device=kernel.device), 4, group_size=-1)
        actual, expected = (
            glu_round(*both, into.qdata, into.scales, "gelu", 4, into.group_size)
            for both in ((gate, up), (gate.contiguous(), up.contiguous()))
        )
        assert_same([t[:, :3] for t in expected], [t[:, :3] for t in actual], "halves")


def test_a_run_with_nan_or_infinity_is_nan(kernel):
    """The row's other runs are unaffected."""
    gate, up = torch.randn(2, 2, 64, device=kernel.device).unbind(0)
    into = ops.quantize_weight(torch.randn(5, 64, device=kernel.device), 8, group_size=32)
    format = into.qdata, into.scales, "silu", 8, 32
    q, scale, sums = glu_round(gate, up, *format)
    broken_gate, broken_up = gate.clone(), up.clone()
    broken_up[0, 40], broken_gate[1, 3] = torch.inf, torch.nan
    actual = glu_round(broken_gate, broken_up, *format)
    nan = torch.tensor([[False, True], [True, False]], device=kernel.device)  # runs, rows
    for a, b in zip(actual[1:], (scale, sums)):
        assert torch.equal(a[:, :2].isnan(), nan)
        assert torch.equal(a[:, :2][~nan], b[:, :2][~nan])
    assert (actual[0][0, 32:] == 0).all() and (actual[0][1, :32] == 0).all()
    assert torch.equal(actual[0][0, :32], q[0, :32]) and torch.equal(actual[0][1, 32:], q[1, 32:])


def test_opcheck():
    """Where no kernel serves, the definition does."""
    x, into = torch.randn(3, 40), ops.quantize_weight(torch.randn(16, 40), 4, group_size=8)
    operands = x, x, into.qdata, into.scales, "silu", 4, 8
    torch.library.opcheck(torch.ops.fastlm.glu_round, operands)
    of = into.qdata, into.scales, into.zeros, torch.randn(16), 4, 8, 40, x.dtype
    torch.library.opcheck(torch.ops.fastlm.rounded_linear, (*glu_round(*operands), *of))


def test_refusals(kernel):
    x = torch.zeros(2, 64, device=kernel.device)
    into = ops.quantize_weight(torch.randn(16, 64, device=kernel.device), 8, group_size=32)
    q, scale, sums = out = quantized_linear.empty_int8_rows(x, 32)
    codes, kernels = (into.qdata, into.scales, 8, 32), extension()
    with pytest.raises(ValueError, match="q: expected columns 64, got 48"):
        narrow = q[:, :48].contiguous()
        kernels.glu_round(x, x, 0, *codes, narrow, scale, sums, stream(x))
    with pytest.raises(ValueError, match="x_sums: expected rows 2, got 1"):
        kernels.glu_round(x, x, 0, *codes, q, scale, sums[:1], stream(x))
    with pytest.raises(ValueError, match="act: expected 0 to 3, got 4"):
        kernels.glu_round(x, x, 4, *codes, *out, stream(x))
