"""rope's CUDA kernel against float64, on the emulator if there is no GPU."""

import pytest
import test_triton_rope as on_triton
import torch
from test_rope import tables

from fastlm import ops


@pytest.fixture(params=["a head a thread", "several heads"])
def heads(request, monkeypatch, cuda):
    """One head per thread, as for few positions, or several, in groups that do not divide them."""
    if request.param == "several heads":
        from fastlm.cuda import rope

        monkeypatch.setattr(rope, "_POSITIONS", 0)
        monkeypatch.setattr(rope, "_HEADS", 3)
    return cuda


# in vectors; with a remainder that is copied; element by element; one pair; no rotation
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((2, 4, 2, 3, 64), 64),
        ((2, 5, 1, 5, 80), 32),
        ((1, 1, 4, 1, 128), 128),
        ((2, 1, 1, 3, 66), 22),
        ((1, 2, 1, 1, 2), 2),
        ((1, 2, 1, 4, 9), 0),
        ((1, 2, 2, 2, 32), 8),  # the pairs fill less than a 16-bit vector
    ],
    ids=str,
)
@pytest.mark.parametrize("batched", [False, True])
def test_matches_float64(heads, dtype, shape, width, interleaved, batched):
    on_triton.test_matches_float64(heads, dtype, shape, width, interleaved, batched)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_table_is_the_elementwise_formula(heads, dtype, interleaved, table_dtype):
    on_triton.test_any_table_is_the_elementwise_formula(heads, dtype, interleaved, table_dtype)


def test_strides_memory_order_and_repeat(heads, dtype):
    on_triton.test_strides_memory_order_and_repeat(heads, dtype)


def test_operands_and_tables_between_16_bytes(heads, dtype):
    q = torch.randn(2, 3, 2, 33, device=heads).to(dtype)[..., 1:]
    cos, sin = torch.randn(2, 2, 33, device=heads).unbind(0)
    expected = ops.rope(
        q.contiguous(), q[:, :1].contiguous(), cos[:, :32].contiguous(), sin[:, :32]
    )
    for c, s in ((cos[:, :32], sin[:, :32]), (cos[:, :32].contiguous(), sin[:, :32].contiguous())):
        for x in (q, q.contiguous()):
            mine = ops.rope(x, x[:, :1], c, s)
            assert all(torch.equal(a, b) for a, b in zip(mine, expected))


def test_tables_of_which_the_second_begins_between_16_bytes(heads, dtype):
    q = torch.randn(2, 3, 2, 32, device=heads).to(dtype)
    cos, sin = (
        torch.randn(2, 65, device=heads).to(dtype)[:, :64].unflatten(-1, (2, 32)) for _ in range(2)
    )
    expected = ops.rope(q, q[:, :1], cos.contiguous(), sin.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ops.rope(q, q[:, :1], cos, sin), expected))


def test_no_query_or_key_heads(heads, dtype):
    q = torch.randn(2, 3, 2, 16, device=heads).to(dtype)
    cos, sin = (t.to(heads) for t in tables(2, 16))
    expected = ops.rope(q, q[:, :1], cos, sin)
    assert torch.equal(ops.rope(q, q[:, :0], cos, sin)[0], expected[0])
    assert torch.equal(ops.rope(q[:, :0], q[:, :1], cos, sin)[1], expected[1])


def test_nothing_to_turn(heads, dtype):
    on_triton.test_nothing_to_turn(heads, dtype)


def test_not_finite_stays_in_its_pair(heads):
    on_triton.test_not_finite_stays_in_its_pair(heads)


def test_refusals(cuda):
    from fastlm.cuda import extension

    q, (cos, sin) = torch.zeros(1, 2, 3, 8, device=cuda), (t.to(cuda) for t in tables(3, 8))

    def rope(q, cos, out):
        extension().rope(q, q, cos, sin, False, False, 1, out, out, 0)

    with pytest.raises(ValueError, match="cos: wanted positions 3, got 2"):
        rope(q, cos[:2], q)
    with pytest.raises(ValueError, match="q: wanted elements side by side, got stride 2"):
        rope(torch.zeros(1, 2, 3, 16, device=cuda)[..., ::2], cos, q)
    with pytest.raises(ValueError, match="q: wanted a size of its result 1, got 2"):
        rope(q, cos, q[:, :1])
