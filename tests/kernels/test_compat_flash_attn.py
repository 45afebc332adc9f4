"""Tests of `fastlm.compat.flash_attn` against flash-attn's documented behaviour, in float64."""

import inspect
import math

import pytest
import torch
from tolerance import assert_near

from fastlm import InputError
from fastlm.compat import flash_attn as door
from fastlm.compat.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from fastlm.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
)

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,"
    " alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_varlen_func": (
        f"q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {COMMON},"
        " block_table=None"
    ),
    "unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "pad_input": "hidden_states, indices, batch, seqlen",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,"
        " cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None,"
        " softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,"
        " rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}  # from flash-attn 2.8

WINDOWS = [(-1, -1), (3, 0), (3, -1), (-1, 2), (2, 1), (0, 0), (-1, 0), (100, 100)]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    function = getattr(door, name, None) or getattr(door.bert_padding, name)
    parameters = inspect.signature(function).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == SIGNATURES[name]


def visible(rows, keys, causal=False, window_size=(-1, -1)):
    """Return a mask: query i sees i + keys - rows - left to i + keys - rows + right, inclusive."""
    left, right = window_size
    right = 0 if causal else right
    mask_rows = [
        [(left < 0 or j >= i - left) and (right < 0 or j <= i + right) for j in range(keys)]
        for i in range(keys - rows, keys)
    ]
    return torch.tensor(mask_rows, dtype=torch.bool).view(rows, keys)


