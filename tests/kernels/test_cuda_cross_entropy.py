"""cross_entropy's CUDA kernels against float64, on the emulator if there is no GPU."""

import pytest
import test_triton_cross_entropy as on_triton
import torch
from test_cross_entropy import OPTIONS, check, make, outputs_and_gradient
from tolerance import ULP

from fastlm import ops


@pytest.fixture(params=["whole rows", "split rows"])
def split(request, monkeypatch, cuda):
    """Whole or split rows: parts of 128 bytes, and enough blocks to split the most rows here."""
    from fastlm.cuda import constants, cross_entropy

    if request.param == "split rows":
        monkeypatch.setattr(constants(), "CROSS_ENTROPY_PART_BYTES", 128)
        monkeypatch.setattr(cross_entropy, "_WAVES", 1)
        monkeypatch.setattr(cross_entropy, "multiprocessors", lambda device: 40)
    return cuda


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_float64(split, dtype, options):
    weight = torch.rand(323, device=split)
    check(*make(5, 323, dtype, device=split), weight=weight, **options)
    check(*make(2, 323, dtype, device=split), **options)


# rows that begin within a vector, and rows shorter than a vector
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 17, 65, 256])
def test_vocabulary_not_a_multiple_of_a_vector(split, dtype, classes):
    check(*make(5, classes, dtype, device=split), label_smoothing=0.1)


@pytest.mark.parametrize("case", ["peaked", "all negative", "common offset", "rising", "falling"])
def test_hard_logits(split, dtype, case):
    on_triton.test_hard_logits(split, dtype, case)


def test_several_vectors_a_thread_and_own_parts(cuda):
    """More than UNROLL vectors per thread, and the parts that ship: 2 for a row of float32."""
    check(*make(1, 2 * 4096 + 9, torch.float32, device=cuda), label_smoothing=0.1)
    check(*make(17, 4096 + 1031, torch.float32, device=cuda))
    check(*make(1, 16384 + 5, torch.bfloat16, device=cuda), z_loss=1e-2)


def test_not_finite_as_torch(split, dtype):
    on_triton.test_not_finite_as_torch(split, dtype)


def test_lowest_numbers(split, dtype):
    """A row filled with a mask's lowest number is a row of equal logits."""
    logits = torch.full((1, 70), torch.finfo(dtype).min, device=split).to(dtype)
    target = torch.zeros(1, dtype=torch.int64, device=split)
    loss, gradient = outputs_and_gradient(
        ops.cross_entropy, logits, target, [torch.ones((), device=split)]
    )
    torch.testing.assert_close(loss.cpu(), torch.tensor(70.0).log())
    assert gradient[0, 1:].float().allclose(torch.tensor(1 / 70, device=split), rtol=1e-2)


def test_every_row_ignored_and_no_rows(split):
    on_triton.test_every_row_ignored_and_no_rows(split)


@pytest.mark.parametrize("bad", [-1, 8, 2**40, -(2**62)])
def test_class_that_does_not_exist(split, dtype, bad):
    on_triton.test_class_that_does_not_exist(split, dtype, bad)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"num_items": 9, "softcap": 3.0}])
def test_loss_without_options(split, dtype, options):
    on_triton.test_loss_without_options(split, dtype, options)


def test_more_rows_than_threads_of_the_sum(cuda):
    check(*make(1100, 3, torch.float32, device=cuda))


