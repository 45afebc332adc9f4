"""AdamW's Triton kernels, interpreted if there is no GPU: the tests of test_optim.py on
smaller tensors, agreement with the reference, and what only a GPU's tables can get wrong.
"""

from random import Random

import fuzz_ops
import pytest
import test_optim as on_cpu
import torch

from fastlm import AdamW, InputError, backend
from fastlm.cuda import adamw_tables

# more than a chunk, less than a block, rows, a scalar, nothing
SHAPES = [(9000,), (257,), (3, 5, 7), (), (0, 4)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _device(triton, monkeypatch):
    parameters = on_cpu.parameters
    monkeypatch.setattr(
        on_cpu, "parameters", lambda dtype=torch.float32, shapes=SHAPES: parameters(dtype, shapes)
    )
    from fastlm.kernels import adamw, launch

    if launch.INTERPRETED:  # a quarter of the iterations
        larger = launch.Config({"BLOCK": 4096})
        monkeypatch.setattr(adamw, "_UPDATE", larger)
        monkeypatch.setattr(adamw, "_SQUARES", larger)
    with torch.device(triton):
        yield


@pytest.fixture
def module(triton):
    from fastlm.kernels import adamw

    return adamw


@pytest.fixture
def launched(module, monkeypatch):
    """The names of the launched kernels."""
    names = []
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda k, *a, **o: (names.append(k.__name__), launch(k, *a, **o))
    )
    return names


@pytest.mark.parametrize(("maximize", "clip"), [(False, None), (True, 0.5), (False, 1e6)])
def test_as_exact_as_torch(maximize, clip):
    on_cpu.test_as_exact_as_torch(None, maximize, clip)


@pytest.mark.parametrize("param", DTYPES)
@pytest.mark.parametrize("grad", DTYPES)
def test_parameter_and_gradient_dtypes(param, grad):
    on_cpu.test_parameter_and_gradient_dtypes(None, param, grad)


@pytest.mark.parametrize("dtype16", DTYPES[1:])
def test_master_weights_follow_float32(dtype16):
    on_cpu.test_master_weights_follow_float32(None, dtype16)


@pytest.mark.parametrize("state", ["float32", "8 bits", "master", "8 bits, master", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_near_the_formula_in_float64(state, dtype):
    """Each step starts from the state after the previous one, with the bounds of the fuzz tests."""
    options = {"lr": 1e-2, "betas": [0.8, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    options |= {"maximize": dtype == torch.float16, "max_grad_norm": 0.5}
    case = {"shapes": [[5000], [3, 7]], "state": state, "grad_dtype": "float16", "threads": 1}
    case |= {"spread": 1.0, "steps": 3, "options": options}
    fuzz_ops.run_adamw(case, dtype, Random(0))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"stochastic_rounding": True, "seed": 7}),
        (torch.bfloat16, {"stochastic_rounding": True, "state_bits": 8}),
        (torch.float32, {"state_bits": 8}),
        (torch.bfloat16, {"master_weights": True, "max_grad_norm": 1.0}),
    ],
    ids=str,
)
def test_agrees_with_reference(dtype, options):
    results = []
    for name in ("triton", "reference"):
        torch.manual_seed(3)
        params = on_cpu.parameters(dtype, shapes=[(33000,), (80, 77)])  # exceeds a key's 32768
        optimizer = AdamW(params, lr=1e-2, **options)
        with backend.use_backend(name):
            for _ in range(2):
                on_cpu.give_grads(params)
                optimizer.step()
        results.append((params, optimizer.state_dict()["state"]))
    for i, (p, q) in enumerate(zip(results[0][0], results[1][0])):
        # a fused multiply-add rounds once, so some values are rounded the other way, though rarely
        off = (p.float() - q.float()).abs()
        assert (off > 1e-6 * q.float().abs() + 1e-7).float().mean() < 2e-3 and off.max() < 0.05
        for key in ("exp_avg", "exp_avg_sq"):
            x, y = (r[1][i][key] for r in results)
            assert ((x - y).abs() > 1e-6 * y.abs() + 2**-24).float().mean() < 2e-3


def test_memory_orders():
    on_cpu.test_memory_orders_and_gaps(None)
    for options in ({}, {"state_bits": 8}, {"master_weights": True}):
        on_cpu.test_memory_order_that_changes_between_steps(None, options)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_refuses_gradients(clip):
    on_cpu.test_refuses_gradients_the_kernel_does_not_take(clip)


@pytest.mark.parametrize("mine_first", [True, False])
def test_checkpoints_go_to_torch_and_back(mine_first, tmp_path):
    on_cpu.test_checkpoints_go_to_torch_and_back(mine_first, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"state_bits": 8}),
        (torch.bfloat16, {"master_weights": True, "state_bits": 8}),
        (torch.bfloat16, {"stochastic_rounding": True, "seed": 5}),
    ],
    ids=str,
)
def test_resume_gives_the_same_bits(dtype, options):
    on_cpu.test_resume_gives_the_same_bits(dtype, options)


def test_options():
    on_cpu.test_options_per_group()
    on_cpu.test_schedulers_tensor_lr_closure_deepcopy_and_missing_grads()
    on_cpu.test_torch_knows_what_a_step_wrote(None)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # from numpy's maximum
@pytest.mark.parametrize("bits", [32, 8])
def test_bad_gradients_propagate(bits):
    on_cpu.test_bad_gradients_propagate(None, bits)


def test_masters_of_every_kind_of_bits():
    on_cpu.test_masters_of_every_kind_of_bits(None, "triton")
    on_cpu.test_a_parameter_set_to_zero_between_steps(None, "triton")


