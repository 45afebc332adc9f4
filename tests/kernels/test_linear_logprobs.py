"""Tests of linear_logprobs beyond its table of cases (cases/linear_logprobs.py)."""

import math

import pytest
import torch
from cases import linear_logprobs as table
from cases.base import assert_same, check, name_parameters, run
from contract import *  # noqa: F403
from on_kernels import on
from peak import run_script
from test_linear_cross_entropy import make

from fastlm import InputError, backend, ops


def fused(*arguments, **options):
    return ops.linear_logprobs(*arguments, return_entropy=True, **options)


def both(x, w, bias, target, upstream, function=fused, **options):
    """Return outputs and gradients."""
    upstream = [u.to(x.device) for u in upstream]
    return run(
        lambda x, w, bias=None: function(x, w, target, linear_bias=bias, **options),
        [x, w, *([] if bias is None else [bias])],
        upstream,
    )[0]


@on("cpu")
def test_one_is_minus_cross_entropy(kernel, dtype):
    """The bits of linear_cross_entropy; 0 and -0 are the same for an ignored row."""
    arguments, upstream = make(67, 40, 300, dtype), torch.randn(1, 67)
    mine = both(*arguments, upstream, ops.linear_logprobs)
    loss = both(*arguments, -upstream, ops.linear_cross_entropy, reduction="none")
    assert_same([0.0 - loss[0], *loss[1:]], mine, "cross entropy")


@pytest.mark.parametrize("used", [0, 1], ids=["logprob", "entropy"])
def test_gradient_of_one_output(op, kernel, dtype, used):
    """Both outputs are computed, and one has an upstream gradient."""
    call = op.build_for(table.case(11, 40, 83), dtype, kernel.language, kernel.device)

    def terms(*tensors):
        *leaves, upstream = tensors
        return call.terms(*leaves, *(upstream if i == used else 0 * upstream for i in (0, 1)))

    single_output = call._replace(
        function=name_parameters(
            lambda *leaves: call.function(*leaves)[used], ("x", "w", "target", "bias")
        ),
        plain=lambda *leaves: call.plain(*leaves)[used],
        terms=terms,
        outputs=call.outputs[used : used + 1],
    )
    check(single_output)


@on("cpu")
def test_many_chunks_are_one(op, kernel, dtype, monkeypatch):
    """With 32 rows per chunk the gradients of the weights are sums over chunks, of which the last
    is ragged.
    """
    from fastlm.cpu import linear_cross_entropy as cpu

    monkeypatch.setattr(cpu, "_MAX_CHUNK_ROWS", 32)
    for bias, ignored in ((True, 0.25), (False, 0.0)):
        check(op.build_for(table.case(107, 48, 300, bias=bias, ignored=ignored), dtype, "cpu"))


def test_equal_logits(kernel, dtype):
    x, w, bias, target = make(9, 32, 700, dtype, ignored=0, device=kernel.device)
    _, entropy = fused(x * 0, w, target, linear_bias=bias * 0)
    torch.testing.assert_close(entropy.cpu(), torch.full((9,), math.log(700)))


def test_masked_classes(op, kernel, dtype):
    """A bias of -inf: the class has probability 0, and 0 * log 0 is 0. Results are those of the
    other classes alone.
    """
    call = op.build_for(table.case(9, 32, 199, ignored=0.0), dtype, kernel.language, kernel.device)
    classes_left = torch.tensor([i for i in range(100, 300) if i != 257], device=kernel.device)
    masked = torch.randn(300, 32, device=kernel.device, requires_grad=True)
    of_masked = torch.full((300,), -math.inf, device=kernel.device, requires_grad=True)

    def function(x, w, target, bias):
        w = masked.to(w.dtype).index_copy(0, classes_left, w)
        bias = of_masked.to(bias.dtype).index_copy(0, classes_left, bias)
        return call.function(x, w, classes_left[target], bias)

    check(call._replace(function=function))
    x, w, target, bias = call.leaves
    sum(t.sum() for t in function(x, w, target, bias)).backward()
    for t in (masked, of_masked):
        assert t.grad is not None and not t.grad.any()
    single = torch.full_like(bias, -math.inf)
    single[7] = 0
    for t in fused(x, w, torch.full_like(target, 7), linear_bias=single):
        assert (t == 0).all()


