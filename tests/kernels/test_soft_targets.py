"""cross_entropy with the probability of every class as target, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from compiled import assert_compiles_once

from fastlm import InputError, backend, ops

OPTIONS = {
    "plain": {},
    "smoothing and weights": {"label_smoothing": 0.1, "weight": True},
    "z-loss": {"z_loss": 1e-2, "return_lse": True},
    "each row": {"reduction": "none"},
    "sum, softcap": {"reduction": "sum", "softcap": 5.0},
    "items": {"num_items": 9},
}


def naive(logits, target, weight=None, z_loss=0.0, softcap=None, num_items=None, return_lse=False,
          reduction="mean", label_smoothing=0.0):  # fmt: skip
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    flat = z.reshape(-1, z.shape[-1]), target.reshape(-1, z.shape[-1])
    loss = F.cross_entropy(
        *flat, weight=weight, reduction="none", label_smoothing=label_smoothing
    ).view(z.shape[:-1])
    lse = torch.logsumexp(z, -1)
    loss = loss + z_loss * lse.square()
    if reduction != "none":
        loss = loss.sum() / (num_items or loss.numel() if reduction == "mean" else 1)
    return (loss, lse) if return_lse else loss


def run(function, logits, target, options):
    leaf = logits.detach().requires_grad_()
    out = function(leaf, target, **options)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((i + 1) * o.sum() for i, o in enumerate(out))
    return [*(o.detach() for o in out), *torch.autograd.grad(total, leaf)]


def check(shape, dtype, options, device="cpu", spread=3.0):
    logits = (spread * torch.randn(shape, device=device)).to(dtype)
    target = (2 * torch.randn(shape, device=device)).softmax(-1).to(dtype)
    options = dict(options)
    if options.get("weight"):
        options["weight"] = torch.rand(shape[-1], device=device)
    wide = options | {"weight": w.double() if (w := options.get("weight")) is not None else None}
    got = run(ops.cross_entropy, logits, target, options)
    truth = run(naive, logits.double(), target.double(), wide)
    for a, t in zip(got, truth):
        assert a.shape == t.shape
        # losses and lse: float32 sums of V terms; gradients are rounded to the logits' dtype
        unit = torch.finfo(a.dtype).eps
        bound = 4 * unit * (t.abs() + t.abs().mean()) + 1e-6 * t.abs().max()
        assert ((a.double() - t).abs() <= bound).all(), (a - t).abs().max()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(7, 33), (3, 4, 5003), (2, 40000), (1, 1)], ids=str)
def test_matches_float64(isa, dtype, shape, options):
    check(shape, dtype, options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_triton_matches_float64(triton, options):
    check((5, 1031), torch.float32, options, device=triton)
    check((1, 33000), torch.float16, options, device=triton)


def test_one_class_of_probability_1_is_that_class():
    logits, target = torch.randn(5, 40), torch.randint(0, 40, (5,))
    soft = run(ops.cross_entropy, logits, F.one_hot(target, 40).float(), {})
    for a, b in zip(soft, run(ops.cross_entropy, logits, target, {})):
        torch.testing.assert_close(a, b)


def test_is_one_graph():
    def calls():
        for rows in (4, 5, 9):
            logits = torch.randn(rows, 20, requires_grad=True)
            yield logits, torch.randn(rows, 20).softmax(-1)

    assert_compiles_once(lambda x, t: ops.cross_entropy(x, t, label_smoothing=0.1), [*calls()])


def test_rows_of_any_stride(isa):
    logits, target = torch.randn(6, 50), torch.randn(6, 50).softmax(-1)
    apart = torch.stack((target, torch.full_like(target, torch.nan)), 1)[:, 0]
    for given in (apart, target.t().contiguous().t()):
        for a, b in zip(*(run(ops.cross_entropy, logits, t, {}) for t in (given, target))):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.rand(3, 5)}, r"target: expected probabilities of shape \(3, 4\)"),
        ({"target": torch.rand(3, 4, requires_grad=True)}, "target: expected constants"),
        ({"ignore_index": 2}, "ignore_index: expected class numbers as target, got 2"),
        ({"weight": torch.rand(5)}, r"weight: wanted floats of shape \(4,\)"),
    ],
)
def test_refusals(change, message):
    arguments = {"logits": torch.randn(3, 4), "target": torch.rand(3, 4)} | change
    with pytest.raises(InputError, match=message):
        ops.cross_entropy(**arguments)


def test_cuda_kernels_refuse_them_when_forced():
    if backend.why_not("simt"):
        pytest.skip(f"needs the emulator: {backend.why_not('simt')}")
    with backend.use_backend("simt"), pytest.raises(InputError, match="class numbers as targets"):
        ops.cross_entropy(torch.randn(3, 4), torch.rand(3, 4))