def test_same_bits_on_repeat():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        params = on_cpu.parameters()
        optimizer = AdamW(params, state_bits=8, max_grad_norm=1.0)
        for _ in range(2):
            on_cpu.give_grads(params)
            optimizer.step()
        results.append([*(p.detach() for p in params), optimizer.grad_norm])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_many_tensors_are_one_launch(launched):
    params = on_cpu.parameters(shapes=[(4 * i,) for i in range(1, 101)])
    wanted = on_cpu.clones(params)
    on_cpu.give_grads(params, wanted)
    AdamW(params).step()
    assert launched == ["_begin", "_update"]
    torch.optim.AdamW(wanted).step()
    for p, w in zip(params, wanted):
        torch.testing.assert_close(p, w, rtol=1e-6, atol=1e-7)


def test_tensors_that_begin_between_16_bytes(launched):
    flat = torch.randn(3001)
    params = [flat[a:b].detach().requires_grad_() for a, b in ((0, 1000), (1001, 3001))]
    wanted = on_cpu.clones(params)
    on_cpu.give_grads(params, wanted)
    kept = flat[1000].clone()
    AdamW(params, max_grad_norm=1e6).step()
    assert launched.count("_update") == 2  # one with 128-bit accesses, one without
    torch.optim.AdamW(wanted).step()
    for p, w in zip(params, wanted):
        torch.testing.assert_close(p, w, rtol=1e-6, atol=1e-7)
    assert flat[1000] == kept


@pytest.fixture
def uploaded(monkeypatch):
    """The shapes of the tables uploaded to the device. Tables of other tests are not kept."""
    for table in ("_tensor_table", "_chunk_tables", "_setting_table"):
        getattr(adamw_tables, table).cache_clear()
    shapes, upload = [], adamw_tables._upload
    monkeypatch.setattr(
        adamw_tables, "_upload", lambda v, device: shapes.append(v.shape) or upload(v, device)
    )
    return shapes


def test_tables_are_kept_until_what_they_say_changes(uploaded):
    params = on_cpu.parameters(shapes=[(50,), (3,)])
    optimizer = AdamW(params, max_grad_norm=1.0)
    on_cpu.give_grads(params)
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


def test_capture_of_a_graph_wants_its_tables_made(uploaded, monkeypatch):
    """A step that needs a copy from the host is refused, and nothing is written."""
    params = on_cpu.parameters(shapes=[(50,), (3,)])
    optimizer = AdamW(params)
    on_cpu.give_grads(params)
    kept, message = [p.detach().clone() for p in params], "step: wanted, in the capture of a CUDA"
    monkeypatch.setattr(adamw_tables, "_captured", [])
    with monkeypatch.context() as capture:
        capture.setattr(adamw_tables, "_is_capturing", lambda device: True)
        with pytest.raises(InputError, match=message):
            optimizer.step()
    assert all(torch.equal(p, k) for p, k in zip(params, kept)) and not adamw_tables._captured
    optimizer.step()
    monkeypatch.setattr(adamw_tables, "_is_capturing", lambda device: True)
    optimizer.step()
    assert len(adamw_tables._captured) == 1
    params[1].grad = params[1].grad.clone()  # as zero_grad() does without set_to_none=False
    with pytest.raises(InputError, match=message):
        optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 for p in params)


def test_lr_of_the_device_is_read_at_every_step(module):
    """A captured step reads it in this way. On a GPU `AdamW` passes such a tensor on unchanged."""
    lr = torch.tensor(1e-2)
    g = torch.randn(20)
    by_tensor, by_number = (on_cpu.tensor(torch.ones(20), g) for _ in range(2))
    for value in (1e-2, 1e-3, 0.5):
        lr.fill_(value)
        for t, rate in ((by_tensor, lr), (by_number, lr.item())):
            options = t.options._replace(lr=rate, weight_decay=0.1)
            module.adamw([t._replace(options=options)], 0.0, None, False)
        assert torch.equal(by_tensor.param, by_number.param)
    assert by_tensor.step == 3


def test_steps_are_where_the_parameters_are(triton):
    p = torch.ones(5, requires_grad=True)
    optimizer = AdamW([p])
    p.grad = torch.ones(5)
    optimizer.step()
    assert optimizer.state[p]["step"].device.type == triton
    assert optimizer.state_dict()["state"][0]["step"].is_cpu  # as in torch's own optimizer


def test_bias_correction_of_late_steps(module):
    """beta^t needs float64: for 0.9999 after a million steps, and for 1 - beta^1, which cancels."""
    for before, betas in ((0, (0.9, 0.9999)), (123_456, (0.99999, 0.999999)), (2**24, (0.9, 0.99))):
        p = torch.ones(8, dtype=torch.float32, requires_grad=True)
        twin = torch.ones(8, dtype=torch.float64, requires_grad=True)
        mine = AdamW([p], lr=0.1, betas=betas, weight_decay=0.0)
        theirs = torch.optim.AdamW([twin], lr=0.1, betas=betas, weight_decay=0.0)
        for parameter, optimizer in ((p, mine), (twin, theirs)):
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.state[parameter]["step"].fill_(before)
            parameter.grad = torch.full_like(parameter, 0.37)
            optimizer.step()
        torch.testing.assert_close(p.double(), twin, rtol=2e-6, atol=0)


def test_refuses_tensors_of_several_devices(module):
    tensor = on_cpu.tensor(torch.ones(3), torch.ones(3, device="meta"))
    with pytest.raises(InputError, match=r"grad: wanted device .* as the first .*, got meta"):
        module.adamw([tensor], 0.0, None, False)