def test_ignored_rows_are_not_read(kernel, dtype):
    x, w, bias, target = make(14, 32, 300, dtype, ignored=0, device=kernel.device)
    target[::3] = -100
    valid = target != -100
    x[::6], x[3::6] = math.nan, math.inf
    upstream = torch.randn(2, 14, device=kernel.device)
    upstream[:, ::3] = math.nan
    mine = both(x, w, bias, target, upstream)
    expected = both(x[valid], w, bias, target[valid], upstream[:, valid])
    assert not any(t[~valid].any() for t in mine[:3])
    actual = [t[valid] for t in mine[:3]] + mine[3:]
    if kernel.language == "cpu":
        assert_same(expected, actual, "the other rows")
    else:  # other products of torch's
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b)
    another = target.masked_fill(~valid, 2).masked_fill(target == 2, 3)
    mine = both(x, w, bias, another, upstream, ignore_index=2)
    assert not mine[0][~valid].any() and mine[0][valid].all() and mine[3].isfinite().all()


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_rows_of_nan_that_are_all_ignored(name):
    x, w, bias, _ = make(3, 8, 20)
    x[1] = math.nan
    ignored = torch.full((3,), -100)
    with backend.use_backend(name):
        mine = both(x, w, bias, ignored, torch.ones(2, 3))
        assert all((t == 0).all() for t in mine)


def test_not_finite_stays_in_its_row(kernel, dtype):
    x, w, bias, target = make(6, 8, 20, dtype, ignored=0, device=kernel.device)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    mine = both(x, w, bias, target, torch.ones(2, 6))
    for t in (mine[0], mine[1], mine[2][:, 0]):
        assert t.isnan().tolist() == [False, True, False, True, False, False]


@on("triton")
def test_class_that_does_not_exist(kernel):
    x, w, _, target = make(6, 8, 20, ignored=0, device=kernel.device)
    target[3] = 20
    assert fused(x, w, target)[0].isnan().tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("needed", ["x", "w", "bias"])
def test_only_what_is_needed(kernel, needed):
    """Only needed gradients are computed: a frozen head (LoRA), a frozen trunk."""
    x, w, bias, target = make(20, 16, 40, device=kernel.device)
    expected = both(x, w, bias, target, torch.ones(2, 20))
    leaf = {"x": x, "w": w, "bias": bias}[needed].requires_grad_()
    sum(t.sum() for t in fused(x, w, target, linear_bias=bias)).backward()
    torch.testing.assert_close(leaf.grad, expected[2 + ["x", "w", "bias"].index(needed)])


def test_leading_dimensions_and_int32(kernel, dtype):
    x, w, _, _ = make(20, 32, 33, dtype, device=kernel.device)
    target = torch.randint(0, 33, (4, 5)).to(kernel.device)
    out = fused(x.view(4, 5, 32), w, target.int(), temperature=0.5)
    flat = fused(x, w, target.flatten(), temperature=0.5)
    assert out[0].shape == out[1].shape == (4, 5)
    assert_same(flat, [t.flatten() for t in out], "flat")


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
    again.
    """
    (grown,) = run_script(MEMORY)
    assert grown <= 64


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_target_out_of_range(name):
    x, w, _, target = make(5, 4, 8, ignored=0)
    target[0], target[3] = -100, 8
    with (
        backend.use_backend(name),
        pytest.raises(InputError, match=r"target: expected 0 <= class < 8 .*, got 8 in row 3"),
    ):
        ops.linear_logprobs(x, w, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"linear_weight": torch.randn(8, 5)},
            r"linear_weight: expected shape \(V, K\).*got \(8, 5\)",
        ),
        ({"linear_bias": torch.ones(8).long()}, "linear_bias: expected floats .* got torch.int64"),
        (
            {"target": torch.zeros(3, dtype=torch.int64)},
            r"target: expected shape \(2,\) \(the rows of input\)",
        ),
        ({"target": torch.zeros(2)}, "target: expected int64 class numbers, got torch.float32"),
        ({"softcap": 0.0}, "softcap: expected > 0 or None, got 0.0"),
        ({"temperature": 0}, "temperature: expected a finite number > 0, got 0"),
        ({"temperature": -1.0}, "temperature: expected a finite number > 0, got -1.0"),
        ({"temperature": math.inf}, "temperature: expected a finite number > 0, got inf"),
        ({"temperature": math.nan}, "temperature: expected a finite number > 0, got nan"),
        ({"temperature": None}, "temperature: expected a number, got None"),
        ({"temperature": "1"}, "temperature: expected a number, got '1'"),
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
