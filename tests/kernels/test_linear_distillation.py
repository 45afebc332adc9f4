"""linear_distillation against its formula in float64: every kind, chunk and block edges, rows that
are left out, and logits that are hard on a softmax.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from compiled import assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from peak import printed_alone
from tolerance import ULP, assert_near

from fastlm import InputError, backend, ops
from fastlm.cpu import linear_distillation as cpu

KINDS = ("forward", "reverse", "jsd")
each_kind = pytest.mark.parametrize("kind", KINDS)


def log_probabilities(x, w, temperature, softcap, logits_dtype=None):
    z = F.linear(x, w)
    z = z if logits_dtype is None else z.to(logits_dtype)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(-1)


def naive(
    student, student_weight, teacher, teacher_weight, *, kind="forward", beta=0.5, temperature=1.0,
    mask=None, num_items=None, student_softcap=None, teacher_softcap=None, logits_dtype=None,
):  # fmt: skip
    """The formula, on the logits of both heads."""
    log_s = log_probabilities(student, student_weight, temperature, student_softcap, logits_dtype)
    log_t = log_probabilities(teacher, teacher_weight, temperature, teacher_softcap, logits_dtype)
    s, t = log_s.exp(), log_t.exp()
    if kind == "forward":
        rows = t * (log_t - log_s)
    elif kind == "reverse":
        rows = s * (log_s - log_t)
    else:
        log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
        rows = beta * t * (log_t - log_m) + (1 - beta) * s * (log_s - log_m)
    rows = rows.sum(-1)
    rows = rows if mask is None else torch.where(mask != 0, rows, 0.0)
    items = num_items or (rows.numel() if mask is None else (mask != 0).sum().clamp(min=1))
    return rows.sum() / items


def naive_low(*tensors, **options):
    """As torch in the low precision: logits and their gradient in it, the loss in float32."""
    return naive(*tensors, logits_dtype=torch.float32, **options)


def make(rows, widths, classes, dtype, scale=2.0):
    """student, student_weight, teacher, teacher_weight; widths: of the student, of the teacher."""
    tensors = []
    for width in widths:
        x, w = torch.randn(rows, width), torch.randn(classes, width) * scale / width**0.5
        tensors += [x.to(dtype), w.to(dtype)]
    return tensors


def loss_and_gradients(function, tensors, upstream=1.3, **options):
    """The loss, and the gradients of student and student_weight."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:2]]
    loss = function(*leaves, *(t.detach() for t in tensors[2:]), **options)
    loss.backward(torch.full_like(loss, upstream))
    return [loss.detach(), *(t.grad for t in leaves)]


def check(tensors, *, ulps=4.0, **options):
    """Compare with float64. ulps: of the results' dtypes, beside the naive error. Where student and
    teacher nearly agree, gradients are differences of probabilities: `size` is what the
    probabilities alone would give. In float32 a probability has the error of its logit, an ulp of
    the largest one, and nothing else is rounded to fewer digits.
    """
    wide = [t.double() for t in tensors]
    mine = loss_and_gradients(ops.linear_distillation, tensors, **options)
    truth = loss_and_gradients(naive, wide, **options)
    low = tensors
    if tensors[2].dtype != tensors[0].dtype:
        low = [*tensors[:2], *(t.to(tensors[0].dtype) for t in tensors[2:])]
    low = loss_and_gradients(naive_low, low, **options)
    assert mine[0].dtype == torch.float32 and mine[0].shape == ()
    x, w = wide[0].nan_to_num(), wide[1]
    if mine[1].dtype == torch.float32 and x.numel():
        ulps *= max(1.0, F.linear(x, w).abs().max().item() / options.get("temperature", 1.0))
    items = options.get("num_items") or max(1, x[..., 0].numel())
    if options.get("num_items") is None and options.get("mask") is not None:
        items = max(1, int((options["mask"] != 0).sum()))
    share = 1.3 / items / options.get("temperature", 1.0)
    sizes = [0.0, share * w.abs().max().item(), share * x.abs().max().item() if x.numel() else 0.0]
    for name, a, p, t, size in zip(("loss", "d_student", "d_weight"), mine, low, truth, sizes):
        size = max(size, 1e-3 if name == "loss" else 0.0)
        a, p, t = (
            torch.cat((v.flatten(), v.new_tensor([size]).to(a.dtype).to(v.dtype)))
            for v in (a, p, t)
        )
        factor = 2 if name == "loss" else 3
        assert_near(a, p, t, factor=factor, floor=ulps * ULP[a.dtype], what=f"{name} {options}")


