"""linear_cross_entropy against F.linear + F.cross_entropy in float64: both paths through the
kernels ("mean" and "sum" with gradients in the forward, "none" and lse with recomputed logits),
every option, chunk and block edges.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from cases.losses import definition as plain
from compiled import assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from peak import printed_alone
from tolerance import ULP, assert_near

from fastlm import InputError, backend, ops
from fastlm.cpu import linear_cross_entropy as cpu
from fastlm.ops import linear_cross_entropy as module_function

MODULE = sys.modules[module_function.__module__]


def naive(x, w, target, *, linear_bias=None, **options):
    return plain(F.linear(x, w, linear_bias), target, **options)


def naive_low(x, w, target, *, linear_bias=None, **options):
    """Compute as torch does in the low precision: logits and their gradient in x's dtype, the loss
    in float32.
    """
    return plain(F.linear(x, w, linear_bias).float(), target, **options)


def outputs_and_gradients(function, x, w, bias, target, upstream, **options):
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (x, w, bias)]
    out = function(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [u.to(o.dtype) for u, o in zip(upstream, out)])
    return [*(o.detach() for o in out), *(t.grad for t in leaves if t is not None)]


def make(rows, width, classes, dtype, ignored=0.25, scale=3.0, bias=True):
    x = torch.randn(rows, width).to(dtype)
    w = (torch.randn(classes, width) * scale / width**0.5).to(dtype)
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < ignored] = -100
    if rows:
        target[0] = classes - 1
    return x, w, torch.randn(classes).to(dtype) if bias else None, target


def largest_term(target, upstream, *, weight=None, reduction="mean", num_items=None):
    """The largest weight of p or 1 in a row's gradient, which is their difference. The gradient may
    be near zero if the target is smoothed or the only class, but keeps the rounding of its terms.
    """
    weights = torch.ones_like(target, dtype=torch.float64)
    if weight is not None:
        weights = weight.double()[target.clamp_min(0)]
    weights = weights[target != -100]
    if not len(weights):
        return 0.0
    items = 1 if reduction != "mean" else num_items or weights.sum().item()
    most = max(weights.max().item(), 1.0 if weight is None else weight.max().item())
    return upstream.abs().max().item() * most / items


def check(x, w, bias, target, *, ulps=2, **options):
    """Compare with float64. ulps: the gradient of a logit is rounded once to x's dtype before the
    matrix products, as in torch, and the exponential that it is computed from once again.
    """
    upstream = [torch.randn(target.shape if options.get("reduction") == "none" else ())]
    upstream += [torch.randn(target.shape)]
    upstream = [u.to(x.device) for u in upstream]
    wide = [t if t is None else t.double() for t in (x, w, bias)]
    mine = outputs_and_gradients(ops.linear_cross_entropy, x, w, bias, target, upstream, **options)
    truth = outputs_and_gradients(naive, *wide, target, upstream, **options)
    low = outputs_and_gradients(naive_low, x, w, bias, target, upstream, **options)
    shared = ("weight", "reduction", "num_items")
    size = largest_term(target, upstream[0], **{k: v for k, v in options.items() if k in shared})
    terms = {"dbias": size}
    if size:
        terms |= {"dx": size * w.abs().max().item(), "dw": size * x.abs().max().item()}
    names = [*["loss", "lse"][: len(mine) - 2 - (bias is not None)], "dx", "dw", "dbias"]
    assert mine[0].dtype == torch.float32
    for name, a, p, t in zip(names, mine, low, truth):
        factor = 3 if name.startswith("d") else 2
        if term := terms.get(name, 0.0):  # added to the truth's scale, which may be 0
            a, p, t = (torch.cat((v.flatten(), v.new_tensor([term]))) for v in (a, p, t))
        assert_near(a, p, t, factor=factor, floor=ulps * ULP[a.dtype], what=f"{name} {options}")


OPTIONS = [
    {},
    {"reduction": "sum", "z_loss": 1e-2},
    {"reduction": "none"},
    {"reduction": "none", "label_smoothing": 0.1, "z_loss": 1e-2},
    {"label_smoothing": 0.1, "num_items": 77},
    {"softcap": 5.0, "logit_scale": 0.7},
    {"softcap": 5.0, "logit_scale": 0.7, "return_lse": True},
    {"softcap": 5.0, "label_smoothing": 0.3, "reduction": "sum"},
]


@pytest.fixture(autouse=True)
def gradients_in_the_forward(monkeypatch):
    """Compute gradients in the forward, as for many rows. test_few_rows and `small` undo this."""
    monkeypatch.setattr(MODULE, "_FEW_ROWS", 0)
    monkeypatch.setattr(MODULE, "_SMALL", 0)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(MODULE, "_FEW_ROWS", 64)
    monkeypatch.setattr(MODULE, "_SMALL", 1 << 20)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
# ragged everywhere; sizes near one; more rows than a chunk is wide and a vocabulary of two blocks
# and one class
@pytest.mark.parametrize("shape", [(37, 50, 123), (2, 1, 3), (70, 64, 513)], ids=str)
def test_matches_float64(isa, dtype, shape, options, weighted):
    weight = torch.rand(shape[2]) if weighted else None
    check(*make(*shape, dtype), weight=weight, **options)


@pytest.mark.parametrize("shape", [(252, 507, 123), (5, 64, 50257), (530, 40, 700)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_larger_shapes(isa, dtype, shape, reduction):
    if isa in ("scalar", "amx_emulated"):
        shape = (min(shape[0], 70), min(shape[1], 96), min(shape[2], 1030))  # slow by nature
    check(*make(*shape, dtype), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_many_chunks_are_one(isa, dtype, reduction, monkeypatch):
    """With 32 rows per chunk the gradients of the weights are sums over chunks, of which the last
    is ragged.
    """
    monkeypatch.setattr(cpu, "_MOST_ROWS", 32)
    x, w, bias, target = make(107, 48, 300, dtype)
    check(x, w, bias, target, reduction=reduction, z_loss=0.01)
    check(x, w, None, target.clamp_min(0), reduction=reduction)


def test_ways_agree(isa, dtype):
    """Gradients computed in the forward, and gradients of recomputed logits."""
    arguments = make(64, 32, 90, dtype)
    first = outputs_and_gradients(ops.linear_cross_entropy, *arguments, [torch.tensor(0.7)])
    x, w, bias, target = arguments
    second = outputs_and_gradients(
        lambda *a, **k: ops.linear_cross_entropy(*a, return_lse=True, **k)[0],
        x,
        w,
        bias,
        target,
        [torch.tensor(0.7)],
    )
    for a, b in zip(first, second):
        torch.testing.assert_close(
            a, b, rtol=4 * ULP[a.dtype], atol=4 * ULP[dtype] * b.abs().max().item()
        )


def half_gradients(function, x, w, target, **options):
    """Mixed precision: scale the loss by GradScaler's first factor, divide the gradients by it."""
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    (function(*leaves, target, **options) * 2.0**16).backward()
    return [t.grad.double() / 2**16 for t in leaves]


