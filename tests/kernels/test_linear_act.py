"""linear with an activation against float64: with gradients, and by oneDNN without."""

import pytest
import torch
import torch.nn.functional as F
from compiled import assert_compiles_once
from tolerance import assert_near

from fastlm import InputError, backend, ops, reference
from fastlm.ops.glu import ACTIVATIONS


def naive(x, weight, bias, act):
    return reference.activation(F.linear(x, weight, bias), act)


def fused(x, weight, bias, act):
    return ops.linear(x, weight, bias, act=act)


def operands(dtype, rows=(37,), n=45, k=33, bias=True):
    x, weight = torch.randn(*rows, k).to(dtype), (2 * torch.randn(n, k) / k**0.5).to(dtype)
    return x, weight, torch.randn(n).to(dtype) if bias else None


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("rows", [(37,), (2, 300), (1,), (0,)], ids=str)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_matches_float64(dtype, rows, act, name):
    leaves = [t.requires_grad_() for t in operands(dtype, rows)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    dy = torch.randn(*rows, 45).to(dtype)
    results = []
    for function, tensors in ((fused, leaves), (naive, leaves), (naive, wide)):
        with backend.use_backend(name):
            y = function(*tensors, act)
        results.append([y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))])
    for i, (a, p, t) in enumerate(zip(*results)):
        if t.numel():
            assert_near(a, p, t, factor=3 if i else 2, what=("y", "dx", "dw", "db")[i])
        assert a.shape == t.shape


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_without_gradient(dtype, act, bias):
    tensors = operands(dtype, (3, 70), bias=bias)
    wide = [None if t is None else t.double() for t in tensors]
    assert_near(fused(*tensors, act), naive(*tensors, act), naive(*wide, act), factor=2, what="y")


def test_onednn_serves_where_no_gradient_is_needed(monkeypatch):
    seen = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *a: seen.append(a[3:]) or real(*a)
    )
    tensors = operands(torch.float32)
    fused(*tensors, "gelu_tanh")
    assert seen == [("gelu", [], "tanh")]
    fused(*tensors, "relu2")  # oneDNN has none
    fused(tensors[0].clone().requires_grad_(), *tensors[1:], "gelu")
    assert len(seen) == 1


def test_is_one_graph():
    calls = [tuple(t.requires_grad_() for t in operands(torch.float32, (r,))) for r in (4, 5, 9)]
    assert_compiles_once(lambda x, w, b: ops.linear(x, w, b, act="silu"), calls)


def test_refusals():
    with pytest.raises(InputError, match="act: expected one of silu, gelu_tanh, gelu, relu2, got"):
        ops.linear(*operands(torch.float32), act="tanh")
    with pytest.raises(InputError, match="weight: wanted"):
        ops.linear(torch.randn(2, 3), torch.randn(4, 5), act="silu")
