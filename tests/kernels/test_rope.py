"""rope: both layouts on every instruction set against float64, strides, compile, refusals."""

import pytest
import torch
from compiled import assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_near
from torch._subclasses import FakeTensorMode

from fastlm import InputError, backend, ops


def tables(length, width, *, interleaved=False, batch=None, dtype=torch.float32):
    """cos and sin as computed by a Hugging Face model's rotary embedding."""
    position = torch.arange(length, dtype=torch.float32).expand(batch or 1, -1)
    if batch:
        position = position + 100 * torch.arange(batch)[:, None]
    angles = position[..., None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return (cos, sin) if batch else (cos[0], sin[0])


def naive(q, k, cos, sin, interleaved=False):
    """Hugging Face's formula, with rounding after every op as in eager torch."""
    width = cos.shape[-1]
    cos, sin = (t.to(q.dtype).unsqueeze(-3) for t in (cos, sin))

    def turn(x):
        part, rest = x[..., :width], x[..., width:]
        if interleaved:
            rotated = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
        else:
            rotated = torch.cat((-part[..., width // 2 :], part[..., : width // 2]), -1)
        return torch.cat((part * cos + rotated * sin, rest), -1)

    return turn(q), turn(k)


def any_tables(q, k, cos, sin, interleaved):
    return ops.rope(q, k, cos, sin, interleaved=interleaved, rotary_dim=cos.shape[-1])


def run(function, q, k, cos, sin, dq, dk, interleaved):
    q, k = (t.detach().requires_grad_() for t in (q, k))
    out = function(q, k, cos, sin, interleaved=interleaved)
    return [t.detach() for t in out] + list(torch.autograd.grad(out, (q, k), (dq, dk)))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((2, 4, 2, 9, 64), 64),
        ((1, 3, 3, 17, 128), 128),
        ((2, 2, 1, 5, 80), 32),
        ((1, 2, 2, 7, 20), 20),
        ((2, 1, 1, 3, 66), 22),
        ((1, 2, 1, 1, 2), 2),
        ((1, 2, 1, 4, 9), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("batched", [False, True])
def test_matches_float64(isa, dtype, shape, width, interleaved, batched):
    b, h, hkv, s, d = shape
    q, dq = torch.randn(2, b, h, s, d).to(dtype).unbind(0)
    k, dk = torch.randn(2, b, hkv, s, d).to(dtype).unbind(0)
    cos, sin = tables(s, width, interleaved=interleaved, batch=b if batched else None)
    arguments = (q, k, cos, sin, dq, dk)
    actual = run(ops.rope, *arguments, interleaved)
    plain = run(naive, *arguments, interleaved)
    truth = run(naive, *(t.double() for t in arguments), interleaved)
    for name, a, p, t in zip(("q", "k", "dq", "dk"), actual, plain, truth):
        assert_near(a, p, t, factor=2 if name in "qk" else 3, what=f"{name} {isa}")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_table_is_the_elementwise_formula(isa, dtype, interleaved, table_dtype):
    # cos and sin without repetition: only x * cos + rotate(x) * sin yields this
    q, dq = torch.randn(2, 2, 3, 6, 40).to(dtype).unbind(0)
    k, dk = torch.randn(2, 2, 1, 6, 40).to(dtype).unbind(0)
    cos, sin = torch.randn(2, 1, 6, 24).to(table_dtype).unbind(0)
    arguments = (q, k, cos, sin, dq, dk)
    actual = run(ops.rope, *arguments, interleaved)
    plain = run(naive, *arguments, interleaved)
    truth = run(naive, *(t.double() for t in arguments), interleaved)
    for a, p, t in zip(actual, plain, truth):
        assert_near(a, p, t, factor=2)


def test_heads_as_views_of_projections(isa, dtype):
    fused = torch.randn(2, 11, (4 + 2 + 2) * 32).to(dtype)
    q = fused[..., : 4 * 32].view(2, 11, 4, 32).transpose(1, 2)
    k = fused[..., 4 * 32 : 6 * 32].view(2, 11, 2, 32).transpose(1, 2)
    cos, sin = tables(11, 32)
    views = [(q, k), (q[:, :, :, ::2], k[:, :, :, ::2]), (q.flip(1), k.expand(2, 2, 11, 32))]
    for a, b in views:
        c, s = cos[:, : a.shape[-1]], sin[:, : a.shape[-1]]
        strided = ops.rope(a, b, c, s)
        plain = ops.rope(a.contiguous(), b.contiguous(), c.contiguous(), s.contiguous())
        assert all(torch.equal(x, y) for x, y in zip(strided, plain))
    assert ops.rope(q, k, cos, sin)[0].transpose(1, 2).is_contiguous()  # memory order is kept


def test_empty_repeat_and_threads(isa, dtype):
    cos, sin = tables(0, 8)
    q, k = ops.rope(
        torch.empty(2, 3, 0, 8, dtype=dtype), torch.empty(2, 1, 0, 8, dtype=dtype), cos, sin
    )
    assert q.shape == (2, 3, 0, 8) and k.shape == (2, 1, 0, 8)
    q, k = torch.randn(1, 8, 300, 64).to(dtype), torch.randn(1, 2, 300, 64).to(dtype)
    cos, sin = tables(300, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(run(ops.rope, q, k, cos, sin, q, k, False))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 5),
    length=st.integers(0, 20),
    pairs=st.integers(0, 40),
    rest=st.integers(0, 20),
    interleaved=st.booleans(),
)
def test_any_shape_agrees_with_reference(batch, heads, length, pairs, rest, interleaved):
    q = torch.randn(batch, heads, length, 2 * pairs + rest)
    k = torch.randn(batch, 1, length, 2 * pairs + rest)
    cos, sin = torch.randn(2, length, 2 * pairs).unbind(0)
    mine = run(any_tables, q, k, cos, sin, q, k, interleaved)
    with backend.use_backend("reference"):
        theirs = run(any_tables, q, k, cos, sin, q, k, interleaved)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rotation_keeps_norms_and_relative_positions():
    q, k = (
        torch.randn(1, 1, 1, 64).expand(1, 1, 40, 64),
        torch.randn(1, 1, 1, 64).expand(1, 1, 40, 64),
    )
    rq, rk = ops.rope(q, k, *tables(40, 64))
    torch.testing.assert_close(rq.norm(dim=-1), q.norm(dim=-1))
    scores = (rq @ rk.transpose(-1, -2))[0, 0]
    for distance in (1, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_agrees_with_hugging_face():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4)
    q, k = torch.randn(2, 4, 12, 16), torch.randn(2, 2, 12, 16)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, torch.arange(12)[None])
    for a, b in zip(ops.rope(q, k, cos, sin), llama.apply_rotary_pos_emb(q, k, cos, sin)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck_and_gradcheck(interleaved):
    q = torch.randn(2, 5, 3, 16).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 1, 5, 16, requires_grad=True)
    cos, sin = tables(5, 8, interleaved=interleaved)
    torch.library.opcheck(torch.ops.fastlm.rope.default, (q, k, cos, sin, interleaved, False))
    assert torch.autograd.gradcheck(
        lambda q, k: ops.rope(q, k, cos, sin, interleaved=interleaved),
        (q.detach().double().requires_grad_(), k.detach().double().requires_grad_()),
    )


def test_compiles_without_break_or_recompile():
    def both(q, k, cos, sin):
        return torch.cat(ops.rope(q, k, cos, sin), 1)

    calls = []
    for b, s in ((5, 11), (6, 13), (7, 17)):  # all sizes differ because of duck sizing
        q = torch.randn(b, s, 4, 16).transpose(1, 2).requires_grad_()
        calls.append((q, torch.randn(b, 2, s, 16, requires_grad=True), *tables(s, 16)))
    assert_compiles_once(both, calls)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_fake_knows_the_strides(name):
    """inductor asserts the strides that the fake declared, also for heads stored transposed."""
    tables = torch.randn(2, 6, 8).unbind(0)
    across = torch.randn(2, 3, 8, 6).transpose(-1, -2)
    for q in (across, torch.randn(2, 6, 3, 8).transpose(1, 2), torch.randn(2, 3, 6, 16)[..., ::2]):
        given, fakes = (q, q[:, :1], *tables), FakeTensorMode()
        promised = [fakes.from_tensor(t) for t in given]
        with backend.use_backend(name):
            real = ops.rope(*given)
            with fakes:
                promised = ops.rope(*promised)
        assert [t.stride() for t in real] == [t.stride() for t in promised]
    q = across.requires_grad_()
    dout = across.detach().clone()  # autograd may pass a gradient with any strides
    out = ops.rope(q, q[:, :1].detach(), *tables)[0]
    expected = torch.autograd.grad(out, q, dout.contiguous(), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, q, dout)[0], expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_half_of_a_whole_rotation_is_not_a_partial_one(interleaved):
    """Tables of width D / 2: with every angle twice they are a partial rotation. With every angle
    once `rope` cannot know what they are.
    """
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    cos, sin = tables(5, 8, interleaved=interleaved, batch=2)
    once = [t[..., ::2] if interleaved else t[..., :8] for t in tables(5, 16, batch=2)]
    partial = ops.rope(q, k, cos, sin, interleaved=interleaved)
    said = ops.rope(q, k, cos, sin, interleaved=interleaved, rotary_dim=8)
    assert all(torch.equal(a, b) for a, b in zip(partial, said))
    with pytest.raises(InputError, match=r"cos: wanted every angle twice .* got \(2, 5, 8\)"):
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
        InputError, match=r"q: wanted floats \(B, H, S, D\), got torch.float32 \(4, 5"
    ):
        ops.rope(q[0], k, cos, sin)
    with pytest.raises(
        InputError, match=r"k: wanted torch.float32 .* got torch.float32 \(2, 2, 4, 16\)"
    ):
        ops.rope(q, k[:, :, :4], cos, sin)
    with pytest.raises(InputError, match=r"k: wanted torch.float32 .* got torch.bfloat16"):
        ops.rope(q, k.bfloat16(), cos, sin)
    with pytest.raises(InputError, match=r"cos: wanted \(S, R\), .* got \(4, 16\)"):
        ops.rope(q, k, cos[:4], sin[:4])
    with pytest.raises(InputError, match=r"cos: wanted \(S, R\), .* got \(3, 5, 16\)"):
        ops.rope(q, k, cos.expand(3, 5, 16), sin.expand(3, 5, 16))
    with pytest.raises(InputError, match="cos: wanted an even width R <= D = 16, got 15"):
        ops.rope(q, k, cos[:, :15], sin[:, :15])
    with pytest.raises(InputError, match="cos: wanted an even width R <= D = 16, got 18"):
        ops.rope(q, k, torch.ones(5, 18), torch.ones(5, 18))
    with pytest.raises(InputError, match=r"sin: wanted torch.float32 \(5, 16\) as cos"):
        ops.rope(q, k, cos, sin[:, :8])
    with pytest.raises(InputError, match="cos: wanted width rotary_dim = 12, got 6"):
        ops.rope(q, k, cos[:, :6], sin[:, :6], rotary_dim=12)
    with pytest.raises(InputError, match="cos, sin: wanted tables without gradient"):
        ops.rope(q, k, cos.clone().requires_grad_(), sin)