def check_float16_under_a_grad_scaler(device, rows, width, classes, **options):
    """Compare with the error of unfused float16, where the factor applies from the start."""
    x, w, _, target = make(rows, width, classes, torch.float16, scale=1.0)
    x, w, target = (t.to(device) for t in (x, w, target))
    mine = half_gradients(ops.linear_cross_entropy, x, w, target, **options)
    low = half_gradients(naive_low, x, w, target, **options)
    truth = half_gradients(naive, x.double(), w.double(), target, **options)
    for name, a, p, t in zip(("dx", "dw"), mine, low, truth):
        assert (a - t).norm() <= 2 * (p - t).norm(), (name, options)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 1.0}, {"logit_scale": 0.01}, {"z_loss": 1.0}], ids=str
)
def test_float16_under_a_grad_scaler(isa, options):
    check_float16_under_a_grad_scaler("cpu", 4096, 512, 70, **options)


@pytest.mark.parametrize("rows", [1, 33, 64])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "reduction": "sum"}], ids=str)
def test_few_rows(isa, dtype, rows, options, monkeypatch):
    """The gradients are computed in the backward, the weight's in its own dtype."""
    monkeypatch.setattr(MODULE, "_FEW_ROWS", 64)
    check(*make(rows, 50, 300, dtype), **options)
    check(*make(rows, 16, 300, dtype, bias=False, ignored=0), **options)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"reduction": "none"}], ids=str)
