"""Tests of adamw beyond its table of cases (cases/adamw.py). test_optim.py tests the class."""

import pytest
import torch
from cases.adamw import case, of
from cases.base import clone_leaves, misaligned_copy
from contract import test_same_bits_on_any_number_of_threads  # noqa: F401
from contract_in_place import *  # noqa: F403
from on_kernels import on

from fastlm import AdamW, InputError, backend, reference
from fastlm.cuda import adamw_tables
from fastlm.ops.adamw import adamw
from fastlm.reference import AdamWOptions, AdamWTensor

HARD = [
    0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x00008000, 0x00000001, 0x7F7F7FFF, 0x80000000,
]  # fmt: skip
NAN = 0x7FFFFFFF  # a GPU's own; a number added to round it would make it -0


def tensor(param, grad, *, lr=0.1, weight_decay=0.0, stochastic=False, **states) -> AdamWTensor:
    """Return an argument of the op, before its first step."""
    states = {
        "exp_avg": torch.zeros_like(param, dtype=torch.float32),
        "exp_avg_sq": torch.zeros_like(param, dtype=torch.float32),
        "exp_avg_scale": None,
        "exp_avg_sq_scale": None,
        "master": None,
        **states,
    }
    options = AdamWOptions(lr, 0.9, 0.999, 1e-8, weight_decay, False, stochastic)
    step = torch.zeros((), device=param.device)
    return AdamWTensor(param, grad, step, **states, options=options, seed=0, ordinal=0)


