"""Tests of rope beyond its table of cases (cases/rope.py)."""

import pytest
import torch
from cases.base import assert_same, run
from cases.rope import naive, tables
from contract import *  # noqa: F403
from on_kernels import on
from torch._subclasses import FakeTensorMode

from fastlm import InputError, backend, ops


def test_heads_as_views_of_projections(kernel, dtype):
    """The same bits as of copies, in the memory order of the arguments, which the fake knows too:
    inductor asserts its strides.
    """
    fused = torch.randn(2, 5, (4 + 2 + 2) * 32).to(kernel.device, dtype)
    q = fused[..., : 4 * 32].view(2, 5, 4, 32).transpose(1, 2)
    k = fused[..., 4 * 32 : 6 * 32].view(2, 5, 2, 32).transpose(1, 2)
    cos, sin = (t.to(kernel.device) for t in tables(5, 32))
    across = torch.randn(2, 3, 32, 5).to(kernel.device, dtype).transpose(-1, -2)
    views = [
        (q, k), (q[..., ::2], k[..., ::2]), (q.flip(1), k[:, :1].expand(2, 2, 5, 32)),
        (across, across[:, :1]),
    ]  # fmt: skip
    for a, b in views:
        arguments = (a, b, cos[:, : a.shape[-1]], sin[:, : a.shape[-1]])
        actual = ops.rope(*arguments)
        assert_same(ops.rope(*(t.contiguous() for t in arguments)), actual, "views")
        fakes = FakeTensorMode()
        promised = [fakes.from_tensor(t) for t in arguments]
        with fakes:
            promised = ops.rope(*promised)
        assert [t.stride() for t in actual] == [t.stride() for t in promised]
    assert ops.rope(q, k, cos, sin)[0].transpose(1, 2).is_contiguous()


def test_gradient_of_another_memory_order(kernel):
    """autograd may pass a gradient with any strides."""
    across = torch.randn(2, 3, 8, 6).to(kernel.device).transpose(-1, -2)
    cos, sin = torch.randn(2, 6, 8).to(kernel.device).unbind(0)
    dout = across.clone()

    def function(q):
        return ops.rope(q, q[:, :1].detach(), cos, sin)[0]

    (_, expected), (_, actual) = (
        run(function, [across], [d])[0] for d in (dout.contiguous(), dout)
    )
    assert torch.equal(actual, expected)


def test_no_query_or_key_heads(kernel, dtype):
    q = torch.randn(2, 3, 2, 16).to(kernel.device, dtype)
    cos, sin = (t.to(kernel.device) for t in tables(2, 16))
    expected = ops.rope(q, q[:, :1], cos, sin)
    assert torch.equal(ops.rope(q, q[:, :0], cos, sin)[0], expected[0])
    assert torch.equal(ops.rope(q[:, :0], q[:, :1], cos, sin)[1], expected[1])


def test_not_finite_stays_in_its_pair(kernel):
    q = torch.ones(1, 2, 3, 8, device=kernel.device)
    q[0, 1, 2, 1], q[0, 0, 0, 7] = float("nan"), float("inf")
    turned, _ = ops.rope(q, q[:, :1], *(t.to(kernel.device) for t in tables(3, 4)))
    expected = torch.zeros(1, 2, 3, 8, dtype=torch.bool)
    expected[0, 1, 2, [1, 3]] = True
    assert torch.equal(turned.isnan().cpu(), expected) and turned[0, 0, 0, 7] == float("inf")


@on("cuda")
def test_operands_and_tables_between_16_bytes(kernel, dtype):
    device = kernel.device
    q = torch.randn(2, 3, 2, 33).to(device, dtype)[..., 1:]
    cos, sin = torch.randn(2, 2, 33, device=device).unbind(0)
    expected = ops.rope(
        q.contiguous(), q[:, :1].contiguous(), cos[:, :32].contiguous(), sin[:, :32].contiguous()
    )
    for c, s in ((cos[:, :32], sin[:, :32]), (cos[:, :32].contiguous(), sin[:, :32].contiguous())):
        for x in (q, q.contiguous()):
            assert_same(expected, ops.rope(x, x[:, :1], c, s), "between")
    # the second table begins between
    cos, sin = (torch.randn(2, 65).to(device, dtype)[:, :64].unflatten(-1, (2, 32)) for _ in "12")
    expected = ops.rope(q, q[:, :1], cos.contiguous(), sin.contiguous())
    assert_same(expected, ops.rope(q, q[:, :1], cos, sin), "second")


