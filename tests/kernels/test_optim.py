"""The class AdamW: as torch's, options, memory orders, masters, checkpoints, curves. Its kernels
have test_adamw.py.
"""

import copy
import math

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from fastlm import AdamW, InputError, backend

SHAPES = [(33, 70), (257,), (1,), (), (0, 4), (3, 5, 7), (70000,)]


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def clones(params, dtype=None):
    return [p.detach().clone().to(dtype or p.dtype).requires_grad_() for p in params]


def give_grads(params, *others, dtype=None, scale=1.0):
    """Give the same random gradient to each parameter and to its copies in the other lists."""
    for p, *copies in zip(params, *others):
        g = (torch.randn(p.shape) * scale).to(dtype or p.dtype)
        p.grad_dtype = None  # a gradient may have another dtype than its parameter
        p.grad = g
        for c in copies:
            c.grad = g.to(c.dtype)


@pytest.mark.parametrize(("maximize", "max_grad_norm"), [(False, None), (True, 0.5), (False, 1e6)])
def test_as_exact_as_torch(maximize, max_grad_norm):
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    mine = parameters()
    theirs, truth = clones(mine), clones(mine, torch.float64)
    a = AdamW(mine, **options, maximize=maximize, max_grad_norm=max_grad_norm)
    b = torch.optim.AdamW(theirs, **options, maximize=maximize)
    c = torch.optim.AdamW(truth, **options, maximize=maximize)
    for _ in range(5):
        give_grads(mine, theirs, truth)
        grads = [p.grad.clone() for p in mine]
        a.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(mine, grads))
        if max_grad_norm is not None:
            clip_grad_norm_(theirs, max_grad_norm)
            norm = clip_grad_norm_(truth, max_grad_norm)
            torch.testing.assert_close(a.grad_norm.double(), norm, rtol=1e-6, atol=0)
        b.step()
        c.step()
    for p, q, t in zip(mine, theirs, truth):
        if p.numel():
            mine_off, theirs_off = ((x.double() - t).abs().max().item() for x in (p, q))
            # half a unit in the last place of the largest parameter and step
            assert mine_off <= 2 * theirs_off + 5 * 2**-24 * t.abs().max().item()
    for p, t in zip(mine, truth):
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                a.state[p][name].double(), c.state[t][name], rtol=1e-5, atol=1e-7
            )


@pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16])
def test_master_weights_follow_float32(dtype16):
    mine = parameters(dtype16)
    wide = clones(mine, torch.float64)
    a = AdamW(mine, lr=1e-4, master_weights=True)
    b = torch.optim.AdamW(wide, lr=1e-4)
    for _ in range(20):
        give_grads(mine, wide)
        a.step()
        b.step()
    saved = a.state_dict()["state"]
    for i, (p, w) in enumerate(zip(mine, wide)):
        # 20 steps with half a unit in the last place each
        torch.testing.assert_close(
            saved[i]["master"].double(), w.detach(), rtol=20 * 2**-24, atol=1e-7
        )
        assert torch.equal(p, saved[i]["master"].to(dtype16))