def naive(
    q, k, v, *, softmax_scale=None, softcap=0.0, alibi_slopes=None, **mask
):  # fmt: skip
    """Return out and lse (B, H, S) of (B, S, H, D)."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    rows, keys = q.shape[2], k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    s = q @ k.mT * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        distance = (torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)).abs()
        slopes = alibi_slopes.double().reshape(-1, q.shape[1], 1, 1)
        s = s - slopes * distance
    mask_ = visible(rows, keys, **mask)
    s = torch.where(mask_, s, -1e30)
    lse = torch.where(mask_.any(-1), s.logsumexp(-1), -torch.inf)
    return ((s.softmax(-1) * mask_) @ v).transpose(1, 2), lse


def tensors(batch, rows, keys, heads, kv_heads, width=16, dtype=torch.float32):
    return tuple(
        torch.randn(batch, n, h, width).to(dtype).requires_grad_()
        for n, h in ((rows, heads), (keys, kv_heads), (keys, kv_heads))
    )


def near(actual, truth, tolerance=2e-5):
    """Compare with the tolerance for float32 sums of tens of terms of size 1."""
    torch.testing.assert_close(actual.double(), truth, rtol=tolerance, atol=tolerance)


def check(function, truth, leaves, tolerance=2e-5):
    """Compare output and gradients of `function(*leaves)` with those of `truth` in float64."""
    out, lse, _ = function(*leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected, expected_lse = truth(*doubles)
    near(out, expected, tolerance)
    near(lse, expected_lse, tolerance)
    upstream = torch.randn(out.shape)
    actual = torch.autograd.grad(out, leaves, upstream)
    expected_gradients = torch.autograd.grad(expected, doubles, upstream.double())
    for a, b in zip(actual, expected_gradients):
        near(a, b, tolerance)


@pytest.mark.parametrize("rows, keys", [(2, 5), (5, 2)])
def test_causal_masks_of_the_documentation(rows, keys):
    """Aligned at the bottom right. A row whose mask is all zero returns zero."""
    drawn = {(2, 5): ["11110", "11111"], (5, 2): ["00", "00", "00", "10", "11"]}[rows, keys]
    mask_ = torch.tensor([[int(c) for c in row] for row in drawn]).bool()
    q, k = torch.zeros(1, rows, 1, 8), torch.zeros(1, keys, 1, 8)
    v = torch.eye(keys, 8)[None, :, None]  # the output shows which keys took part
    out = flash_attn_func(q, k, v, causal=True)[0, :, 0, :keys]
    assert torch.equal(out > 0, mask_)
    assert torch.equal(out[~mask_.any(1)], torch.zeros(int((~mask_.any(1)).sum()), keys))
    assert torch.equal(visible(rows, keys, causal=True), mask_)


@pytest.mark.parametrize("window_size", WINDOWS, ids=str)
@pytest.mark.parametrize("rows, keys", [(7, 7), (5, 11), (11, 5), (1, 6)])
def test_windows(rows, keys, window_size):
    for causal in (False, True):
        options = {"causal": causal, "window_size": window_size}
        check(
            lambda *t, o=options: flash_attn_func(*t, **o, return_attn_probs=True),
            lambda *t, o=options: naive(*t, **o),
            tensors(2, rows, keys, 4, 2),
        )


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (4, 0), (3, 2)], ids=str)
def test_options(heads, kv_heads, slopes, window_size):
    options = {
        "softmax_scale": 0.3, "softcap": 1.5, "window_size": window_size,
        "alibi_slopes": torch.rand(heads) if slopes else None,
    }  # fmt: skip
    check(
        lambda *t: flash_attn_func(*t, **options, deterministic=True, return_attn_probs=True),
        lambda *t: naive(*t, **options),
        tensors(2, 9, 13, heads, kv_heads, width=24),
    )


def test_low_precision(dtype):
    q, k, v = (t.detach() for t in tensors(2, 40, 56, 4, 2, width=64, dtype=dtype))
    truth, _ = naive(q.double(), k.double(), v.double(), causal=True, window_size=(20, -1))
    plain, _ = naive(q, k, v, causal=True, window_size=(20, -1))
    out = flash_attn_func(q, k, v, causal=True, window_size=(20, -1))
    assert out.dtype == dtype
    assert_near(out, plain, truth)


LENGTHS = [([3, 0, 7, 1], [3, 0, 7, 1]), ([3, 2, 0, 7], [5, 2, 4, 1])]


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def one_by_one(q, k, v, q_lengths, k_lengths, alibi_slopes=None, **options):
    outs, lses = [], []
    parts = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths))
    for part in parts:
        out, lse = naive(*(t[None] for t in part), alibi_slopes=alibi_slopes, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


@pytest.mark.parametrize("q_lengths, k_lengths", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (2, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("slopes", [None, (4,)])
def test_varlen(q_lengths, k_lengths, causal, window_size, slopes):
    """Each sequence has the results that it has alone."""
    options = {
        "causal": causal, "window_size": window_size, "softcap": 2.0,
        "alibi_slopes": None if slopes is None else torch.rand(slopes),
    }  # fmt: skip
    lengths = (offsets(q_lengths), offsets(k_lengths), max(q_lengths), max(k_lengths))
    leaves = [
        t[0].detach().requires_grad_() for t in tensors(1, sum(q_lengths), sum(k_lengths), 4, 2)
    ]
    check(
        lambda *t: flash_attn_varlen_func(*t, *lengths, **options, return_attn_probs=True),
        lambda *t: one_by_one(*t, q_lengths, k_lengths, **options),
        leaves,
    )


def test_varlen_of_full_rows_is_dense():
    """From flash-attn's own tests: packing rows of one length changes only the shape."""
    q, k, v = tensors(3, 8, 8, 4, 2)
    cu = offsets([8] * 3)
    dense = flash_attn_func(q, k, v, causal=True)
    packed = flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in (q, k, v)), cu, cu, 8, 8, causal=True
    )
    torch.testing.assert_close(packed.view(dense.shape), dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_padding(kind):
    """Rows go from a padded batch through the packed function and back, with the dense result."""
    lengths = [5, 0, 9, 3]
    mask = torch.zeros(4, 9, dtype=kind)
    for b, (length, left) in enumerate(zip(lengths, (True, False, True, False))):
        mask[b, slice(9 - length, 9) if left else slice(0, length)] = 1
    x = torch.randn(4, 9, 3, 4, 16, requires_grad=True)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert packed.shape == (17, 3, 4, 16) and longest == 9 and used.tolist() == lengths
    assert torch.equal(cu_seqlens, offsets(lengths)) and used.dtype == torch.int32
    assert torch.equal(packed, x[mask.bool()])
    lengths = cu_seqlens, cu_seqlens, longest, longest
    out = flash_attn_varlen_func(*packed.unbind(1), *lengths, causal=True)
    padded = pad_input(out, indices, 4, 9)
    for b, row in enumerate(mask.bool()):
        assert not padded[b, ~row].any()
        if row.any():
            expected = flash_attn_func(*x[b, row][None].unbind(2), causal=True)[0]
            torch.testing.assert_close(padded[b, row], expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(padded.square().sum(), x)
    assert gradient[mask.bool()].abs().sum() > 0 and not gradient[~mask.bool()].any()


def test_padding_with_rows_kept_unused():
    mask, more = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0]] * 2)
    x = torch.randn(2, 4, 8)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask, more)
    assert indices.tolist() == [0, 1, 2, 4, 6] and cu_seqlens.tolist() == [0, 3, 5]
    assert longest == 3 and used.tolist() == [2, 1]
    assert torch.equal(packed, index_first_axis(x.flatten(0, 1), indices))
    put = index_put_first_axis(packed, indices, 8)
    assert torch.equal(put, pad_input(packed, indices, 2, 4).flatten(0, 1))
    with pytest.raises(InputError, match=r"attention_mask: expected \(2, 4\) as hidden_states"):
        unpad_input(x, mask[:, :3])


