"""paged_attention: pages in any order equal the dense op on the gathered keys; int8; refusals."""

import pytest
import torch
from attention_cases import lse_size
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import ULP, assert_near

from fastlm import InputError, backend, ops


def cache(lengths, page_size, hkv, d, dv, dtype):
    """k, v pages in shuffled order with NaN in unused slots; garbage past a sequence's pages."""
    counts = [(n + page_size - 1) // page_size for n in lengths]
    pages = sum(counts) + 2
    k = torch.randn(pages, page_size, hkv, d)
    v = torch.randn(pages, page_size, hkv, dv)
    if dtype == torch.int8:
        k, v = ((40 * t).clamp(-127, 127).round().to(dtype) for t in (k, v))
    else:
        k, v = k.to(dtype), v.to(dtype)
    order = torch.randperm(pages)
    table = torch.full((len(lengths), max([*counts, 1])), 2**31 - 1, dtype=torch.int32)
    for b, n in enumerate(counts):
        table[b, :n], order = order[:n].int(), order[n:]
        if dtype != torch.int8 and lengths[b] % page_size:
            k[table[b, n - 1], lengths[b] % page_size :] = float("nan")
            v[table[b, n - 1], lengths[b] % page_size :] = float("nan")
    return k, v, table, torch.tensor(lengths, dtype=torch.int32)


def assert_paged_near(q, k, v, table, lens, what, **options):
    def call(q, cast=lambda t: t):
        return ops.paged_attention(q, cast(k), cast(v), table, lens, return_lse=True, **options)

    mine = call(q)
    with backend.use_backend("reference"):
        plain = call(q)
        wide = (lambda t: t) if k.dtype == torch.int8 else torch.Tensor.double
        truth = call(q.double(), wide)
        terms = ops.paged_attention(q.double(), wide(k), wide(v).abs(), table, lens, **options)
    for name, a, p, t in zip(("out", "lse"), mine, plain, truth):
        seen = torch.isfinite(t)
        assert torch.equal(torch.isfinite(a), seen), f"{what} {name}"
        ulp = (
            ULP[torch.float32] * 8
            if name == "lse" or q.dtype == torch.float32
            else 2 * ULP[q.dtype]
        )
        if name == "lse" and seen.any():
            size = lse_size(t[seen], lens.max().item())
            ulp = max(ulp, 4 * ULP[torch.float32] * size / max(t[seen].abs().max().item(), 1e-30))
        elif q.dtype == torch.float32 and seen.any():  # a mean of values of either sign may vanish
            size = terms.abs().max().item() / max(t[seen].abs().max().item(), 1e-30)
            ulp = max(ulp, 4 * ULP[torch.float32] * size)
        assert_near(a[seen], p[seen], t[seen], floor=ulp, what=f"{what} {name}")


OPTIONS = {
    "causal": {"causal": True},
    "window sinks": {"causal": True, "window": 30, "sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    "softcap alibi bias": {
        "softcap": 3.0, "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "bias": torch.linspace(-1, 1, 700),
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("queries", [1, 3, 20])
@pytest.mark.parametrize("page_size", [1, 7, 16, 256])
def test_matches_float64(isa, dtype, page_size, queries, options):
    q = torch.randn(3, queries, 4, 40).to(dtype)
    assert_paged_near(q, *cache([53, 0, 700], page_size, 2, 40, 24, dtype), what=isa, **options)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("scales", [(0.02, 0.03), (torch.tensor([0.02, 0.01]), torch.tensor(0.03))])
def test_int8_cache(isa, dtype, queries, scales):
    q = torch.randn(2, queries, 4, 64).to(dtype)
    assert_paged_near(
        q, *cache([90, 333], 16, 2, 64, 64, torch.int8), what=isa, causal=True,
        k_scale=scales[0], v_scale=scales[1],
    )  # fmt: skip


def test_is_attention_of_the_gathered_keys(dtype):
    lengths = [19, 600]
    k, v, table, lens = cache(lengths, 8, 2, 32, 32, dtype)
    for queries in (1, 9):
        q = torch.randn(2, queries, 4, 32).to(dtype)
        out = ops.paged_attention(q, k, v, table, lens, causal=True)
        for b, n in enumerate(lengths):
            rows = table[b, : (n + 7) // 8].long()
            keys, values = (
                t[rows].flatten(0, 1)[:n].transpose(0, 1)[None].contiguous() for t in (k, v)
            )
            dense = ops.attention(q[b : b + 1].transpose(1, 2), keys, values, causal=True)
            torch.testing.assert_close(
                out[b], dense[0].transpose(0, 1), rtol=0, atol=4 * ULP[dtype]
            )  # runs of keys end at page ends, so sums are in another order


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    page_size=st.integers(1, 40),
    queries=st.integers(0, 12),
    heads=st.sampled_from([(1, 1), (6, 2), (9, 3), (10, 1)]),
    int8=st.booleans(),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 100),
)
def test_any_shape_agrees_with_reference(lengths, page_size, queries, heads, int8, causal, window):
    h, hkv = heads
    q = torch.randn(len(lengths), queries, h, 20)
    scales = {"k_scale": 0.02, "v_scale": 0.02} if int8 else {}
    dtype = torch.int8 if int8 else torch.float32
    assert_paged_near(
        q, *cache(lengths, page_size, hkv, 20, 12, dtype), what="any", causal=causal, window=window,
        **scales,
    )  # fmt: skip


def test_repeat_and_threads(isa, dtype):
    parts = cache([700, 3], 16, 2, 32, 32, dtype)
    threads = torch.get_num_threads()
    try:
        for queries in (1, 30):
            q = torch.randn(2, queries, 4, 32).to(dtype)
            results = []
            for n in (2, 2, 1):
                torch.set_num_threads(n)
                results.append(ops.paged_attention(q, *parts, causal=True))
            assert all(torch.equal(results[0], r) for r in results[1:])
    finally:
        torch.set_num_threads(threads)


def test_strided_cache(isa):
    """Keys and values interleaved in one allocation, a table that is a view."""
    both = torch.randn(6, 8, 2, 2, 32)
    k, v = both.unbind(2)
    table = torch.tensor([[3, 9, 1, 9, 5]], dtype=torch.int32)[:, ::2]
    lens = torch.tensor([20], dtype=torch.int32)
    for queries in (1, 10):
        q = torch.randn(1, queries, 4, 32)
        expected = ops.paged_attention(q, k.contiguous(), v.contiguous(), table.contiguous(), lens)
        assert torch.equal(ops.paged_attention(q, k, v, table, lens), expected)


@pytest.mark.parametrize("queries", [1, 20])
def test_table_much_wider_than_the_sequences(isa, queries, monkeypatch):
    """A server's table has room for the longest context in each row. Memory follows the lengths."""
    k, v, table, lens = cache([600, 3, 0, 9], 16, 2, 32, 32, torch.float32)
    q = torch.randn(4, queries, 4, 32)
    expected = ops.paged_attention(q, k, v, table, lens)
    wide = torch.full((4, 1 << 16), 2**31 - 1, dtype=torch.int32)
    wide[:, : table.shape[1]] = table
    sizes = []
    make = torch.Tensor.new_empty

    def recorded(self, *size, **options):
        made = make(self, *size, **options)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    with torch.no_grad():
        assert torch.equal(ops.paged_attention(q, k, v, wide, lens), expected)
    # two heads: 612 rows of keys and values, and 32 for each sequence, where the table has room for
    # 2^22; plus a block of scores per thread
    assert max(sizes) <= 2 * (612 + 4 * 32) * 64 + torch.get_num_threads() * (1 << 16)


def test_opcheck_and_compile():
    k, v, table, lens = cache([9, 20], 4, 2, 16, 16, torch.float32)
    q = torch.randn(2, 3, 4, 16)
    torch.library.opcheck(
        torch.ops.fastlm.paged_attention.default,
        (q, k, v, table, lens, None, None, None, None, None, True, 0.3, 0, 0.0, 0.0),
    )
    compiled = torch.compile(
        lambda q: ops.paged_attention(q, k, v, table, lens, causal=True), fullgraph=True,
        backend="aot_eager"
    )  # fmt: skip
    torch.testing.assert_close(compiled(q), ops.paged_attention(q, k, v, table, lens, causal=True))


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("queries", [1, 20])
def test_refuses_what_would_be_read_out_of_bounds(name, queries):
    k, v, table, lens = cache([9, 20], 4, 2, 16, 16, torch.float32)
    q = torch.randn(2, queries, 4, 16)
    with backend.use_backend(name):
        for page in (-1, 10):
            bad = table.clone()
            bad[1, 2] = page
            with pytest.raises(
                InputError, match=f"block_table: wanted pages 0 to 9, got .*{page}.* for sequence 1"
            ):
                ops.paged_attention(q, k, v, bad, lens)
        for n in (-3, 21):
            with pytest.raises(
                InputError, match=f"seq_lens: wanted 0 to 20 .* got {n} for sequence 0"
            ):
                ops.paged_attention(q, k, v, table, torch.tensor([n, 20]))
        # in range only if cut to 32 bits
        with pytest.raises(InputError, match="seq_lens: wanted 0 to 20"):
            ops.paged_attention(q, k, v, table, torch.tensor([2**32 + 9, 20]))
        with pytest.raises(InputError, match="block_table: wanted pages 0 to 9"):
            ops.paged_attention(q, k, v, table.long() + 2**32, lens)


def test_refusals():
    k, v, table, lens = cache([9, 20], 4, 2, 16, 16, torch.float32)
    q = torch.randn(2, 1, 4, 16)
    k8, v8 = k.to(torch.int8), v.to(torch.int8)
    for arguments, options, message in (
        ((q[0], k, v, table, lens), {}, r"q: wanted 4 dimensions, got \(1, 4, 16\)"),
        (
            (q, k, v[:, :3], table, lens),
            {},
            r"v_cache: wanted \(pages, page_size, Hkv, Dv\) as k_cache",
        ),
        (
            (q, k, v, table[:1], lens),
            {},
            r"block_table: wanted 2 dimension\(s\), B = 2 rows, int32 on cpu",
        ),
        (
            (q, k, v, table, lens.float()),
            {},
            r"seq_lens: wanted 1 dimension\(s\), B = 2 rows, int32 on cpu",
        ),
        (
            (q, k8, v8, table, lens),
            {},
            r"k_scale: wanted a number or a tensor \(int8 cache\), got None",
        ),
        (
            (q, k, v, table, lens),
            {"k_scale": 1.0},
            r"k_scale: wanted None \(torch.float32 cache\), got one",
        ),
        (
            (q, k8, v8, table, lens),
            {"k_scale": torch.ones(3), "v_scale": 1.0},
            r"k_scale: wanted shape \(\) or \(2,\) on cpu, got \(3,\)",
        ),
        ((q.bfloat16(), k, v, table, lens), {}, "k: wanted torch.bfloat16 as q, got torch.float32"),
        (
            (q, k, v, table, lens),
            {"sinks": torch.zeros(4, requires_grad=True)},
            "wanted tensors without grad .* got one that requires grad",
        ),
        (
            (q.clone().requires_grad_(), k, v, table, lens),
            {},
            "wanted tensors without grad .* got one that requires grad",
        ),
    ):
        with pytest.raises(InputError, match=message):
            ops.paged_attention(*arguments, **options)
