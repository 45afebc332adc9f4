"""Tests of `fastlm.register_sdpa`: ``F.scaled_dot_product_attention`` on fastlm's kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from patch_models import assert_equal_gradients, gradients, model_of, tokens
from tolerance import assert_near

import fastlm
from fastlm import InputError
from fastlm.hf import sdpa

doors = torch.nn.attention

# warnings of transformers about its own names do not concern the kernels
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def calls(monkeypatch):
    """Activate the kernels during the test, and count the calls of forward and backward."""
    counted = {"_forward": 0, "_backward": 0}

    def counts(name, function):
        def call(*arguments):
            counted[name] += 1
            return function(*arguments)

        return call

    for name in counted:
        monkeypatch.setattr(sdpa, name, counts(name, getattr(sdpa, name)))
    fastlm.register_sdpa()
    doors.activate_flash_attention_impl("fastlm")
    yield counted
    doors.restore_flash_attention_impl(_raise_warn=False)


def run(leaves, **options):
    out = F.scaled_dot_product_attention(*leaves, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def leaves_of(rows, keys, kv_heads=4, dtype=torch.float32, *, transposed=False):
    shapes = [(2, 4, rows, 16), (2, kv_heads, keys, 16), (2, kv_heads, keys, 16)]
    if transposed:
        leaves = [torch.randn(b, n, h, d).to(dtype).transpose(1, 2) for b, h, n, d in shapes]
    else:
        leaves = [torch.randn(shape).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in leaves]


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
    "bool mask": {"attn_mask": bool},
    "float mask": {"attn_mask": float},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rows, keys", [(9, 9), (3, 11), (11, 3), (1, 6)])
@pytest.mark.parametrize("transposed", [False, True])
def test_computes_the_same(calls, dtype, options, rows, keys, transposed):
    """Causal is aligned at the top left, and results have the same strides, as in torch."""
    options = dict(options)
    kind = options.get("attn_mask")
    if kind is bool:
        options["attn_mask"] = torch.rand(2, 1, rows, keys) < 0.7
        options["attn_mask"][..., 0] = True
    elif kind is float:
        options["attn_mask"] = torch.randn(rows, keys).to(dtype)
    kv_heads = 2 if "enable_gqa" in options else 4
    leaves = leaves_of(rows, keys, kv_heads, dtype, transposed=transposed)
    mine = run(leaves, **options)
    pieces = 2 if "is_causal" in options and rows > keys else 1
    assert calls == {"_forward": pieces, "_backward": pieces}
    doors.restore_flash_attention_impl()
    theirs = run(leaves, **options)
    assert calls == {"_forward": pieces, "_backward": pieces}  # torch is fully restored
    if kind is float:
        options["attn_mask"] = options["attn_mask"].double()
    exact = run([t.detach().double().requires_grad_() for t in leaves], **options)
    for name, a, b, truth in zip(("out", "dq", "dk", "dv"), mine, theirs, exact):
        assert a.stride() == b.stride(), name
        # torch rounds P and dS where fastlm does: 2 ulp, as in cases/attention.py
        slack = {"floor": 2 * torch.finfo(dtype).eps}
        assert_near(a, b, truth, factor=3 if name != "out" else 2, label=name, **slack)


def test_rows_that_see_nothing_are_zero(calls):
    leaves = leaves_of(3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    out, dq, *_ = run(leaves, attn_mask=mask)
    assert calls["_forward"] == 1
    assert torch.equal(out[:, :, 1], torch.zeros(2, 4, 16)) and not dq[:, :, 1].any()


def test_what_stays_with_torch(calls):
    """Dropout, a mask with a gradient, values with another width."""
    q, k, v = leaves_of(5, 5)
    F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    F.scaled_dot_product_attention(q, k, v, torch.zeros(5, 5, requires_grad=True))
    F.scaled_dot_product_attention(q, k, v[..., :8])
    assert calls == {"_forward": 0, "_backward": 0}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(calls, backend):
    leaves = leaves_of(8, 8, transposed=True)
    expected = run(leaves, is_causal=True)
    torch._dynamo.reset()
    function = torch.compile(
        lambda *t: F.scaled_dot_product_attention(*t, is_causal=True).transpose(1, 2) + 1,
        fullgraph=True, backend=backend,
    )  # fmt: skip
    before = calls["_forward"]
    out = function(*leaves)
    torch.testing.assert_close(out.transpose(1, 2) - 1, expected[0], rtol=1e-6, atol=1e-6)
    out.sum().backward()
    assert calls["_forward"] > before and calls["_backward"] > 1


def test_a_model_of_transformers(calls):
    """Its "sdpa" attention runs on the kernels, unchanged and unpatched."""
    model, ids = model_of(), tokens()
    model.set_attn_implementation("sdpa")
    fast, fast_gradients = gradients(copy.deepcopy(model), input_ids=ids, labels=ids)
    assert calls == {"_forward": 2, "_backward": 2}
    doors.restore_flash_attention_impl()
    plain, plain_gradients = gradients(model, input_ids=ids, labels=ids)
    torch.testing.assert_close(fast.loss, plain.loss, rtol=1e-6, atol=1e-6)
    assert_equal_gradients(plain_gradients, fast_gradients)


def test_registering_alone_changes_nothing():
    fastlm.register_sdpa()
    fastlm.register_sdpa()  # the second call has no effect
    assert doors.list_flash_attention_impls().count("fastlm") == 1
    assert doors.current_flash_attention_impl() is None


def test_a_torch_without_the_door(monkeypatch):
    monkeypatch.delattr(doors, "register_flash_attention_impl")
    with pytest.raises(InputError, match="torch: expected one with"):
        fastlm.register_sdpa()
