"""cross_entropy's Triton kernels against float64, interpreted if there is no GPU."""

import sys

import pytest
import torch
import torch.nn.functional as F
from test_cross_entropy import OPTIONS, check, make, outputs_and_gradient

from fastlm import ops
from fastlm.kernels import launch


@pytest.fixture(params=["whole rows", "split rows"])
def split(request, monkeypatch, triton):
    """Blocks of 64 classes, several per row; split rows have programs for the most rows here."""
    ops.cross_entropy(torch.ones(1, 2, device=triton), torch.zeros(1, device=triton).long())
    module = sys.modules["fastlm.kernels.cross_entropy"]
    monkeypatch.setattr(module, "_BLOCK", 64)
    programs = 1 if request.param == "whole rows" else 40
    monkeypatch.setattr(module, "_WAVES", 1)
    monkeypatch.setattr(module, "multiprocessors", lambda device: programs)
    return triton


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_float64(split, dtype, options, weighted):
    weight = torch.rand(323, device=split) if weighted else None
    check(*make(9, 323, dtype, device=split), weight=weight, **options)


# one class, a block, one less and one more, a partial last part of a split row
@pytest.mark.parametrize("classes", [1, 2, 17, 63, 64, 65, 257])
def test_vocabulary_not_a_multiple_of_the_block(split, dtype, classes):
    check(*make(3, classes, dtype, device=split), label_smoothing=0.1)


@pytest.mark.parametrize("case", ["peaked", "all negative", "common offset", "rising", "falling"])
def test_hard_logits(split, dtype, case):
    logits, target = make(3, 200, dtype, device=split)
    if case == "peaked":
        logits[torch.arange(3), target.clamp_min(0)] += 80
        logits[1] -= 60
        logits[1, 3] = 60
    elif case == "all negative":
        logits = -logits.abs() - 50
    elif case == "common offset":
        logits = (torch.randn(3, 200, device=split) + 1e4).to(dtype)
    else:
        ramp = torch.linspace(-90, 90, 200, device=split).to(dtype)
        logits = (ramp if case == "rising" else ramp.flip(0)).repeat(3, 1)
    check(logits, target, return_lse=True)
    # the sum over all classes is relative to the maximum, so that an offset does not drown it
    check(logits, target, label_smoothing=0.2, reduction="none")


def test_rows_of_the_lowest_number(split, dtype):
    """The logits left when a mask's finfo.min is added to all of a row."""
    logits, target = make(3, 200, dtype, device=split, ignored=0)
    logits[1:] = torch.finfo(dtype).min
    target[2] = -100
    upstream = [torch.ones((), device=split)]
    mine = outputs_and_gradient(ops.cross_entropy, logits, target, upstream)
    theirs = outputs_and_gradient(F.cross_entropy, logits.float(), target, upstream)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b.to(a.dtype))


def test_own_blocks(triton):
    """The shipped block and splits."""
    check(*make(2, 50257, torch.bfloat16, device=triton), z_loss=1e-2)
    check(*make(40, 5000, torch.float16, device=triton), label_smoothing=0.1)


def test_not_finite_as_torch(split, dtype):
    logits, target = make(6, 70, dtype, ignored=0)
    logits[0, 3] = float("nan")
    logits[1, 5] = float("inf")
    logits[2, 7] = float("-inf")
    logits[3] = float("-inf")
    logits[4, int(target[4])] = float("-inf")
    logits[5] = float("nan")
    target[5] = -100
    logits, target, upstream = logits.to(split), target.to(split), [torch.ones(6, device=split)]
    mine = outputs_and_gradient(ops.cross_entropy, logits, target, upstream, reduction="none")
    theirs = outputs_and_gradient(
        F.cross_entropy, logits.float(), target, upstream, reduction="none"
    )
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a[:5].float(), b[:5], equal_nan=True, rtol=1e-2, atol=1e-3)
    assert (mine[-1][5] == 0).all()  # ignored: no gradient; torch would multiply NaN by 0


def test_every_row_ignored_and_no_rows(split):
    logits, target = torch.randn(3, 9, device=split), torch.full((3,), -100, device=split)
    one = [torch.ones((), device=split)]
    loss, gradient = outputs_and_gradient(ops.cross_entropy, logits, target, one)
    assert loss.isnan() and (gradient == 0).all()
    loss, gradient = outputs_and_gradient(ops.cross_entropy, logits, target, one, num_items=5)
    assert loss == 0 and (gradient == 0).all()
    loss, gradient = outputs_and_gradient(
        ops.cross_entropy, logits[:0], target[:0], one, reduction="sum"
    )
    assert loss == 0 and gradient.shape == (0, 9)


@pytest.mark.parametrize("bad", [-1, 8, 2**40, -(2**62)])
def test_class_that_does_not_exist(split, dtype, bad):
    """No memory outside the logits is read, and the row is NaN: a check would wait for the GPU."""
    base = torch.full((5, 8), 1e30, device=split).to(dtype)
    base[1:4] = torch.randn(3, 8, device=split).to(dtype)
    target = torch.tensor([1, bad, -100], device=split)
    loss, gradient = outputs_and_gradient(
        ops.cross_entropy,
        base[1:4],
        target,
        [torch.ones(3, device=split)],
        reduction="none",
        weight=torch.rand(8, device=split),
    )
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    assert gradient[[0, 2]].isfinite().all()
    mean = ops.cross_entropy(base[1:4].clone().requires_grad_(), target)
    assert mean.isnan()


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"num_items": 9, "softcap": 3.0}])
def test_loss_without_options(split, dtype, options):
    logits, target = make(7, 123, dtype, device=split)
    check(logits, target, **options)
    with torch.no_grad():
        alone = ops.cross_entropy(logits, target, **options)
    with_gradient = ops.cross_entropy(logits.detach().requires_grad_(), target, **options)
    assert torch.equal(alone, with_gradient)


def test_strides_and_repeat(split, dtype):
    base = torch.randn(4, 5, 80, device=split).to(dtype)
    target = torch.randint(0, 40, (4, 5), device=split)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "reduction": "none"}
    for logits in (base[..., :40], base[..., ::2], base[:1, :1, :40].expand(4, 5, 40)):
        upstream = [torch.ones(5, 4, device=split).t()]
        mine, again, plain = (
            outputs_and_gradient(ops.cross_entropy, z, target, upstream, **options)
            for z in (logits, logits, logits.contiguous())
        )
        for a, b, c in zip(mine, again, plain):
            assert torch.equal(a, b) and torch.equal(a, c)


def test_offsets_beyond_32_bits(triton):
    """Rows are 2^31 elements apart: an index multiplied in 32 bits would read elsewhere."""
    if not launch.INTERPRETED:
        pytest.skip("8 GiB of device memory")
    apart = 2**31 + 64
    storage = torch.UntypedStorage(2 * (apart + 64))  # pages are mapped only where used
    base = torch.tensor([], dtype=torch.float16).set_(storage)
    logits = base.as_strided((2, 40), (apart, 1))
    logits.copy_(torch.randn(2, 40))
    target = torch.tensor([3, 39])
    assert torch.equal(ops.cross_entropy(logits, target), ops.cross_entropy(logits.clone(), target))
