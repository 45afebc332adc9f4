"""Tests of linear_distillation beyond its table of cases (cases/linear_distillation.py)."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import linear_distillation as table
from cases.base import assert_same, check, run
from contract import *  # noqa: F403
from on_kernels import on
from peak import run_script
from tensor_peak import TensorPeak

from fastlm import InputError, backend, ops

each_kind = pytest.mark.parametrize("kind", table.KINDS)


def make(rows, widths, classes, dtype=torch.float32, spread=2.0, device="cpu"):
    """student, student_weight, teacher, teacher_weight; widths: of the student, of the teacher."""
    tensors = []
    for width in widths:
        x, w = torch.randn(rows, width), torch.randn(classes, width) * spread / width**0.5
        tensors += [x.to(device, dtype), w.to(device, dtype)]
    return tensors


def both(tensors, function=ops.linear_distillation, upstream=1.3, **options):
    """Return the loss, and the gradients of student and student_weight."""
    teacher = [t.detach() for t in tensors[2:]]
    upstream = [torch.tensor(upstream, device=tensors[0].device)]
    return run(lambda x, w: function(x, w, *teacher, **options), tensors[:2], upstream)[0]


@on("cpu")
@each_kind
def test_many_chunks_are_one(op, kernel, dtype, kind, monkeypatch):
    """Chunks of 32 rows, of which the last is ragged: the weight's gradient is a sum over them."""
    from fastlm.cpu import linear_distillation as cpu

    monkeypatch.setattr(cpu, "_MAX_CHUNK_ROWS", 32)
    check(op.build_for(table.case(107, 48, 20, 300, left_out=0.1, kind=kind), dtype, "cpu"))


@each_kind
def test_rows_left_out_are_never_read(kernel, dtype, kind):
    rows, classes = (40, 300) if kernel.language == "cpu" else (9, 70)
    tensors = make(rows, (24, 16), classes, dtype, device=kernel.device)
    mask = (torch.rand(rows) < 0.4).to(kernel.device)
    mask[:2] = torch.tensor([True, False])
    clean = both(tensors, kind=kind, mask=mask)
    tensors[0][~mask], tensors[2][~mask] = float("nan"), float("inf")
    actual = both(tensors, kind=kind, mask=mask)
    assert_same(clean, actual, "rows left out")
    assert not actual[1][~mask].any() and actual[1][mask].any(1).all()
    for same in (mask.long(), mask.float(), mask.to(torch.uint8)):
        assert torch.equal(actual[0], ops.linear_distillation(*tensors, kind=kind, mask=same))


@pytest.mark.parametrize("name", ["cpu", "reference"])
@each_kind
def test_masks_with_few_rows_and_none(name, kind):
    tensors = make(6, (8, 5), 20)
    with backend.use_backend(name):
        single_row = torch.tensor([0, 0, 1, 0, 0, 0])
        row_tensors = [t[2:3] if i % 2 == 0 else t for i, t in enumerate(tensors)]
        for a, b in zip(both(tensors, kind=kind, mask=single_row), both(row_tensors, kind=kind)):
            torch.testing.assert_close(a[2:3] if a.shape == (6, 8) else a, b)
        none = [t[:0] if i % 2 == 0 else t for i, t in enumerate(tensors)]
        cases = [(tensors, {"mask": 0 * single_row}), (none, {}), (none, {"mask": single_row[:0]})]
        for given_, options in cases:
            for items in (None, 4, torch.tensor([4])):
                actual = both(given_, kind=kind, num_items=items, **options)
                assert actual[0] == 0 and actual[0].shape == ()
                assert not actual[1].any() and not actual[2].any() and actual[2].shape == (20, 8)


@each_kind
def test_micro_batches_add_up(kind):
    """With num_items the sum over the parts is the loss of the whole, and so are the gradients."""
    tensors = make(30, (12, 9), 70)
    mask = torch.rand(30) < 0.6
    items = mask.sum()
    expected = both(tensors, kind=kind, mask=mask)
    parts = []
    for rows in (slice(0, 7), slice(7, 30)):
        some = [t[rows] if i % 2 == 0 else t for i, t in enumerate(tensors)]
        parts.append(both(some, kind=kind, mask=mask[rows], num_items=items))
    first, second = parts
    joined = [first[0] + second[0], torch.cat((first[1], second[1])), first[2] + second[2]]
    for a, b in zip(expected, joined):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_kind
