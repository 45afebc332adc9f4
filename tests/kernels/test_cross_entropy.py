"""Tests of cross_entropy beyond its table of cases (cases/cross_entropy.py)."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import OPS, losses
from cases import cross_entropy as table
from cases.base import check, run
from contract import *  # noqa: F403
from on_kernels import on

from fastlm import InputError, backend, ops
from fastlm.reference import blocks


def make(rows, classes, dtype=torch.float32, ignored=0.25, device="cpu"):
    logits = (torch.randn(rows, classes) * 3).to(device, dtype)
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < ignored] = -100
    target[0] = classes - 1
    return logits, target.to(device)


def both(function, logits, target, upstream=None, **options):
    """Return outputs and gradient."""
    upstream = None if upstream is None else [upstream]
    return run(lambda z: function(z, target, **options), [logits], upstream)[0]


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "linear_logprobs"])
def test_targets_of_the_tables(name):
    """The last class, and ignored rows between others."""
    for case in (row.case for row in OPS[name].rows.values()):
        rows, classes, ignored = case["shape"][0], case["shape"][-1], case["ignored"]
        target = losses.targets(case, rows, classes)[0]
        assert (target == classes - 1).any() == (rows > 0 and ignored < 1), case
        assert (target == -100).any() == (ignored > 0 and rows > (ignored < 1)), case


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_are_torchs_own(reduction, ignored, weighted):
    """Compare with the reduction of F.cross_entropy, not with a copy of fastlm's."""
    logits, target = make(40, 61, torch.float64, ignored)
    weight = torch.rand(61, dtype=torch.float64) if weighted else None
    for smoothing in (0.0, 0.2):
        options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        mine, theirs = (
            both(f, logits, target, **options) for f in (ops.cross_entropy, F.cross_entropy)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_not_finite_as_torch(kernel, dtype):
    logits, target = make(6, 70, dtype, ignored=0, device=kernel.device)
    logits[0, 3] = float("nan")
    logits[1, 5] = float("inf")
    logits[2, 7] = float("-inf")
    logits[3] = float("-inf")
    logits[4, int(target[4])] = float("-inf")
    logits[5] = float("nan")
    target[5] = -100
    mine = both(ops.cross_entropy, logits, target, torch.ones(6), reduction="none")
    theirs = both(F.cross_entropy, logits.float(), target, torch.ones(6), reduction="none")
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a[:5].float(), b[:5], equal_nan=True, rtol=1e-2, atol=1e-3)
    assert (mine[-1][5] == 0).all()  # ignored: no gradient; torch would multiply NaN by 0


def test_rows_of_the_lowest_number(kernel, dtype):
    """The logits left when a mask's finfo.min is added to all of a row: equal logits."""
    logits, target = make(3, 200, dtype, ignored=0, device=kernel.device)
    logits[1:] = torch.finfo(dtype).min
    target[2] = -100
    mine, theirs = (
        both(f, z, target)
        for f, z in ((ops.cross_entropy, logits), (F.cross_entropy, logits.float()))
    )
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b.to(a.dtype))


def test_every_row_ignored(kernel):
    logits, target = make(3, 9, ignored=0, device=kernel.device)
    loss, gradient = both(ops.cross_entropy, logits, torch.full_like(target, -100))
    assert loss.isnan() and (gradient == 0).all()


@on("triton", "cuda")
@pytest.mark.parametrize("bad", [-1, 8, 2**40, -(2**62)])
def test_class_that_does_not_exist(kernel, dtype, bad):
    """No memory outside the logits is read, and the row is NaN: a check would wait for the GPU."""
    base = torch.full((5, 8), 1e30).to(kernel.device, dtype)
    base[1:4] = torch.randn(3, 8).to(kernel.device, dtype)
    target = torch.tensor([1, bad, -100], device=kernel.device)
    weight = torch.rand(8, device=kernel.device)
    loss, gradient = both(
        ops.cross_entropy, base[1:4], target, torch.ones(3), reduction="none", weight=weight
    )
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    assert gradient[[0, 2]].isfinite().all()
    assert ops.cross_entropy(base[1:4].clone().requires_grad_(), target).isnan()


@pytest.mark.parametrize("bad", [-1, 8, 2**40])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_target_out_of_range(bad, name):
    target = torch.tensor([1, -100, bad])
    message = rf"target: expected 0 <= class < 8 or ignore_index -100, got {bad} in row 2"
    with backend.use_backend(name), pytest.raises(InputError, match=message):
        ops.cross_entropy(torch.randn(3, 8), target, weight=torch.rand(8))