def test_stochastic_rounding_is_unbiased_repeats_and_keeps_small_updates():
    n = 200_000  # more than six chunks
    results = []
    for threads, seed in ((1, 1), (2, 1), (2, 2)):
        p = torch.full((n,), 1.0, dtype=torch.bfloat16, requires_grad=True)
        opt = AdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=True, seed=seed)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for _ in range(10):
            p.grad = torch.ones_like(p)
            opt.step()
        torch.set_num_threads(before)
        results.append(p.detach().clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    # ten updates of 1e-4 against spacings of 2^-8 below 1: rounding to nearest would not move at
    # all
    x = results[0].double()
    assert abs(x.mean().item() - 0.999) < 5 * x.std().item() / math.sqrt(n)
    assert x.unique().numel() > 1
    plain = torch.full((n,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    opt = AdamW([plain], lr=1e-4, weight_decay=0.0)
    for _ in range(10):
        plain.grad = torch.ones_like(plain)
        opt.step()
    assert (plain == 1).all()


def test_8bit_states_are_small_and_start_at_4096():
    params = parameters(shapes=[(64, 64), (4095,)])
    opt = AdamW(params, state_bits=8)
    give_grads(params)
    opt.step()
    big, small = (opt.state[p] for p in params)
    assert sum(t.numel() * t.element_size() for t in big.values()) < 4096 * 2.05
    assert big["exp_avg_code"].dtype == torch.uint8 and small["exp_avg"].dtype == torch.float32


def test_memory_orders_and_gaps():
    base = torch.randn(40, 30)
    variants = [base.clone(), base.t().contiguous().t(), torch.randn(40, 60)[:, ::2].copy_(base)]
    grad = torch.randn(40, 30)
    grads = [grad, grad, grad.t().contiguous().t()]
    results = []
    for p, g in zip(variants, grads):
        p = p.detach().requires_grad_()
        opt = AdamW([p], lr=1e-2, max_grad_norm=1.0)
        for _ in range(2):
            p.grad = g
            opt.step()
        results.append(p.detach())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"state_bits": 8}, {"master_weights": True}], ids=str)
def test_memory_order_that_changes_between_steps(options):
    """After .to(memory_format=...) on a model in training the states follow their elements."""
    dtype = torch.bfloat16 if "master_weights" in options else torch.float32
    start = torch.randn(16, 16, 5, 5).to(dtype)
    grads = torch.randn(4, 16, 16, 5, 5)
    results = []
    for order in (torch.contiguous_format, torch.channels_last):
        p = start.clone().requires_grad_()
        opt = AdamW([p], lr=1e-2, **options)
        for i, g in enumerate(grads.to(dtype)):
            if i == 2:
                p.grad = None
                p.data = p.data.to(memory_format=order)
            p.grad = g.to(memory_format=order) if i > 1 else g
            opt.step()
        results.append((p.detach(), opt.state_dict()["state"][0]["exp_avg"]))
    # 8 bits: other elements share a scale, so codes with 3 bits of mantissa are rounded again
    near = 2**-4 if "state_bits" in options else 1e-6
    for a, b in zip(*results):
        assert (a - b).norm() <= near * b.norm()


