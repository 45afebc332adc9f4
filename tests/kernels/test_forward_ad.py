"""Forward-mode AD: tangents are right or refused, never zero. The backward of an op is tested
against float64 elsewhere; here ``<dy, J t> == <J^T dy, t>``.
"""

import pytest
import torch
from op_calls import CALLS, TRANSFORMED, each_transformed
from torch.autograd import forward_ad
from transform_models import model_and_ids

from fastlm import backend, ops

# warnings of torch's own jvp and linearize
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]


def jvp(function, tensors, tangents):
    return torch.func.jvp(function, tensors, tangents)


def linearize(function, tensors, tangents):
    out, push = torch.func.linearize(function, *tensors)
    return out, push(*tangents)


def dual(function, tensors, tangents):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, u) for t, u in zip(tensors, tangents)]
        return forward_ad.unpack_dual(function(*duals))


def dual_with_grad(function, tensors, tangents):
    return dual(function, [t.clone().requires_grad_() for t in tensors], tangents)


def pulled_back(function, tensors, dy):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, dy)


@each_transformed
@pytest.mark.parametrize("way", [jvp, linearize, dual, dual_with_grad])
def test_tangents(way, function, tensors):
    tangents = tuple(torch.randn_like(t) for t in tensors)
    out, tangent = way(function, tensors, tangents)
    torch.testing.assert_close(out, function(*tensors))
    dy = torch.randn_like(tangent)
    products = [(g * t) for g, t in zip(pulled_back(function, tensors, dy), tangents)]
    # float32 sums of up to 2000 terms, computed in two ways
    scale = sum(p.abs().sum() for p in products) + (dy * tangent).abs().sum()
    assert tangent.abs().max() > 0
    assert ((dy * tangent).sum() - sum(p.sum() for p in products)).abs() < 1e-5 * scale


@each_transformed
def test_jacobians_agree(function, tensors):
    """``jacfwd`` is vmap over tangents, ``jacrev`` over cotangents."""
    forward, reverse = torch.func.jacfwd(function)(*tensors), torch.func.jacrev(function)(*tensors)
    torch.testing.assert_close(forward, reverse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function, tensors",
    # rounding has steps, which finite differences pick up
    [c for n, c in TRANSFORMED.items() if n != "quantized_linear, int8"],
    ids=[n for n in TRANSFORMED if n != "quantized_linear, int8"],
)
def test_second_derivative_forward_over_reverse(function, tensors):
    """Compare with central differences of the gradient in float64."""
    tensors = [t.double() for t in tensors]
    tangents = [torch.randn_like(t) for t in tensors]
    step = 1e-5

    def gradient(*moved):
        return torch.func.grad(lambda *t: function(*t).square().sum(), tuple(range(len(moved))))(
            *moved
        )

    with backend.use_backend("reference"):
        _, actual = torch.func.jvp(gradient, tuple(tensors), tuple(tangents))
        up, down = (
            gradient(*(t + sign * step * u for t, u in zip(tensors, tangents))) for sign in (1, -1)
        )
    for f, a, b in zip(actual, up, down):
        torch.testing.assert_close(f, (a - b) / (2 * step), rtol=1e-5, atol=1e-6)


def test_paged_attention():
    function, (q,) = CALLS["paged_attention, int8"]
    q, t = q.double(), torch.randn_like(q).double()
    with backend.use_backend("reference"):
        _, actual = torch.func.jvp(function, (q,), (t,))
        expected = (function(q + 1e-5 * t) - function(q - 1e-5 * t)) / 2e-5
    assert actual.abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


def test_queries_that_see_nothing_have_no_tangent():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 3, 8)

    def function(q, k):
        return ops.attention(q, k, k, causal=True, return_lse=True)

    _, (out, lse) = torch.func.jvp(function, (q, k), (q.flip(0), k))
    assert not out[:, :, :2].any() and not lse[:, :, :2].any()
    assert out[:, :, 2:].abs().max() > 0 and out.isfinite().all() and lse.isfinite().all()
    hessian = torch.func.hessian(lambda q: function(q, k)[0].square().sum())(q)
    assert hessian.isfinite().all()


def test_ordinary_tensors_beside_dual_ones_run_the_kernels():
    x, w = torch.randn(4, 32), torch.randn(32)
    with forward_ad.dual_level():
        assert torch.equal(ops.rms_norm(x, w), ops.rms_norm(x.clone(), w))


def test_what_has_no_tangent_is_refused():
    x, w = torch.randn(4, 32), torch.randn(32)
    cache, tokens = torch.zeros(2, 4, 2, 8), torch.randn(1, 3, 2, 8)
    table, positions = torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2]])

    def append(k):
        ops.paged_append(k, k, cache, cache.clone(), table, positions)
        return k

    for way in (jvp, dual):
        with pytest.raises(NotImplementedError, match="paged_append writes its arguments"):
            way(append, (tokens,), (tokens,))

    def operator(x):
        return torch.ops.fastlm.rms_norm(x, None, w, 1e-6, 0.0)[0]

    for way in (jvp, dual, dual_with_grad):
        with pytest.raises(NotImplementedError, match=r"forward-mode AD call fastlm\.ops"):
            way(operator, (x,), (x,))


@pytest.mark.parametrize("way", [jvp, dual])
def test_under_torch_compile_it_is_refused(way):
    x, w = torch.randn(4, 32), torch.randn(32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.rms_norm(x, w), backend="aot_eager")
    compiled(x)
    try:
        _, tangent = way(compiled, (x,), (x.flip(0),))
    except NotImplementedError as error:
        assert "forward-mode AD call fastlm.ops" in str(error)
    else:  # torch runs it uncompiled under its transforms
        _, expected = way(lambda x: ops.rms_norm(x, w), (x,), (x.flip(0),))
        torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("patched", [False, True])
def test_models(patched):
    model, ids = model_and_ids(patched)
    parameters = dict(model.named_parameters())
    tangents = {n: torch.randn_like(p) for n, p in parameters.items()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (ids,), {"labels": ids}).loss

    gradients = torch.autograd.grad(loss(parameters), list(parameters.values()))
    expected = sum((t * g).sum() for t, g in zip(tangents.values(), gradients))
    detached = {n: p.detach() for n, p in parameters.items()}
    _, actual = torch.func.jvp(loss, (detached,), (tangents,))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