def test_one_class_of_probability_1_is_that_class():
    logits, target = torch.randn(2, 5, 40), torch.randint(0, 40, (2, 5))
    one_hot = F.one_hot(target, 40).float()
    for options in ({}, {"reduction": "none"}):
        soft, hard = (both(ops.cross_entropy, logits, t, **options) for t in (one_hot, target))
        torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"num_items": 9, "softcap": 3.0}])
def test_loss_with_and_without_a_gradient_are_the_same_bits(kernel, dtype, options):
    for rows in (1, 7):
        logits, target = make(rows, 123, dtype, device=kernel.device)
        without_gradient = ops.cross_entropy(logits, target, **options)
        with_gradient = ops.cross_entropy(logits.requires_grad_(), target, **options)
        assert torch.equal(without_gradient, with_gradient)


def test_leading_dimensions_int32_and_a_row_alone(kernel, dtype):
    logits = torch.randn(4, 5, 40).to(kernel.device, dtype)
    target = torch.randint(0, 40, (4, 5)).to(kernel.device)
    loss = ops.cross_entropy(logits, target, reduction="none")
    flat = ops.cross_entropy(logits.flatten(0, 1), target.flatten().int(), reduction="none")
    assert torch.equal(loss, flat.view(4, 5))
    row = ops.cross_entropy(logits[0, 0], target[0, 0], reduction="none", return_lse=True)
    assert row[0].shape == row[1].shape == ()


def test_num_items_as_tensor_and_other_ignore_index():
    logits, target = make(10, 33)
    target[target == -100] = 7
    by_tensor, by_int = (
        both(ops.cross_entropy, logits, target, ignore_index=7, num_items=n)
        for n in (torch.tensor(13), 13)
    )
    theirs = both(F.cross_entropy, logits, target, ignore_index=7, reduction="sum")
    torch.testing.assert_close(by_tensor, by_int)
    torch.testing.assert_close(by_int, [t / 13 for t in theirs])
    for options in ({}, {"label_smoothing": 0.1}):  # num_items has one dimension, a loss has none
        loss = ops.cross_entropy(logits, target, num_items=torch.tensor([13]), **options)
        assert loss.shape == ()


@pytest.mark.parametrize("apart", [2**31 + 64, 2**31 + 3])
def test_offsets_beyond_32_bits(kernel, apart):
    """Rows are 2^31 elements apart: an index multiplied in 32 bits would read elsewhere. The memory
    of only one row is touched.
    """
    if kernel.device != "cpu" or kernel.variant in ("scalar", "amx_emulated"):
        pytest.skip("8 GiB of device memory, or the index arithmetic of avx2")
    storage = torch.UntypedStorage(2 * (apart + 64))  # pages are mapped only where used
    base = torch.tensor([], dtype=torch.float16).set_(storage)
    logits = base.as_strided((2, 40), (apart, 1))
    logits.copy_(torch.randn(2, 40))
    target = torch.tensor([3, 39])
    torch.testing.assert_close(
        ops.cross_entropy(logits, target), ops.cross_entropy(logits.clone(), target)
    )


@on("cuda")
def test_more_parts_than_lanes_of_the_warp_that_adds_them(op, kernel, monkeypatch):
    from fastlm.cuda import constants
    from fastlm.cuda import cross_entropy as module

    monkeypatch.setattr(constants(), "CROSS_ENTROPY_PART_BYTES", 16)
    monkeypatch.setattr(module, "multiprocessors", lambda device: 40)
    # the largest logit is in the first parts, or in the last
    for values in ("rising", "falling"):
        case = table.case(1, 500, ignored=0.0, values=values, label_smoothing=0.1, return_lse=True)
        check(op.build_for(case, torch.float32, "cuda", kernel.device))


@on("cuda")
@pytest.mark.parametrize("classes", [40, 77])
def test_gradient_in_place(kernel, dtype, classes):
    from fastlm.cuda.cross_entropy import row_gradients

    logits, target = make(5, classes, dtype, device=kernel.device)
    shift, log_sum, _, _ = torch.ops.fastlm.cross_entropy(
        logits, target, None, False, -100, None, 1.0
    )
    on = torch.rand(2, 5, device=kernel.device).unbind(0)
    row = (logits, target, None, shift, log_sum, -100, None, 1.0)
    expected = torch.ops.fastlm.cross_entropy_backward(*on, None, *row)
    row_gradients(*on, None, *row, logits)
    assert torch.equal(logits, expected)


