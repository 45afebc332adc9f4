"""AdamW's CUDA kernels, on the emulator if there is no GPU: the tests of test_optim.py and
tests/kernels/test_triton_adamw.py on smaller tensors, and what only these kernels can get wrong.
"""

from random import Random

import fuzz_ops
import pytest
import test_optim as on_cpu
import test_triton_adamw as on_triton
import torch
from test_triton_adamw import uploaded  # noqa: F401, a fixture

from fastlm import AdamW, backend, reference

# more than a chunk, less than a warp's 256, rows, a scalar, nothing
SHAPES = [(8500,), (257,), (3, 5, 7), (), (0, 4)]
DTYPES = on_triton.DTYPES


@pytest.fixture(autouse=True)
def _device(cuda, monkeypatch):
    parameters = on_cpu.parameters
    monkeypatch.setattr(
        on_cpu, "parameters", lambda dtype=torch.float32, shapes=SHAPES: parameters(dtype, shapes)
    )
    with torch.device(cuda):
        yield


@pytest.fixture
def module(cuda):
    from fastlm.cuda import adamw

    return adamw


@pytest.mark.parametrize(("maximize", "clip"), [(False, None), (True, 0.5), (False, 1e6)])
def test_as_exact_as_torch(maximize, clip):
    on_cpu.test_as_exact_as_torch(None, maximize, clip)


@pytest.mark.parametrize("param", DTYPES)
@pytest.mark.parametrize("grad", DTYPES)
def test_parameter_and_gradient_dtypes(param, grad):
    on_cpu.test_parameter_and_gradient_dtypes(None, param, grad)


@pytest.mark.parametrize("state", ["float32", "8 bits", "master", "8 bits, master", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_near_the_formula_in_float64(state, dtype):
    """Each step starts from the state after the previous one, with the bounds of the fuzz tests."""
    options = {"lr": 1e-2, "betas": [0.8, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    options |= {"maximize": dtype == torch.float16, "max_grad_norm": 0.5}
    case = {"shapes": [[4500], [3, 7]], "state": state, "grad_dtype": "float16", "threads": 1}
    case |= {"spread": 1.0, "steps": 3, "options": options}
    fuzz_ops.run_adamw(case, dtype, Random(0))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"stochastic_rounding": True, "seed": 7}),
        (torch.bfloat16, {"stochastic_rounding": True, "state_bits": 8}),
        (torch.float32, {"state_bits": 8}),
        (torch.float16, {"state_bits": 8, "master_weights": True}),
        (torch.bfloat16, {"master_weights": True, "max_grad_norm": 1.0}),
    ],
    ids=str,
)
def test_agrees_with_reference(cuda, dtype, options):
    results = []
    for name in ("cuda" if cuda == "cuda" else "simt", "reference"):
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


@pytest.mark.parametrize("options", [{}, {"state_bits": 8}, {"master_weights": True}])
def test_memory_orders(options):
    on_cpu.test_memory_orders_and_gaps(None)
    on_cpu.test_memory_order_that_changes_between_steps(None, options)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_refuses_gradients(clip):
    on_cpu.test_refuses_gradients_the_kernel_does_not_take(clip)


@pytest.mark.parametrize("mine_first", [True, False])
def test_checkpoints_go_to_torch_and_back(mine_first, tmp_path):
    on_cpu.test_checkpoints_go_to_torch_and_back(mine_first, tmp_path)


def test_options():
    on_cpu.test_options_per_group()
    on_cpu.test_schedulers_tensor_lr_closure_deepcopy_and_missing_grads()
    on_cpu.test_torch_knows_what_a_step_wrote(None)


@pytest.mark.parametrize("bits", [32, 8])
def test_bad_gradients_propagate(bits):
    on_cpu.test_bad_gradients_propagate(None, bits)


def test_a_bad_gradient_shows_in_both_states_of_its_block():
    p = torch.zeros(5000, requires_grad=True)
    p.grad = torch.ones(5000)
    p.grad[300] = float("nan")
    optimizer = AdamW([p], state_bits=8)
    optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        bad = optimizer.state[p][f"{name}_scale"].isnan()
        assert bad[1] and bad.sum() == 1


