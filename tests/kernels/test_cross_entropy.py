"""cross_entropy against F.cross_entropy in float64: every option, dtype and instruction set; logits
that broke other implementations (peaked, offset, all negative, ragged vocabularies, infinities);
registration, compile, refusals.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compiled import assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import ULP, assert_near

from fastlm import InputError, backend, ops
from fastlm.reference import blocks


def plain(
    logits,
    target,
    *,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    reduction="mean",
    num_items=None,
    return_lse=False,
):
    """The definition, composed of torch's own functions, in the dtype of its arguments."""
    z = logits * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    w = None if weight is None else weight.to(z.dtype)
    rows = F.cross_entropy(
        z, target, w, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    lse, valid = torch.logsumexp(z, -1), target != ignore_index
    loss = rows + torch.where(valid, z_loss * lse**2, 0.0)
    if reduction == "mean":
        seen = valid.sum() if w is None else w[target[valid]].sum()
        loss = loss.sum() / (seen if num_items is None else num_items)
    elif reduction == "sum":
        loss = loss.sum()
    return (loss, lse) if return_lse else loss


def outputs_and_gradient(function, logits, target, upstream, **options):
    z = logits.detach().requires_grad_()  # no clone, which would be contiguous
    out = function(z, target, **options)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [u.to(o.dtype) for u, o in zip(upstream, out)])
    return [*(o.detach() for o in out), z.grad]


def make(rows, classes, dtype, ignored=0.25, scale=3.0, offset=0.0, device="cpu"):
    logits = (torch.randn(rows, classes) * scale + offset).to(dtype)
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < ignored] = -100
    if rows:
        target[0] = classes - 1
    return logits.to(device), target.to(device)


def check(logits, target, *, ulps=1, of_terms=False, **options):
    upstream = [torch.randn(target.shape if options.get("reduction") == "none" else ())]
    upstream += [torch.randn(target.shape)]
    upstream = [u.to(logits.device) for u in upstream]
    mine = outputs_and_gradient(ops.cross_entropy, logits, target, upstream, **options)
    # rounding of the logits is not counted: truth and naive start from the same ones; naive in
    # float32, like losses
    truth = outputs_and_gradient(plain, logits.double(), target, upstream, **options)
    naive = outputs_and_gradient(plain, logits.float(), target, upstream, **options)
    assert mine[0].dtype == torch.float32 and mine[-1].dtype == logits.dtype
    names = [*["loss", "lse"][: len(mine) - 1], "gradient"]
    for name, a, p, t in zip(names, mine, naive, truth):
        if name == "gradient":
            p = p.to(a.dtype)  # rounded once, like ours
        factor = 3 if name == "gradient" else 2
        if of_terms and len(target) and name == "gradient":
            # relative to p and 1: the gradient is their difference, which may vanish (one class)
            term = upstream[0].abs().max()
            a, p, t = (torch.cat((v.flatten(), term.to(v.dtype)[None])) for v in (a, p, t))
        assert_near(a, p, t, factor=factor, floor=ulps * ULP[a.dtype], what=f"{name} {options}")