def test_scores_far_above_the_first(isa, dtype, options):
    """e^(z - base) overflows a float if the base is one of the first classes' scores."""
    x, w, bias, target = make(40, 32, 700, dtype)
    w[:64] /= 64
    w[64:] *= 8
    assert (F.linear(x, w).float().amax(1) - F.linear(x, w[:64]).float().amax(1)).max() > 50
    check(x, w, bias, target, **options)


@pytest.mark.parametrize("case", ["peaked", "all negative", "common offset"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hard_logits(isa, dtype, case, reduction):
    x, w, bias, target = make(40, 32, 700, dtype)
    if case == "peaked":
        x = x * 8
    elif (
        case == "all negative"
    ):  # the largest logit is far below 0: a maximum that starts at 0 gives lse = -inf
        bias = bias - 200
    else:  # 1e4 in every logit, representable in all dtypes
        bias = torch.full_like(bias, 8192.0)
    check(x, w, bias, target, reduction=reduction)


def test_not_finite_stays_in_its_row(isa, dtype):
    x, w, bias, target = make(6, 8, 20, dtype, ignored=0)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    for reduction in ("none", "sum"):
        upstream = [torch.ones(6 if reduction == "none" else ())]
        mine = outputs_and_gradients(
            ops.linear_cross_entropy, x, w, bias, target, upstream, reduction=reduction
        )
        rows = mine[1].isnan().all(1)
        assert rows.tolist() == [False, True, False, True, False, False]
        assert mine[0].isnan().sum() == (2 if reduction == "none" else 1)
        assert mine[2].isnan().all() and mine[3].isnan().all()
    ignored = target.clone()
    ignored[[1, 3]] = -100
    mine = outputs_and_gradients(
        ops.linear_cross_entropy, x, w, bias, ignored, [torch.ones(())], reduction="sum"
    )
    assert all(t.isfinite().all() for t in mine)  # ignored rows are left out entirely


def test_every_row_ignored_and_no_rows(isa):
    x, w, bias, _ = make(3, 8, 20, torch.float32)
    ignored = torch.full((3,), -100)
    for options, wanted in (
        ({}, float("nan")),
        ({"num_items": 4}, 0.0),
        ({"reduction": "sum"}, 0.0),
    ):
        loss, *gradients = outputs_and_gradients(
            ops.linear_cross_entropy, x, w, bias, ignored, [torch.ones(())], **options
        )
        torch.testing.assert_close(loss, torch.tensor(wanted), equal_nan=True)
        assert all((g == 0).all() for g in gradients)
    for reduction in ("sum", "none"):
        upstream = [torch.ones(0 if reduction == "none" else ())]
        loss, *gradients = outputs_and_gradients(
            ops.linear_cross_entropy, x[:0], w, bias, ignored[:0], upstream, reduction=reduction
        )
        assert loss.sum() == 0 and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("needed", ["x", "w", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_needed(isa, needed, reduction):
    """Only needed gradients are computed: a frozen head (LoRA), a frozen trunk."""
    x, w, bias, target = make(20, 16, 40, torch.float32)
    whole = outputs_and_gradients(
        ops.linear_cross_entropy,
        x,
        w,
        bias,
        target,
        [torch.ones(20)[: 20 if reduction == "none" else 1].squeeze()],
        reduction=reduction,
    )
    leaf = {"x": x, "w": w, "bias": bias}[needed].requires_grad_()
    ops.linear_cross_entropy(x, w, target, linear_bias=bias, reduction=reduction).sum().backward()
    torch.testing.assert_close(leaf.grad, whole[1 + ["x", "w", "bias"].index(needed)])


def test_strides_leading_dimensions_and_tied_weight(isa, dtype):
    base, wide = torch.randn(4, 5, 96).to(dtype), torch.randn(33, 96).to(dtype)
    target = torch.randint(0, 33, (4, 5))
    for x, w in ((base[..., :32], wide[:, 8:40]), (base[..., ::2], wide[:, ::2])):
        out = ops.linear_cross_entropy(x, w, target, reduction="none")
        assert out.shape == (4, 5)
        assert torch.equal(
            out, ops.linear_cross_entropy(x.contiguous(), w.contiguous(), target, reduction="none")
        )
    w = torch.randn(33, 16, requires_grad=True)
    ops.linear_cross_entropy(w[target], w, target).backward()
    tied = w.grad.clone()
    w.grad = None
    F.cross_entropy(F.linear(w[target], w).flatten(0, 1), target.flatten()).backward()
    torch.testing.assert_close(tied, w.grad)


def test_backward_twice_and_no_grad():
    x, w, _, target = make(9, 8, 20, torch.float32)
    x.requires_grad_()
    loss = ops.linear_cross_entropy(x, w, target)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    with torch.no_grad():
        torch.testing.assert_close(ops.linear_cross_entropy(x, w, target), loss.detach())
    with torch.inference_mode():
        torch.testing.assert_close(ops.linear_cross_entropy(x, w, target), loss.detach())


def test_same_bits_on_repeat_and_on_one_and_two_threads(isa):
    arguments = make(70, 130, 600, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(
                outputs_and_gradients(ops.linear_cross_entropy, *arguments, [torch.ones(())])
                + outputs_and_gradients(
                    ops.linear_cross_entropy, *arguments, [torch.ones(70)], reduction="none"
                )
            )
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
ops.linear_cross_entropy(x[:32], w, t[:32]).backward()  # libraries loaded, threads started
x.grad = w.grad = None
print(growth(lambda: ops.linear_cross_entropy(x, w, t).backward()))
"""


REFERENCE_MEMORY = """
import torch
from fastlm import ops, backend
from peak import growth
n, d, v = 2048, 16, 32768
x, w = (torch.randn(s, d, dtype=torch.float64, requires_grad=True) for s in (n, v))
z = torch.randn(n, v, requires_grad=True)  # 256 MiB, with its gradient twice that
t = torch.randint(0, v, (n,))
with backend.use_backend("reference"):
    print(growth(lambda: ops.linear_cross_entropy(x, w, t, label_smoothing=0.1).backward()))
    print(growth(lambda: ops.cross_entropy(z, t, label_smoothing=0.1).backward()))
"""


@pytest.mark.slow
def test_reference_is_bounded_by_its_blocks():
    """2048 x 32768 logits in float64 take 512 MiB, and a loss creates half a dozen such tensors. Of
    float32 logits the gradient takes 256, six temporaries of a block 96.
    """
    linear, logits = printed_alone(REFERENCE_MEMORY)
    assert linear <= 320
    assert logits <= 256 + 96


def test_logits_are_never_in_memory():
    """1024 x 32768 logits take 64 MiB in bf16 and twice that in float32, and their gradient as much
    again. Allowed are 32 MiB of exponentials, the float32 gradient (16) and the gradients (8).
    """
    (grown,) = printed_alone(MEMORY)
    assert grown <= 64


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 80),
    width=st.integers(1, 70),
    classes=st.integers(1, 300),
    bias=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    softcap=st.sampled_from([None, 2.0]),
    reduction=st.sampled_from(["none", "sum"]),
    return_lse=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5]),
)
def test_any_options_agree_with_the_definition(
    rows, width, classes, bias, weighted, smoothing, z_loss, softcap, reduction, return_lse, ignored
):
    check(
        *make(rows, width, classes, torch.float32, ignored, bias=bias),
        ulps=32,  # the gradient is a difference of terms several times its size, summed over rows
        weight=torch.rand(classes) if weighted else None,
        label_smoothing=smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
        return_lse=return_lse,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck_of_the_reference(options):
    x, w, bias, target = make(5, 4, 7, torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: ops.linear_cross_entropy(
            x, w, target, linear_bias=b, weight=torch.arange(7.0), **options
        ),
        leaves,
    )


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    x, w, b, target = make(6, 8, 32, torch.float32, bias=bias)
    leaves = [t if t is None else t.requires_grad_() for t in (x, w, b)]
    operators = torch.ops.fastlm
    torch.library.opcheck(
        operators.linear_cross_entropy.default,
        (*leaves, target, torch.rand(32), True, -100, 3.0, 1.0),
    )
    torch.library.opcheck(
        operators.linear_cross_entropy_loss.default,
        (*leaves, target, None, torch.rand(6), None, torch.rand(6), -100, None, 1.0, True, True),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_break_or_recompile(reduction):
    w = torch.randn(40, 16)
    assert_compiles_once(
        lambda x, w, t: ops.linear_cross_entropy(x, w, t, z_loss=0.1, reduction=reduction),
        [
            (torch.randn(n, 16, requires_grad=True), w.requires_grad_(), torch.arange(n))
            for n in (4, 9, 17)
        ],
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 17, 3), (7, 40, 123)], ids=str)
def test_small_products_are_the_definition(dtype, shape, options, weighted, small, monkeypatch):
    """Both paths meet the same bound. The calls of the kernels show which one runs."""
    weight = torch.rand(shape[2]) if weighted else None
    tensors = make(*shape, dtype, ignored=0)
    called = []
    for name in ("_forward", "_loss"):
        run = getattr(MODULE, name)
        monkeypatch.setattr(MODULE, name, lambda *a, run=run: called.append(1) or run(*a))
    check(*tensors, weight=weight, **options)
    assert not called
    with torch.autocast("cpu", dtype=torch.bfloat16):  # F.linear of floats would follow it
        x, w, bias, target = tensors
        out = ops.linear_cross_entropy(x, w, target, linear_bias=bias)
    low = ops.linear_cross_entropy(x.bfloat16(), w.bfloat16(), target, linear_bias=bias)
    assert torch.equal(out, low) and not called


def test_small_products_leave_ignored_rows_out(small):
    x, w, _, target = make(3, 8, 5, torch.float32, ignored=0, bias=False)
    x[1], target[1] = float("nan"), -100
    x.requires_grad_(), w.requires_grad_()
    dx, dw = torch.autograd.grad(ops.linear_cross_entropy(x, w, target), (x, w))
    assert dw.isfinite().all() and not dx[1].any() and dx[0].any()


def test_small_products_same_bits_on_one_and_two_threads(small, monkeypatch):
    """Everything but the product of logits, which is torch's: on some machines its bits depend on
    the number of threads. Here it is computed in float64 and rounded.
    """

    def logits(x, w, bias):
        return F.linear(x.double(), w.double(), bias.double()).float()

    monkeypatch.setattr(MODULE, "_float32_logits", logits)
    threads, results = torch.get_num_threads(), []
    x, w, bias, target = make(8, 64, 2000, torch.float32, ignored=0)
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(
                outputs_and_gradients(
                    ops.linear_cross_entropy, x, w, bias, target, [torch.ones(())]
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_target_out_of_range(name):
    x, w, _, target = make(5, 4, 8, torch.float32, ignored=0)
    target[3] = 8
    for grad in (False, True):
        with (
            backend.use_backend(name),
            pytest.raises(InputError, match=r"target: wanted 0 <= class < 8 .*, got 8 in row 3"),
        ):
            ops.linear_cross_entropy(x.requires_grad_(grad), w, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"linear_weight": torch.randn(8, 5)},
            r"linear_weight: wanted shape \(V, D\).*got \(8, 5\)",
        ),
        (
            {"linear_weight": torch.randn(8, 4).half()},
            "wanted torch.float32 on cpu as input, got torch.float16",
        ),
        (
            {"linear_bias": torch.randn(7)},
            r"linear_bias: wanted floats of shape \(8,\) on cpu, got torch.float32 \(7,\)",
        ),
        ({"linear_bias": torch.ones(8).long()}, "linear_bias: wanted floats .* got torch.int64"),
        (
            {"input": torch.randn(3, 0), "linear_weight": torch.randn(8, 0)},
            r"input: wanted at least one feature, got shape \(3, 0\)",
        ),
        (
            {"target": torch.zeros(3, dtype=torch.int64)},
            r"target: wanted shape \(2,\) \(the rows of input\)",
        ),
        ({"reduction": "avg"}, "reduction: wanted none, mean or sum"),
    ],
)  # fmt: skip
def test_refusals(change, message):
    arguments = {
        "input": torch.randn(2, 4),
        "linear_weight": torch.randn(8, 4),
        "target": torch.zeros(2, dtype=torch.int64),
        **change,
    }
    with pytest.raises(InputError, match=message):
        ops.linear_cross_entropy(**arguments)