@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_student_equal_to_teacher(kernel, dtype, kind, beta):
    rows, classes = (40, 700) if kernel.language == "cpu" else (5, 100)
    x, w, *_ = make(rows, (24, 24), classes, dtype, spread=4.0, device=kernel.device)
    loss, *gradients = both([x, w, x, w], kind=kind, beta=beta)
    assert loss.abs() <= 2 * 2**-23
    for g in gradients:  # next to terms of the size of a logit over the rows
        assert g.abs().max() <= 1e-6


@each_kind
def test_not_finite_stays_in_its_row(kernel, dtype, kind):
    tensors = make(6, (8, 8), 20, dtype, device=kernel.device)
    tensors[0][1, 2], tensors[2][3, 0] = float("nan"), float("inf")
    loss, d_student, d_weight = both(tensors, kind=kind)
    assert d_student.isnan().all(1).tolist() == [False, True, False, True, False, False]
    assert loss.isnan() and d_weight.isnan().all()


@each_kind
def test_probability_zero_contributes_nothing(kernel, kind):
    """Logits of -inf in both heads, by products that overflow: 0 * inf appears in the formula."""
    tensors = make(5, (4, 4), 12, device=kernel.device)
    for x, w in (tensors[:2], tensors[2:]):
        x[:, 0], w[:, 0] = 2e38, 0.0
        w[3, 0] = -4.0
    assert F.linear(tensors[0], tensors[1])[:, 3].eq(-math.inf).all()
    loss, d_student, _ = both(tensors, kind=kind)
    rest = [t[torch.arange(12) != 3] if i % 2 else t for i, t in enumerate(tensors)]
    expected, d_rest, _ = both(rest, kind=kind)
    torch.testing.assert_close(loss, expected)
    assert d_student.isfinite().all()
    torch.testing.assert_close(d_student[:, 1:], d_rest[:, 1:])


@pytest.mark.parametrize("needed", [0, 1])
@each_kind
def test_only_what_is_needed(kernel, needed, kind):
    """A frozen head (LoRA), a frozen trunk; a teacher that requires a gradient gets none."""
    tensors = make(20, (16, 12), 40, device=kernel.device)
    expected = both(tensors, upstream=1.0, kind=kind)
    for t in (tensors[needed], *tensors[2:]):
        t.requires_grad_()
    ops.linear_distillation(*tensors, kind=kind).backward()
    torch.testing.assert_close(tensors[needed].grad, expected[1 + needed])
    assert tensors[2].grad is None and tensors[3].grad is None


@each_kind
def test_leading_dimensions(kernel, dtype, kind):
    tensors = make(6, (32, 12), 33, dtype, device=kernel.device)
    deep = [t.view(2, 3, -1) if i % 2 == 0 else t for i, t in enumerate(tensors)]
    actual, flat = both(deep, kind=kind), both(tensors, kind=kind)
    assert_same(flat, [actual[0], actual[1].flatten(0, 1), actual[2]], "flat")


@each_kind
def test_backward_twice_and_no_grad(kind):
    tensors = make(9, (8, 8), 20)
    tensors[0].requires_grad_()
    loss = ops.linear_distillation(*tensors, kind=kind)
    loss.backward(retain_graph=True)
    once = tensors[0].grad.clone()
    loss.backward()
    torch.testing.assert_close(tensors[0].grad, 2 * once)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(ops.linear_distillation(*tensors, kind=kind), loss.detach())


@each_kind
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_float16_under_a_grad_scaler(kernel, kind, temperature):
    """Mixed precision: scale the loss by GradScaler's first factor, divide the gradients by it. The
    error is at most twice that of the formula, where the factor applies from the start.
    """
    rows = 1000 if kernel.language == "cpu" else 60
    options = {"kind": kind, "temperature": temperature, "upstream": 2.0**16}
    tensors = make(rows, (64, 48), 70, torch.float16, spread=1.0, device=kernel.device)
    mine = both(tensors, **options)[1:]
    low = both(tensors, table.definition, **options)[1:]
    truth = both([t.double() for t in tensors], table.definition, **options)[1:]
    for name, a, p, t in zip(("d_student", "d_weight"), mine, low, truth):
        assert (a.double() - t).norm() <= 2 * (p.double() - t).norm(), name