def test_strides_and_repeat(split, dtype):
    """Row strides for which logits and gradient begin at different offsets from 16 bytes."""
    base = torch.randn(2, 3, 83, device=split).to(dtype)
    target = torch.randint(0, 40, (2, 3), device=split)
    upstream = [torch.randn(3, 2, device=split).t()]
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "reduction": "none"}
    for logits in (base[..., 3:43], base[..., :41], base[..., ::2], base[:1, :1, :40]):
        logits = logits.expand(2, 3, -1)
        mine, again, plain = (
            outputs_and_gradient(ops.cross_entropy, z, target, upstream, **options)
            for z in (logits, logits, logits.contiguous())
        )
        assert all(torch.equal(a, b) for a, b in zip(mine, again))
        # a row with another alignment is summed in other vectors, so the order and the bits differ
        torch.testing.assert_close(mine[0], plain[0], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(mine[1], plain[1], rtol=2 * ULP[dtype], atol=1e-6)


def test_more_parts_than_lanes_of_the_warp_that_adds_them(cuda, monkeypatch):
    from fastlm.cuda import constants, cross_entropy

    monkeypatch.setattr(constants(), "CROSS_ENTROPY_PART_BYTES", 16)
    monkeypatch.setattr(cross_entropy, "multiprocessors", lambda device: 40)
    for offset in (-50.0, 50.0):  # the largest logit is in the first parts, or in the last
        logits, target = make(1, 500, torch.float32, ignored=0, device=cuda)
        logits += torch.linspace(-offset, offset, 500, device=cuda)
        check(logits, target, label_smoothing=0.1, return_lse=True)


@pytest.mark.parametrize("classes", [40, 77])
def test_gradient_in_place(cuda, dtype, classes):
    from fastlm.cuda.cross_entropy import row_gradients

    logits, target = make(5, classes, dtype, device=cuda)
    shift, log_sum, _, _ = torch.ops.fastlm.cross_entropy(
        logits, target, None, False, -100, None, 1.0
    )
    on = torch.rand(2, 5, device=cuda).unbind(0)
    row = (logits, target, None, shift, log_sum, -100, None, 1.0)
    expected = torch.ops.fastlm.cross_entropy_backward(*on, None, *row)
    row_gradients(*on, None, *row, logits)
    assert torch.equal(logits, expected)


def test_without_a_factor_of_p_no_p_is_looked_at(cuda, dtype):
    """The gradients of loss and lse cancel: only the target's is left, whatever the logits."""
    from fastlm.cuda.cross_entropy import row_gradients

    logits = torch.tensor([[0.5, torch.nan, torch.inf] * 7], device=cuda).to(dtype)
    target, none = torch.zeros(1, dtype=torch.int64, device=cuda), torch.zeros(1, device=cuda)
    gradient = torch.empty_like(logits)
    row_gradients(none, none + 2, None, logits, target, None, none, none, -100, None, 1.0, gradient)
    assert gradient[0, 0] == -2 and (gradient[0, 1:] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "apart"), [(torch.float16, 2**31 + 64), (torch.bfloat16, 2**31 + 3)]
)
def test_offsets_beyond_32_bits(cuda, dtype, apart):
    """Rows are 2^31 elements apart: an index multiplied in 32 bits would read elsewhere."""
    if cuda == "cuda":
        pytest.skip("8 GiB of device memory")
    storage = torch.UntypedStorage(2 * (apart + 64))  # pages are mapped only where used
    base = torch.tensor([], dtype=dtype).set_(storage)
    logits = base.as_strided((2, 40), (apart, 1))
    logits.copy_(torch.randn(2, 40))
    target = torch.tensor([3, 39])
    torch.testing.assert_close(
        ops.cross_entropy(logits, target), ops.cross_entropy(logits.clone(), target)
    )


def test_refusals(cuda):
    from fastlm.cuda import extension

    logits, target = make(3, 8, torch.float32, device=cuda)
    shift, log_sum, nll = torch.empty(3, 3, device=cuda).unbind(0)

    def forward(logits, target):
        extension().cross_entropy_forward(
            logits, target, None, False, -100, 0.0, 1.0, None, shift, log_sum, nll, None, 0
        )

    with pytest.raises(ValueError, match="target: wanted rows 3, got 2"):
        forward(logits, target[:2])
    with pytest.raises(ValueError, match="target: wanted a contiguous tensor"):
        forward(logits, torch.zeros(6, dtype=torch.int64, device=cuda)[::2])
    with pytest.raises(ValueError, match="logits: wanted classes side by side, got stride 2"):
        forward(torch.zeros(3, 16, device=cuda)[:, ::2], target)
    with pytest.raises(ValueError, match="logits: wanted float32, bfloat16 or float16, got int64"):
        forward(logits.long(), target)