def trained(optimizer, params, steps, seed):
    torch.manual_seed(seed)
    for _ in range(steps):
        give_grads(params)
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("mine_first", [True, False])
def test_checkpoints_go_to_torch_and_back(mine_first, tmp_path):
    params = parameters()
    groups = lambda ps: [{"params": ps[:2], "weight_decay": 0.0}, {"params": ps[2:]}]  # noqa: E731
    makers = [
        lambda ps: AdamW(groups(ps), lr=1e-2),
        lambda ps: torch.optim.AdamW(groups(ps), lr=1e-2),
    ]
    first, second = makers if mine_first else makers[::-1]
    full, part = clones(params), clones(params)
    opt = first(part)
    trained(opt, part, 3, seed=1)
    torch.save(opt.state_dict(), tmp_path / "optimizer.pt")
    resumed = second(part)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    actual = trained(resumed, part, 3, seed=2)
    opt = first(full)
    trained(opt, full, 3, seed=1)
    expected = trained(opt, full, 3, seed=2)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert resumed.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"state_bits": 8}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.bfloat16, {"master_weights": True, "state_bits": 8}),
        (torch.bfloat16, {"stochastic_rounding": True, "seed": 5}),
        (torch.bfloat16, {}),
    ],
    ids=str,
)
def test_resume_gives_the_same_bits(dtype, options):
    params = parameters(dtype)
    uninterrupted, part = clones(params), clones(params)
    opt = AdamW(uninterrupted, lr=1e-2, **options)
    trained(opt, uninterrupted, 3, seed=1)
    expected = trained(opt, uninterrupted, 3, seed=2)
    opt = AdamW(part, lr=1e-2, **options)
    trained(opt, part, 3, seed=1)
    saved = opt.state_dict()
    saved_copy, loaded = copy.deepcopy(saved), copy.deepcopy(list(opt.state.values()))
    resumed = AdamW(part, lr=1e-2, **options)
    resumed.load_state_dict(saved)
    actual = trained(resumed, part, 3, seed=2)
    # loading aliased neither what was saved nor the optimizer that it came from
    for now, before in (
        (saved["state"].values(), saved_copy["state"].values()),
        (opt.state.values(), loaded),
    ):
        for a, b in zip(now, before):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_schedulers_tensor_lr_closure_deepcopy_and_missing_grads():
    p, q = parameters(shapes=[(10,), (10,)])
    opt = AdamW([p, q], lr=torch.tensor(1e-2), max_grad_norm=float("inf"))
    theirs = clones([p])
    peer = torch.optim.AdamW(theirs, lr=1e-2)
    saved = q.detach().clone()
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (opt, peer)]
    for _ in range(5):
        give_grads([p], theirs)
        assert opt.step(lambda: "loss") == "loss"
        peer.step()
        for s in schedules:
            s.step()
    torch.testing.assert_close(p, theirs[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(q, saved) and q not in opt.state
    twin = copy.deepcopy(opt)
    assert twin.max_grad_norm == float("inf") and len(twin.state) == 1
    opt.zero_grad()
    opt.step()  # there is no gradient, so nothing happens
    assert opt.state[p]["step"].item() == 5


def test_options_per_group():
    a, b = parameters(shapes=[(64, 64), (64, 64)])
    opt = AdamW([{"params": [a], "state_bits": 8}, {"params": [b], "lr": 0.0, "weight_decay": 0.0}])
    saved = b.detach().clone()
    give_grads([a, b])
    opt.step()
    assert "exp_avg_code" in opt.state[a] and "exp_avg" in opt.state[b] and torch.equal(b, saved)


def test_float64_and_float32_run_together_on_the_reference():
    mine = [torch.randn(30, dtype=d).requires_grad_() for d in (torch.float64, torch.float32)]
    theirs = clones(mine)
    a, b = AdamW(mine, lr=1e-2, max_grad_norm=0.1), torch.optim.AdamW(theirs, lr=1e-2)
    give_grads(mine, theirs)
    a.step()
    clip_grad_norm_(theirs, 0.1)
    b.step()
    for p, q in zip(mine, theirs):
        torch.testing.assert_close(p, q)
    with backend.use_backend("cpu"), pytest.raises(InputError, match="not float64"):
        a.step()


def problem(width=64):
    """Return a regression of a few hundred steps: one two-layer network learns another."""
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(
        torch.nn.Linear(width, 128), torch.nn.Tanh(), torch.nn.Linear(128, 8)
    )
    student = torch.nn.Sequential(
        torch.nn.Linear(width, 128), torch.nn.SiLU(), torch.nn.Linear(128, 8)
    )
    return teacher.requires_grad_(False), student


def loss_curve(make, steps=300, dtype=torch.float32):
    teacher, student = problem()
    student = student.to(dtype)
    opt = make(student.parameters())
    clip = None if isinstance(opt, AdamW) else 1.0
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(128, 64)
        loss = (student(x.to(dtype)).float() - teacher(x)).square().mean()
        opt.zero_grad()
        loss.backward()
        if clip:
            clip_grad_norm_(student.parameters(), clip)
        opt.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_loss_curve_is_that_of_torch():
    theirs = loss_curve(lambda ps: torch.optim.AdamW(ps, lr=3e-3))
    mine = loss_curve(lambda ps: AdamW(ps, lr=3e-3, max_grad_norm=1.0))
    assert theirs[-20:].mean() < 0.25 * theirs[:5].mean()  # it learns
    torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-5)  # 300 steps of fp32 rounding


def test_low_precision_loss_curves_end_where_float32_ends():
    expected = loss_curve(lambda ps: torch.optim.AdamW(ps, lr=3e-3))[-20:].mean()
    ends = {
        "8-bit": loss_curve(lambda ps: AdamW(ps, lr=3e-3, max_grad_norm=1.0, state_bits=8)),
        "master": loss_curve(
            lambda ps: AdamW(ps, lr=3e-3, max_grad_norm=1.0, master_weights=True),
            dtype=torch.bfloat16,
        ),
        "stochastic": loss_curve(
            lambda ps: AdamW(ps, lr=3e-3, max_grad_norm=1.0, stochastic_rounding=True),
            dtype=torch.bfloat16,
        ),
    }
    for name, curve in ends.items():
        assert curve[-20:].mean() < 1.15 * expected, (
            f"{name}: {curve[-20:].mean()} against {expected}"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr: expected a number >= 0, got -1\.0"),
        ({"lr": float("nan")}, "lr: expected a number >= 0, got nan"),
        ({"lr": torch.ones(2)}, r"lr: expected a number or a one-element tensor, got \(2,\)"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"lr": "1e-3"}, "lr: expected a number >= 0, got '1e-3'"),  # as YAML parses it
        ({"lr": None}, "lr: expected a number >= 0, got None"),
        ({"betas": ("0.9", 0.95)}, r"betas: expected two numbers in \[0, 1\), got \('0\.9', 0\.95"),
        ({"betas": 0.9}, r"betas: expected two numbers in \[0, 1\), got 0\.9"),
        ({"weight_decay": "0.1"}, "weight_decay: expected a number >= 0, got '0.1'"),
        ({"max_grad_norm": "1"}, "max_grad_norm: expected a number > 0 or None, got '1'"),
        ({"eps": -1e-8}, "eps: expected a number >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number >= 0"),
        ({"state_bits": 4}, "state_bits: expected 8 or 32, got 4"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm: expected a number > 0 or None, got 0\.0"),
        (
            {"master_weights": True, "stochastic_rounding": True},
            "stochastic_rounding: expected False",
        ),
    ],
    ids=str,
)
def test_refuses_options(options, message):
    with pytest.raises(InputError, match=message):
        AdamW([torch.ones(2, requires_grad=True)], **options)


