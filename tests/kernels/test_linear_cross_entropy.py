"""Tests of linear_cross_entropy beyond its table of cases (cases/linear_cross_entropy.py)."""

import pytest
import torch
import torch.nn.functional as F
from cases import linear_cross_entropy as table
from cases.base import assert_same, check, results, run
from cases.losses import definition
from contract import *  # noqa: F403
from fuzz_cases import threads
from on_kernels import on
from peak import run_script
from tensor_peak import TensorPeak

from fastlm import InputError, backend, ops
from fastlm.ops import linear_cross_entropy as function

MODULE = function.__globals__


def make(rows, width, classes, dtype=torch.float32, ignored=0.25, device="cpu", spread=3.0):
    x, w, bias = torch.randn(rows, width), torch.randn(classes, width), torch.randn(classes)
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < ignored] = -100
    w = w * spread / width**0.5
    return *(t.to(device, dtype) for t in (x, w, bias)), target.to(device)


def loss(x, w, bias, target, **options):
    return ops.linear_cross_entropy(x, w, target, linear_bias=bias, **options)


def both(x, w, bias, target, **options):
    """Outputs and gradients for upstream gradients of 1."""
    upstream = torch.ones(target.shape if options.get("reduction") == "none" else ())
    upstream = [upstream.to(x.device)]
    return run(lambda x, w, b: loss(x, w, b, target, **options), [x, w, bias], upstream)[0]


@pytest.fixture(params=["forward", "recomputed"])
def gradients(request):
    """Return the gradients of both paths."""
    with table.gradient_method(request.param):
        yield


@on("cpu")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_many_chunks_are_one(op, kernel, dtype, reduction, monkeypatch):
    """With 32 rows per chunk the gradients of the weights are sums over chunks, of which the last
    is ragged.
    """
    from fastlm.cpu import linear_cross_entropy as cpu

    monkeypatch.setattr(cpu, "_MAX_CHUNK_ROWS", 32)
    for bias, ignored in ((True, 0.25), (False, 0.0)):
        case = table.case(
            107, 48, 300, bias=bias, ignored=ignored, reduction=reduction, z_loss=0.01
        )
        check(op.build_for(case, dtype, "cpu"))


def test_ways_agree(kernel, dtype):
    """Gradients computed in the forward equal gradients of recomputed logits."""
    arguments = make(29, 32, 90, dtype, device=kernel.device)
    with table.gradient_method("forward"):
        first = both(*arguments)
    with table.gradient_method("recomputed"):
        second = both(*arguments)
    eps = torch.finfo(dtype).eps
    for a, b in zip(first, second):
        near = 4 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=near, atol=4 * eps * b.abs().max().item())


def half_gradients(function, x, w, target, **options):
    """Mixed precision: scale the loss by GradScaler's first factor, divide the gradients by it."""
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    (function(*leaves, target, **options) * 2.0**16).backward()
    return [t.grad.double() / 2**16 for t in leaves]


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 1.0}, {"logit_scale": 0.01}, {"z_loss": 1.0}], ids=str
)
def test_float16_under_a_grad_scaler(kernel, options):
    """Compare with the error of unfused float16, where the factor applies from the start."""
    shape = (4096, 512, 70) if kernel.language == "cpu" else (128, 128, 500)
    x, w, _, target = make(*shape, torch.float16, device=kernel.device, spread=1.0)

    def plain(x, w, target, **options):
        return definition(F.linear(x, w), target, **options)

    with table.gradient_method("forward"):
        mine = half_gradients(ops.linear_cross_entropy, x, w, target, **options)
    low = half_gradients(plain, x, w, target, **options)
    truth = half_gradients(plain, x.double(), w.double(), target, **options)
    for name, a, p, t in zip(("dx", "dw"), mine, low, truth):
        assert (a - t).norm() <= 2 * (p - t).norm(), (name, options)


