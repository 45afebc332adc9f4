"""Tests of ops and models under torch.func, batched backwards, torch.jit.trace, meta tensors."""

import warnings

import pytest
import torch
from op_calls import (
    CALLS,
    TRANSFORMED,
    caches,
    cos,
    each_transformed,
    head,
    k,
    lengths,
    offsets,
    pages,
    q,
    rows,
    sin,
    target,
    v,
    weight,
)
from transform_models import CONFIG, model_and_ids

import fastlm
from fastlm import ops


def cotangent(function, tensors):
    return torch.randn_like(function(*tensors))


def pulled_back(function, tensors, dy):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, dy)


def assert_all_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@each_transformed
def test_grad_and_vjp_run_the_kernels(function, tensors):
    dy = cotangent(function, tensors)
    expected = pulled_back(function, tensors, dy)
    everything = tuple(range(len(tensors)))
    actual = torch.func.grad(lambda *t: (function(*t) * dy).sum(), everything)(*tensors)
    assert_all_equal(actual, expected)
    _, pull = torch.func.vjp(function, *tensors)
    assert_all_equal(pull(dy), expected)  # after the transform its wrappers are invalid


@each_transformed
def test_vmap(function, tensors):
    """Forward, per-sample gradients, gradients of a batch, all without a warning."""
    batch = [torch.stack((t, 2 * t)) for t in tensors]
    with torch.no_grad():
        expected = torch.stack([function(*t) for t in zip(*batch)])
    assert torch.equal(torch.vmap(function)(*batch), expected)
    everything = tuple(range(len(tensors)))
    gradient = torch.func.grad(lambda *t: function(*t).sum(), everything)
    each = [pulled_back(function, t, torch.ones_like(e)) for t, e in zip(zip(*batch), expected)]
    each = [torch.stack(g) for g in zip(*each)]
    assert_all_equal(torch.vmap(gradient)(*batch), each)
    assert_all_equal(
        torch.func.grad(lambda *t: torch.vmap(function)(*t).sum(), everything)(*batch), each
    )


def test_vmap_of_nothing_is_refused():
    with pytest.raises(NotImplementedError, match="expected at least one sample"):
        torch.vmap(lambda x: ops.glu(x, x))(torch.zeros(0, 4, 8))


@each_transformed
def test_batched_backward(function, tensors):
    dy = torch.stack([cotangent(function, tensors) for _ in range(2)])
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    actual = torch.autograd.grad(function(*leaves), leaves, dy, is_grads_batched=True)
    expected = [torch.stack(g) for g in zip(*(pulled_back(function, tensors, d) for d in dy))]
    for a, b in zip(actual, expected):  # torch's own rules use other products
        torch.testing.assert_close(a, b)


def three_ops(q, k, v):
    out = ops.rms_norm(ops.attention(q, k, v, causal=True), weight[:16]).flatten(0, 2)
    return ops.cross_entropy(out, torch.arange(len(out)) % 16)


BATCH = tuple(t[:, None] for t in (q, k, v))  # two samples
COMPILED = {
    "grad": (torch.func.grad(three_ops, (0, 1, 2)), (q, k, v)),
    "grad of vmap": (
        torch.func.grad(lambda *t: torch.vmap(three_ops)(*t).sum(), (0, 1, 2)), BATCH,
    ),
    "vmap of grad": (torch.vmap(torch.func.grad(three_ops, (0, 1, 2))), BATCH),
}  # fmt: skip


@pytest.mark.parametrize("way", COMPILED)
def test_transforms_inside_torch_compile(way):
    gradient, tensors = COMPILED[way]
    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    assert_all_equal(compiled(*tensors), gradient(*tensors))


def test_a_graph_break_does_not_compile_each_op_again():
    """After it Dynamo compiles function by function, each at most `recompile_limit` times."""

    def loss(*tensors):
        torch._dynamo.graph_break()
        return three_ops(*tensors)

    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        actual = compiled(q, k, v)
    assert torch.equal(actual, torch.func.grad(three_ops)(q, k, v))


# ops that are not linear in their first tensor
CURVED = [n for n in TRANSFORMED if n not in ("rope", "linear") and "quantized" not in n]


@pytest.mark.parametrize("name", CURVED)
def test_no_reverse_over_reverse(name):
    function, (first, *others) = TRANSFORMED[name]

    def gradient(x):
        return torch.func.grad(lambda x: function(x, *others).sum())(x)

    with pytest.raises(
        NotImplementedError,
        match=r"no derivative: .*create_graph=True\) is refused",
    ):
        torch.func.grad(lambda x: gradient(x).square().sum())(first)
    x = first.clone().requires_grad_()
    loss = function(x, *others).sum()
    with warnings.catch_warnings():  # the warning that create_graph may leak memory
        warnings.simplefilter("ignore")
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="_backward has no derivative"):
        torch.autograd.grad(loss + slope.square().sum(), x)


