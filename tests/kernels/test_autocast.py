"""Tests of ops and models under ``torch.autocast``: they accept its dtypes, and they train."""

import pytest
import torch
import torch.nn.functional as F
from op_calls import caches, cos, lengths, pages, q, rows, sin, weight
from transform_models import model_and_ids

import fastlm
from fastlm import InputError, ops

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@each_dtype
@pytest.mark.parametrize("swapped", [False, True])
def test_mixed_dtypes_take_the_wider(dtype, swapped):
    def mixed(a, b):
        return (a, b.to(dtype)) if swapped else (a.to(dtype), b)

    other, k = rows.flip(0), q[:, :2]
    x, residual = mixed(rows, other)
    gate, up = mixed(rows, other)
    q_in, k_in = mixed(q, k)
    with torch.autocast("cpu", dtype):
        y, h = ops.rms_norm(x, weight, residual=residual)
        product = ops.glu(gate, up)
        turned = ops.rope(q_in, k_in, cos, sin)
    assert torch.equal(h, x + residual) and h.dtype == torch.float32
    assert torch.equal(y, ops.rms_norm(h, weight))
    torch.testing.assert_close(product, F.silu(gate.float()) * up)
    assert all(
        torch.equal(a, b)
        for a, b in zip(turned, ops.rope(q_in.float(), k_in.float(), cos, sin), strict=True)
    )


@each_dtype
def test_gradients_of_mixed_dtypes_come_in_their_own(dtype):
    x, residual = rows.to(dtype).requires_grad_(), rows.flip(0).clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y, h = ops.rms_norm(x, weight, residual=residual)
    (y.square().sum() + h.sum()).backward()
    assert x.grad.dtype == dtype and residual.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, residual.grad.to(dtype))


@each_dtype
def test_caches_of_pages(dtype):
    """Tensors that autocast has cast to 16 bits work with a cache in float32."""
    narrow = q.transpose(1, 2).to(dtype)
    cache, tokens = torch.zeros(2, 8, 2, 16), q[:, :2, :3].transpose(1, 2).to(dtype)
    positions = torch.arange(3).expand(2, 3)
    with torch.autocast("cpu", dtype):
        actual = ops.paged_attention(narrow, *caches, pages, lengths)
        ops.paged_append(tokens, tokens, cache, cache.clone(), pages, positions)
    assert torch.equal(actual, ops.paged_attention(narrow.float(), *caches, pages, lengths))
    assert torch.equal(cache[:, :3], tokens.float())


def test_without_autocast_two_dtypes_are_a_mistake():
    for call in (
        lambda: ops.rms_norm(rows.bfloat16(), weight, residual=rows),
        lambda: ops.glu(rows.bfloat16(), rows),
        lambda: ops.rope(q.bfloat16(), q, cos, sin),
        lambda: ops.paged_attention(q.transpose(1, 2).bfloat16(), *caches, pages, lengths),
    ):
        with pytest.raises(InputError, match=r"expected torch.bfloat16 .*got torch.float32"):
            call()


@each_dtype
def test_compiles_in_one_graph(dtype):
    torch._dynamo.reset()

    def function(x, residual):
        with torch.autocast("cpu", dtype):
            y, h = ops.rms_norm(x, weight, residual=residual)
            return y, h, ops.glu(x, residual)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = rows.to(dtype)
    for a, b in zip(compiled(x, rows), function(x, rows), strict=True):
        assert torch.equal(a, b)


def trained(model, ids, dtype, optimizer, spoiled=None):
    """Return the losses of ten steps, and the skipped steps. Step `spoiled` has an infinite
    gradient.
    """
    opt = optimizer(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    losses, skipped = [], []
    for step in range(10):
        opt.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(ids, labels=ids).loss
        assert loss.dtype == torch.float32
        losses.append(loss.item())
        scaler.scale(loss).backward()
        if step == spoiled:
            next(model.parameters()).grad.fill_(torch.inf)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(opt)
        scaler.update()
        if all(torch.equal(a, b) for a, b in zip(before, model.parameters())):
            skipped.append(step)
    return torch.tensor(losses), skipped


@each_dtype
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, fastlm.AdamW], ids=["torch", "fastlm"])
@pytest.mark.parametrize("patched", [False, True])
def test_trains(patched, optimizer, dtype):
    results = []
    spoiled = 4 if dtype == torch.float16 else None
    for precision in (None, dtype):
        torch.manual_seed(0)
        model, ids = model_and_ids(patched)
        if precision is None:
            results.append(trained(model.train(), ids, None, optimizer)[0])
        else:
            losses, skipped = trained(model.train(), ids, precision, optimizer, spoiled)
            assert skipped == ([] if spoiled is None else [spoiled])
            results.append(losses)
    exact, actual = results
    if spoiled is not None:  # a skipped step leaves the weights to the next one
        assert abs(actual[spoiled + 1] - actual[spoiled]) < 1e-3
        actual, exact = torch.cat((actual[: spoiled + 1], actual[spoiled + 2 :])), exact[:-1]
    assert exact[-1] < exact[0] - 0.3
    # a few times a bfloat16 product's error of 2^-9; less than 2 % of what ten steps learn
    torch.testing.assert_close(actual, exact, rtol=0, atol=2e-2)


@each_dtype
def test_own_model_generates(dtype):
    model, ids = model_and_ids(False)
    with torch.autocast("cpu", dtype):
        out = model.generate(ids, max_new_tokens=4, temperature=0.0)
    assert out.shape == (2, 16)
