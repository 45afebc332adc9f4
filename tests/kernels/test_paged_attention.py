"""Tests of paged_attention beyond its table of cases (cases/paged_attention.py)."""

import importlib

import pytest
import torch
from cases.attention import assert_reference, far_apart
from cases.base import check
from cases.paged_attention import OPTIONS, case, pages
from contract import *  # noqa: F403
from on_kernels import on
from torch.nn.functional import pad

from fastlm import InputError, backend, ops
from fastlm.cuda import constants, stream
from fastlm.cuda import paged_attention as host

del test_gradcheck_of_the_reference  # noqa: F821  it has no backward


def move(kernel, tensors):
    return [t.to(kernel.device) for t in tensors]


def test_the_reference_is_the_formula(op):
    assert_reference(op)


def test_nan_is_not_hidden(kernel):
    k, v, table, lens = move(kernel, pages([60], 16, 1, 16, 16, torch.bfloat16))
    for queries in (1, 4):
        q = torch.randn(1, queries, 2, 16).bfloat16().to(kernel.device)
        q[0, 0, 0] = torch.nan
        out = ops.paged_attention(q, k, v, table, lens)
        assert out[0, 0, 0].isnan().all() and not out[0, 0, 1].isnan().any()


@pytest.mark.parametrize("queries", [1, 4])
def test_aligned_strides_do_not_matter(kernel, dtype, queries):
    """Keys and values interleaved in one allocation, a table that is a view, a projected q."""
    k, v = torch.randn(6, 8, 2, 2, 32).to(kernel.device, dtype).unbind(2)
    table = torch.tensor([[3, 9, 1, 9, 5]], dtype=torch.int32).to(kernel.device)[:, ::2]
    lens = torch.tensor([20], dtype=torch.int32).to(kernel.device)
    q = torch.randn(1, 4, queries, 64).to(kernel.device, dtype).transpose(1, 2)[..., 16:48]
    expected = ops.paged_attention(*(t.contiguous() for t in (q, k, v, table)), lens)
    assert torch.equal(ops.paged_attention(q, k, v, table, lens), expected)


@on("triton", "cuda")
@pytest.mark.parametrize("queries", [1, 4])
def test_lengths_and_pages_out_of_bounds_stay_inside(kernel, queries):
    """The CPU refuses these; a GPU sees them too late, and reads nothing outside the tensors."""
    k, v, table, lens = move(kernel, pages([9, 20], 4, 2, 16, 16, torch.bfloat16))
    q = torch.randn(2, queries, 4, 16).to(kernel.device).bfloat16()
    good = ops.paged_attention(q, k, v, table, lens)
    table[1, 2], lens[1] = 2**31 - 1, 2**20
    assert torch.equal(ops.paged_attention(q, k, v, table, lens)[0], good[0])
    expected = ops.paged_attention(q, k, v, table, lens)
    lens = lens + torch.tensor([0, 2**32], device=lens.device)
    assert torch.equal(ops.paged_attention(q, k, v, table, lens), expected)


@on("triton", "cuda")
def test_no_pages(kernel):
    """The table has pages that the cache does not have: there is nothing to read."""
    cache = torch.zeros(0, 4, 2, 16).to(kernel.device)
    table = torch.zeros(2, 3, dtype=torch.int32).to(kernel.device)
    lens = torch.tensor([5, 9] if kernel.language == "triton" else [0, 0]).to(kernel.device)
    q = torch.randn(2, 1, 4, 16).to(kernel.device)
    out, lse = ops.paged_attention(q, cache, cache, table, lens, return_lse=True)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


@on("triton")
@pytest.mark.parametrize("name", OPTIONS)
def test_keys_that_programs_share(op, kernel, name, monkeypatch):
    """Four programs per sequence whatever its length, so some of them have no keys."""
    from fastlm.kernels import attention_forward as module

    monkeypatch.setattr(module, "_splits", lambda *_: 4)
    row = case([300, 1, 0, 40], 16, widths=(16, 24), **OPTIONS[name])
    check(op.build_for(row, torch.float32, "triton", kernel.device))