OPTIONS = [
    {},
    {"reduction": "sum", "z_loss": 1e-2},
    {"reduction": "none", "return_lse": True},
    {"label_smoothing": 0.1, "num_items": 77},
    {"softcap": 5.0, "logit_scale": 0.7, "return_lse": True},
    {"softcap": 5.0, "label_smoothing": 0.3, "z_loss": 1e-2, "reduction": "none"},
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(12, 123), (3, 50257)], ids=str)
def test_matches_float64(isa, dtype, shape, options, weighted):
    weight = torch.rand(shape[1]) if weighted else None
    check(*make(*shape, dtype), weight=weight, **options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_are_torchs_own(reduction, ignored, weighted):
    """Comparison with F.cross_entropy's own reduction, not with a copy of ours."""
    logits, target = make(40, 61, torch.float64, ignored)
    weight = torch.rand(61, dtype=torch.float64) if weighted else None
    for smoothing in (0.0, 0.2):
        options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        upstream = [torch.randn(target.shape if reduction == "none" else (), dtype=torch.float64)]
        mine = outputs_and_gradient(ops.cross_entropy, logits, target, upstream, **options)
        theirs = outputs_and_gradient(F.cross_entropy, logits, target, upstream, **options)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


# Blocks of 1024 are read at a time: test sizes around it, and 1
@pytest.mark.parametrize("classes", [1, 2, 17, 1023, 1024, 1025, 2049])
def test_vocabulary_not_a_multiple_of_the_block(isa, dtype, classes):
    check(*make(5, classes, dtype), label_smoothing=0.1)


@pytest.mark.parametrize("case", ["peaked", "all negative", "common offset", "rising", "falling"])
def test_hard_logits(isa, dtype, case):
    """Faults seen in other implementations: a padded column counted as exp(0), a maximum that
    starts at 0, an lse rounded at 1e4.
    """
    logits, target = make(6, 1500, dtype)
    if case == "peaked":
        logits[torch.arange(6), target.clamp_min(0)] += 80
        logits[1] -= 60
        logits[1, 3] = 60
    elif case == "all negative":
        logits = -logits.abs() - 50
    elif case == "common offset":
        logits = (torch.randn(6, 1500) + 1e4).to(dtype)
    else:
        ramp = torch.linspace(-90, 90, 1500).to(dtype)
        logits = (ramp if case == "rising" else ramp.flip(0)).repeat(6, 1)
    check(logits, target, return_lse=True)


def test_not_finite_as_torch(isa, dtype):
    logits, target = make(6, 70, dtype, ignored=0)
    logits[0, 3] = float("nan")
    logits[1, 5] = float("inf")
    logits[2, 7] = float("-inf")
    logits[3] = float("-inf")
    logits[4, int(target[4])] = float("-inf")
    logits[5] = float("nan")
    target[5] = -100
    upstream = [torch.ones(6)]
    mine = outputs_and_gradient(ops.cross_entropy, logits, target, upstream, reduction="none")
    theirs = outputs_and_gradient(
        F.cross_entropy, logits.float(), target, upstream, reduction="none"
    )
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a[:5].float(), b[:5], equal_nan=True, rtol=1e-2, atol=1e-3)
    assert (mine[-1][5] == 0).all()  # ignored: no gradient; torch would multiply NaN by 0


def test_every_row_ignored(isa):
    logits, target = torch.randn(3, 9), torch.full((3,), -100)
    loss, gradient = outputs_and_gradient(ops.cross_entropy, logits, target, [torch.ones(())])
    assert loss.isnan() and (gradient == 0).all()
    loss, gradient = outputs_and_gradient(
        ops.cross_entropy, logits, target, [torch.ones(())], num_items=5
    )
    assert loss == 0 and (gradient == 0).all()


def test_num_items_as_tensor_and_other_ignore_index():
    logits, target = make(10, 33, torch.float32)
    target[target == -100] = 7
    upstream = [torch.ones(())]
    by_tensor = outputs_and_gradient(
        ops.cross_entropy, logits, target, upstream, ignore_index=7, num_items=torch.tensor(13)
    )
    by_int = outputs_and_gradient(
        ops.cross_entropy, logits, target, upstream, ignore_index=7, num_items=13
    )
    theirs = outputs_and_gradient(
        F.cross_entropy, logits, target, upstream, ignore_index=7, reduction="sum"
    )
    torch.testing.assert_close(by_tensor, by_int)
    torch.testing.assert_close(by_int, [t / 13 for t in theirs])
    for options in ({}, {"label_smoothing": 0.1}):  # num_items has one dimension, a loss has none
        loss = ops.cross_entropy(logits, target, num_items=torch.tensor([13]), **options)
        assert loss.shape == ()


def test_leading_dimensions_strides_and_int32(isa, dtype):
    base = torch.randn(4, 5, 80).to(dtype)
    target = torch.randint(0, 40, (4, 5))
    for logits in (base[..., :40], base[..., ::2], base.transpose(0, 1)[..., 10:50]):
        t = target if logits.shape[:2] == (4, 5) else target.t()
        expected = ops.cross_entropy(logits.contiguous(), t, reduction="none")
        assert expected.shape == t.shape
        assert torch.equal(ops.cross_entropy(logits, t.int(), reduction="none"), expected)
    one = ops.cross_entropy(base[0, 0], target[0, 0], reduction="none", return_lse=True)
    assert one[0].shape == one[1].shape == ()