def test_a_norm_that_is_nan_is_seen_everywhere():
    """All parameters become NaN, as in clip_grad_norm_."""
    params = on_cpu.parameters()
    on_cpu.give_grads(params)
    params[0].grad[7] = float("nan")
    optimizer = AdamW(params, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm is not None and optimizer.grad_norm.isnan()
    assert all(p.isnan().all() for p in params)


def test_masters_of_every_kind_of_bits(cuda):
    name = "cuda" if cuda == "cuda" else "simt"
    on_cpu.test_masters_of_every_kind_of_bits(None, name)
    on_cpu.test_a_parameter_set_to_zero_between_steps(None, name)


def test_same_bits_on_repeat():
    on_triton.test_same_bits_on_repeat()


KINDS = [
    (torch.float32, {}),
    (torch.bfloat16, {"stochastic_rounding": True}),
    (torch.bfloat16, {"master_weights": True}),
    (torch.float16, {"master_weights": True}),
    (torch.float32, {"state_bits": 8}),
    (torch.bfloat16, {"state_bits": 8, "lr": 3e-3, "maximize": True}),
]


def test_one_launch_of_all_kinds_is_a_launch_of_each():
    """The bits of a tensor do not depend on its neighbours, aligned to 16 bytes or not."""
    flat = torch.randn(20000)
    together: list[list] = []
    alone: list[list] = []
    for i, (dtype, _) in enumerate(KINDS):
        for groups in (together, alone):
            base = flat.to(dtype, copy=True)
            parts = base[i : i + 5003], base[6000:6256], base[7001:7001]
            groups.append([p.detach().requires_grad_() for p in parts])
    options = {"lr": 1e-2, "max_grad_norm": 0.5}
    optimizers = [
        AdamW([{"params": g, **o} for g, (_, o) in zip(together, KINDS)], **options),
        # after parameters without a gradient: the random numbers depend on a tensor's position
        *(
            AdamW(
                [{"params": [torch.ones(1) for _ in range(3 * i)]}, {"params": g, **o}], **options
            )
            for i, (g, (_, o)) in enumerate(zip(alone, KINDS))
        ),
    ]
    for _ in range(2):
        for params, copies in zip(together, alone):
            on_cpu.give_grads(params, copies, scale=1e-4)  # the norm is too small to clip
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].grad_norm is not None and optimizers[0].grad_norm < 0.5
    for params, copies in zip(together, alone):
        assert all(torch.equal(p, q) for p, q in zip(params, copies))


def test_tensors_that_begin_between_16_bytes():
    flat = torch.randn(3001)
    params = [flat[a:b].detach().requires_grad_() for a, b in ((0, 1000), (1001, 3001))]
    wanted = on_cpu.clones(params)
    on_cpu.give_grads(params, wanted)
    kept = flat[1000].clone()
    AdamW(params, max_grad_norm=1e6).step()
    torch.optim.AdamW(wanted).step()
    for p, w in zip(params, wanted):
        torch.testing.assert_close(p, w, rtol=1e-6, atol=1e-7)
    assert flat[1000] == kept


def test_a_master_that_begins_between_16_bytes(module):
    """Everything else is aligned to 16 bytes."""
    p, g, master = torch.zeros(300).half(), torch.ones(300).half(), torch.zeros(301)[1:]
    module.adamw([on_cpu.tensor(p, g, lr=0.5, master=master)], 0.0, None, False)
    torch.testing.assert_close(master, torch.full((300,), -0.5))
    assert torch.equal(p, master.half())


def test_tables_are_kept_and_a_capture_wants_them_made(uploaded, monkeypatch):  # noqa: F811
    on_triton.test_tables_are_kept_until_what_they_say_changes(uploaded)
    on_triton.test_capture_of_a_graph_wants_its_tables_made(uploaded, monkeypatch)


def test_lr_of_the_device_is_read_at_every_step(module):
    on_triton.test_lr_of_the_device_is_read_at_every_step(module)


def test_bias_correction_of_late_steps(module):
    on_triton.test_bias_correction_of_late_steps(module)


def test_codes_of_states_of_every_size(module):
    """A block's largest moment is 1; the others go down to sizes that vanish."""
    g = torch.cat([torch.exp2(torch.linspace(-24, 0, 2047)), torch.ones(1)])
    g[::2] *= -1
    g = g.view(256, 8).t().contiguous().flatten()  # every size in every block
    g[::256] = 1.0
    codes = [torch.zeros(2048, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(8) for _ in range(2)]
    tensor = on_cpu.tensor(
        torch.zeros(2048), g, beta1=0.0, beta2=0.0,  # the states depend on g only
        exp_avg=codes[0], exp_avg_sq=codes[1], exp_avg_scale=scales[0], exp_avg_sq_scale=scales[1],
    )  # fmt: skip
    module.adamw([tensor], 0.0, None, False)
    for i, x in enumerate((g, (g * g).sqrt())):
        wanted, scale = reference.pack_state(x.cpu(), root=i == 1)
        assert torch.equal(codes[i].cpu(), wanted) and torch.equal(scales[i].cpu(), scale)


def test_stochastic_rounding_keeps_every_nan(module):
    """A GPU's own NaN has all bits set: the number added for rounding would turn it into -0."""
    bits = torch.full((600,), 0x7FFFFFFF, dtype=torch.int32)
    p, g = torch.zeros(600).bfloat16(), bits.view(torch.float32)
    module.adamw([on_cpu.tensor(p, g, stochastic=True)], 0.0, None, False)
    assert p.isnan().all()


def test_a_norm_that_is_given(module):
    """A norm passed in, as for sharded parameters, whose norm was summed over ranks before."""
    p, g, norm = torch.zeros(20), torch.full((20,), 2.0), torch.tensor(4.0)
    tensor = on_cpu.tensor(p, g)
    module.adamw([tensor], 1.0, norm, True)
    torch.testing.assert_close(tensor.exp_avg, torch.full((20,), 0.1 * 2.0 / (4.0 + 1e-6)))
    assert norm == 4.0


def test_more_tensors_than_a_block_of_the_first_kernel():
    params = on_cpu.parameters(shapes=[(i,) for i in range(1, 141)])
    wanted = on_cpu.clones(params)
    on_cpu.give_grads(params, wanted)
    AdamW(params).step()
    torch.optim.AdamW(wanted).step()
    for p, w in zip(params, wanted):
        torch.testing.assert_close(p, w, rtol=1e-6, atol=1e-7)


def test_refuses_tensors_of_several_devices(module):
    on_triton.test_refuses_tensors_of_several_devices(module)