OPTIONS = [
    {},
    {"temperature": 2.0, "beta": 0.1},
    {"temperature": 0.7, "num_items": 77, "beta": 0.9},
    {"student_softcap": 5.0, "teacher_softcap": 3.0, "temperature": 1.5},
]


@each_kind
@pytest.mark.parametrize("options", OPTIONS, ids=str)
# ragged everywhere; near one; more rows than are padded to and two blocks and one class
@pytest.mark.parametrize(
    "shape", [(37, (50, 33), 123), (2, (1, 2), 3), (70, (64, 32), 513)], ids=str
)
def test_matches_float64(isa, dtype, shape, options, kind):
    check(make(*shape, dtype), kind=kind, **options)


@each_kind
@pytest.mark.parametrize("shape", [(252, (123, 60), 507), (5, (64, 40), 5003)], ids=str)
def test_larger_shapes(isa, dtype, shape, kind):
    if isa in ("scalar", "amx_emulated"):
        shape = (min(shape[0], 70), (48, 24), min(shape[2], 1030))  # slow by nature
    check(make(*shape, dtype), kind=kind)


@each_kind
def test_many_chunks_are_one(isa, dtype, kind, monkeypatch):
    """Chunks of 32 rows, of which the last is ragged: the weight's gradient is a sum over them."""
    monkeypatch.setattr(cpu, "_MOST_ROWS", 32)
    check(make(107, (48, 20), 300, dtype), kind=kind, mask=torch.rand(107) < 0.9)


@each_kind
def test_rows_left_out_are_never_read(isa, dtype, kind):
    tensors = make(40, (24, 16), 300, dtype)
    mask = torch.rand(40) < 0.4
    clean = loss_and_gradients(ops.linear_distillation, tensors, kind=kind, mask=mask)
    for name in (0, 2):
        tensors[name][~mask] = float("nan")
    tensors[0][(~mask).nonzero()[0, 0]] = float("inf")
    found = loss_and_gradients(ops.linear_distillation, tensors, kind=kind, mask=mask)
    for a, b in zip(clean, found):
        assert torch.equal(a, b)
    assert not found[1][~mask].any() and found[1][mask].any(1).all()
    for same in (mask.long(), mask.float(), mask.to(torch.uint8)):
        assert torch.equal(found[0], ops.linear_distillation(*tensors, kind=kind, mask=same))


@pytest.mark.parametrize("name", ["cpu", "reference"])
@each_kind
def test_masks_with_few_rows_and_none(name, kind):
    tensors = make(6, (8, 5), 20, torch.float32)
    with backend.use_backend(name):
        one = torch.tensor([0, 0, 1, 0, 0, 0])
        check(tensors, kind=kind, mask=one)
        check([t[2:3] if i % 2 == 0 else t for i, t in enumerate(tensors)], kind=kind)
        none = [t[:0] if i % 2 == 0 else t for i, t in enumerate(tensors)]
        cases = [(tensors, {"mask": 0 * one}), (none, {}), (none, {"mask": one[:0]})]
        for given_, options in cases:
            for items in (None, 4, torch.tensor([4])):
                found = loss_and_gradients(
                    ops.linear_distillation, given_, kind=kind, num_items=items, **options
                )
                assert found[0] == 0 and found[0].shape == ()
                assert not found[1].any() and not found[2].any() and found[2].shape == (20, 8)


