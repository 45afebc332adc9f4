"""rope with several axes of positions against Qwen2-VL's formula."""

import pytest
import torch
from tolerance import assert_near

from fastlm import InputError, ops

SECTIONS = (4, 6, 6)  # angles of time, height and width: half of a head of 32


def tables(positions, width, *, interleaved):
    """(A, B, S, R) cos and sin of positions (A, B, S), as a Hugging Face model computes them."""
    angles = positions[..., None].float() * 10000.0 ** -(torch.arange(0, width, 2) / width)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def naive(q, k, cos, sin, interleaved):
    """Rotate each pair of elements by the angle of its section's axis."""
    axis = torch.repeat_interleave(torch.arange(len(SECTIONS)), torch.tensor(SECTIONS))
    axis = axis.repeat_interleave(2) if interleaved else axis.repeat(2)
    cos, sin = (
        t.gather(0, axis.expand(1, *t.shape[1:])).squeeze(0).unsqueeze(1).to(q.dtype)
        for t in (cos, sin)
    )

    def turn(x):
        if interleaved:
            rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        else:
            half = x.shape[-1] // 2
            rotated = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos + rotated * sin

    return turn(q), turn(k)


def run(function, q, k, dy, *arguments):
    q, k = (t.detach().requires_grad_() for t in (q, k))
    out = function(q, k, *arguments)
    return [*(t.detach() for t in out), *torch.autograd.grad(out, (q, k), dy)]


def fused(q, k, cos, sin, interleaved):
    return ops.rope(q, k, cos, sin, interleaved=interleaved, mrope_section=SECTIONS)


def operands(dtype, device="cpu"):
    q, k = torch.randn(2, 4, 7, 32), torch.randn(2, 2, 7, 32)
    dy = torch.randn_like(q), torch.randn_like(k)
    return [t.to(device, dtype) for t in (q, k, *dy)]


def check(dtype, interleaved, device="cpu"):
    q, k, dq, dk = operands(dtype, device)
    positions = torch.randint(0, 500, (3, 2, 7))
    cos, sin = (t.to(device) for t in tables(positions, 32, interleaved=interleaved))
    got, plain, truth = (
        run(f, *(t.to(d) for t in (q, k)), [t.to(d) for t in (dq, dk)],
            *(t.to(torch.float64 if d == torch.float64 else torch.float32) for t in (cos, sin)),
            interleaved)
        for f, d in ((fused, dtype), (naive, dtype), (naive, torch.float64))
    )  # fmt: skip
    for name, a, p, t in zip(("q", "k", "dq", "dk"), got, plain, truth):
        assert_near(a, p, t, factor=2, what=name)


@pytest.mark.parametrize("interleaved", [False, True])
def test_matches_float64(isa, dtype, interleaved):
    check(dtype, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_triton_matches_float64(triton, interleaved):
    check(torch.float32, interleaved, triton)


def test_equal_axes_are_the_rope_of_one_axis():
    q, k, _, _ = operands(torch.float32)
    cos, sin = tables(torch.arange(7).expand(3, 2, 7), 32, interleaved=False)
    for a, b in zip(fused(q, k, cos, sin, False), ops.rope(q, k, cos[0], sin[0])):
        assert torch.equal(a, b)


def test_is_one_graph():
    q, k, _, _ = operands(torch.float32)
    cos, sin = tables(torch.randint(0, 500, (3, 2, 7)), 32, interleaved=False)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, b in zip(compiled(q, k, cos, sin, False), fused(q, k, cos, sin, False)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ((4, 6), r"cos: expected \(A, B, S, R\) with A = 2 axes and R = 2 \* 10"),
        ((4, 6, 5), r"cos: expected .* mrope_section \(4, 6, 5\), got \(3, 2, 7, 32\)"),
        (16, "mrope_section: wanted a Sequence or None, got 16"),
    ],
)
def test_refusals(sections, message):
    q, k, _, _ = operands(torch.float32)
    cos, sin = tables(torch.randint(0, 500, (3, 2, 7)), 32, interleaved=False)
    with pytest.raises(InputError, match=message):
        ops.rope(q, k, cos, sin, mrope_section=sections)