@pytest.mark.parametrize("name", [n for n, (_, tensors) in CALLS.items() if tensors])
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_trace(name):
    """The trace records the op, so it also returns the op's results for other values."""
    function, tensors = CALLS[name]
    for needs_grad in (False, True)[: 1 if "paged" in name else 2]:
        leaves = [t.clone().requires_grad_(needs_grad) for t in tensors]
        traced = torch.jit.trace(lambda *t: function(*t), leaves)
        others = [(2 * t).detach().requires_grad_(needs_grad) for t in tensors]
        assert torch.equal(traced(*others), function(*others))
        if needs_grad:
            assert_all_equal(
                pulled_back(traced, others, torch.ones_like(function(*others))),
                pulled_back(function, others, torch.ones_like(function(*others))),
            )


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_traced_model(patched):
    model, ids = model_and_ids(patched)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.eval()

        def forward(self, ids):
            return self.model(ids).logits

    traced = torch.jit.trace(Logits(), ids)
    for shape in ((3, 17), (1, 128)):
        others = torch.randint(3, 99, shape)
        torch.testing.assert_close(traced(others), model(others).logits)
    if not patched:
        with pytest.raises(Exception, match="index 128 is out of bounds"):
            traced(torch.ones(1, 129, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_tables_by_the_length_are_not_traced():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = fastlm.CausalLM(fastlm.ModelConfig(**CONFIG, rope_parameters=rope), seed=0)
    with pytest.raises(NotImplementedError, match="rope_type dynamic"):
        torch.jit.trace(lambda ids: model(ids).logits, torch.ones(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("patched", [False, True])
def test_per_sample_gradients_of_a_model(patched):
    model, ids = model_and_ids(patched)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters, ids):
        batch = ids[None]
        return torch.func.functional_call(model, parameters, (batch,), {"labels": batch}).loss

    actual = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(actual[name][i], parameter.grad)


# (t moves a tensor to the device under test)
ON_META = {
    "rms_norm": lambda t: ops.rms_norm(t(rows), t(weight), residual=t(rows)),
    "layer_norm": lambda t: ops.layer_norm(t(rows), t(weight), t(weight), residual=t(rows)),
    "rope": lambda t: ops.rope(t(q), t(k), t(cos), t(sin)),
    "glu": lambda t: ops.glu(t(rows), t(rows)),
    "cross_entropy": lambda t: ops.cross_entropy(t(rows), t(target), z_loss=0.1, return_lse=True),
    "cross_entropy, mean": lambda t: ops.cross_entropy(t(rows), t(target)),
    "linear_cross_entropy": lambda t: ops.linear_cross_entropy(t(rows), t(head), t(target)),
    "linear_logprobs": lambda t: ops.linear_logprobs(
        t(rows), t(head), t(target), return_entropy=True
    ),
    "linear_distillation": lambda t: ops.linear_distillation(
        t(rows), t(head), t(rows), t(head), kind="jsd", mask=t(target) != -100
    ),
    "linear": lambda t: ops.linear(t(rows), t(head)),
    "attention": lambda t: ops.attention(t(q), t(k), t(v), causal=True, return_lse=True),
    "varlen_attention": lambda t: ops.varlen_attention(
        *(t(x[0].transpose(0, 1)) for x in (q, k, v)), t(offsets)
    ),
    "paged_attention": lambda t: ops.paged_attention(
        t(q.transpose(1, 2)), *(t(c) for c in caches), t(pages), t(lengths)
    ),
}


@pytest.mark.parametrize("call", ON_META.values(), ids=ON_META)
@pytest.mark.parametrize("autocasts", [False, True])
def test_meta_tensors_give_shapes(call, autocasts):
    """CPU autocast does not apply to meta tensors."""

    def results(t):
        out = call(t)
        return out if isinstance(out, tuple) else (out,)

    expected = results(lambda t: t)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        actual = results(lambda t: t.to("meta"))
    for meta, real in zip(actual, expected, strict=True):
        assert meta.is_meta and meta.shape == real.shape and meta.dtype == real.dtype


@pytest.mark.parametrize("patched", [False, True])
def test_a_model_on_meta(patched):
    model, ids = model_and_ids(patched)
    model, ids = model.to("meta"), ids.to("meta")
    assert model(ids).logits.shape == (2, 12, 99)
    mask = torch.ones_like(ids)  # no value of it is read
    assert model(ids, attention_mask=mask).logits.shape == (2, 12, 99)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())