def paged(k, lengths, page_size, pages):
    """Packed keys in shuffled pages, with NaN in unused slots; and the table."""
    max_pages = -(-max(lengths) // page_size)
    cache = torch.full((pages, page_size, *k.shape[1:]), torch.nan)
    table = torch.randperm(pages)[: len(lengths) * max_pages].view(len(lengths), max_pages).int()
    for b, part in enumerate(k.split(lengths)):
        for j, row in enumerate(part):
            cache[table[b, j // page_size], j % page_size] = row
    return cache, table


@pytest.mark.parametrize("window_size", [(-1, -1), (2, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("slopes", [None, (4,)])
def test_varlen_in_pages(window_size, slopes):
    q_lengths, k_lengths = [3, 2, 0, 5], [5, 2, 4, 9]
    options = {
        "causal": window_size == (-1, -1), "window_size": window_size,
        "alibi_slopes": None if slopes is None else torch.rand(slopes),
    }  # fmt: skip
    q, k, v = (t[0].detach() for t in tensors(1, 10, 20, 4, 2))
    torch.manual_seed(1)
    k_pages, table = paged(k, k_lengths, 4, 16)
    torch.manual_seed(1)
    v_pages, _ = paged(v, k_lengths, 4, 16)
    out, lse, _ = flash_attn_varlen_func(
        q, k_pages, v_pages, offsets(q_lengths), offsets(k_lengths), 5, 9, **options,
        block_table=table, return_attn_probs=True,
    )  # fmt: skip
    doubles = (t.double() for t in (q, k, v))
    expected, expected_lse = one_by_one(*doubles, q_lengths, k_lengths, **options)
    near(out, expected)
    near(lse, expected_lse)


CAPACITY, NEW = 16, 3
KVCACHE = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (4, 0), "softcap": 2.0},
    "ahead": {"window_size": (4, 1)},
    "slopes": {"causal": True, "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
}


@pytest.mark.parametrize("options", KVCACHE.values(), ids=KVCACHE)
@pytest.mark.parametrize("layout", ["rows", "chosen rows", "pages"])
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("rows", [1, NEW])
def test_kvcache(options, layout, new, rows):
    """Keys are appended in place at cache_seqlens, and are visible."""
    seqlens = torch.tensor([5, 11], dtype=torch.int32)
    q, k, v = (t.detach() for t in tensors(2, rows, rows, 4, 2))
    shape = (10, 4, 2, 16) if layout == "pages" else (5, CAPACITY, 2, 16)
    caches = torch.randn(2, *shape)
    before = caches.clone()
    arguments = {}
    if layout == "pages":
        table = torch.randperm(10)[:8].view(2, 4).int()
        arguments["block_table"] = table
        indices = [table[b].long() for b in range(2)]
    else:
        row_of = [0, 1]
        if layout != "rows":
            row_of = [4, 2]
            arguments["cache_batch_idx"] = torch.tensor(row_of, dtype=torch.int32)
        indices = [torch.tensor([r]) for r in row_of]
    if new:
        arguments |= {"k": k, "v": v}
    out, lse = flash_attn_with_kvcache(
        q, *caches, cache_seqlens=seqlens, **arguments, **options, return_softmax_lse=True
    )
    for b in range(2):
        length = int(seqlens[b])
        sequences = [c[indices[b]].flatten(0, 1).double() for c in before]
        if new:
            for cache, more in zip(sequences, (k[b].double(), v[b].double())):
                cache[length : length + rows] = more
            length += rows
            for cache, kept_cache in zip(caches, sequences):
                near(cache[indices[b]].flatten(0, 1), kept_cache, 1e-6)
        kv = (t[None, :length] for t in sequences)
        expected, expected_lse = naive(q[b].double()[None], *kv, **options)
        near(out[b], expected[0])
        near(lse[b], expected_lse[0])
    if new:  # nothing else was written
        assert int((caches != before).any(-1).any(-1).sum()) == 2 * 2 * rows
    else:
        assert torch.equal(caches, before)


def test_kvcache_lengths():
    """A number is for all sequences; without one the full cache is used."""
    q, k_cache, v_cache = (t.detach() for t in tensors(2, 1, 8, 4, 2))
    full_cache = flash_attn_with_kvcache(q, k_cache, v_cache)
    assert torch.equal(full_cache, flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=8))
    near(full_cache, naive(*(t.double() for t in (q, k_cache, v_cache)))[0])
    five = torch.tensor([5, 5], dtype=torch.int32)
    expected = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=five, num_splits=2)
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=5), expected)


def test_decoding_token_by_token_is_one_causal_call():
    q, k, v = (t.detach() for t in tensors(2, 9, 9, 4, 2))
    caches = [torch.full((2, 9, 2, 16), torch.nan) for _ in range(2)]
    steps = [
        flash_attn_with_kvcache(
            *(q[:, i : i + 1], *caches, k[:, i : i + 1], v[:, i : i + 1]), cache_seqlens=i,
            causal=True,
        )
        for i in range(9)
    ]  # fmt: skip
    torch.testing.assert_close(
        torch.cat(steps, 1), flash_attn_func(q, k, v, causal=True), rtol=1e-5, atol=1e-5
    )


def test_dropout():
    """Dropout uses torch's generator and preserves the mean. Probabilities are not available."""
    q, k, v = (t.detach() for t in tensors(1, 4, 256, 2, 2))

    def run(seed):
        torch.manual_seed(seed)
        return flash_attn_func(q, k, torch.ones_like(v), 0.25)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    # each output is a sum of 256 probabilities, kept or dropped: 1 on average
    assert (torch.stack([run(i) for i in range(50)]).mean() - 1).abs() < 0.05
    with pytest.raises(InputError, match="return_attn_probs: expected False with dropout"):
        flash_attn_func(q, k, v, 0.25, return_attn_probs=True)


def test_probabilities_without_dropout_are_an_empty_tensor():
    out, lse, probabilities = flash_attn_func(*tensors(2, 3, 5, 4, 2), return_attn_probs=True)
    assert out.shape == (2, 3, 4, 16) and lse.shape == (2, 4, 3) and lse.dtype == torch.float32
    assert probabilities.numel() == 0


def test_no_rows():
    q, k, v = tensors(2, 0, 5, 4, 2)
    assert flash_attn_func(q, k, v, causal=True, window_size=(2, 2)).shape == q.shape
    assert flash_attn_func(k, q[:, :, :2], q[:, :, :2]).eq(0).all()


def test_compiles_in_one_graph():
    q, k, v = tensors(2, 8, 8, 4, 2)
    cu = offsets([3, 5])
    cache = torch.randn(2, 16, 2, 16)
    seqlens = torch.tensor([4, 6], dtype=torch.int32)

    def dense(q, k, v):
        return flash_attn_func(q, k, v, causal=True, window_size=(3, 0))

    def packed(q, k, v):
        q, k, v = (t[0] for t in (q, k, v))
        return flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, window_size=(2, 1))

    def decode(q, k, v):
        q, k, v = (t.detach()[:, :1] for t in (q, k, v))
        return flash_attn_with_kvcache(
            q, cache.clone(), cache.clone(), k, v, cache_seqlens=seqlens, causal=True
        )

    for function in (dense, packed, decode):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k, v), function(q, k, v), rtol=1e-6, atol=1e-6)