@on("triton")
def test_pages_past_two_to_the_31_elements(kernel):
    if kernel.device != "cpu":
        pytest.skip("takes memory that is not touched")
    k, v = (far_apart((3, 4, 2, 16), 2**30 + 16, torch.int8) for _ in range(2))
    table, lens = torch.tensor([[2, 0, 1]], dtype=torch.int32), torch.tensor([11]).int()
    q, scales = torch.randn(1, 1, 4, 16), {"k_scale": 0.02, "v_scale": 0.03}
    expected = ops.paged_attention(q, k.contiguous(), v.contiguous(), table, lens, **scales)
    assert torch.equal(ops.paged_attention(q, k, v, table, lens, **scales), expected)


@on("cpu")
@pytest.mark.parametrize("queries", [1, 20])
def test_table_much_wider_than_the_sequences(kernel, queries, monkeypatch):
    """A server's table fits the longest context in each row. Memory follows the lengths."""
    k, v, table, lens = pages([600, 3, 0, 9], 16, 2, 32, 32, torch.float32)
    q = torch.randn(4, queries, 4, 32)
    expected = ops.paged_attention(q, k, v, table, lens)
    wide = torch.full((4, 1 << 16), 2**31 - 1, dtype=torch.int32)
    wide[:, : table.shape[1]] = table
    sizes = []
    make = torch.Tensor.new_empty

    def recorded(self, *size, **options):
        buffer = make(self, *size, **options)
        sizes.append(buffer.numel())
        return buffer

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    with torch.no_grad():
        assert torch.equal(ops.paged_attention(q, k, v, wide, lens), expected)
    # two heads: 612 rows of keys and values, and 32 for each sequence, where the table has room for
    # 2^22; plus a block of scores per thread
    assert max(sizes) <= 2 * (612 + 4 * 32) * 64 + torch.get_num_threads() * (1 << 16)


# ---- CUDA


@on("cuda")
def test_supports_its_rows(op, kernel, dtype):
    """An unsupported row would compare the definition with itself."""
    for name, row in op.rows.items():
        if "cuda" in row.on:
            call = op.build_for(row.case, dtype, "cuda", kernel.device)
            assert host.SUPPORT.predicate(*call.leaves[:3]), name


@on("cuda")
@pytest.mark.parametrize("heads", [1, 3])
def test_every_int8_is_widened_exactly(kernel, dtype, heads):
    """Sequence b has b + 1 keys, and the last one has all the weight: its score is 16 more than
    that of its predecessor. q selects the column that is the score.
    """
    device = kernel.device
    k = torch.arange(-128, 128).to(torch.int8).reshape(1, 16, 1, 16).to(device)
    lens = torch.arange(1, 17, dtype=torch.int32, device=device)
    table = torch.zeros(16, 1, dtype=torch.int32, device=device)
    values = k[0, :, 0].float()
    for column in (0, 1, 2, 3, 6, 12):  # each kind of position in a fragment
        q = torch.zeros(16, 1, heads, 16, dtype=dtype, device=device)
        q[..., column] = 1
        out, lse = ops.paged_attention(
            q, k, k, table, lens, k_scale=1.0, v_scale=1.0, scale=1.0, return_lse=True
        )
        torch.testing.assert_close(out[:, 0], values[:, None].to(dtype).expand(16, heads, 16))
        expected = values[:, None, column].expand(16, heads)
        torch.testing.assert_close(lse[:, :, 0], expected, rtol=1e-6, atol=1e-5)