def test_autocast():
    tensors = make(9, (8, 6), 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ops.linear_distillation(*tensors)
    assert torch.equal(actual, ops.linear_distillation(*(t.bfloat16() for t in tensors)))


MEMORY = """
import torch
from fastlm import ops
from peak import growth
n, d, v = 1024, 64, 49152
x, w, xt, wt = (torch.randn(s, d).bfloat16() for s in (n, v, n, v))
x.requires_grad_(), w.requires_grad_()
ops.linear_distillation(x[:32], w, xt[:32], wt).backward()  # libraries loaded, threads started
x.grad = w.grad = None
print(growth(lambda: ops.linear_distillation(x, w, xt, wt, kind="jsd").backward()))
"""


def test_logits_are_never_in_memory():
    """The logits of either head take 96 MiB in bf16 and twice that in float32. Allowed are 64 MiB
    of scores and the weight's gradient in both dtypes (18), part of which the first call had.
    """
    (grown,) = run_script(MEMORY)
    assert grown <= 88


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher_weight": torch.randn(9, 3)},
            "teacher_weight: expected the student's vocabulary of 8 classes, got 9",
        ),
        (
            {"student_weight": torch.randn(8, 5)},
            r"student_weight: expected shape \(V, K\), K the last dimension of student \(2, 4\),"
            r" got \(8, 5\)",
        ),
        (
            {"teacher_weight": torch.randn(8, 3).half()},
            "teacher_weight: expected torch.float32 on cpu as teacher, got torch.float16 on cpu",
        ),
        (
            {"teacher": torch.randn(3, 3)},
            r"teacher: expected shape \(2,\) \(the rows of student\) and its .*, got \(3, 3\)",
        ),
        (
            {"teacher": torch.randn(2, 3).double(), "teacher_weight": torch.randn(8, 3).double()},
            "teacher: expected float64 with float64 only, student is torch.float32",
        ),
        (
            {"student": torch.randn(2, 0), "student_weight": torch.randn(8, 0)},
            r"student: expected a float tensor .* at least one feature, got torch.float32 \(2, 0\)",
        ),
        ({"student": torch.ones(2, 4).long()}, "student: expected a float tensor .* torch.int64"),
        ({"mask": torch.ones(3)}, r"mask: expected shape \(2,\) .* on cpu, got \(3,\) on cpu"),
        ({"kind": "kl"}, "kind: expected forward, reverse or jsd, got 'kl'"),
        (
            {"kind": "jsd", "beta": 0.0},
            "beta: expected 0 < beta < 1 with kind 'jsd', got 0.0; .* is kind 'forward'",
        ),
        ({"kind": "jsd", "beta": 1}, "beta: expected 0 < beta < 1 .* got 1; .* is kind 'reverse'"),
        ({"temperature": 0.0}, "temperature: expected > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature: expected > 0, got nan"),
        ({"student_softcap": 0.0}, "student_softcap: expected > 0 or None, got 0.0"),
        ({"teacher_softcap": -1.0}, "teacher_softcap: expected > 0 or None, got -1.0"),
        ({"num_items": 0}, "num_items: expected > 0, got 0"),
        ({"num_items": torch.ones(2)}, r"num_items: expected one number, got shape \(2,\)"),
        ({"teacher": None}, "teacher: expected a tensor, got None"),
        ({"mask": [1, 1]}, "mask: expected a tensor or None, got list"),
    ],
)  # fmt: skip
def test_refusals(change, message):
    arguments = {
        "student": torch.randn(2, 4),
        "student_weight": torch.randn(8, 4),
        "teacher": torch.randn(2, 3),
        "teacher_weight": torch.randn(8, 3),
        **change,
    }
    with pytest.raises(InputError, match=message):
        ops.linear_distillation(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [512, 5120])
def test_memory_is_a_quarter_of_the_logits(dtype, rows, monkeypatch):
    """Counted on tensors without memory: what the host function creates in addition to its results.
    A quarter of the rows: 8 bytes per logit of a chunk, and 2 for a 16-bit gradient.
    """
    from fastlm.kernels import linear_distillation as module

    monkeypatch.setattr(module, "row_statistics", lambda *_: None)
    monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    width, classes = 8, 4096
    x, w = (torch.empty(n, width, dtype=dtype, device="meta") for n in (rows, classes))
    with TensorPeak() as peak:
        module.linear_distillation_forward(
            x, w, x, w, None, "jsd", 0.5, 1.0, None, None, 1.0, True, True
        )
    bytes_ = 8 if dtype == torch.float32 else 10
    other_bytes = 4 * (rows + classes) * width * 4 + 12 * rows * 4
    assert (
        rows * classes * bytes_ / 8 <= peak.peak_bytes <= rows * classes * bytes_ / 4 + other_bytes
    )