def trained(device: str, *sizes: int, **options) -> tuple[list[torch.Tensor], AdamW]:
    """Return parameters with gradients, and their optimizer."""
    params = [torch.randn(n, device=device).requires_grad_() for n in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params, AdamW(params, **options)


# ---- numbers that are not finite, every bit of a master


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # from the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_gradients_propagate(op, kernel, value):
    """They make their element NaN in float32, and their block in 8 bits, including both scales."""
    for state in ("float32", "8 bits"):
        call = op.build_for(
            case(5000, kinds=of(state, "float32")), torch.float32, kernel.language, kernel.device
        )
        param, grad, *_ = call.leaves
        grad[300] = value
        scales = call.function(*call.leaves)[5:7]
        for scale in scales:
            assert scale[1].isnan() and scale.isnan().sum() == 1
        grad.normal_()
        call.function(*call.leaves)
        bad = param.isnan()
        assert bad[256:512].all() if scales else bad[300]
        assert bad.sum() == (256 if scales else 1)


def test_a_norm_that_is_nan_is_seen_everywhere(kernel):
    """All parameters become NaN, as in clip_grad_norm_."""
    good, norm = torch.ones(300, device=kernel.device), torch.zeros((), device=kernel.device)
    bad = good.index_fill(0, torch.tensor([7], device=kernel.device), float("nan"))
    tensors = [tensor(torch.zeros_like(good, dtype=t), bad) for t in (torch.float32, torch.half)]
    tensors[1] = tensors[1]._replace(grad=good)
    adamw(tensors, 1.0, norm, False)
    assert norm.isnan() and all(t.param.isnan().all() for t in tensors)


def test_every_nan_stays(kernel):
    g = torch.full((600,), NAN, dtype=torch.int32, device=kernel.device).view(torch.float32)
    rounded, halves = (torch.zeros_like(g, dtype=torch.bfloat16) for _ in range(2))
    low = torch.zeros_like(g, dtype=torch.int16)
    tensors = [tensor(rounded, g, stochastic=True), tensor(halves, g, master=low)]
    adamw(tensors, 0.0, None, False)
    assert rounded.isnan().all() and halves.isnan().all()


def masters() -> torch.Tensor:
    bits = torch.cat([torch.tensor(HARD, dtype=torch.int64), torch.randint(0, 2**32, (1000,))])
    exact = bits.int().view(torch.float32)
    return exact.where(exact.abs() < 3e38, 1.0)


def assert_kept(exact: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Compare bit by bit; denormals may be flushed."""
    after = reference.join_master(high, low)
    normal = exact.abs() >= torch.finfo(torch.float32).tiny
    assert torch.equal(after[normal].view(torch.int32), exact[normal].view(torch.int32))
    assert (after[~normal].abs() <= exact[~normal].abs()).all()


def test_masters_of_every_kind_of_bits(kernel):
    """Ties and signed zeros survive a step that changes nothing."""
    exact = masters().to(kernel.device)
    high, low = reference.split_master(exact)
    adamw([tensor(high, torch.zeros_like(exact), lr=0.0, master=low)], 0.0, None, False)
    assert_kept(exact, high, low)


# ---- the definition


def test_masters_are_split_and_joined():
    exact = masters()
    assert_kept(exact, *reference.split_master(exact))


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 12.0])
@pytest.mark.parametrize("n", [1, 255, 256, 700])
def test_packed_states_keep_what_they_promise(n, spread, root):
    x = torch.randn(n) * torch.exp(spread * torch.randn(n))
    x = x.abs() if root else x
    x[::7] = 0
    codes, scales = reference.pack_state(x, root=root)
    y = reference.unpack_state(codes, scales, root=root)
    top = scales.repeat_interleave(reference.STATE_BLOCK)[:n]
    assert scales.shape == (-(-n // 256),) and codes.dtype == torch.uint8
    half_step = 2**-5 if root else 2**-4  # with 4 or 3 mantissa bits
    smallest = top * 2**-15.7
    inside = x.abs() > smallest
    assert ((x - y).abs() <= x.abs() * (half_step + 1e-6))[inside].all()
    assert ((x - y).abs() <= smallest)[~inside].all()
    assert (y[x == 0] == 0).all() and (not root or (y[x > 0] > 0).all())
    repacked, same = reference.pack_state(y, root=root)
    assert torch.equal(reference.unpack_state(repacked, same, root=root), y)


def test_the_kernel_has_the_definitions_constants():
    assert backend.cpu_extension.ADAMW_CHUNK == reference.RANDOM_CHUNK
    assert backend.cpu_extension.ADAMW_BLOCK == reference.STATE_BLOCK


def test_the_profiler_shows_the_op():
    with torch.profiler.profile() as profile:
        adamw([tensor(torch.ones(3), torch.ones(3))], 0.0, None, False)
    assert [e.count for e in profile.key_averages() if e.key == "fastlm::adamw"] == [1]


# ---- refusals


def test_refuses_before_it_writes(kernel):
    """An exception in a parallel region would end the process."""
    ones = torch.ones(5000, device=kernel.device)
    good, bad = (tensor(ones.clone(), ones.clone()) for _ in range(2))
    for clip in (None, torch.zeros((), device=kernel.device)):
        for wrong, message in (
            (bad._replace(grad=ones[:5]), "grad: expected elements: 5000, got 5"),
            (bad._replace(grad=ones.double()), r"grad: expected float32, .* got float64"),
            (bad._replace(step=torch.zeros_like(ones[0].long())), "step: expected .*float"),
        ):
            with pytest.raises(InputError, match=message):
                adamw([good, wrong], 1.0, clip, False)
            assert good.step == 0 and (good.param == 1).all()


@on("cpu")
def test_refuses_scales_that_do_not_fit(kernel):
    codes = torch.zeros(5000, dtype=torch.uint8)
    bad = tensor(torch.ones(5000), torch.ones(5000), exp_avg=codes, exp_avg_sq=codes)
    with pytest.raises(InputError, match="exp_avg_sq_scale: expected blocks: 20, got 0"):
        adamw([bad._replace(exp_avg_scale=torch.zeros(20))], 0.0, None, False)


@on("triton", "cuda")
def test_refuses_tensors_of_several_devices(kernel):
    bad = tensor(torch.ones(3, device=kernel.device), torch.ones(3, device="meta"))
    with pytest.raises(InputError, match=r"grad: expected device .* as the first .*, got meta"):
        adamw([bad], 0.0, None, False)


# ---- what a GPU's tables and launches can get wrong


@on("cuda")
def test_tensors_between_16_bytes(op, kernel):
    """One tensor begins there, and all else is aligned."""
    for state in ("float32", "8 bits, master"):
        call = op.build_for(case(300, kinds=of(state)), torch.float16, "cuda", kernel.device)
        for i in range(len(call.leaves)):
            leaves = clone_leaves(call)
            if leaves[i].dim():
                leaves[i] = misaligned_copy(leaves[i], 0)
            call.verify(call.leaves, call.function(*leaves))


@on("triton")
@pytest.mark.parametrize(("start", "updates"), [(1000, 1), (1001, 2)])
def test_many_tensors_are_one_launch(kernel, start, updates, monkeypatch):
    """There are two launches where some tensors allow 128-bit accesses and some do not."""
    from fastlm.kernels import adamw as module

    launched, launch = [], module.launch
    monkeypatch.setattr(
        module, "launch", lambda k, *a, **o: launched.append(k.__name__) or launch(k, *a, **o)
    )
    flat = torch.randn(2001, device=kernel.device)
    parts = [flat[:1000], flat[start:2000], *(flat[i : i + 4] for i in range(0, 40, 4))]
    params = [p.detach().requires_grad_() for p in parts]
    for p in params:
        p.grad = torch.zeros_like(flat)[: len(p)]
    AdamW(params).step()
    assert launched == ["_begin", *["_update"] * updates]


@pytest.fixture
def uploaded(monkeypatch):
    """Record the shapes of the tables uploaded to the device. Other tests' tables are dropped."""
    for table in ("_tensor_table", "_chunk_tables", "_setting_table"):
        getattr(adamw_tables, table).cache_clear()
    shapes, upload = [], adamw_tables._upload
    monkeypatch.setattr(
        adamw_tables, "_upload", lambda v, device: shapes.append(v.shape) or upload(v, device)
    )
    return shapes


@on("triton", "cuda")
def test_tables_are_kept_until_what_they_say_changes(kernel, uploaded):
    params, optimizer = trained(kernel.device, 50, 3, max_grad_norm=1.0)
    optimizer.step()
    assert sorted(uploaded) == [(1, 8), (2, 2), (2, 12)]  # settings, chunks, tensors
    uploaded.clear()
    optimizer.step()
    assert uploaded == []
    params[0].grad = params[0].grad.clone()
    optimizer.step()
    assert uploaded == [(2, 12)]
    before = params[0].detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0  # as a schedule changes it at every step
    uploaded.clear()
    optimizer.step()
    assert uploaded == [(1, 8)]
    assert torch.equal(params[0], before)


@on("triton", "cuda")
def test_capture_of_a_graph_wants_its_tables_made(kernel, uploaded, monkeypatch):
    """A step that needs a copy from the host is refused, and nothing is written."""
    params, optimizer = trained(kernel.device, 50, 3)
    saved, message = (
        [p.detach().clone() for p in params],
        "step: expected, in the capture of a CUDA",
    )
    monkeypatch.setattr(adamw_tables, "_captured", [])
    with monkeypatch.context() as capture:
        capture.setattr(adamw_tables, "_is_capturing", lambda device: True)
        with pytest.raises(InputError, match=message):
            optimizer.step()
    assert all(torch.equal(p, k) for p, k in zip(params, saved)) and not adamw_tables._captured
    optimizer.step()
    monkeypatch.setattr(adamw_tables, "_is_capturing", lambda device: True)
    optimizer.step()
    assert len(adamw_tables._captured) == 1
    params[1].grad = params[1].grad.clone()  # as zero_grad() does without set_to_none=False
    with pytest.raises(InputError, match=message):
        optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 for p in params)


@on("triton", "cuda")
def test_lr_of_the_device_is_read_at_every_step(kernel):
    """A captured step reads it in this way. On a GPU `AdamW` passes such a tensor on unchanged."""
    lr = torch.tensor(1e-2, device=kernel.device)
    step, g = torch.ones(20, device=kernel.device), torch.randn(20, device=kernel.device)
    by_tensor, by_number = (tensor(step.clone(), g, weight_decay=0.1) for _ in range(2))
    for value in (1e-2, 1e-3, 0.5):
        lr.fill_(value)
        for t, rate in ((by_tensor, lr), (by_number, lr.item())):
            adamw([t._replace(options=t.options._replace(lr=rate))], 0.0, None, False)
        assert torch.equal(by_tensor.param, by_number.param)
    assert by_tensor.step == 3


@on("triton", "cuda")
def test_steps_are_where_the_parameters_are(kernel):
    (p,), optimizer = trained(kernel.device, 5)
    optimizer.step()
    assert optimizer.state[p]["step"].device.type == kernel.device
    assert optimizer.state_dict()["state"][0]["step"].is_cpu  # as in torch's own optimizer
