"""Appending to an int8 cache of pages against torch, on the emulator where there is no GPU."""

import contextlib

import pytest
import torch

from fastlm import ops
from fastlm.cuda import paged_append as host
from fastlm.cuda.paged_append import paged_append


def case(cuda, dtype, b, s, hkv, d, dv, page_size):
    """k, v, caches, a table of shuffled pages, positions, scales."""
    per = 5
    k = torch.randn(b, s, hkv, d, device=cuda).to(dtype)
    v = 3 * torch.randn(b, s, hkv, dv, device=cuda).to(dtype)
    k_cache, v_cache = (
        torch.randint(-127, 128, (b * per + 2, page_size, hkv, n), device=cuda).to(torch.int8)
        for n in (d, dv)
    )
    table = torch.randperm(b * per + 2, device=cuda)[: b * per].view(b, per).int()
    start = torch.randint(0, per * page_size - s + 1, (b, 1), device=cuda)
    positions = (start + torch.arange(s, device=cuda)).int()
    scales = torch.rand(2, hkv, device=cuda) * 0.02 + 0.01
    return k, v, k_cache, v_cache, table, positions, *scales.unbind(0)


def wanted(k, v, k_cache, v_cache, table, positions, k_scale, v_scale):
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    page_size = k_cache.shape[1]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        page = table.long().gather(1, positions.long() // page_size)
        q = (x.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        cache[page, positions.long() % page_size] = q
    return k_cache, v_cache


# with vectors and element by element; several blocks a token; a token, many
@pytest.mark.parametrize(
    "shape",
    [(3, 1, 2, 64, 64, 16), (2, 7, 3, 40, 24, 5), (1, 4, 2, 33, 7, 1), (5, 1, 9, 128, 128, 8)],
    ids=str,
)
def test_is_torch(cuda, dtype, shape):
    arguments = case(cuda, dtype, *shape)
    expected = wanted(*arguments)
    paged_append(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments[2:4], expected))


def test_rounds_to_even_and_saturates(cuda):
    k = torch.tensor([0.5, 1.5, -0.5, -2.5, 200.0, -200.0, torch.inf, -torch.inf], device=cuda)
    cache = torch.zeros(1, 1, 1, 8, dtype=torch.int8, device=cuda)
    one, zero = torch.ones(1, device=cuda), torch.zeros(1, 1, dtype=torch.int32, device=cuda)
    x = k.view(1, 1, 1, 8)
    paged_append(x, x, cache, cache.clone(), zero, zero, one, one)
    assert cache.flatten().tolist() == [0, 2, 0, -2, 127, -127, 127, -127]


def test_strided(cuda, dtype):
    """k and v of one projection, caches interleaved, a table that is a view."""
    _, _, _, _, table, positions, *scales = case(cuda, dtype, 2, 3, 2, 16, 16, 4)
    k, v = torch.randn(2, 2, 2, 3, 16, device=cuda).to(dtype).transpose(2, 3).unbind(1)
    both = torch.zeros(12, 4, 2, 2, 16, dtype=torch.int8, device=cuda)
    k_cache, v_cache = both.unbind(2)
    wide = torch.full((2, 10), 2**31 - 1, dtype=torch.int32, device=cuda)
    wide[:, ::2] = table
    k = k.transpose(2, 3).contiguous().transpose(2, 3)  # elements of a head apart
    expected = wanted(k, v, k_cache, v_cache, table, positions, *scales)
    paged_append(k, v, k_cache, v_cache, wide[:, ::2], positions, *scales)
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])


def test_offsets_beyond_32_bits(cuda):
    """Pages 2^30 elements apart: an index multiplied in 32 bits would write elsewhere."""
    storage = torch.UntypedStorage(2**31 + 2**13, device=cuda)  # mapped where it is used
    base = torch.tensor([], dtype=torch.int8, device=cuda).set_(storage)
    k_cache, v_cache = (t.as_strided((3, 4, 2, 16), (2**30, 32, 16, 1)) for t in (base, base[512:]))
    k, v, near_k, near_v, _, _, *scales = case(cuda, torch.float16, 1, 3, 2, 16, 16, 4)
    table = torch.tensor([[2, 1]], dtype=torch.int32, device=cuda)
    positions = torch.tensor([[0, 3, 4]], dtype=torch.int32, device=cuda)
    for far, near in ((k_cache, near_k), (v_cache, near_v)):
        far.copy_(near[:3])
    paged_append(k, v, near_k, near_v, table, positions, *scales)
    paged_append(k, v, k_cache, v_cache, table, positions, *scales)
    assert torch.equal(k_cache, near_k[:3]) and torch.equal(v_cache, near_v[:3])