@on("cuda")
def test_without_a_factor_of_p_no_p_is_looked_at(kernel, dtype):
    """The gradients of loss and lse cancel: only the target's is left, whatever the logits."""
    from fastlm.cuda.cross_entropy import row_gradients

    logits = torch.tensor([[0.5, torch.nan, torch.inf] * 7]).to(kernel.device, dtype)
    target, none = torch.zeros(1, dtype=torch.int64), torch.zeros(1, device=kernel.device)
    target, gradient = target.to(kernel.device), torch.empty_like(logits)
    row_gradients(none, none + 2, None, logits, target, None, none, none, -100, None, 1.0, gradient)
    assert gradient[0, 0] == -2 and (gradient[0, 1:] == 0).all()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1}], ids=str)
def test_blocks_of_the_reference_under_transforms(monkeypatch, options):
    """A gradient written in parts works batched, with tangents, and both."""
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

    all_expected = everything()
    assert all_expected[-1].abs().sum() > 0.1
    monkeypatch.setattr(blocks, "SCORES", 14)  # two rows
    for actual, expected in zip(everything(), all_expected, strict=True):
        torch.testing.assert_close(actual, expected)


def test_backward_refuses_a_loss_without_statistics():
    logits, target = make(3, 7)
    loss, stats = torch.ops.fastlm.cross_entropy_loss.default(
        logits, target, -100, True, None, 1.0, False
    )
    with pytest.raises(ValueError, match="stats: expected elements: 9, got 0"):
        torch.ops.fastlm.cross_entropy_loss_backward.default(
            loss, logits, target, stats, -100, True, None, 1.0
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target": torch.zeros(3, dtype=torch.int64)},
            r"target: expected shape \(2,\) .*got \(3,\)",
        ),
        ({"target": torch.zeros(2)}, "target: expected int64 class numbers, got torch.float32"),
        ({"logits": torch.ones(2, 8, dtype=torch.int64)}, "logits: expected a float tensor"),
        ({"logits": torch.ones(2, 0)}, "logits: expected at least one class"),
        (
            {"weight": torch.ones(7)},
            r"weight: expected floats of shape \(8,\) on cpu, got .*\(7,\)",
        ),
        ({"weight": torch.ones(8).int()}, "weight: expected floats .* got torch.int32"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected 0 to 1, got 1.5"),
        ({"softcap": 0.0}, "softcap: expected > 0 or None, got 0.0"),
        ({"reduction": "avg"}, "reduction: expected none, mean or sum, got 'avg'"),
        ({"num_items": 0}, "num_items: expected > 0, got 0"),
        ({"num_items": torch.ones(2)}, r"num_items: expected one number, got shape \(2,\)"),
        ({"num_items": 3, "reduction": "sum"}, "num_items: expected reduction 'mean', got 'sum'"),
        ({"target": torch.rand(2, 5)}, r"target: expected probabilities of shape \(2, 8\)"),
        ({"target": torch.rand(2, 8, requires_grad=True)}, "target: expected constants"),
        (
            {"target": torch.rand(2, 8), "ignore_index": 2},
            "ignore_index: expected class numbers as target, got 2",
        ),
        (
            {"target": torch.rand(2, 8), "weight": torch.rand(5)},
            r"weight: expected floats .*\(8,\)",
        ),
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


@on("cuda")
def test_cuda_has_no_kernel_for_soft_targets(kernel):
    logits, target = torch.rand(2, 3, 4, device=kernel.device)
    with pytest.raises(InputError, match="class numbers as targets"):
        ops.cross_entropy(logits, target)


@on("cuda")
def test_the_extension_refuses(kernel):
    from fastlm.cuda import extension

    logits, target = make(3, 8, torch.float32, device=kernel.device)
    shift, log_sum, nll = torch.empty(3, 3, device=kernel.device).unbind(0)

    def forward(logits, target):
        extension().cross_entropy_forward(
            logits, target, None, False, -100, 0.0, 1.0, None, shift, log_sum, nll, None, 0
        )

    with pytest.raises(ValueError, match="target: expected rows 3, got 2"):
        forward(logits, target[:2])
    with pytest.raises(ValueError, match="target: expected a contiguous tensor"):
        forward(logits, torch.zeros(6, dtype=torch.int64, device=kernel.device)[::2])
    with pytest.raises(ValueError, match="logits: expected classes side by side, got stride 2"):
        forward(torch.zeros(3, 16, device=kernel.device)[:, ::2], target)
    with pytest.raises(
        ValueError, match="logits: expected float32, bfloat16 or float16, got int64"
    ):
        forward(logits.long(), target)