@each_kind
def test_micro_batches_add_up(kind):
    """With num_items the sum over the parts is the loss of the whole, and so are the gradients."""
    tensors = make(30, (12, 9), 70, torch.float32)
    mask = torch.rand(30) < 0.6
    items = mask.sum()
    whole = loss_and_gradients(ops.linear_distillation, tensors, kind=kind, mask=mask)
    parts = []
    for rows in (slice(0, 7), slice(7, 30)):
        some = [t[rows] if i % 2 == 0 else t for i, t in enumerate(tensors)]
        parts.append(
            loss_and_gradients(
                ops.linear_distillation, some, kind=kind, mask=mask[rows], num_items=items
            )
        )
    first, second = parts
    joined = [first[0] + second[0], torch.cat((first[1], second[1])), first[2] + second[2]]
    for a, b in zip(whole, joined):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_kind
@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_student_equal_to_teacher(isa, dtype, kind, beta):
    x, w, *_ = make(40, (24, 24), 700, dtype, scale=4.0)
    loss, *gradients = loss_and_gradients(
        ops.linear_distillation, [x, w, x, w], kind=kind, beta=beta
    )
    assert loss.abs() <= 2 * ULP[torch.float32]
    for g in gradients:  # next to terms of the size of a logit over the rows
        assert g.abs().max() <= 1e-6


@each_kind
@pytest.mark.parametrize("case", ["peaked", "all negative", "common offset", "apart"])
def test_hard_logits(isa, dtype, case, kind):
    """Every head has a feature of ones, whose weight shifts all logits."""
    tensors = make(40, (32, 24), 700, dtype)
    student, student_weight, teacher, teacher_weight = tensors
    if case == "peaked":
        student, teacher = student * 8, teacher * 8
    elif case == "apart":  # almost all of either's probability is where the other's is 0
        student_weight[:350] -= 4 * torch.eye(350, 32).to(dtype)
        student[:, 0], student_weight[:350, 0] = 16.0, 8.0
        teacher[:, 0], teacher_weight[350:, 0] = 16.0, 8.0
    else:
        for x, w, offset in ((student, student_weight, 1.0), (teacher, teacher_weight, 4.0)):
            x[:, 0] = 64.0
            w[:, 0] = offset * (-4.0 if case == "all negative" else 32.0)
    check([student, student_weight, teacher, teacher_weight], kind=kind)


@each_kind
def test_not_finite_stays_in_its_row(isa, dtype, kind):
    tensors = make(6, (8, 8), 20, dtype)
    tensors[0][1, 2], tensors[2][3, 0] = float("nan"), float("inf")
    loss, d_student, d_weight = loss_and_gradients(ops.linear_distillation, tensors, kind=kind)
    assert d_student.isnan().all(1).tolist() == [False, True, False, True, False, False]
    assert loss.isnan() and d_weight.isnan().all()


@each_kind
def test_probability_zero_contributes_nothing(isa, kind):
    """Logits of -inf in both heads, by products that overflow: 0 * inf appears in the formula."""
    tensors = make(5, (4, 4), 12, torch.float32)
    for x, w in (tensors[:2], tensors[2:]):
        x[:, 0], w[:, 0] = 2e38, 0.0
        w[3, 0] = -4.0
    assert F.linear(tensors[0], tensors[1])[:, 3].eq(-math.inf).all()
    loss, d_student, _ = loss_and_gradients(ops.linear_distillation, tensors, kind=kind)
    rest = [t[torch.arange(12) != 3] if i % 2 else t for i, t in enumerate(tensors)]
    wanted, d_rest, _ = loss_and_gradients(ops.linear_distillation, rest, kind=kind)
    torch.testing.assert_close(loss, wanted)
    assert d_student.isfinite().all()
    torch.testing.assert_close(d_student[:, 1:], d_rest[:, 1:])


