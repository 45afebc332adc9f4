"""linear_logprobs on Triton against float64, interpreted if there is no GPU. The products are then
torch's on the CPU, which sum in float32 like cuBLAS.
"""

import math
import sys

import pytest
import torch
from test_linear_cross_entropy import make
from test_linear_logprobs import OPTIONS, check, fused, outputs_and_gradients

from fastlm import ops


@pytest.fixture(params=["parts of rows", "whole rows"])
def device(request, monkeypatch, triton):
    """Chunks of 8 rows, of which the last is ragged; blocks of 32 classes, of which a row has
    several parts or one.
    """
    x, w, _, target = make(1, 2, 3, torch.float32)
    ops.linear_logprobs(x.to(triton), w.to(triton), target.to(triton))  # imports the kernels
    monkeypatch.setattr(sys.modules["fastlm.kernels.linear_cross_entropy"], "_TILE", 8)
    rows = sys.modules["fastlm.kernels.cross_entropy"]
    monkeypatch.setattr(rows, "_BLOCK", 32)
    if request.param == "whole rows":
        monkeypatch.setattr(rows, "_WAVES", 1)
    return triton


def on(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_float64(device, dtype, options):
    check(*on(device, *make(11, 40, 83, dtype)), **options)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=str)
def test_gradient_of_one_output(device, used):
    check(*on(device, *make(9, 40, 83, torch.float16)), on=used)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (9, 16, 70)], ids=str)
def test_shapes_without_entropy(device, dtype, shape):
    tensors = on(device, *make(*shape, dtype, bias=False, ignored=0))
    check(*tensors, entropy=False, on=(True, False))


@pytest.mark.parametrize("case", ["peaked", "all negative", "common offset", "masked"])
def test_hard_logits(device, dtype, case):
    x, w, bias, target = make(8, 32, 70, dtype)
    if case == "peaked":
        x = x * 8
    elif case == "all negative":
        bias = bias - 200
    elif case == "masked":
        bias[:40] = -math.inf
        target = torch.where(target < 0, target, 40 + target % 30)
    else:
        bias = torch.full_like(bias, 8192.0)
    check(*on(device, x, w, bias, target))


def test_ignored_rows_are_not_read(device, dtype):
    x, w, bias, target = on(device, *make(14, 8, 20, dtype, ignored=0))
    target[::3] = -100
    kept = target != -100
    x[::6], x[3::6] = math.nan, math.inf
    upstream = torch.randn(2, 14, device=device)
    upstream[:, ::3] = math.nan
    mine = outputs_and_gradients(fused, x, w, bias, target, upstream)
    assert all(t.isfinite().all() for t in mine)
    assert not any(t[~kept].any() for t in mine[:3])
    alone = outputs_and_gradients(fused, x[kept], w, bias, target[kept], upstream[:, kept])
    for a, b in zip(mine[:3], alone):
        torch.testing.assert_close(a[kept], b)


def test_no_rows_and_class_that_does_not_exist(device):
    x, w, bias, target = on(device, *make(6, 8, 20, torch.float32, ignored=0))
    none = outputs_and_gradients(fused, x[:0], w, bias, target[:0], torch.ones(2, 0, device=device))
    assert none[0].shape == none[1].shape == (0,) and not any(t.any() for t in none)
    target[3] = 20
    assert fused(x, w, target)[0].isnan().tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("needed", ["x", "w", "bias"])
def test_only_what_is_needed(device, needed):
    x, w, bias, target = on(device, *make(7, 16, 40, torch.float32))
    ones = torch.ones(2, 7, device=device)
    whole = outputs_and_gradients(fused, x, w, bias, target, ones)
    leaf = {"x": x, "w": w, "bias": bias}[needed].requires_grad_()
    sum(t.sum() for t in fused(x, w, target, linear_bias=bias)).backward()
    torch.testing.assert_close(leaf.grad, whole[2 + ["x", "w", "bias"].index(needed)])


def test_strides_and_repeat(device):
    base, wide = torch.randn(6, 96).half(), torch.randn(33, 96).half()
    target = torch.randint(0, 33, (6,)).to(device)
    upstream = torch.randn(2, 12, device=device)[:, ::2]
    for x, w in ((base[:, :32], wide[:, 8:40]), (base[:, ::2], wide[:, ::2])):
        x, w = x.to(device), w.to(device)
        mine, again, plain = (
            outputs_and_gradients(fused, a, b, None, target, u)
            for a, b, u in (
                (x, w, upstream),
                (x, w, upstream),
                (x.contiguous(), w.contiguous(), upstream.contiguous()),
            )
        )
        assert mine[2].dtype == mine[3].dtype == torch.float16
        for a, b, c in zip(mine, again, plain):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)
