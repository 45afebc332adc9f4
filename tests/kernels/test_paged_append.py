"""paged_append against a loop over tokens; what it leaves out or refuses; torch.compile."""

import pytest
import torch

from fastlm import InputError, backend, ops


@pytest.fixture(params=["cpu", "triton"])
def by(request):
    """The backends on which `ops.paged_append` runs without CUDA kernels."""
    with backend.use_backend(request.param):
        yield


def case(dtype, b=3, s=4, hkv=2, d=16, dv=8, page_size=5, per=3, int8=False, device="cpu"):
    """k, v, caches, a table of shuffled pages, positions; scales by name."""
    k = torch.randn(b, s, hkv, d, device=device).to(dtype)
    v = 3 * torch.randn(b, s, hkv, dv, device=device).to(dtype)
    caches = [
        torch.randint(-127, 128, (b * per + 2, page_size, hkv, n), device=device).to(
            torch.int8 if int8 else dtype
        )
        for n in (d, dv)
    ]
    table = torch.randperm(b * per + 2, device=device)[: b * per].view(b, per).int()
    start = torch.randint(0, per * page_size - s + 1, (b, 1), device=device)
    positions = (start + torch.arange(s, device=device)).int()
    scales = {}
    if int8:
        k_scale, v_scale = torch.rand(2, hkv, device=device) * 0.02 + 0.01
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    return [k, v, *caches, table, positions], scales


def wanted(arguments, scales):
    """Append token by token."""
    k, v, k_cache, v_cache, table, positions = arguments
    caches = k_cache.clone(), v_cache.clone()
    for b in range(k.shape[0]):
        for s in range(k.shape[1]):
            p = int(positions[b, s])
            page, slot = int(table[b, p // k_cache.shape[1]]), p % k_cache.shape[1]
            for x, cache, scale in zip((k, v), caches, scales.values() or (None, None)):
                row = x[b, s]
                if scale is not None:
                    row = (row.float() / scale[:, None]).round().clamp(-127, 127)
                cache[page, slot] = row.to(cache.dtype)
    return caches


@pytest.mark.parametrize("int8", [False, True])
def test_is_a_loop_over_tokens(by, dtype, int8):
    arguments, scales = case(dtype, int8=int8)
    expected = wanted(arguments, scales)
    ops.paged_append(*arguments, **scales)
    assert all(torch.equal(a, b) for a, b in zip(arguments[2:4], expected))


@pytest.mark.parametrize("scale", [0.05, torch.tensor(0.05), torch.tensor([0.05])])
def test_one_scale_for_all_heads(scale):
    arguments, scales = case(torch.float32, int8=True)
    expected = wanted(arguments, {n: torch.full((2,), 0.05) for n in scales})
    ops.paged_append(*arguments, **dict.fromkeys(scales, scale))
    assert all(torch.equal(a, b) for a, b in zip(arguments[2:4], expected))


def test_tokens_without_a_place_are_left_out(by):
    arguments, _ = case(torch.float32, b=4, s=1, page_size=4, per=5)
    table, positions = arguments[4:]
    positions[:, 0] = torch.tensor([-1, 20, 3, 2], dtype=torch.int32)
    table[2, 0], table[3, 0] = arguments[2].shape[0], -1
    before = [t.clone() for t in arguments[2:4]]
    ops.paged_append(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments[2:4], before))
    for t in (arguments[0], arguments[1], table, positions):  # now next to tokens that have one
        t.copy_(t.flip(0))
    positions[2], table[2, 1] = 7, 3
    ops.paged_append(*arguments)
    for x, cache, old in zip(arguments, arguments[2:4], before):
        old[3, 3] = x[2, 0]
        assert torch.equal(cache, old)


@pytest.mark.parametrize("place", [4, 5], ids=["block_table", "positions"])
@pytest.mark.parametrize("added", [-(2**32), 2**32], ids=["below", "above"])
def test_numbers_beyond_32_bits_are_left_out(by, place, added):
    """They would be in range if cut to 32 bits."""
    assert_left_out(case(torch.float32)[0], place, added)


def assert_left_out(arguments, place, added):
    arguments[place] = arguments[place].long() + added
    before = [t.clone() for t in arguments[2:4]]
    ops.paged_append(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments[2:4], before))


def test_triton_does_without_values():
    """Tensors without values raise an error for anything that would have to wait for a GPU."""
    arguments, _ = case(torch.float32, device="meta")
    triton = backend.OPS["paged_append"].load(backend.BACKENDS["triton"])
    triton(*arguments, None, None)


@pytest.mark.parametrize("int8", [False, True])
def test_is_one_graph(int8):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(k, v, k_cache, v_cache, table, positions, **scales):
        ops.paged_append(k * 1.0, v, k_cache, v_cache, table, positions, **scales)
        return k_cache.float().sum()

    for b in (2, 3):
        arguments, scales = case(torch.float32, b=b, int8=int8)
        expected = wanted(arguments, scales)
        step(*arguments, **scales)
        assert all(torch.equal(a, b) for a, b in zip(arguments[2:4], expected))


def test_opcheck():
    arguments, _ = case(torch.float32)
    torch.library.opcheck(torch.ops.fastlm.paged_append.default, (*arguments, None, None))


_cache = torch.zeros(1, 4, 2, 8)
_x, _place = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: _x[0]}, r"k: wanted 4 dimensions, got \(1, 2, 8\)"),
        (
            {0: torch.zeros(1, 1, 3, 8)},
            r"k: wanted torch.float32 \(1, 1, 2, 8\) on cpu .* \(1, 1, 3",
        ),
        ({1: torch.zeros(1, 1, 2, 9)}, r"v: wanted torch.float32 \(1, 1, 2, 8\) .* \(1, 1, 2, 9\)"),
        ({1: _x.half()}, "v: wanted torch.float32 .* got torch.float16"),
        ({0: _x.int(), 1: _x.int()}, "k: wanted a float dtype, got torch.int32"),
        ({2: _cache.half()}, "k_cache: wanted .* torch.float32 or int8 .* got torch.float16"),
        ({3: _cache.to(torch.int8)}, "v_cache: wanted .* the same for both, got torch.int8"),
        ({3: _cache[:, :3]}, r"v_cache: wanted .* got torch.float32 \(1, 3, 2, 8\)"),
        (
            {2: torch.zeros(1, 4, 8, 2).transpose(2, 3)},
            "k_cache: wanted elements of a head side by side, got stride 2",
        ),
        ({4: _place.float()}, r"block_table: wanted int32, .* got torch.float32"),
        ({5: _place[0]}, r"positions: wanted int32, 2 dimensions, the first \(1, 1\)"),
        ({"k_scale": 1.0}, r"k_scale: wanted None \(torch.float32 cache\), got one"),
        (
            {2: _cache.to(torch.int8), 3: _cache.to(torch.int8), "k_scale": 1.0},
            r"v_scale: wanted a number or a tensor \(int8 cache\), got None",
        ),
        ({0: _x.clone().requires_grad_()}, "wanted tensors without grad"),
    ],
)
def test_refusals(change, message):
    arguments = [_x, _x, _cache.clone(), _cache.clone(), _place, _place]
    options = {n: value for n, value in change.items() if isinstance(n, str)}
    for i, value in change.items():
        if isinstance(i, int):
            arguments[i] = value
    with pytest.raises(InputError, match=message):
        ops.paged_append(*arguments, **options)
