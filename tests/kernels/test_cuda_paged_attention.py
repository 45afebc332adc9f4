"""paged_attention's CUDA kernels against float64, on the emulator if there is no GPU."""

import importlib

import pytest
import torch
from test_paged_attention import OPTIONS, assert_paged_near, cache

from fastlm import InputError, backend, ops
from fastlm.cuda import constants, stream
from fastlm.cuda import paged_attention as host


def on(device, *values):
    """Move tensors to the device, also those in dicts."""
    moved = []
    for v in values:
        if isinstance(v, dict):
            v = dict(zip(v, on(device, *v.values())))
        moved.append(v.to(device) if isinstance(v, torch.Tensor) else v)
    return moved


def check(cuda, q, parts, what, **options):
    q, *parts, options = on(cuda, q, *parts, options)
    assert_paged_near(q, *parts, what=what, **options)


def few(dtype, rows):
    """For float32 the kernels accept at most 8 rows per key head."""
    return min(rows, 8) if dtype == torch.float32 else rows


# rows per key head: 2 by dot products, 6 and 18 (8) by matrix instructions if q has 16 bits
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("queries, page_size", [(1, 7), (3, 64), (9, 1)])
def test_matches_float64(cuda, dtype, page_size, queries, options):
    q = torch.randn(3, few(dtype, 2 * queries) // 2, 4, 40).to(dtype)
    check(cuda, q, cache([53, 0, 130], page_size, 2, 40, 24, dtype), "", **options)


@pytest.mark.parametrize(
    "group, d, dv", [(1, 16, 256), (16, 256, 16), (33, 72, 128), (3, 64, 8), (71, 64, 64)]
)
def test_widths(cuda, dtype, group, d, dv):
    q = torch.randn(1, 1, few(dtype, group), d).to(dtype)
    check(cuda, q, cache([70], 16, 1, d, dv, dtype), "", causal=True)


@pytest.mark.parametrize(
    "queries, group, d, dv",
    [(1, 1, 64, 64), (1, 4, 48, 80), (3, 2, 24, 40), (5, 4, 16, 160), (2, 4, 256, 16)],
)
def test_int8_cache(cuda, dtype, queries, group, d, dv):
    q = torch.randn(2, few(dtype, queries * group) // group, 2 * group, d).to(dtype)
    scales = {"k_scale": torch.tensor([0.02, 0.01]), "v_scale": 0.03}
    check(cuda, q, cache([90, 70], 16, 2, d, dv, torch.int8), "", causal=True, **scales)


@pytest.mark.parametrize("heads", [1, 3])
def test_every_int8_is_widened_exactly(cuda, dtype, heads):
    """Sequence b has b + 1 keys, and the last one has all the weight: its score is 16 more than
    that of its predecessor. q selects the column that is the score."""
    k = torch.arange(-128, 128).to(torch.int8).reshape(1, 16, 1, 16).to(cuda)
    lens = torch.arange(1, 17, dtype=torch.int32, device=cuda)
    table = torch.zeros(16, 1, dtype=torch.int32, device=cuda)
    values = k[0, :, 0].float()
    for column in (0, 1, 2, 3, 6, 12):  # each kind of position in a fragment
        q = torch.zeros(16, 1, heads, 16, dtype=dtype, device=cuda)
        q[..., column] = 1
        out, lse = ops.paged_attention(
            q, k, k, table, lens, k_scale=1.0, v_scale=1.0, scale=1.0, return_lse=True
        )
        torch.testing.assert_close(out[:, 0], values[:, None].to(dtype).expand(16, heads, 16))
        wanted = values[:, None, column].expand(16, heads)
        torch.testing.assert_close(lse[:, :, 0], wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("blocks", [2, 6, 40])
def test_any_division_of_the_keys(cuda, monkeypatch, blocks, queries, options):
    """Blocks with a part of a unit, several units or none; units with many blocks."""
    monkeypatch.setattr(constants(), "PAGED_MIN_TILES", 1)
    monkeypatch.setattr(host, "multiprocessors", lambda _: blocks // 2)
    dtype = torch.float32 if queries == 1 else torch.float16
    q = torch.randn(5, queries, 4, 16).to(dtype)
    parts = cache([300, 1, 0, 40, 200], 16, 2, 16, 24, dtype)
    check(cuda, q, parts, f"{blocks} blocks", **options)


def test_more_sequences_than_threads(cuda):
    lengths = torch.randint(0, 90, (300,)).tolist()
    q = torch.randn(300, 1, 1, 8)
    check(cuda, q, cache(lengths, 32, 1, 8, 8, q.dtype), "", causal=True)


@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("window", [67, 140])
def test_windows_of_several_tiles(cuda, dtype, queries, window):
    """Tiles that every row sees, and tiles at both ends of what a row sees."""
    q = torch.randn(2, few(dtype, 2 * queries) // 2, 2, 16).to(dtype)
    check(cuda, q, cache([410, 139], 16, 1, 16, 16, dtype), "", causal=True, window=window)


@pytest.mark.parametrize("queries", [1, 4])
def test_a_tile_with_room_does_not_show_the_start_of_the_cache(cuda, dtype, queries):
    """The start of the cache may hold anything, such as NaN of another sequence."""
    k, v, table, lens = on(cuda, *cache([70, 5], 16, 1, 24, 24, dtype))
    q = torch.randn(2, queries, 2, 24, device=cuda).to(dtype)
    expected = ops.paged_attention(q, k, v, table, lens)
    k, v = (torch.cat([torch.full_like(t[:1], torch.nan), t]) for t in (k, v))
    assert torch.equal(ops.paged_attention(q, k, v, table + 1, lens), expected)


def test_row_groups_of_several_key_heads(cuda, monkeypatch):
    """More rows than fit in a block, from two key heads, in pieces."""
    monkeypatch.setattr(constants(), "PAGED_MIN_TILES", 1)
    q = torch.randn(2, 1, 2 * 130, 16).half()
    check(cuda, q, cache([150, 70], 16, 2, 16, 16, q.dtype), "", sinks=torch.randn(260))


@pytest.mark.parametrize("group", [1, 4])
def test_lengths_near_31_bits(cuda, group):
    """All pages are the same one, so a short sequence ending in the same slot gives the result."""
    k, v, *_ = on(cuda, *cache([1024], 1024, 1, 8, 8, torch.float16))
    table = torch.zeros(1, 2**21, dtype=torch.int32, device=cuda)
    q = torch.randn(1, 1, group, 8, device=cuda).half()
    long, short = (
        ops.paged_attention(q, k, v, table[:, : n // 1024 + 1], lens, window=30)
        for n in (2**31 - 3000, 1024 + (2**31 - 3000) % 1024)
        for lens in [torch.tensor([n], dtype=torch.int32, device=cuda)]
    )
    assert torch.equal(long, short)
    lens = torch.tensor([2**31 - 1], dtype=torch.int32, device=cuda)  # clamped below it
    assert ops.paged_attention(q, k, v, table, lens, window=30).isfinite().all()


def test_sinks_without_keys(cuda, dtype):
    q = torch.randn(1, 3, 4, 16).to(dtype)
    parts = cache([2], 4, 2, 16, 16, dtype)
    check(cuda, q, parts, "", causal=True, sinks=torch.tensor([0.3, -1.0, 2.0, -torch.inf]))


def test_strided(cuda, dtype):
    """Keys and values interleaved in one allocation, a table that is a view, a projected q."""
    both = torch.randn(6, 8, 2, 2, 32, device=cuda).to(dtype)
    k, v = both.unbind(2)
    table = torch.tensor([[3, 9, 1, 9, 5]], dtype=torch.int32, device=cuda)[:, ::2]
    lens = torch.tensor([20], dtype=torch.int32, device=cuda)
    for queries in (1, few(dtype, 20) // 2):
        q = torch.randn(1, 4, queries, 64, device=cuda).to(dtype).transpose(1, 2)[..., 16:48]
        expected = ops.paged_attention(
            q.contiguous(), k.contiguous(), v.contiguous(), table.contiguous(), lens
        )
        assert torch.equal(ops.paged_attention(q, k, v, table, lens), expected)


@pytest.mark.parametrize("d, dv", [(24, 32), (32, 24)])
def test_int8_rows_of_half_a_copy(cuda, d, dv):
    """Rows are aligned to 16 bytes. Of the last row's last 16 bytes only 8 belong to the tensor."""
    k, v = torch.randint(-127, 128, (2, 1, 16, 1, 32)).to(torch.int8).to(cuda)
    table = torch.zeros(1, 1, dtype=torch.int32, device=cuda)
    lens = torch.tensor([16], dtype=torch.int32, device=cuda)
    q = torch.randn(1, 1, 4, d).half()
    parts = k[..., :d], v[..., :dv], table, lens
    check(cuda, q, parts, "", k_scale=0.02, v_scale=0.02)


@pytest.mark.parametrize("queries", [1, 4])
def test_options_of_any_strides_and_dtype(cuda, queries):
    k, v, table, lens = cache([60, 33], 16, 2, 16, 16, torch.float16)
    lens = torch.stack([lens, lens + 1], 1)[:, 0]
    q = torch.randn(2, queries, 4, 16).half()
    sinks, slopes = torch.randn(4, 2).unbind(1)
    bias = torch.randn(4, 1, 60).bfloat16()
    options = {"sinks": sinks, "alibi_slopes": slopes.abs(), "bias": bias}
    check(cuda, q, (k, v, table, lens), "", causal=True, **options)


@pytest.mark.parametrize("heads", [1, 4])
def test_offsets_beyond_32_bits(cuda, heads):
    """Pages are 2^30 elements apart: an index multiplied in 32 bits would read elsewhere."""
    storage = torch.UntypedStorage(2**31 + 2**13, device=cuda)  # mapped only where used
    base = torch.tensor([], dtype=torch.int8, device=cuda).set_(storage)
    k, v = (t.as_strided((3, 64, 1, 16), (2**30, 16, 16, 1)) for t in (base, base[1024:]))
    for t in (k, v):
        t.copy_(torch.randint(-127, 128, t.shape))
    table = torch.tensor([[2, 1]], dtype=torch.int32, device=cuda)
    lens = torch.tensor([100], dtype=torch.int32, device=cuda)
    q = torch.randn(1, 1, heads, 16, device=cuda).half()
    scales = {"k_scale": 0.01, "v_scale": 0.01}
    far = ops.paged_attention(q, k, v, table, lens, **scales)
    near = ops.paged_attention(q, k.contiguous(), v.contiguous(), table, lens, **scales)
    assert torch.equal(far, near)


@pytest.mark.parametrize("queries", [1, 4])
def test_repeats_bit_for_bit(cuda, dtype, queries):
    parts = on(cuda, *cache([300, 3], 16, 2, 32, 32, dtype))
    q = torch.randn(2, queries, 4, 32, device=cuda).to(dtype)
    first = ops.paged_attention(q, *parts, return_lse=True)
    again = ops.paged_attention(q, *parts, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("queries", [1, 4])
def test_nan_is_not_hidden(cuda, queries):
    k, v, table, lens = on(cuda, *cache([60], 16, 1, 16, 16, torch.bfloat16))
    q = torch.randn(1, queries, 2, 16, device=cuda).bfloat16()
    q[0, 0, 0] = torch.nan
    out = ops.paged_attention(q, k, v, table, lens)
    assert out[0, 0, 0].isnan().all() and not out[0, 0, 1].isnan().any()


@pytest.mark.parametrize("queries", [1, 4])
def test_lengths_and_pages_out_of_bounds_stay_inside(cuda, queries):
    """The CPU refuses these; a GPU sees them too late, and reads nothing outside the tensors."""
    k, v, table, lens = on(cuda, *cache([9, 20], 4, 2, 16, 16, torch.bfloat16))
    q = torch.randn(2, queries, 4, 16, device=cuda).bfloat16()
    good = ops.paged_attention(q, k, v, table, lens)
    table[1, 2], lens[1] = 2**31 - 1, 2**20
    assert torch.equal(ops.paged_attention(q, k, v, table, lens)[0], good[0])
    whole = ops.paged_attention(q, k, v, table, lens)
    lens = lens + torch.tensor([0, 2**32], device=lens.device)
    assert torch.equal(ops.paged_attention(q, k, v, table, lens), whole)


@pytest.mark.parametrize(
    "shape, heads, width", [((0, 1), 2, 16), ((1, 0), 2, 16), ((2, 1), 2, 16)], ids=str
)
def test_empty(cuda, shape, heads, width):
    """No sequences, no queries, no pages."""
    k = torch.empty(0, 4, 1, width, device=cuda)
    table = torch.zeros(shape[0], 3, dtype=torch.int32, device=cuda)
    lens = torch.zeros(shape[0], dtype=torch.int32, device=cuda)
    q = torch.randn(*shape, heads, width, device=cuda)
    out, lse = ops.paged_attention(q, k, k, table, lens, return_lse=True)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


# more rows, wider or odd heads, rows not aligned to 16 (8) bytes, only one cache in int8
NOT_SERVED = {
    "65 rows": ((13, 5, 16), {}),
    "width": ((1, 1, 264), {}),
    "odd width": ((1, 1, 20), {}),
    "float32": ((9, 1, 16), {"dtype": torch.float32}),
    "int8 of 8 bytes": ((9, 1, 24), {"dtype": torch.int8}),
    "unaligned": ((1, 1, 16), {"offset": 1}),
    "mixed": ((1, 1, 16), {"mixed": True}),
}


def not_forced():
    """The rows as if the emulator had a device of its own."""
    names = (backend.forced(), "reference")
    return lambda *key: [
        backend.BACKENDS[b] for b in names if backend.why_not_here(key[0], b, *key[1:]) is None
    ]


@pytest.mark.parametrize("shape, change", NOT_SERVED.values(), ids=NOT_SERVED)
def test_what_it_does_not_serve(cuda, monkeypatch, shape, change):
    """The next backend serves it; where this one is forced it raises."""
    queries, heads, width = shape
    dtype = change.get("dtype", torch.bfloat16)
    k, v, table, lens = on(cuda, *cache([40], 16, 1, width + 8, width + 8, dtype))
    offset = change.get("offset", 0)
    k, v = (t[..., offset : offset + width] for t in (k, v))
    scales = {"k_scale": 0.1, "v_scale": 0.1} if dtype == torch.int8 else {}
    if change.get("mixed"):
        k, scales = (k.nan_to_num() * 10).to(torch.int8), {"k_scale": 0.1}
    q_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    q = torch.randn(1, queries, heads, width, device=cuda).to(q_dtype)
    arguments = (q, k, v, table, lens)
    with pytest.raises(
        InputError, match="is forced but cannot serve: it has paged_attention for D"
    ):
        ops.paged_attention(*arguments, causal=True, **scales)
    with backend.use_backend("reference"):
        wanted = ops.paged_attention(*arguments, causal=True, **scales)
    monkeypatch.setattr(backend, "_candidates", not_forced())
    monkeypatch.setattr(backend, "_picked", {})
    assert torch.equal(ops.paged_attention(*arguments, causal=True, **scales), wanted)


def test_served_and_not_in_turn(cuda, monkeypatch):
    """The predicate is asked for each call, once."""
    asked, launches, holds = [], [], host.SERVES.holds
    served = host.SERVES._replace(holds=lambda *a: (asked.append(1), holds(*a))[1])
    monkeypatch.setitem(backend.OPS["paged_attention"].serves, "cuda", served)
    monkeypatch.setattr(backend, "_candidates", not_forced())
    monkeypatch.setattr(backend, "_picked", {})
    monkeypatch.setattr(host, "stream", lambda t: (launches.append(t.shape[-1]), stream(t))[1])
    for width in (16, 20, 24):
        parts = on(cuda, *cache([40], 16, 1, width, width, torch.float16))
        ops.paged_attention(torch.zeros(1, 1, 2, width, device=cuda).half(), *parts)
    assert len(asked) == 3 and launches == [16, 24]


def test_what_has_no_room(cuda, monkeypatch):
    """Tiles of wide heads do not fit into the shared memory of every architecture."""
    monkeypatch.setattr(host, "_fits", lambda device, rows, *_: rows <= 16)
    parts = on(cuda, *cache([40], 16, 1, 16, 16, torch.bfloat16))
    for rows in (16, 17):
        q = torch.randn(1, 1, rows, 16, device=cuda).bfloat16()
        if rows > 16:
            with pytest.raises(InputError, match="forced but cannot serve"):
                ops.paged_attention(q, *parts)
        else:
            ops.paged_attention(q, *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts are the emulator's")
@pytest.mark.parametrize("heads", [2, 8])
def test_reads_whole_sectors_without_bank_conflicts(heads):
    """In the emulator's counts the kernels read q and the cache in whole sectors, and the kernel of
    matrix instructions has no bank conflicts."""
    simt = importlib.import_module("fastlm._simt")
    parts = cache([200], 16, 1, 128, 128, torch.bfloat16)
    q = torch.randn(1, 1, heads, 128).bfloat16()
    with backend.use_backend("simt"):
        simt.reset_report()
        simt.set_options(seed=1, count=True)
        try:
            ops.paged_attention(q, *parts)
        finally:
            simt.set_options()
    file = "paged_attention_mma.cu" if heads == 8 else "paged_attention.cu"
    counts = {
        place: cost
        for place, cost in simt.report().items()
        if place.startswith(f"paged_attention {file}") and (heads == 8 or "read global" in place)
    }
    # 200 keys and values of 256 bytes, and q
    read = sum(done for place, (_, done, _) in counts.items() if "read global" in place)
    assert 200 * 2 * 8 <= read <= 1.3 * 200 * 2 * 8
    assert {place: cost for place, cost in counts.items() if cost[1] != cost[2]} == {}