def test_tokens_between_16_bytes(cuda, dtype):
    """The first token begins at 16 bytes, the next one does not."""
    k, v, *others = case(cuda, dtype, 1, 3, 2, 16, 16, 4)
    k = torch.randn(1, 3, 33, device=cuda).to(dtype)[..., :32].unflatten(-1, (2, 16))
    expected = wanted(k, v, *others)
    paged_append(k, v, *others)
    assert torch.equal(others[0], expected[0]) and torch.equal(others[1], expected[1])


def test_leaves_out_what_has_no_place(cuda):
    """Negative positions, beyond the table, pages outside the cache: nothing is written."""
    k, v, k_cache, v_cache, table, positions, *scales = case(
        cuda, torch.bfloat16, 4, 1, 2, 16, 16, 4
    )
    # behind the table's last row nothing lies that could be read as a page
    positions[0], positions[1], positions[2], positions[3] = -1, 3, 2, 20
    table[1, 0], table[2, 0] = k_cache.shape[0], -1
    before = k_cache.clone(), v_cache.clone()
    paged_append(k, v, k_cache, v_cache, table, positions, *scales)
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache, before[1])


def test_starts_on_the_device_of_its_tensors(cuda, monkeypatch):
    """Which need not be the current one."""
    entered, started = [], []

    @contextlib.contextmanager
    def made_current(t):
        entered.append(t)
        yield
        entered.pop()

    class Extension:
        def paged_append(self, k, *_):
            started.append(any(t is k for t in entered))

    monkeypatch.setattr(torch.cuda, "device_of", made_current)
    monkeypatch.setattr(host, "extension", Extension)
    paged_append(*case(cuda, torch.float32, 1, 1, 1, 8, 8, 4))
    assert started == [True] and not entered


def test_paged_attention_reads_it(cuda):
    k, v, k_cache, v_cache, table, _, *scales = case(cuda, torch.float16, 2, 9, 2, 32, 32, 4)
    positions = torch.arange(9, device=cuda).int().expand(2, 9)
    paged_append(k, v, k_cache, v_cache, table, positions, *scales)
    lens = torch.full((2,), 9, dtype=torch.int32, device=cuda)
    q = torch.randn(2, 1, 4, 32, device=cuda).half()
    out = ops.paged_attention(
        q, k_cache, v_cache, table, lens, k_scale=scales[0], v_scale=scales[1]
    )
    pages = torch.arange(2, device=cuda).int()[:, None]
    steps = [s[:, None] for s in scales]
    rounded = [((x / s).float().round().clamp(-127, 127) * s).half() for x, s in zip((k, v), steps)]
    torch.testing.assert_close(
        out, ops.paged_attention(q, *rounded, pages, lens), atol=2e-2, rtol=1e-2
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: torch.zeros(1, 1, 3, 8)}, "k: wanted key heads as its cache 2, got 3"),
        ({1: torch.zeros(1, 1, 2, 9)}, "v: wanted elements of a head as its cache 8, got 9"),
        ({5: torch.zeros(2, dtype=torch.int32)}, "positions: wanted entries, one a token 1, got 2"),
        ({6: torch.zeros(1)}, "k_scale: wanted one for each key head 2, got 1"),
        (
            {2: torch.zeros(1, 4, 8, 2, dtype=torch.int8).transpose(2, 3)},
            "k_cache: wanted elements of a head side by side, stride 1, got 2",
        ),
        ({2: torch.zeros(1, 4, 2, 8)}, "k_cache: wanted dtype int8, got float32"),
        (
            {3: torch.zeros(0, 4, 2, 8, dtype=torch.int8)},
            "v_cache: wanted pages as k_cache 1, got 0",
        ),
        (
            {3: torch.zeros(1, 2, 2, 8, dtype=torch.int8)},
            "v_cache: wanted page size of k_cache 4, got 2",
        ),
    ],
    ids=["heads", "width", "positions", "scale", "strides", "dtype", "pages", "page size"],
)
def test_refusals(cuda, change, message):
    cache = torch.zeros(1, 4, 2, 8, dtype=torch.int8)
    x, place, scale = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, dtype=torch.int32), torch.ones(2)
    arguments = [x, x, cache, cache.clone(), place, place, scale, scale]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(ValueError, match=message):
        paged_append(*(a.to(cuda) for a in arguments))