def cached(**changes):
    q, k, v = (t.detach() for t in tensors(2, 2, 2, 4, 2))
    cache = torch.zeros(2, 8, 2, 16)
    arguments = {"k_cache": cache, "v_cache": cache.clone(), "k": k, "v": v, "cache_seqlens": 3}
    return flash_attn_with_kvcache(q, **(arguments | changes))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: flash_attn_func(t[0][0], *t[1:]), r"q: expected \(B, length, heads, D\), got"),
        (lambda t: flash_attn_func(t[0][..., :8], *t[1:]), "k: expected head width D = 8"),
        (lambda t: flash_attn_func(t[0][:, :, :3], *t[1:]), "q: expected heads a multiple of"),
        (
            lambda t: flash_attn_varlen_func(*(x[0] for x in t), offsets([2])[None], None, 2, 2),
            r"cu_seqlens_q: expected a tensor \(B \+ 1,\)",
        ),
        (
            lambda t: flash_attn_varlen_func(
                t[0][0], t[1], t[2], offsets([2]), offsets([2]), 2, 2, 0.5,
                block_table=torch.zeros(1, 1).int(),
            ),
            "dropout_p: expected 0 with block_table, got 0.5",
        ),
        (
            lambda t: flash_attn_varlen_func(*(x[0] for x in t), [0, 2], [0, 2], 2, 2),
            r"cu_seqlens_q: expected a tensor \(B \+ 1,\), got list",
        ),
        (
            lambda t: flash_attn_func(*t, window_size=128),
            r"window_size: expected \(left, right\), -1 for no limit, got 128",
        ),
        (lambda t: cached(v=None), "k, v: expected both or neither"),
        (lambda t: cached(cache_seqlens=None), "cache_seqlens: expected 0 to 6 .* got 8"),
        (lambda t: cached(cache_seqlens=7), "cache_seqlens: expected 0 to 6 with 2 new keys"),
        (lambda t: cached(v=t[2].detach().half()), "v: expected torch.float32 .* torch.float16"),
        (lambda t: cached(rotary_cos=torch.ones(8, 4)), "rotary_cos: expected None here"),
        (lambda t: cached(cache_leftpad=torch.ones(2)), "cache_leftpad: expected None here"),
        (lambda t: cached(k=t[0].detach()), r"k: expected torch.float32 \(2, 2, 2, 16\) on cpu as"),
        (lambda t: cached(k=t[1]), "k: expected a tensor without grad"),
        (
            lambda t: cached(
                block_table=torch.zeros(2, 1).int(), cache_batch_idx=torch.zeros(2).int()
            ),
            "cache_batch_idx: expected None here",
        ),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(tensors(2, 2, 2, 4, 2))
    assert "\n" not in str(caught.value)