def test_refuses_parameters():
    with pytest.raises(InputError, match=r"params: expected real floats, got torch\.complex64"):
        AdamW([torch.ones(2, dtype=torch.complex64, requires_grad=True)])
    for strides in ((1, 1), (1, 2), (0, 1)):
        shared = torch.ones(16).as_strided((3, 4), strides).requires_grad_()
        with pytest.raises(InputError, match="params: expected elements that share no memory"):
            AdamW([shared])
    for apart in (torch.ones(3, 8)[:, ::2], torch.ones(4, 3).T, torch.ones(1, 3).expand(1, 3)):
        AdamW([apart.requires_grad_()])
    with pytest.raises(InputError, match="stochastic_rounding: expected bfloat16 or float32"):
        AdamW([torch.ones(2).half().requires_grad_()], stochastic_rounding=True)
    p = torch.ones(3, 2, requires_grad=True)
    opt = AdamW([p])
    p.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (3, 2), check_invariants=True)
    with pytest.raises(
        InputError, match=r"grad: expected a dense gradient, got layout torch.sparse"
    ):
        opt.step()


def test_masters_kept_before_the_cast():
    """The masters are the float32 values. An update too small for bfloat16 is not lost."""
    module = torch.nn.Linear(64, 64)
    exact = [p.detach().clone() for p in module.parameters()]
    optimizer = AdamW(module.parameters(), lr=1e-6, weight_decay=0.0, master_weights=True)
    optimizer.keep_masters()
    module.bfloat16()
    before = optimizer.state_dict()["state"]
    for i, (p, e) in enumerate(zip(module.parameters(), exact)):
        assert p.dtype == torch.bfloat16
        assert torch.equal(before[i]["master"], e)
        assert torch.equal(p, e.bfloat16())
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    for i, (p, e) in enumerate(zip(module.parameters(), exact)):
        torch.testing.assert_close(saved["state"][i]["master"], e - 1e-6, rtol=0, atol=1e-8)
        assert torch.equal(p, saved["state"][i]["master"].bfloat16())
    other = AdamW(module.parameters(), master_weights=True)
    other.load_state_dict(saved)
    for i, reloaded in other.state_dict()["state"].items():
        assert torch.equal(reloaded["master"], saved["state"][i]["master"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("begin", ["steps", "keep_masters"])
def test_masters_of_a_model_cast_later(dtype, begin):
    """Small updates are not lost after steps in float32, or after a cast to a 16-bit dtype other
    than the one `keep_masters` assumes.
    """
    p = torch.nn.Parameter(torch.full((64,), 2.0))
    module = torch.nn.ParameterList([p])
    optimizer = AdamW([p], lr=1e-4, weight_decay=0.0, master_weights=True)
    if begin == "keep_masters":
        optimizer.keep_masters()
    else:
        p.grad = torch.ones_like(p)
        optimizer.step()
    module.to(dtype)
    for _ in range(400):  # each update is a hundredth of bfloat16's spacing
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(p.float(), torch.full((64,), 1.96), rtol=0, atol=0.01)
    assert optimizer.state_dict()["state"][0]["master"].dtype == torch.float32


def test_masters_kept_and_overtaken():
    """After float32 steps the masters from `keep_masters` are outdated."""
    p = torch.nn.Parameter(torch.randn(64))
    module = torch.nn.ParameterList([p])
    optimizer = AdamW([p], lr=0.1, master_weights=True)
    optimizer.keep_masters()
    p.grad = torch.ones_like(p)
    optimizer.step()
    module.bfloat16()
    optimizer.param_groups[0] |= {"lr": 0.0, "weight_decay": 0.0}
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state_dict()["state"][0]["master"], p.float())


def test_a_tie_keeps_within_one_unit_of_float32():
    """``.bfloat16()`` rounds ties to even. The master is then the adjacent float32."""
    p = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32).view(torch.float32)
    exact = p.clone()
    module = torch.nn.ParameterList([torch.nn.Parameter(p)])
    optimizer = AdamW(module.parameters(), master_weights=True)
    optimizer.keep_masters()
    module.bfloat16()
    master = optimizer.state_dict()["state"][0]["master"]
    assert ((master.view(torch.int32) - exact.view(torch.int32)).abs() <= 1).all()


