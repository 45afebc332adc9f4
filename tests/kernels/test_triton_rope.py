"""rope's Triton kernel against float64, interpreted if there is no GPU."""

import sys

import pytest
import torch
from test_rope import naive, run, tables
from tolerance import assert_near
from torch._subclasses import FakeTensorMode

from fastlm import ops


@pytest.fixture(params=["a head a program", "several heads"])
def heads(request, monkeypatch, triton):
    """One head per program, as for few positions, or several, in tiles that do not divide them."""
    q = torch.ones(1, 1, 1, 2, device=triton)
    ops.rope(q, q, q[0, 0], q[0, 0])  # imports the kernel
    if request.param == "several heads":
        module = sys.modules["fastlm.kernels.rope"]
        monkeypatch.setattr(module, "multiprocessors", lambda device: 0)
        monkeypatch.setattr(module, "_PAIRS", 64)
    return triton


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((2, 4, 2, 9, 64), 64),
        ((2, 5, 1, 5, 80), 32),
        ((2, 1, 1, 3, 66), 22),
        ((1, 2, 1, 1, 2), 2),
        ((1, 2, 1, 4, 9), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("batched", [False, True])
def test_matches_float64(heads, dtype, shape, width, interleaved, batched):
    b, h, hkv, s, d = shape
    q, dq = torch.randn(2, b, h, s, d, device=heads).to(dtype).unbind(0)
    k, dk = torch.randn(2, b, hkv, s, d, device=heads).to(dtype).unbind(0)
    cos, sin = tables(s, width, interleaved=interleaved, batch=b if batched else None)
    check(q, k, cos.to(heads), sin.to(heads), dq, dk, interleaved)


def check(*arguments):
    actual, plain = run(ops.rope, *arguments), run(naive, *arguments)
    truth = run(naive, *(t.double() for t in arguments[:-1]), arguments[-1])
    for name, a, p, t in zip(("q", "k", "dq", "dk"), actual, plain, truth):
        assert_near(a, p, t, factor=2 if name in "qk" else 3, what=name)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_table_is_the_elementwise_formula(heads, dtype, interleaved, table_dtype):
    q, dq = torch.randn(2, 2, 3, 6, 40, device=heads).to(dtype).unbind(0)
    k, dk = torch.randn(2, 2, 1, 6, 40, device=heads).to(dtype).unbind(0)
    cos, sin = torch.randn(2, 1, 6, 24, device=heads).to(table_dtype).unbind(0)
    check(q, k, cos, sin, dq, dk, interleaved)


def test_strides_memory_order_and_repeat(heads, dtype):
    fused = torch.randn(2, 5, 8 * 32, device=heads).to(dtype)
    q = fused[..., : 4 * 32].view(2, 5, 4, 32).transpose(1, 2)
    k = fused[..., 4 * 32 : 6 * 32].view(2, 5, 2, 32).transpose(1, 2)
    cos, sin = (t.to(heads) for t in tables(5, 32))
    for a, b in ((q, k), (q[..., ::2], k[..., ::2]), (q.flip(1), k[:, :1].expand(2, 2, 5, 32))):
        c, s = cos[:, : a.shape[-1]], sin[:, : a.shape[-1]]
        given = (a, b, c, s)
        strided, again = ops.rope(*given), ops.rope(*given)
        plain = ops.rope(*(t.contiguous() for t in given))
        for x, y, z in zip(strided, again, plain):
            assert torch.equal(x, y) and torch.equal(x, z)
        fakes = FakeTensorMode()
        promised = [fakes.from_tensor(t) for t in given]
        with fakes:
            promised = ops.rope(*promised)
        assert [t.stride() for t in strided] == [t.stride() for t in promised]
    assert ops.rope(q, k, cos, sin)[0].transpose(1, 2).is_contiguous()


def test_nothing_to_turn(heads, dtype):
    for shape in ((2, 3, 0, 8), (0, 3, 4, 8), (2, 3, 4, 0)):
        q = torch.empty(shape, dtype=dtype, device=heads)
        cos = torch.empty(shape[2], shape[3], device=heads)
        turned = ops.rope(q, q[:, :1], cos, cos)
        assert [t.shape for t in turned] == [q.shape, q[:, :1].shape]


def test_a_batch_beyond_a_grid_s_third_dimension(triton, monkeypatch):
    q, dq = torch.randn(2, 5, 2, 3, 8, device=triton).unbind(0)
    k, dk = torch.randn(2, 5, 1, 3, 8, device=triton).unbind(0)
    tables_of_each = (t.to(triton) for t in tables(3, 8, batch=5))
    ops.rope(q, k, q[0, 0], q[0, 0])  # imports the kernel
    module, grids = sys.modules["fastlm.kernels.rope"], []
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda f, grid, *a, **o: grids.append(grid) or launch(f, grid, *a, **o)
    )
    assert module._BATCH == 65535
    monkeypatch.setattr(module, "_BATCH", 2)
    check(q, k, *tables_of_each, dq, dk, False)
    check(q, k, *(t.to(triton) for t in tables(3, 8)), dq, dk, False)
    assert {grid[2] for grid in grids} == {2, 1}


def test_not_finite_stays_in_its_pair(heads):
    q = torch.ones(1, 2, 3, 8, device=heads)
    q[0, 1, 2, 1], q[0, 0, 0, 7] = float("nan"), float("inf")
    turned, _ = ops.rope(q, q[:, :1], *(t.to(heads) for t in tables(3, 4)))
    expected = torch.zeros(1, 2, 3, 8, dtype=torch.bool)
    expected[0, 1, 2, [1, 3]] = True
    assert torch.equal(turned.isnan().cpu(), expected) and turned[0, 0, 0, 7] == float("inf")