def integers(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


REFUSED = {
    "cache_seqlens: expected 0 to 6": {"cache_seqlens": 7},
    "cache_seqlens: expected 0 to 6 .* got -1": {"cache_seqlens": integers(0, -1)},
    r"seq_lens: expected 1 dim.* \(3,\)": {"cache_seqlens": integers(0, 0, 0)},
    "seq_lens: expected .* got torch.float32": {"cache_seqlens": torch.zeros(2)},
    "v: expected torch.float32": {"v": torch.zeros(2, 2, 2, 8)},
    "v_cache: expected": {"v_cache": torch.zeros(2, 7, 2, 16)},
    "k: expected head width D = 8": {"q": torch.zeros(2, 2, 4, 8)},
    "k: expected torch.float16 as q": {"q": torch.zeros(2, 2, 4, 16).half()},
    "q: expected heads a multiple": {"q": torch.zeros(2, 2, 3, 16)},
    r"alibi_slopes: expected \(4,\) floats": {"alibi_slopes": torch.ones(3)},
    r"alibi_slopes: expected \(4,\) floats.*": {"alibi_slopes": torch.ones(2, 4)},
    "window_size: expected": {"window_size": 3},
    "block_table: expected .* int32": {"block_table": torch.zeros(2, 1)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refused_append_writes_nothing(message):
    q, k, v = (t.detach() for t in tensors(2, 2, 2, 4, 2))
    caches = {name: torch.zeros(2, 8, 2, 16) for name in ("k_cache", "v_cache")}
    arguments = {"q": q, **caches, "k": k, "v": v, "cache_seqlens": 3, "causal": True}
    with pytest.raises(InputError, match=message) as caught:
        flash_attn_with_kvcache(**(arguments | REFUSED[message]))
    assert "\n" not in str(caught.value)
    assert not any(cache.any() for cache in caches.values())


def test_lengths_that_are_too_short():
    """Rows past max_seqlen would otherwise get the wrong mask, or be left out."""
    q, k, v = (t[0].detach() for t in tensors(1, 5, 5, 4, 2))
    for sizes, side in (((1, 3), "q"), ((3, 2), "k")):
        with pytest.raises(InputError, match=f"max_seqlen_{side}: expected at least 3, got"):
            flash_attn_varlen_func(q, k, v, offsets([2, 3]), offsets([2, 3]), *sizes)
