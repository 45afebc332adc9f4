"""linear_distillation on Triton against float64, interpreted if there is no GPU. The products are
then torch's on the CPU, which sum in float32 like cuBLAS.
"""

import sys

import pytest
import torch
from test_linear_distillation import (
    OPTIONS,
    check,
    each_kind,
    half_gradients,
    loss_and_gradients,
    make,
    naive,
    naive_low,
)
from test_triton_linear_cross_entropy import Peak

from fastlm import ops


@pytest.fixture
def device(triton, monkeypatch):
    """Chunks of 4 rows, of which the last is ragged, and rows of several blocks."""
    ops.linear_distillation(*on(triton, *make(1, (2, 2), 3, torch.float32)))  # imports the kernels
    module = sys.modules["fastlm.kernels.linear_distillation"]
    monkeypatch.setattr(module, "_TILE", 4)
    monkeypatch.setattr(module, "_BLOCK", 64)
    return triton


def on(device, *tensors):
    return [t.to(device) for t in tensors]


@each_kind
@pytest.mark.parametrize("options", [{"beta": 0.1}, OPTIONS[-1]], ids=str)
def test_matches_float64(device, dtype, options, kind):
    check(on(device, *make(11, (40, 24), 150, dtype)), kind=kind, **options)


@each_kind
@pytest.mark.parametrize("shape", [(1, (1, 1), 1), (2, (1, 2), 3), (8, (16, 8), 64)], ids=str)
def test_shapes(device, shape, kind):
    check(on(device, *make(*shape, torch.float32)), kind=kind)


@each_kind
def test_rows_left_out_have_no_part(device, kind):
    tensors = on(device, *make(9, (16, 12), 70, torch.bfloat16))
    mask = (torch.rand(9) < 0.5).to(device)
    clean = loss_and_gradients(ops.linear_distillation, tensors, kind=kind, mask=mask)
    check(tensors, kind=kind, mask=mask)
    tensors[0][~mask], tensors[2][~mask] = float("nan"), float("inf")
    found = loss_and_gradients(ops.linear_distillation, tensors, kind=kind, mask=mask)
    for a, b in zip(clean, found):
        assert torch.equal(a, b)
    assert not found[1][~mask].any() and found[1][mask].any()


@each_kind
def test_no_rows(device, kind):
    tensors = on(device, *make(3, (8, 5), 20, torch.float32))
    none = [t[:0] if i % 2 == 0 else t for i, t in enumerate(tensors)]
    for given, mask in ((none, None), (tensors, torch.zeros(3, device=device))):
        found = loss_and_gradients(ops.linear_distillation, given, kind=kind, mask=mask)
        assert all(not t.any() for t in found)


@each_kind
@pytest.mark.parametrize("case", ["peaked", "common offset", "equal"])
def test_hard_logits(device, case, kind):
    tensors = make(5, (32, 32), 100, torch.float32)
    if case == "peaked":
        tensors[0], tensors[2] = tensors[0] * 8, tensors[2] * 8
    elif case == "common offset":
        for x, w in (tensors[:2], tensors[2:]):
            x[:, 0], w[:, 0] = 64.0, 32.0
    else:
        loss, *gradients = loss_and_gradients(
            ops.linear_distillation, on(device, *tensors[:2] * 2), kind=kind
        )
        assert loss.abs() <= 1e-6 and all(g.abs().max() <= 1e-6 for g in gradients)
        return
    check(on(device, *tensors), kind=kind)


@pytest.mark.parametrize("kind", ["reverse"])
def test_float16_under_a_grad_scaler(triton, kind):
    tensors = on(triton, *make(60, (64, 48), 70, torch.float16, scale=1.0))
    mine = half_gradients(ops.linear_distillation, tensors, kind=kind)
    low = half_gradients(naive_low, tensors, kind=kind)
    truth = half_gradients(naive, [t.double() for t in tensors], kind=kind)
    for a, p, t in zip(mine, low, truth):
        assert (a - t).norm() <= 2 * (p - t).norm()


@each_kind
def test_not_finite_stays_in_its_row(device, kind):
    tensors = on(device, *make(6, (8, 8), 20, torch.float32))
    tensors[0][1, 2], tensors[2][3, 0] = float("nan"), float("inf")
    loss, d_student, d_weight = loss_and_gradients(ops.linear_distillation, tensors, kind=kind)
    assert d_student.isnan().all(1).tolist() == [False, True, False, True, False, False]
    assert loss.isnan() and d_weight.isnan().all()


@pytest.mark.parametrize("needed", [0, 1])
def test_only_what_is_needed(device, needed):
    tensors = on(device, *make(9, (16, 12), 40, torch.float32))
    whole = loss_and_gradients(ops.linear_distillation, tensors, upstream=1.0, kind="jsd")
    tensors[needed].requires_grad_()
    ops.linear_distillation(*tensors, kind="jsd").backward()
    torch.testing.assert_close(tensors[needed].grad, whole[1 + needed])


@pytest.mark.parametrize("kind", ["jsd"])
def test_strides_and_repeat(device, dtype, kind):
    base, wide = torch.randn(6, 96).to(dtype), torch.randn(33, 96).to(dtype)
    teacher = on(device, torch.randn(6, 12).bfloat16(), torch.randn(33, 12).bfloat16())
    for x, w in ((base[:, :32], wide[:, 8:40]), (base[:, ::2], wide[:, ::2])):
        x, w = on(device, x, w)
        mine, again, plain = (
            loss_and_gradients(ops.linear_distillation, [a, b, *teacher], kind=kind)
            for a, b in ((x, w), (x, w), (x.contiguous(), w.contiguous()))
        )
        for a, b, c in zip(mine, again, plain):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [512, 5120])
def test_memory_is_a_quarter_of_the_logits(dtype, rows, monkeypatch):
    """Counted on tensors without memory: what the host function creates in addition to its results.
    A quarter of the rows: 8 bytes per logit of a chunk, and 2 for a 16-bit gradient.
    """
    from fastlm.kernels import linear_distillation as module

    monkeypatch.setattr(module, "row_statistics", lambda *_: None)
    monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    width, classes = 8, 4096
    x, w = (torch.empty(n, width, dtype=dtype, device="meta") for n in (rows, classes))
    with Peak() as peak:
        module.linear_distillation_forward(
            x, w, x, w, None, "jsd", 0.5, 1.0, None, None, 1.0, True, True
        )
    bytes_ = 8 if dtype == torch.float32 else 10
    beside = 4 * (rows + classes) * width * 4 + 12 * rows * 4
    assert rows * classes * bytes_ / 8 <= peak.most <= rows * classes * bytes_ / 4 + beside
