"""Tests of attention beyond its table of cases (cases/attention.py)."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import attention as table
from cases.base import assert_same, check, run
from contract import *  # noqa: F403
from on_kernels import on

from fastlm import InputError, backend, ops, reference


def test_the_reference_is_the_formula(op):
    table.assert_reference(op)


@pytest.mark.parametrize("causal", [False, True])
def test_the_formula_is_torchs(causal):
    q, k, v = (torch.randn(2, h, 70, 32, dtype=torch.float64) for h in (4, 2, 2))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(ops.attention(q, k, v, causal=causal), expected)


def test_bool_bias_is_a_mask():
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    mask = torch.rand(2, 1, 9, 9) < 0.7
    torch.testing.assert_close(
        ops.attention(q, k, v, bias=mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )


def test_nan_is_not_hidden(kernel, dtype):
    q, k, v = (torch.randn(1, 1, 40, 16).to(kernel.device, dtype) for _ in range(3))
    k[0, 0, 3, 2] = math.nan
    assert ops.attention(q, k, v).isnan().all()
    assert ops.attention(q[:, :, :1], k, v).isnan().all()


def test_memory_order(kernel, dtype):
    """out and the gradients have q's, which the next projection reads in place. lse is float32."""
    qkv = torch.randn(3, 2, 5, 4, 16).to(kernel.device, dtype)
    q, k, v = qkv.transpose(2, 3).requires_grad_().unbind(0)
    out, lse = ops.attention(q, k, v, return_lse=True)
    assert out.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    assert all(g.stride() == q.stride() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_rows_past_two_to_the_31_elements(kernel):
    """The third row of q, k and v is past 2^31 elements. The bits equal those of packed rows."""
    if kernel.device != "cpu":
        pytest.skip("takes memory that is not touched")
    bias = torch.randn(3, 3)
    qkv = [table.far_apart((3, 1, 1, 16), 2**30 + 8, torch.float16) for _ in range(3)]

    def function(*qkv):
        return ops.attention(*(t.permute(1, 2, 0, 3) for t in qkv), bias=bias, return_lse=True)

    far, upstream = run(function, qkv)
    assert_same(run(function, [t.contiguous() for t in qkv], upstream)[0], far, "far")


# ---- dropout


def test_philox_known_answers():
    """The published vectors of Random123's philox4x32-10."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    assert [int(w) for w in reference.philox((zero,) * 4, zero)] == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip
    assert [int(w) for w in reference.philox((ones,) * 4, torch.tensor([-1]))] == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]  # fmt: skip


def dropped(device, batch=2, keys=140, p=0.25):
    """With v the identity the output is P after dropout."""
    torch.manual_seed(11)
    q, k = torch.randn(batch, 2, 20, 8), torch.randn(batch, 2, keys, 8)
    v = torch.eye(keys).expand(batch, 2, keys, keys)
    return ops.attention(*(t.to(device) for t in (q, k, v)), dropout_p=p).eq(0)


def test_dropout_draws(kernel):
    """What the reference draws, as often as it should; another draw for another sequence and in
    the next call.
    """
    mine = dropped(kernel.device)
    with backend.use_backend("reference"):
        assert torch.equal(dropped(kernel.device), mine)
    share = mine.double().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / mine.numel())
    assert not torch.equal(mine[0], mine[1])
    assert dropped(kernel.device, p=1.0).all()
    q = torch.randn(1, 2, 20, 8, device=kernel.device)
    first, second = (ops.attention(q, q, q, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


@on("triton")
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_dropout_draws_in_tiles_of_any_width(kernel, width, monkeypatch):
    """They use four words of a counter, two, or one."""
    from fastlm.kernels import attention_forward as module

    with backend.use_backend("reference"):
        expected = dropped(kernel.device, batch=1)
    tiles = module.TileConfigs("of the test", {(4, 256): {80: module._tiles(16, width, 4, 1)}})
    monkeypatch.setattr(module, "_CONFIGS", tiles)
    monkeypatch.setattr(module, "_FEW_ROWS_CONFIGS", tiles)
    assert torch.equal(dropped(kernel.device, batch=1), expected)


def test_compiled_dropout_draws_again():
    drop = torch.compile(
        lambda q: ops.attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    q = torch.randn(2, 2, 9, 4, requires_grad=True)
    assert torch.autograd.grad(drop(q).sum(), q)[0].isfinite().all()
    assert not torch.equal(drop(q), drop(q))


# ---- Triton's programs


@on("triton")
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_keys_that_programs_share(op, kernel, name, monkeypatch):
    """Few rows and many keys."""
    from fastlm.kernels import attention_forward as module

    used, splits = [], module._splits
    monkeypatch.setattr(module, "_splits", lambda *a: used.append(splits(*a)) or used[-1])
    case = table.case(1, 2, 1, 2, 520, 16, 24, **table.OPTIONS[name])
    check(op.build_for(case, torch.float32, "triton", kernel.device))
    assert max(used) > 1


# ---- refusals

REFUSALS = [
    ({"q": (2, 4, 8)}, r"q: expected 4 dimensions \(B, heads, length, D\), got \(2, 4, 8\)"),
    ({"k": (3, 2, 5, 8)}, r"k, v: expected .* with B = 2 as q, got \(3, 2, 5, 8\), \(2, 2, 5, 8\)"),
    ({"v": (2, 2, 6, 8)}, r"k, v: expected .* got \(2, 2, 5, 8\), \(2, 2, 6, 8\)"),
    ({"k": (2, 2, 5, 7)}, r"k: expected head width D = 8 >= 1 as q, got k \(2, 2, 5, 7\)"),
    ({"q": (2, 3, 5, 8)}, "q: expected heads a multiple of k's 2, got 3"),
    (
        {"k": torch.ones(2, 2, 5, 8).bfloat16()},
        "k: expected torch.float32 as q, got torch.bfloat16",
    ),
    ({"q": torch.ones(2, 4, 5, 8).long()}, "q: expected a float dtype, got torch.int64"),
    ({"window": 0}, "window: expected at least 1 or None, got 0"),
    ({"softcap": -1.0}, "softcap: expected above 0 or None, got -1.0"),
    ({"dropout_p": 1.5}, "dropout_p: expected 0 to 1, got 1.5"),
    (
        {"sinks": torch.zeros(3)},
        r"sinks: expected \(4,\) floats on cpu, .* got torch.float32 \(3,\)",
    ),
    ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "alibi_slopes: expected constants"),
    ({"bias": torch.zeros(5, 4)}, r"bias: expected to broadcast to \(2, 4, 5, 5\) .* got \(5, 4\)"),
    (
        {"bias": torch.zeros(5, 5, dtype=torch.int64)},
        "bias: expected float or bool, got torch.int64",
    ),
]


@pytest.mark.parametrize("wrong, message", REFUSALS, ids=[m[:24] for _, m in REFUSALS])
def test_refusals(wrong, message):
    shapes = {"q": (2, 4, 5, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 8)} | wrong
    shapes = {n: torch.randn(x) if isinstance(x, tuple) else x for n, x in shapes.items()}
    with pytest.raises(InputError, match=message):
        ops.attention(shapes.pop("q"), shapes.pop("k"), shapes.pop("v"), **shapes)