def test_no_rows(isa, dtype):
    z = torch.empty(0, 7, dtype=dtype).zero_().requires_grad_()
    loss = ops.cross_entropy(z, torch.empty(0, dtype=torch.int64), reduction="sum")
    loss.backward()
    assert loss == 0 and z.grad.shape == (0, 7)


def test_offsets_beyond_32_bits(isa):
    """Rows are 2^31 elements apart: an index multiplied in 32 bits would read elsewhere. The memory
    of only one row is touched.
    """
    if isa in ("scalar", "amx_emulated"):
        pytest.skip("the same index arithmetic as avx2, and the mapping is 4 GiB of address space")
    apart = 2**31 + 64
    storage = torch.UntypedStorage(
        2 * (apart + 64)
    )  # not written: pages are only mapped where used
    base = torch.tensor([], dtype=torch.bfloat16).set_(storage)
    logits = base.as_strided((2, 40), (apart, 1))
    logits.copy_(torch.randn(2, 40))
    target = torch.tensor([3, 39])
    assert torch.equal(ops.cross_entropy(logits, target), ops.cross_entropy(logits.clone(), target))


def test_same_bits_on_repeat_and_on_one_and_two_threads(isa):
    logits, target = make(64, 3000, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(
                outputs_and_gradient(
                    ops.cross_entropy, logits, target, [torch.ones(())], z_loss=0.1
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    classes=st.integers(1, 300),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    softcap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([1.0, 0.3]),
    reduction=st.sampled_from(["none", "sum"]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_options_agree_with_the_definition(
    rows, classes, weighted, smoothing, z_loss, softcap, scale, reduction, ignored
):
    logits, target = make(rows, classes, torch.float32, ignored)
    check(
        logits,
        target,
        # with smoothing and z-loss the gradient is a difference of terms several times its size
        ulps=16,
        of_terms=True,
        weight=torch.rand(classes) if weighted else None,
        label_smoothing=smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=scale,
        reduction=reduction,
        return_lse=True,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck_of_the_reference(options):
    logits, target = make(5, 7, torch.float64)
    weight = torch.rand(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: ops.cross_entropy(z, target, weight=weight, **options), logits.requires_grad_()
    )


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1}], ids=str)
def test_blocks_of_the_reference_under_transforms(monkeypatch, options):
    """A gradient written in parts: batched, with tangents, and both."""
    logits, target = make(5, 7, torch.float64)
    upstream, tangent = torch.randn(3, 5).double(), torch.randn(5, 7).double()

    def gradient(z, on=upstream[0]):
        losses = partial(ops.cross_entropy, target=target, reduction="none", **options)
        return torch.func.vjp(losses, z)[1](on)[0]

    def everything():
        return (
            gradient(logits),
            torch.vmap(gradient)(torch.stack([logits, -logits])),
            torch.vmap(lambda on: gradient(logits, on))(upstream),
            *torch.func.jvp(gradient, (logits,), (tangent,)),
            torch.func.jacfwd(gradient)(logits),
        )

    whole = everything()
    assert whole[-1].abs().sum() > 0.1
    monkeypatch.setattr(blocks, "SCORES", 14)  # two rows
    for found, wanted in zip(everything(), whole, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("smooth", [False, True])
def test_opcheck(smooth):
    logits, target = make(6, 32, torch.float32)
    weight = torch.rand(32) if smooth else None
    torch.library.opcheck(
        torch.ops.fastlm.cross_entropy.default,
        (logits.requires_grad_(), target, weight, smooth, -100, 3.0, 1.0),
    )


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck_of_the_loss(mean, keep):
    logits, target = make(6, 32, torch.float32)
    torch.library.opcheck(
        torch.ops.fastlm.cross_entropy_loss.default,
        (logits.requires_grad_(keep), target, -100, mean, 3.0, 1.0, keep),
    )
    stats = torch.ops.fastlm.cross_entropy_loss.default(
        logits.detach(), target, -100, mean, 3.0, 1.0, True
    )[1]
    torch.library.opcheck(
        torch.ops.fastlm.cross_entropy_loss_backward.default,
        (torch.tensor(0.7), logits.detach(), target, stats, -100, mean, 3.0, 1.0),
    )


# The plain sum and mean have their own path; up to 64 rows need no tensor of statistics
@pytest.mark.parametrize("rows", [1, 8, 64, 65])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"num_items": 9}, {"softcap": 3.0, "logit_scale": 0.5}]
)
def test_loss_without_options(isa, dtype, rows, options):
    logits, target = make(rows, 123, dtype)
    check(logits, target, **options)
    check(logits, target.clamp_min(0), **options)
    with torch.no_grad():
        alone = ops.cross_entropy(logits, target, **options)
    with_gradient = ops.cross_entropy(logits.detach().requires_grad_(), target, **options)
    assert torch.equal(alone, with_gradient)