@pytest.mark.parametrize("needed", [0, 1])
@each_kind
def test_only_what_is_needed(isa, needed, kind):
    """A frozen head (LoRA), a frozen trunk; a teacher that requires a gradient gets none."""
    tensors = make(20, (16, 12), 40, torch.float32)
    whole = loss_and_gradients(ops.linear_distillation, tensors, upstream=1.0, kind=kind)
    for t in (tensors[needed], *tensors[2:]):
        t.requires_grad_()
    ops.linear_distillation(*tensors, kind=kind).backward()
    torch.testing.assert_close(tensors[needed].grad, whole[1 + needed])
    assert tensors[2].grad is None and tensors[3].grad is None


@each_kind
def test_strides_leading_dimensions_and_dtypes_of_the_teacher(isa, dtype, kind):
    base, wide = torch.randn(4, 5, 96).to(dtype), torch.randn(33, 96).to(dtype)
    other, head = torch.randn(20, 12), torch.randn(33, 12)
    for x, w in ((base[..., :32], wide[:, 8:40]), (base[..., ::2], wide[:, ::2])):
        for teacher_dtype in (torch.float32, torch.bfloat16, torch.float16):
            teacher = [other.view(4, 5, 12).to(teacher_dtype), head.to(teacher_dtype)]
            mine = loss_and_gradients(ops.linear_distillation, [x, w, *teacher], kind=kind)
            flat = [x.reshape(20, -1).contiguous(), w.contiguous()]
            teacher = [other.to(teacher_dtype), head.to(teacher_dtype).t().contiguous().t()]
            plain = loss_and_gradients(ops.linear_distillation, [*flat, *teacher], kind=kind)
            assert torch.equal(mine[0], plain[0]) and torch.equal(mine[2], plain[2])
            assert torch.equal(mine[1].view(20, -1), plain[1])
            check([*flat, *teacher], kind=kind)


@each_kind
def test_backward_twice_and_no_grad(kind):
    tensors = make(9, (8, 8), 20, torch.float32)
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
def test_same_bits_on_repeat_and_on_one_and_two_threads(isa, kind):
    tensors = make(70, (130, 64), 600, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(loss_and_gradients(ops.linear_distillation, tensors, kind=kind))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def half_gradients(function, tensors, **options):
    """Mixed precision: scale the loss by GradScaler's first factor, divide the gradients by it."""
    _, *gradients = loss_and_gradients(function, tensors, upstream=2.0**16, **options)
    return [g.double() / 2**16 for g in gradients]


@each_kind
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_float16_under_a_grad_scaler(isa, kind, temperature):
    """The error is at most that of unfused float16, where the factor applies from the start."""
    options = {"kind": kind, "temperature": temperature}
    tensors = make(1000, (64, 48), 70, torch.float16, scale=1.0)
    mine = half_gradients(ops.linear_distillation, tensors, **options)
    low = half_gradients(naive_low, tensors, **options)
    truth = half_gradients(naive, [t.double() for t in tensors], **options)
    for name, a, p, t in zip(("d_student", "d_weight"), mine, low, truth):
        assert (a - t).norm() <= 2 * (p - t).norm(), name


def test_autocast():
    tensors = make(9, (8, 6), 20, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.linear_distillation(*tensors)
    assert torch.equal(found, ops.linear_distillation(*(t.bfloat16() for t in tensors)))


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
    (grown,) = printed_alone(MEMORY)
    assert grown <= 88


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 80),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    classes=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    beta=st.floats(0.01, 0.99),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    masked=st.booleans(),
    student_softcap=st.sampled_from([None, 2.0]),
    teacher_softcap=st.sampled_from([None, 3.0]),
)
def test_any_options_agree_with_the_formula(rows, widths, classes, masked, **options):
    mask = torch.rand(rows) < 0.5 if masked else None
    # the gradient is a difference of terms several times its size, summed over rows
    check(make(rows, widths, classes, torch.float32), ulps=32, mask=mask, num_items=7, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@each_kind
def test_gradcheck_of_the_reference(options, kind):
    student, student_weight, *teacher = make(5, (4, 3), 7, torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 1])
    assert torch.autograd.gradcheck(
        lambda x, w: ops.linear_distillation(x, w, *teacher, kind=kind, mask=mask, **options),
        [student.requires_grad_(), student_weight.requires_grad_()],
    )