@on("triton")
def test_a_batch_beyond_a_grid_s_third_dimension(kernel, monkeypatch):
    from fastlm.kernels import rope as module

    q, k = (torch.randn(5, h, 3, 8, device=kernel.device) for h in (2, 1))
    grids, launch = [], module.launch
    monkeypatch.setattr(
        module, "launch", lambda f, grid, *a, **o: grids.append(grid) or launch(f, grid, *a, **o)
    )
    for batch in (None, 5):
        cos, sin = (t.to(kernel.device) for t in tables(3, 8, batch=batch))
        expected = ops.rope(q, k, cos, sin)
        assert module._BATCH == 65535
        with monkeypatch.context() as patch:
            patch.setattr(module, "_BATCH", 2)
            grids.clear()
            assert_same(expected, ops.rope(q, k, cos, sin), "parts")
            assert {grid[2] for grid in grids} == {2, 1}


def test_rotation_keeps_norms_and_relative_positions():
    q, k = torch.randn(2, 1, 1, 1, 64).expand(2, 1, 1, 40, 64).unbind(0)
    rq, rk = ops.rope(q, k, *tables(40, 64))
    torch.testing.assert_close(rq.norm(dim=-1), q.norm(dim=-1))
    scores = (rq @ rk.transpose(-1, -2))[0, 0]
    for distance in (1, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_equal_axes_are_the_rope_of_one_axis():
    q, k, (cos, sin) = torch.randn(2, 4, 7, 32), torch.randn(2, 2, 7, 32), tables(7, 32, batch=2)
    axes = [t.expand(3, 2, 7, 32) for t in (cos, sin)]
    assert_same(ops.rope(q, k, cos, sin), ops.rope(q, k, *axes, mrope_section=(4, 6, 6)), "axes")


def test_agrees_with_hugging_face():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4)
    q, k = torch.randn(2, 4, 12, 16), torch.randn(2, 2, 12, 16)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, torch.arange(12)[None])
    for a, b in zip(ops.rope(q, k, cos, sin), llama.apply_rotary_pos_emb(q, k, cos, sin)):
        torch.testing.assert_close(a, b)


def test_fake_of_the_reference_knows_the_strides():
    cos, sin = torch.randn(2, 6, 8).unbind(0)
    across = torch.randn(2, 3, 8, 6).transpose(-1, -2)
    for q in (across, torch.randn(2, 6, 3, 8).transpose(1, 2), torch.randn(2, 3, 6, 16)[..., ::2]):
        arguments, fakes = (q, q[:, :1], cos, sin), FakeTensorMode()
        promised = [fakes.from_tensor(t) for t in arguments]
        with backend.use_backend("reference"):
            real = ops.rope(*arguments)
            with fakes:
                promised = ops.rope(*promised)
        assert [t.stride() for t in real] == [t.stride() for t in promised]


