"""linear_logprobs against F.linear + log_softmax in float64: values and gradients of both outputs,
ignored rows, masked classes, hard logits, chunk and block edges.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from compiled import assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from peak import printed_alone
from test_linear_cross_entropy import make
from tolerance import ULP, assert_near

from fastlm import InputError, backend, ops
from fastlm.cpu import linear_cross_entropy as cpu


def plain(x, w, target, *, linear_bias=None, temperature=1.0, softcap=None, ignore_index=-100):
    """Both outputs by their definition, the logits in x's dtype, all after them in float32."""
    z = F.linear(x, w, linear_bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(1)
    ignored = target == ignore_index
    at_target = logp.gather(1, target.masked_fill(ignored, 0)[:, None])[:, 0]
    finite = logp.masked_fill(logp == -math.inf, 0)  # a masked class: 0 * -inf
    entropy = -(logp.exp() * finite).sum(1)
    return at_target.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)


def outputs_and_gradients(function, x, w, bias, target, upstream, **options):
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (x, w, bias)]
    out = function(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
    out = out if isinstance(out, tuple) else (out,)
    pairs = [(o, u.to(o.dtype)) for o, u in zip(out, upstream) if u is not None]
    torch.autograd.backward(*zip(*pairs))
    return [*(o.detach() for o in out), *(t.grad for t in leaves if t is not None)]


def fused(*arguments, **options):
    return ops.linear_logprobs(*arguments, return_entropy=True, **options)


def check(x, w, bias, target, *, on=(True, True), ulps=2, entropy=True, **options):
    """Compare with float64. on: which outputs have an upstream gradient. ulps: the gradient of a
    logit is rounded once to x's dtype before the matrix products, as in torch, and the exponential
    that it is computed from once again.
    """
    upstream = [torch.randn(target.shape).to(x.device) if o else None for o in on]
    wide = [t if t is None else t.double() for t in (x, w, bias)]
    mine = outputs_and_gradients(
        fused if entropy else ops.linear_logprobs, x, w, bias, target, upstream, **options
    )
    truth = outputs_and_gradients(plain, *wide, target, upstream, **options)
    low = outputs_and_gradients(plain, x, w, bias, target, upstream, **options)
    if not entropy:
        del truth[1], low[1]
    assert mine[0].dtype == torch.float32
    # The entropy has the rounding of the logits, which are as large as the log-probabilities. For
    # gradients, the largest weight of p in a logit's: a difference of such terms, which may be near
    # zero, keeps their rounding.
    used = target != options.get("ignore_index", -100)
    size = sum(u[used].abs().max().item() for u in upstream if u is not None and used.any())
    size /= options.get("temperature", 1.0)
    terms = {
        "entropy": F.pad(truth[0], (0, 1)).abs().max().item(),  # 0 without rows
        "dx": size * w.abs().max().item(),
        "dw": size * x[used].abs().max().item() if used.any() else 0.0,
        "dbias": size,
    }
    names = [*["logprob", "entropy"][: 1 + entropy], *["dx", "dw", "dbias"]]
    for name, a, p, t in zip(names, mine, low, truth):
        factor = 3 if name.startswith("d") else 2
        if term := terms.get(name, 0.0):  # added to the truth's scale, which may be 0
            a, p, t = (torch.cat((v.flatten(), v.new_tensor([term]))) for v in (a, p, t))
        assert_near(a, p, t, factor=factor, floor=ulps * ULP[a.dtype], what=f"{name} {options}")


OPTIONS = [{}, {"temperature": 0.6}, {"softcap": 5.0, "temperature": 1.7}]


@pytest.mark.parametrize("on", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
# ragged everywhere; sizes near one; more rows than a chunk is wide and a vocabulary of two blocks
# and one class
@pytest.mark.parametrize("shape", [(37, 50, 123), (2, 1, 3), (70, 64, 513)], ids=str)
def test_matches_float64(isa, dtype, shape, options, on):
    check(*make(*shape, dtype), on=on, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_entropy(isa, dtype, options):
    check(*make(37, 50, 300, dtype), entropy=False, on=(True, False), **options)


def test_one_is_minus_cross_entropy(isa, dtype):
    """The bits of linear_cross_entropy; with the entropy beside it the sums have another order."""
    x, w, bias, target = make(67, 40, 300, dtype)
    upstream = [torch.randn(67)]
    mine = outputs_and_gradients(ops.linear_logprobs, x, w, bias, target, upstream)
    both = outputs_and_gradients(fused, x, w, bias, target, [*upstream, None])
    del both[1]
    loss = outputs_and_gradients(
        lambda *a, **k: -ops.linear_cross_entropy(*a, reduction="none", **k),
        x,
        w,
        bias,
        target,
        upstream,
    )
    assert all(torch.equal(a, b) for a, b in zip(mine, loss))
    for a, b in zip(mine, both):
        torch.testing.assert_close(a, b, rtol=4 * ULP[a.dtype], atol=4 * ULP[a.dtype])


@pytest.mark.parametrize("shape", [(252, 507, 123), (5, 64, 50257), (530, 40, 700)], ids=str)
def test_larger_shapes(isa, dtype, shape):
    if isa in ("scalar", "amx_emulated"):
        shape = (min(shape[0], 70), min(shape[1], 96), min(shape[2], 1030))  # slow by nature
    check(*make(*shape, dtype))


def test_many_chunks_are_one(isa, dtype, monkeypatch):
    """With 32 rows per chunk the gradients of the weights are sums over chunks, of which the last
    is ragged.
    """
    monkeypatch.setattr(cpu, "_MOST_ROWS", 32)
    x, w, bias, target = make(107, 48, 300, dtype)
    check(x, w, bias, target)
    check(x, w, None, target.clamp_min(0))


@pytest.mark.parametrize("rows", [1, 8, 33])
def test_few_rows(isa, dtype, rows):
    check(*make(rows, 50, 300, dtype))
    check(*make(rows, 16, 300, dtype, bias=False, ignored=0))


def test_scores_far_above_the_first(isa, dtype):
    """e^(z - base) overflows a float if the base is one of the first classes' scores."""
    x, w, bias, target = make(40, 32, 700, dtype)
    w[:64] /= 64
    w[64:] *= 8
    assert (F.linear(x, w).float().amax(1) - F.linear(x, w[:64]).float().amax(1)).max() > 50
    check(x, w, bias, target)


@pytest.mark.parametrize("case", ["peaked", "uniform", "all negative", "common offset"])
def test_hard_logits(isa, dtype, case):
    x, w, bias, target = make(40, 32, 700, dtype)
    if case == "peaked":
        x = x * 8
    elif case == "uniform":
        x, bias = x * 0, bias * 0
        _, entropy = fused(x, w, target.clamp_min(0), linear_bias=bias)
        torch.testing.assert_close(entropy, torch.full((40,), math.log(700)))
    elif case == "all negative":  # a maximum that starts at 0 gives lse = -inf
        bias = bias - 200
    else:  # 1e4 in every logit, representable in all dtypes
        bias = torch.full_like(bias, 8192.0)
    check(x, w, bias, target)


def test_masked_classes(isa, dtype):
    """A bias of -inf: the class has probability 0, and 0 * log 0 is 0."""
    x, w, bias, target = make(40, 32, 300, dtype)
    bias[:100], bias[257] = -math.inf, -math.inf
    target = torch.where(target < 0, target, torch.where(target == 257, 299, 100 + target % 150))
    check(x, w, bias, target)
    alone = torch.full_like(bias, -math.inf)
    alone[7] = 0
    logprob, entropy = fused(x, w, torch.full((40,), 7), linear_bias=alone)
    assert (logprob == 0).all() and (entropy == 0).all()


def test_ignored_rows_are_not_read(isa, dtype):
    x, w, bias, target = make(40, 32, 300, dtype, ignored=0)
    target[::3] = -100
    kept = target != -100
    x[::6], x[3::6] = math.nan, math.inf
    upstream = torch.randn(2, 40)
    upstream[:, ::3] = math.nan
    mine = outputs_and_gradients(fused, x, w, bias, target, upstream)
    alone = outputs_and_gradients(fused, x[kept], w, bias, target[kept], upstream[:, kept])
    for name, a, b in zip(("logprob", "entropy", "dx"), mine, alone):
        assert not a[~kept].any() and torch.equal(a[kept], b), name
    assert torch.equal(mine[3], alone[3]) and torch.equal(mine[4], alone[4])
    another = target.masked_fill(~kept, 2).masked_fill(target == 2, 3)
    mine = outputs_and_gradients(fused, x, w, bias, another, upstream, ignore_index=2)
    assert not mine[0][~kept].any() and mine[0][kept].all() and mine[3].isfinite().all()


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_every_row_ignored_and_no_rows(name):
    x, w, bias, _ = make(3, 8, 20, torch.float32)
    x[1] = math.nan
    ignored = torch.full((3,), -100)
    with backend.use_backend(name):
        for n in (3, 0):
            upstream = [torch.ones(n)] * 2
            mine = outputs_and_gradients(fused, x[:n], w, bias, ignored[:n], upstream)
            assert mine[0].shape == mine[1].shape == (n,)
            assert all((t == 0).all() for t in mine)
            (alone, *_) = outputs_and_gradients(
                ops.linear_logprobs, x[:n], w, bias, ignored[:n], upstream
            )
            assert torch.equal(alone, mine[0])


def test_not_finite_stays_in_its_row(isa, dtype):
    x, w, bias, target = make(6, 8, 20, dtype, ignored=0)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    mine = outputs_and_gradients(fused, x, w, bias, target, torch.ones(2, 6))
    for t in (mine[0], mine[1], mine[2][:, 0]):
        assert t.isnan().tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("needed", ["x", "w", "bias"])
def test_only_what_is_needed(isa, needed):
    """Only needed gradients are computed: a frozen head (LoRA), a frozen trunk."""
    x, w, bias, target = make(20, 16, 40, torch.float32)
    whole = outputs_and_gradients(fused, x, w, bias, target, torch.ones(2, 20))
    leaf = {"x": x, "w": w, "bias": bias}[needed].requires_grad_()
    sum(t.sum() for t in fused(x, w, target, linear_bias=bias)).backward()
    torch.testing.assert_close(leaf.grad, whole[2 + ["x", "w", "bias"].index(needed)])


def test_strides_leading_dimensions_and_int32(isa, dtype):
    base, wide = torch.randn(4, 5, 96).to(dtype), torch.randn(33, 96).to(dtype)
    target = torch.randint(0, 33, (4, 5))
    for x, w in ((base[..., :32], wide[:, 8:40]), (base[..., ::2], wide[:, ::2])):
        out = fused(x, w, target.int(), temperature=0.5)
        again = fused(x.contiguous(), w.contiguous(), target, temperature=0.5)
        assert out[0].shape == out[1].shape == (4, 5)
        assert all(torch.equal(a, b) for a, b in zip(out, again))
    x = torch.randn(20, 16).to(dtype)
    w = torch.randn(33, 16).to(dtype)
    strided, target = torch.randn(2, 40)[:, ::2], target.flatten()
    found = outputs_and_gradients(fused, x, w, None, target, strided)
    expected = outputs_and_gradients(fused, x, w, None, target, strided.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_same_bits_on_repeat_and_on_one_and_two_threads(isa):
    arguments = make(70, 130, 600, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(outputs_and_gradients(fused, *arguments, torch.ones(2, 70)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


MEMORY = """
import torch
from fastlm import ops
from peak import growth
n, d, v = 1024, 128, 32768
x, w = torch.randn(n, d).bfloat16().requires_grad_(), torch.randn(v, d).bfloat16().requires_grad_()
t = torch.randint(0, v, (n,))
def run(n):
    torch.stack(ops.linear_logprobs(x[:n], w, t[:n], return_entropy=True)).sum().backward()
    x.grad = w.grad = None
run(32)  # libraries loaded, threads started
print(growth(lambda: run(n)))
"""


def test_logits_are_never_in_memory():
    """1024 x 32768 logits take 64 MiB in bf16 and twice that in float32, and their gradient as much
    again."""
    (grown,) = printed_alone(MEMORY)
    assert grown <= 64


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 80),
    width=st.integers(1, 70),
    classes=st.integers(1, 300),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    on=st.sampled_from([(True, True), (True, False), (False, True)]),
    ignored=st.sampled_from([0.0, 0.5]),
)
def test_any_options_agree_with_the_definition(
    rows, width, classes, bias, softcap, temperature, on, ignored
):
    check(
        *make(rows, width, classes, torch.float32, ignored, bias=bias),
        on=on,
        ulps=32,  # the gradient is a difference of terms several times its size, summed over rows
        softcap=softcap,
        temperature=temperature,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck_of_the_reference(options):
    x, w, bias, target = make(5, 4, 7, torch.float64)
    target[1] = -100
    leaves = [t.requires_grad_() for t in (x, w, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: fused(x, w, target, linear_bias=b, **options), leaves
    )


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias, entropy):
    x, w, b, target = make(6, 8, 32, torch.float32, bias=bias)
    leaves = [t if t is None else t.requires_grad_() for t in (x, w, b)]
    torch.library.opcheck(
        torch.ops.fastlm.linear_logprobs.default, (*leaves, target, entropy, -100, 3.0, 0.7)
    )


@pytest.mark.parametrize("entropy", [False, True])
def test_compiles_without_break_or_recompile(entropy):
    w = torch.randn(40, 16)

    def both(x, w, t):
        out = ops.linear_logprobs(x, w, t, temperature=0.7, return_entropy=entropy)
        return out[0] + out[1] if entropy else out

    assert_compiles_once(
        both,
        [
            (torch.randn(n, 16, requires_grad=True), w.requires_grad_(), torch.arange(n))
            for n in (4, 9, 17)
        ],
    )


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_target_out_of_range(name):
    x, w, _, target = make(5, 4, 8, torch.float32, ignored=0)
    target[0], target[3] = -100, 8
    with (
        backend.use_backend(name),
        pytest.raises(InputError, match=r"target: wanted 0 <= class < 8 .*, got 8 in row 3"),
    ):
        ops.linear_logprobs(x, w, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"linear_weight": torch.randn(8, 5)},
            r"linear_weight: wanted shape \(V, D\).*got \(8, 5\)",
        ),
        ({"linear_bias": torch.ones(8).long()}, "linear_bias: wanted floats .* got torch.int64"),
        (
            {"target": torch.zeros(3, dtype=torch.int64)},
            r"target: wanted shape \(2,\) \(the rows of input\)",
        ),
        ({"target": torch.zeros(2)}, "target: wanted int64 class numbers, got torch.float32"),
        ({"softcap": 0.0}, "softcap: wanted > 0 or None, got 0.0"),
        ({"temperature": 0}, "temperature: wanted a finite number > 0, got 0"),
        ({"temperature": -1.0}, "temperature: wanted a finite number > 0, got -1.0"),
        ({"temperature": math.inf}, "temperature: wanted a finite number > 0, got inf"),
        ({"temperature": math.nan}, "temperature: wanted a finite number > 0, got nan"),
        ({"temperature": None}, "temperature: wanted a number, got None"),
        ({"temperature": "1"}, "temperature: wanted a number, got '1'"),
    ],
)
def test_refusals(change, message):
    arguments = {
        "input": torch.randn(2, 4),
        "linear_weight": torch.randn(8, 4),
        "target": torch.zeros(2, dtype=torch.int64),
        **change,
    }
    with pytest.raises(InputError, match=message):
        ops.linear_logprobs(**arguments)