def test_opcheck():
    student, student_weight, *teacher = make(6, (8, 5), 32, torch.float32)
    leaves = [student.requires_grad_(), student_weight.requires_grad_()]
    for keep, cap in ((None, None), (torch.rand(6) < 0.5, 3.0)):
        torch.library.opcheck(
            torch.ops.fastlm.linear_distillation.default,
            (*leaves, *teacher, keep, "jsd", 0.5, 1.0, cap, None, 1.0, True, True),
        )


@pytest.mark.parametrize(("kind", "masked"), [("forward", False), ("jsd", True)])
def test_compiles_without_break_or_recompile(kind, masked):
    teacher_weight, w = torch.randn(40, 12), torch.randn(40, 16).requires_grad_()
    assert_compiles_once(
        lambda x, w, t, tw, m: ops.linear_distillation(
            x, w, t, tw, kind=kind, temperature=2.0, mask=m if masked else None
        ),
        [
            (
                torch.randn(n, 16, requires_grad=True),
                w,
                torch.randn(n, 12),
                teacher_weight,
                torch.rand(n) < 0.5,
            )
            for n in (4, 9, 17)
        ],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher_weight": torch.randn(9, 3)},
            "teacher_weight: wanted the student's vocabulary of 8 classes, got 9",
        ),
        (
            {"student_weight": torch.randn(8, 5)},
            r"student_weight: wanted shape \(V, K\), K the last dimension of student \(2, 4\),"
            r" got \(8, 5\)",
        ),
        (
            {"teacher_weight": torch.randn(8, 3).half()},
            "teacher_weight: wanted torch.float32 on cpu as teacher, got torch.float16 on cpu",
        ),
        (
            {"teacher": torch.randn(3, 3)},
            r"teacher: wanted shape \(2,\) \(the rows of student\) and its features, got \(3, 3\)",
        ),
        (
            {"teacher": torch.randn(2, 3).double(), "teacher_weight": torch.randn(8, 3).double()},
            "teacher: wanted float64 with float64 only, student is torch.float32",
        ),
        (
            {"student": torch.randn(2, 0), "student_weight": torch.randn(8, 0)},
            r"student: wanted a float tensor .* at least one feature, got torch.float32 \(2, 0\)",
        ),
        ({"student": torch.ones(2, 4).long()}, "student: wanted a float tensor .* got torch.int64"),
        ({"mask": torch.ones(3)}, r"mask: wanted shape \(2,\) .* on cpu, got \(3,\) on cpu"),
        ({"kind": "kl"}, "kind: wanted forward, reverse or jsd, got 'kl'"),
        (
            {"kind": "jsd", "beta": 0.0},
            "beta: wanted 0 < beta < 1 with kind 'jsd', got 0.0; .* is kind 'forward'",
        ),
        ({"kind": "jsd", "beta": 1}, "beta: wanted 0 < beta < 1 .* got 1; .* is kind 'reverse'"),
        ({"temperature": 0.0}, "temperature: wanted > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature: wanted > 0, got nan"),
        ({"student_softcap": 0.0}, "student_softcap: wanted > 0 or None, got 0.0"),
        ({"teacher_softcap": -1.0}, "teacher_softcap: wanted > 0 or None, got -1.0"),
        ({"num_items": 0}, "num_items: wanted > 0, got 0"),
        ({"num_items": torch.ones(2)}, r"num_items: wanted one number, got shape \(2,\)"),
        ({"teacher": None}, "teacher: wanted a tensor, got None"),
        ({"mask": [1, 1]}, "mask: wanted a tensor or None, got list"),
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