def test_backward_refuses_a_loss_without_statistics():
    logits, target = make(3, 7, torch.float32)
    loss, stats = torch.ops.fastlm.cross_entropy_loss.default(
        logits, target, -100, True, None, 1.0, False
    )
    with pytest.raises(ValueError, match="stats: wanted elements: 9, got 0"):
        torch.ops.fastlm.cross_entropy_loss_backward.default(
            loss, logits, target, stats, -100, True, None, 1.0
        )


def test_loss_compiles_without_break_or_recompile():
    assert_compiles_once(
        lambda z, t: ops.cross_entropy(z, t, softcap=9.0),
        [(torch.randn(n, 64, requires_grad=True), torch.arange(n) % 64) for n in (5, 9, 70)],
    )


def test_compiles_without_break_or_recompile():
    weight = torch.rand(64)
    assert_compiles_once(
        lambda z, t: ops.cross_entropy(
            z, t, weight=weight, label_smoothing=0.1, z_loss=0.1, softcap=9.0
        ),
        [(make(n, 64, torch.float32)[0].requires_grad_(), torch.arange(n)) for n in (4, 9, 17)],
    )


@pytest.mark.parametrize("bad", [-1, 8, 2**40])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_target_out_of_range(bad, name):
    target = torch.tensor([1, -100, bad])
    with (
        backend.use_backend(name),
        pytest.raises(
            InputError,
            match=rf"target: wanted 0 <= class < 8 or ignore_index -100, got {bad} in row 2",
        ),
    ):
        ops.cross_entropy(torch.randn(3, 8), target, weight=torch.rand(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target": torch.zeros(3, dtype=torch.int64)},
            r"target: wanted shape \(2,\) .*got \(3,\)",
        ),
        ({"target": torch.zeros(2)}, "target: wanted int64 class numbers, got torch.float32"),
        ({"logits": torch.ones(2, 8, dtype=torch.int64)}, "logits: wanted a float tensor"),
        ({"logits": torch.ones(2, 0)}, "logits: wanted at least one class"),
        ({"weight": torch.ones(7)}, r"weight: wanted floats of shape \(8,\) on cpu, got .*\(7,\)"),
        ({"weight": torch.ones(8).int()}, "weight: wanted floats .* got torch.int32"),
        ({"label_smoothing": 1.5}, "label_smoothing: wanted 0 to 1, got 1.5"),
        ({"softcap": 0.0}, "softcap: wanted > 0 or None, got 0.0"),
        ({"reduction": "avg"}, "reduction: wanted none, mean or sum, got 'avg'"),
        ({"num_items": 0}, "num_items: wanted > 0, got 0"),
        ({"num_items": torch.ones(2)}, r"num_items: wanted one number, got shape \(2,\)"),
        ({"num_items": 3, "reduction": "sum"}, "num_items: wanted reduction 'mean', got 'sum'"),
    ],
)
def test_refusals(change, message):
    arguments = {
        "logits": torch.randn(2, 8),
        "target": torch.zeros(2, dtype=torch.int64),
        **change,
    }
    with pytest.raises(InputError, match=message):
        ops.cross_entropy(**arguments)