@on("cuda")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("blocks", [2, 6, 40])
def test_any_division_of_the_keys(op, kernel, monkeypatch, blocks, queries, name):
    """Blocks with a part of a unit, several units or none; units with many blocks."""
    monkeypatch.setattr(constants(), "PAGED_MIN_TILES", 1)
    monkeypatch.setattr(host, "multiprocessors", lambda _: blocks // 2)
    dtype = torch.float32 if queries == 1 else torch.float16
    row = case([300, 1, 0, 40, 200], 16, queries, widths=(16, 24), **OPTIONS[name])
    check(op.build_for(row, dtype, "cuda", kernel.device))


@on("cuda")
def test_row_groups_of_several_key_heads(op, kernel, monkeypatch):
    """More rows than fit in a block, from two key heads, in pieces."""
    monkeypatch.setattr(constants(), "PAGED_MIN_TILES", 1)
    row = case([150, 70], 16, heads=(260, 2), widths=(16, 16), sinks=True)
    check(op.build_for(row, torch.float16, "cuda", kernel.device))


@on("cuda")
@pytest.mark.parametrize("queries", [1, 4])
def test_a_tile_with_room_does_not_show_the_start_of_the_cache(kernel, dtype, queries):
    """The start of the cache may hold anything, such as NaN of another sequence."""
    k, v, table, lens = move(kernel, pages([70, 5], 16, 1, 24, 24, dtype))
    q = torch.randn(2, queries, 2, 24, device=kernel.device).to(dtype)
    expected = ops.paged_attention(q, k, v, table, lens)
    k, v = (torch.cat([torch.full_like(t[:1], torch.nan), t]) for t in (k, v))
    assert torch.equal(ops.paged_attention(q, k, v, table + 1, lens), expected)


@on("cuda")
@pytest.mark.parametrize("group", [1, 4])
def test_lengths_near_31_bits(kernel, group):
    """All pages are the same one, so a short sequence ending in the same slot gives the result."""
    k, v, *_ = move(kernel, pages([1024], 1024, 1, 8, 8, torch.float16))
    table = torch.zeros(1, 2**21, dtype=torch.int32, device=kernel.device)
    q = torch.randn(1, 1, group, 8, device=kernel.device).half()
    long, short = (
        ops.paged_attention(q, k, v, table[:, : n // 1024 + 1], lens, window=30)
        for n in (2**31 - 3000, 1024 + (2**31 - 3000) % 1024)
        for lens in [torch.tensor([n], dtype=torch.int32, device=kernel.device)]
    )
    assert torch.equal(long, short)
    lens = torch.tensor([2**31 - 1], dtype=torch.int32, device=kernel.device)  # clamped below it
    assert ops.paged_attention(q, k, v, table, lens, window=30).isfinite().all()


@on("cuda")
@pytest.mark.parametrize("d, dv", [(24, 32), (32, 24)])
def test_int8_rows_of_half_a_copy(op, kernel, d, dv):
    """Rows are aligned to 16 bytes. Of the last row's last 16 bytes only 8 belong to the tensor."""
    row = case([16], 16, heads=(4, 1), widths=(d, dv), int8="number")
    call = op.build_for(row, torch.float16, "cuda", kernel.device)
    for i in (1, 2):
        n = call.leaves[i].shape[-1]
        call.leaves[i] = pad(call.leaves[i], (0, 32 - n), value=7)[..., :n]
    assert host.SUPPORT.predicate(*call.leaves[:3])
    check(call)


@on("cuda")
@pytest.mark.parametrize("heads", [1, 4])
def test_offsets_beyond_32_bits(kernel, heads):
    """Pages are 2^30 elements apart: an index multiplied in 32 bits would read elsewhere."""
    storage = torch.UntypedStorage(2**31 + 2**13, device=kernel.device)  # mapped only where used
    base = torch.tensor([], dtype=torch.int8, device=kernel.device).set_(storage)
    k, v = (t.as_strided((3, 64, 1, 16), (2**30, 16, 16, 1)) for t in (base, base[1024:]))
    for t in (k, v):
        t.copy_(torch.randint(-127, 128, t.shape))
    table = torch.tensor([[2, 1]], dtype=torch.int32, device=kernel.device)
    lens = torch.tensor([100], dtype=torch.int32, device=kernel.device)
    q = torch.randn(1, 1, heads, 16, device=kernel.device).half()
    scales = {"k_scale": 0.01, "v_scale": 0.01}
    far = ops.paged_attention(q, k, v, table, lens, **scales)
    near = ops.paged_attention(q, k.contiguous(), v.contiguous(), table, lens, **scales)
    assert torch.equal(far, near)


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
    """Return the rows as if the emulator had a separate device."""
    names = (backend.forced_backend(), "reference")
    return lambda *key: [
        backend.BACKENDS[b]
        for b in names
        if backend.unsupported_reason(key[0], b, *key[1:]) is None
    ]


@on("cuda")
@pytest.mark.parametrize("shape, change", NOT_SERVED.values(), ids=NOT_SERVED)
def test_unsupported_arguments(kernel, monkeypatch, shape, change):
    """The next backend runs. If this one is forced, the call raises."""
    queries, heads, width = shape
    dtype = change.get("dtype", torch.bfloat16)
    k, v, table, lens = move(kernel, pages([40], 16, 1, width + 8, width + 8, dtype))
    offset = change.get("offset", 0)
    k, v = (t[..., offset : offset + width] for t in (k, v))
    scales = {"k_scale": 0.1, "v_scale": 0.1} if dtype == torch.int8 else {}
    if change.get("mixed"):
        k, scales = (k.nan_to_num() * 10).to(torch.int8), {"k_scale": 0.1}
    q_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    q = torch.randn(1, queries, heads, width, device=kernel.device).to(q_dtype)
    arguments = (q, k, v, table, lens)
    with pytest.raises(InputError, match="which is forced: it supports D"):
        ops.paged_attention(*arguments, causal=True, **scales)
    with backend.use_backend("reference"):
        expected = ops.paged_attention(*arguments, causal=True, **scales)
    monkeypatch.setattr(backend, "_candidates", not_forced())
    monkeypatch.setattr(backend, "_selected", {})
    assert torch.equal(ops.paged_attention(*arguments, causal=True, **scales), expected)


@on("cuda")
def test_supported_and_unsupported_in_turn(kernel, monkeypatch):
    """The predicate is called once per call."""
    checks, launches, predicate = [], [], host.SUPPORT.predicate
    support = host.SUPPORT._replace(predicate=lambda *a: (checks.append(1), predicate(*a))[1])
    monkeypatch.setitem(backend.OPS["paged_attention"].supports, "cuda", support)
    monkeypatch.setattr(backend, "_candidates", not_forced())
    monkeypatch.setattr(backend, "_selected", {})
    monkeypatch.setattr(host, "stream", lambda t: (launches.append(t.shape[-1]), stream(t))[1])
    for width in (16, 20, 24):
        parts = move(kernel, pages([40], 16, 1, width, width, torch.float16))
        ops.paged_attention(torch.zeros(1, 1, 2, width, device=kernel.device).half(), *parts)
    assert len(checks) == 3 and launches == [16, 24]


@on("cuda")
def test_no_shared_memory(kernel, monkeypatch):
    """Tiles of wide heads do not fit into the shared memory of every architecture."""
    monkeypatch.setattr(host, "_fits", lambda device, rows, *_: rows <= 16)
    parts = move(kernel, pages([40], 16, 1, 16, 16, torch.bfloat16))
    for rows in (16, 17):
        q = torch.randn(1, 1, rows, 16, device=kernel.device).bfloat16()
        if rows > 16:
            with pytest.raises(InputError, match="which is forced"):
                ops.paged_attention(q, *parts)
        else:
            ops.paged_attention(q, *parts)


@on("cuda")
@pytest.mark.parametrize("heads", [2, 8])
def test_reads_whole_sectors_without_bank_conflicts(kernel, heads):
    """In the emulator's counts the kernels read q and the cache in whole sectors, and the kernel of
    matrix instructions has no bank conflicts.
    """
    if kernel.device != "cpu":
        pytest.skip("counts are the emulator's")
    simt = importlib.import_module("fastlm._simt")
    parts = pages([200], 16, 1, 128, 128, torch.bfloat16)
    q = torch.randn(1, 1, heads, 128).bfloat16()
    simt.reset_report()
    simt.set_options(seed=int(kernel.variant), count=True)
    try:
        ops.paged_attention(q, *parts)
    finally:
        simt.set_options()
    file = "paged_attention_mma.cu" if heads == 8 else "paged_attention.cu"
    counts = {
        location: cost
        for location, cost in simt.report().items()
        if location.startswith(f"paged_attention {file}")
        and (heads == 8 or "read global" in location)
    }
    # 200 keys and values of 256 bytes, and q
    read = sum(done for location, (_, done, _) in counts.items() if "read global" in location)
    assert 200 * 2 * 8 <= read <= 1.3 * 200 * 2 * 8
    assert {location: cost for location, cost in counts.items() if cost[1] != cost[2]} == {}


# ---- refusals


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("queries", [1, 20])
def test_refuses_what_would_be_read_out_of_bounds(name, queries):
    k, v, table, lens = pages([9, 20], 4, 2, 16, 16, torch.float32)
    q = torch.randn(2, queries, 4, 16)
    with backend.use_backend(name):
        for page in (-1, 10):
            bad = table.clone()
            bad[1, 2] = page
            with pytest.raises(
                InputError,
                match=f"block_table: expected pages 0 to 9, got .*{page}.* for sequence 1",
            ):
                ops.paged_attention(q, k, v, bad, lens)
        for n in (-3, 21):
            with pytest.raises(
                InputError, match=f"seq_lens: expected 0 to 20 .* got {n} for sequence 0"
            ):
                ops.paged_attention(q, k, v, table, torch.tensor([n, 20]))
        # in range only if cut to 32 bits
        with pytest.raises(InputError, match="seq_lens: expected 0 to 20"):
            ops.paged_attention(q, k, v, table, torch.tensor([2**32 + 9, 20]))
        with pytest.raises(InputError, match="block_table: expected pages 0 to 9"):
            ops.paged_attention(q, k, v, table.long() + 2**32, lens)


def test_refusals():
    k, v, table, lens = pages([9, 20], 4, 2, 16, 16, torch.float32)
    q = torch.randn(2, 1, 4, 16)
    k8, v8 = k.to(torch.int8), v.to(torch.int8)
    for arguments, options, message in (
        ((q[0], k, v, table, lens), {}, r"q: expected 4 dimensions, got \(1, 4, 16\)"),
        (
            (q, k, v[:, :3], table, lens),
            {},
            r"v_cache: expected \(pages, page_size, Hkv, Dv\) as k_cache",
        ),
        (
            (q, k, v, table[:1], lens),
            {},
            r"block_table: expected 2 dimension\(s\), B = 2 rows, int32 on cpu",
        ),
        (
            (q, k, v, table, lens.float()),
            {},
            r"seq_lens: expected 1 dimension\(s\), B = 2 rows, int32 on cpu",
        ),
        (
            (q, k8, v8, table, lens),
            {},
            r"k_scale: expected a number or a tensor \(int8 cache\), got None",
        ),
        (
            (q, k, v, table, lens),
            {"k_scale": 1.0},
            r"k_scale: expected None \(torch.float32 cache\), got one",
        ),
        (
            (q, k8, v8, table, lens),
            {"k_scale": torch.ones(3), "v_scale": 1.0},
            r"k_scale: expected shape \(\) or \(2,\) on cpu, got \(3,\)",
        ),
        (
            (q.bfloat16(), k, v, table, lens),
            {},
            "k: expected torch.bfloat16 as q, got torch.float32",
        ),
        (
            (q, k, v, table, lens),
            {"sinks": torch.zeros(4, requires_grad=True)},
            "expected tensors without grad .* got one that requires grad",
        ),
        (
            (q.clone().requires_grad_(), k, v, table, lens),
            {},
            "expected tensors without grad .* got one that requires grad",
        ),
    ):
        with pytest.raises(InputError, match=message):
            ops.paged_attention(*arguments, **options)