def test_loading_a_master_sets_its_parameter():
    p = torch.randn(300).bfloat16().requires_grad_()
    optimizer = AdamW([p], master_weights=True)
    give_grads([p])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = torch.zeros(300).bfloat16().requires_grad_()
    resumed = AdamW([other], master_weights=True)
    resumed.load_state_dict(saved)
    assert torch.equal(other, p)
    assert torch.equal(resumed.state_dict()["state"][0]["master"], saved["state"][0]["master"])


def test_only_groups_with_the_option_keep_masters():
    a, b = (torch.nn.Parameter(torch.randn(8)) for _ in range(2))
    low = torch.nn.Parameter(torch.randn(8).bfloat16())
    groups = [{"params": [a, low], "master_weights": True}, {"params": [b]}]
    optimizer = AdamW(groups)
    optimizer.keep_masters()
    assert list(optimizer.state) == [a]


def test_torch_knows_what_a_step_wrote():
    """A tensor saved for a backward must not change unnoticed, nor what was packed from it."""
    p = torch.randn(8, requires_grad=True)
    optimizer = AdamW([p])
    p.grad = torch.ones_like(p)
    before, product = p._version, p * p
    optimizer.step()
    assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_tensors_without_memory():
    """A step of a model on ``torch.device("meta")`` makes states of the right shapes."""
    p = torch.nn.Parameter(torch.empty(3, 5, dtype=torch.bfloat16, device="meta"))
    p.grad = torch.empty_like(p)
    optimizer = AdamW([p], max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (3, 5) and optimizer.state[p]["exp_avg"].is_meta