@pytest.mark.parametrize("interleaved", [False, True])
def test_half_of_a_whole_rotation_is_not_a_partial_one(interleaved):
    """Tables of width D / 2: with every angle twice they are a partial rotation. With every angle
    once `rope` cannot know what they are.
    """
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    cos, sin = tables(5, 8, interleaved=interleaved, batch=2)
    once = [t[..., ::2] if interleaved else t[..., :8] for t in tables(5, 16, batch=2)]
    partial = ops.rope(q, k, cos, sin, interleaved=interleaved)
    explicit = ops.rope(q, k, cos, sin, interleaved=interleaved, rotary_dim=8)
    assert all(torch.equal(a, b) for a, b in zip(partial, explicit))
    with pytest.raises(InputError, match=r"cos: expected every angle twice .* got \(2, 5, 8\)"):
        ops.rope(q, k, *once, interleaved=interleaved)
    turned = ops.rope(q, k, *once, interleaved=interleaved, rotary_dim=8)
    for a, b in zip(turned, naive(q, k, *once, interleaved)):
        torch.testing.assert_close(a, b)

    # where values cannot be read: NaN instead of a guess
    compiled = torch.compile(ops.rope, fullgraph=True, backend="aot_eager")
    graphed = compiled(q, k, cos, sin, interleaved=interleaved)
    assert all(torch.equal(a, b) for a, b in zip(partial, graphed))
    for wrong in compiled(q, k, *once, interleaved=interleaved):
        assert wrong[..., :8].isnan().all()


def test_refusals():
    q, k, (cos, sin) = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), tables(5, 16)
    with pytest.raises(
        InputError, match=r"q: expected floats \(B, H, S, D\), got torch.float32 \(4, 5"
    ):
        ops.rope(q[0], k, cos, sin)
    with pytest.raises(
        InputError, match=r"k: expected torch.float32 .* got torch.float32 \(2, 2, 4, 16\)"
    ):
        ops.rope(q, k[:, :, :4], cos, sin)
    with pytest.raises(InputError, match=r"k: expected torch.float32 .* got torch.bfloat16"):
        ops.rope(q, k.bfloat16(), cos, sin)
    with pytest.raises(InputError, match=r"cos: expected \(S, R\), .* got \(4, 16\)"):
        ops.rope(q, k, cos[:4], sin[:4])
    with pytest.raises(InputError, match=r"cos: expected \(S, R\), .* got \(3, 5, 16\)"):
        ops.rope(q, k, cos.expand(3, 5, 16), sin.expand(3, 5, 16))
    with pytest.raises(InputError, match="cos: expected an even width R <= D = 16, got 15"):
        ops.rope(q, k, cos[:, :15], sin[:, :15])
    with pytest.raises(InputError, match="cos: expected an even width R <= D = 16, got 18"):
        ops.rope(q, k, torch.ones(5, 18), torch.ones(5, 18))
    with pytest.raises(InputError, match=r"sin: expected torch.float32 \(5, 16\) as cos"):
        ops.rope(q, k, cos, sin[:, :8])
    with pytest.raises(InputError, match="cos: expected width rotary_dim = 12, got 6"):
        ops.rope(q, k, cos[:, :6], sin[:, :6], rotary_dim=12)
    with pytest.raises(InputError, match="cos, sin: expected tables without gradient"):
        ops.rope(q, k, cos.clone().requires_grad_(), sin)
    axes = [t.expand(3, 2, 5, 16) for t in (cos, sin)]
    for sections, message in {
        (3, 5): r"cos: expected \(A, B, S, R\) with A = 2 axes and R = 2 \* 8",
        (2, 3, 2): r"cos: expected .* mrope_section \(2, 3, 2\), got \(3, 2, 5, 16\)",
        8: "mrope_section: expected a Sequence or None, got 8",
    }.items():
        with pytest.raises(InputError, match=message):
            ops.rope(q, k, *axes, mrope_section=sections)


@on("cuda")
def test_the_extension_refuses(kernel):
    from fastlm.cuda import extension

    q, (cos, sin) = (
        torch.zeros(1, 2, 3, 8, device=kernel.device),
        (t.to(kernel.device) for t in tables(3, 8)),
    )

    def rope(q, cos, out):
        extension().rope(q, q, cos, sin, False, False, 1, out, out, 0)

    with pytest.raises(ValueError, match="cos: expected positions 3, got 2"):
        rope(q, cos[:2], q)
    with pytest.raises(ValueError, match="q: expected elements side by side, got stride 2"):
        rope(torch.zeros(1, 2, 3, 16, device=kernel.device)[..., ::2], cos, q)
    with pytest.raises(ValueError, match="q: expected a size of its result 1, got 2"):
        rope(q, cos, q[:, :1])
