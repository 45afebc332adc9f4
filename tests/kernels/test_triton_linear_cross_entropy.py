"""linear_cross_entropy on Triton against float64, interpreted if there is no GPU. The products are
then torch's on the CPU, which sum in float32 like cuBLAS.
"""

import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from test_linear_cross_entropy import (
    OPTIONS,
    check,
    check_float16_under_a_grad_scaler,
    make,
    outputs_and_gradients,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import ops


@pytest.fixture(params=["two products more", "gradients in the forward"])
def way(request, monkeypatch, triton):
    """Chunks of 8 rows, of which the last is ragged, and both paths to the gradients."""
    x, w, _, target = make(1, 2, 3, torch.float32)
    ops.linear_cross_entropy(x.to(triton), w.to(triton), target.to(triton))  # imports the kernels
    monkeypatch.setattr(sys.modules["fastlm.kernels.linear_cross_entropy"], "_TILE", 8)
    few = 1000 if request.param == "two products more" else 0
    monkeypatch.setattr(sys.modules["fastlm.ops.linear_cross_entropy"], "_FEW_ROWS", few)
    return triton


def on(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_float64(way, dtype, options, weighted):
    weight = torch.rand(123, device=way) if weighted else None
    check(*on(way, *make(29, 40, 123, dtype)), weight=weight, **options)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (32, 16, 70)], ids=str)
def test_shapes(way, dtype, shape):
    check(*on(way, *make(*shape, dtype)))
    check(*on(way, *make(*shape, dtype, bias=False, ignored=0)))


@pytest.mark.parametrize("case", ["peaked", "all negative", "common offset"])
def test_hard_logits(way, dtype, case):
    x, w, bias, target = make(12, 32, 100, dtype)
    if case == "peaked":
        x = x * 8
    elif case == "all negative":
        bias = bias - 200
    else:
        bias = torch.full_like(bias, 8192.0)
    check(*on(way, x, w, bias, target))


def test_float16_under_a_grad_scaler(triton):
    check_float16_under_a_grad_scaler(triton, 1024, 128, 2000)


def test_not_finite_stays_in_its_row(way, dtype):
    x, w, bias, target = on(way, *make(6, 8, 20, dtype, ignored=0))
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    one = [torch.ones((), device=way)]
    mine = outputs_and_gradients(ops.linear_cross_entropy, x, w, bias, target, one, reduction="sum")
    assert mine[1].isnan().all(1).tolist() == [False, True, False, True, False, False]
    assert mine[0].isnan() and mine[2].isnan().all() and mine[3].isnan().all()
    ignored = target.clone()
    ignored[[1, 3]] = -100
    mine = outputs_and_gradients(
        ops.linear_cross_entropy, x, w, bias, ignored, one, reduction="sum"
    )
    assert all(t.isfinite().all() for t in mine)  # ignored rows contribute to nothing


def test_every_row_ignored_and_no_rows(way):
    x, w, bias, _ = on(way, *make(3, 8, 20, torch.float32))
    ignored, one = torch.full((3,), -100, device=way), [torch.ones((), device=way)]
    for options, wanted in (({}, float("nan")), ({"num_items": 4}, 0.0)):
        loss, *gradients = outputs_and_gradients(
            ops.linear_cross_entropy, x, w, bias, ignored, one, **options
        )
        torch.testing.assert_close(loss, torch.tensor(wanted, device=way), equal_nan=True)
        assert all((g == 0).all() for g in gradients)
    loss, *gradients = outputs_and_gradients(
        ops.linear_cross_entropy, x[:0], w, bias, ignored[:0], one, reduction="sum"
    )
    assert loss == 0 and all((g == 0).all() for g in gradients)


def test_class_that_does_not_exist(way):
    x, w, bias, target = on(way, *make(6, 8, 20, torch.float32, ignored=0))
    target[3] = 20
    assert ops.linear_cross_entropy(x, w, target, linear_bias=bias).isnan()


@pytest.mark.parametrize("needed", ["x", "w", "bias"])
def test_only_what_is_needed(way, needed):
    x, w, bias, target = on(way, *make(20, 16, 40, torch.float32))
    whole = outputs_and_gradients(
        ops.linear_cross_entropy, x, w, bias, target, [torch.ones((), device=way)]
    )
    leaf = {"x": x, "w": w, "bias": bias}[needed].requires_grad_()
    ops.linear_cross_entropy(x, w, target, linear_bias=bias).backward()
    torch.testing.assert_close(leaf.grad, whole[1 + ["x", "w", "bias"].index(needed)])


def test_strides_dtypes_and_repeat(way, dtype):
    base, wide = torch.randn(20, 96).to(dtype), torch.randn(33, 96).to(dtype)
    target = torch.randint(0, 33, (20,)).to(way)
    bias, one = torch.randn(33, device=way), [torch.ones((), device=way)]
    for x, w in ((base[:, :32], wide[:, 8:40]), (base[:, ::2], wide[:, ::2])):
        x, w = x.to(way), w.to(way)
        mine, again, plain = (
            outputs_and_gradients(ops.linear_cross_entropy, a, b, bias, target, one)
            for a, b in ((x, w), (x, w), (x.contiguous(), w.contiguous()))
        )
        assert mine[1].dtype == mine[2].dtype == dtype and mine[3].dtype == torch.float32
        for a, b, c in zip(mine, again, plain):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)


class Peak(TorchDispatchMode):
    """The peak size in bytes of all tensors created here that are alive at the same time."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    self.most = max(self.most, self.bytes)
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key, size):
        self.alive.discard(key)
        self.bytes -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [512, 5120])
def test_memory_is_an_eighth(dtype, rows, monkeypatch):
    """An eighth of the logits alone, by the formula at the top of the kernel's file. Counted, on
    tensors without memory: what the host functions create in addition to their results and to
    tensors of (N, D) and (V, D).
    """
    from fastlm.kernels import linear_cross_entropy as module

    monkeypatch.setattr(module, "row_statistics", lambda *_: None)
    monkeypatch.setattr(module, "row_gradients", lambda *_: None)
    width, classes = 8, 4096
    meta = {"device": "meta"}
    x, w = (torch.empty(n, width, dtype=dtype, **meta) for n in (rows, classes))
    target, on_nll = torch.empty(rows, dtype=torch.int64, **meta), torch.empty(rows, **meta)
    with Peak() as fused:
        module.linear_cross_entropy_loss(
            x, w, None, target, None, on_nll, None, None, -100, None, 1.0, True, True
        )
    x, w = x.requires_grad_(), w.requires_grad_()
    with Peak() as plain:
        F.cross_entropy(F.linear(x, w).float(), target).backward()
    assert plain.most >= 12 * rows * classes
    beside = 4 * (rows + classes) * width * 4 + 10 * rows * 4
    assert fused.most <= rows * classes * 12 / 8 + beside
    assert fused.most >= 128 * classes * 4  # something was counted