def test_not_finite_stays_in_its_row(kernel, gradients, dtype):
    x, w, bias, target = make(6, 8, 20, dtype, ignored=0, device=kernel.device)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    for reduction in ("none", "sum"):
        mine = both(x, w, bias, target, reduction=reduction)
        assert mine[1].isnan().all(1).tolist() == [False, True, False, True, False, False]
        assert mine[0].isnan().sum() == (2 if reduction == "none" else 1)
        assert mine[2].isnan().all() and mine[3].isnan().all()
    target[[1, 3]] = -100
    mine = both(x, w, bias, target, reduction="sum")
    assert all(t.isfinite().all() for t in mine)  # ignored rows are left out entirely


def test_every_row_ignored(kernel, gradients):
    x, w, bias, target = make(3, 8, 20, ignored=0, device=kernel.device)
    loss, *actual = both(x, w, bias, torch.full_like(target, -100))
    assert loss.isnan() and all((g == 0).all() for g in actual)


@on("triton")
def test_class_that_does_not_exist(kernel, gradients):
    x, w, bias, target = make(6, 8, 20, ignored=0, device=kernel.device)
    target[3] = 20
    assert loss(x, w, bias, target).isnan()


@pytest.mark.parametrize("needed", ["x", "w", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_needed(kernel, gradients, needed, reduction):
    """Only needed gradients are computed: a frozen head (LoRA), a frozen trunk."""
    x, w, bias, target = make(20, 16, 40, device=kernel.device)
    expected = both(x, w, bias, target, reduction=reduction)
    leaf = {"x": x, "w": w, "bias": bias}[needed].requires_grad_()
    loss(x, w, bias, target, reduction=reduction).sum().backward()
    torch.testing.assert_close(leaf.grad, expected[1 + ["x", "w", "bias"].index(needed)])


def test_leading_dimensions_other_dtypes_and_tied_weight(kernel, dtype):
    x, w, _, _ = make(20, 32, 33, dtype, device=kernel.device)
    bias, target = torch.randn(33, device=kernel.device), torch.randint(0, 33, (4, 5))
    target = target.to(kernel.device)
    mine = both(x, w, bias, target.flatten().int())
    assert mine[1].dtype == mine[2].dtype == dtype and mine[3].dtype == torch.float32
    rows = loss(x.view(4, 5, 32), w, bias, target, reduction="none")
    assert torch.equal(rows.flatten(), loss(x, w, bias, target.flatten(), reduction="none"))
    w = torch.randn(33, 16, device=kernel.device, requires_grad=True)
    ops.linear_cross_entropy(w[target], w, target).backward()
    tied, w.grad = w.grad, None
    F.cross_entropy(F.linear(w[target], w).flatten(0, 1), target.flatten()).backward()
    torch.testing.assert_close(tied, w.grad)


def test_backward_twice_and_no_grad():
    x, w, _, target = make(9, 8, 20)
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
    linear, logits = run_script(REFERENCE_MEMORY)
    assert linear <= 320
    assert logits <= 256 + 96


def test_logits_are_never_in_memory():
    """1024 x 32768 logits take 64 MiB in bf16 and twice that in float32, and their gradient as much
    again. Allowed are 32 MiB of exponentials, the float32 gradient (16) and the gradients (8).
    """
    (grown,) = run_script(MEMORY)
    assert grown <= 64


@pytest.mark.parametrize("name", ["one row", "small, options"])
def test_small_products_are_the_definition(op, dtype, name, monkeypatch):
    """The kernels do not run. `small` rows of the table compare with float64."""
    for kernel in ("_forward", "_loss"):
        monkeypatch.setitem(MODULE, kernel, None)
    call = op.build_for(op.rows[name].case | {"method": "small"}, dtype, "cpu")
    results(call, call.leaves)
    x, w, bias, target = make(7, 40, 123, dtype, ignored=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # F.linear of floats would follow it
        out = loss(x, w, bias, target)
    assert torch.equal(out, loss(x.bfloat16(), w.bfloat16(), bias, target))


def test_small_products_leave_ignored_rows_out():
    x, w, _, target = make(3, 8, 5, ignored=0)
    x[1], target[1] = float("nan"), -100
    x.requires_grad_(), w.requires_grad_()
    dx, dw = torch.autograd.grad(ops.linear_cross_entropy(x, w, target), (x, w))
    assert dw.isfinite().all() and not dx[1].any() and dx[0].any()


def test_small_products_same_bits_on_one_and_two_threads(monkeypatch):
    """Everything but the product of logits, which is torch's: on some machines its bits depend on
    the number of threads. Here it is computed in float64 and rounded.
    """

    def logits(x, w, bias):
        return F.linear(x.double(), w.double(), bias.double()).float()

    monkeypatch.setitem(MODULE, "_float32_logits", logits)
    arguments, first = make(8, 64, 2000, ignored=0), None
    for n in (1, 2, 2):
        with threads(n):
            actual = both(*arguments)
        first = first or actual
        assert_same(first, actual, f"{n} threads")


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_target_out_of_range(name):
    x, w, _, target = make(5, 4, 8, ignored=0)
    target[3] = 8
    for grad in (False, True):
        with (
            backend.use_backend(name),
            pytest.raises(InputError, match=r"target: expected 0 <= class < 8 .*, got 8 in row 3"),
        ):
            ops.linear_cross_entropy(x.requires_grad_(grad), w, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"linear_weight": torch.randn(8, 5)},
            r"linear_weight: expected shape \(V, K\).*got \(8, 5\)",
        ),
        (
            {"linear_weight": torch.randn(8, 4).half()},
            "expected torch.float32 on cpu as input, got torch.float16",
        ),
        (
            {"linear_bias": torch.randn(7)},
            r"linear_bias: expected floats of shape \(8,\) on cpu, got torch.float32 \(7,\)",
        ),
        ({"linear_bias": torch.ones(8).long()}, "linear_bias: expected floats .* got torch.int64"),
        (
            {"input": torch.randn(3, 0), "linear_weight": torch.randn(8, 0)},
            r"input: expected at least one feature, got shape \(3, 0\)",
        ),
        (
            {"target": torch.zeros(3, dtype=torch.int64)},
            r"target: expected shape \(2,\) \(the rows of input\)",
        ),
        ({"reduction": "avg"}, "reduction: expected none, mean or sum"),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [512, 5120])
def test_memory_is_an_eighth(dtype, rows, monkeypatch):
    """An eighth of the logits alone, by the formula at the top of the kernel's file. Counted, on
    tensors without memory: what the host functions create in addition to their results and to
    tensors of (N, D) and (V, D).
    """
    from fastlm.kernels import linear_cross_entropy as module

    monkeypatch.setattr(module, "row_statistics", lambda *_: None)
    monkeypatch.setattr(module, "row_gradients", lambda *_: None)
    width, classes = 8, 4096
    meta = {"device": "meta"}
    x, w = (torch.empty(n, width, dtype=dtype, **meta) for n in (rows, classes))
    target, on_nll = torch.empty(rows, dtype=torch.int64, **meta), torch.empty(rows, **meta)
    with TensorPeak() as fused:
        module.linear_cross_entropy_loss(
            x, w, None, target, None, on_nll, None, None, -100, None, 1.0, True, True
        )
    x, w = x.requires_grad_(), w.requires_grad_()
    with TensorPeak() as plain:
        F.cross_entropy(F.linear(x, w).float(), target).backward()
    assert plain.peak_bytes >= 12 * rows * classes
    other_bytes = 4 * (rows + classes) * width * 4 + 10 * rows * 4
    assert fused.peak_bytes <= rows * classes * 12 / 8 + other_bytes
    assert fused.peak_bytes >= 128 * classes * 4  # something was counted
