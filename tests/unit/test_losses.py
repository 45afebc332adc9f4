"""fastlm.train.losses: each function against its formula in plain Python loops and float64, on
ragged cases whose masked positions hold NaN; the same loss, gradient and metrics for every split
into micro-batches and every padding; refusals.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlm.errors import InputError
from fastlm.train import losses

NAN = float("nan")


def ragged(
    seed: int, batch: int = 5, length: int = 9, names: int = 4
) -> tuple[Tensor, list[Tensor]]:
    """A mask with padding on both sides and gaps, one row full and one empty, and float64 tensors
    that are NaN where it is false.
    """
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, length, generator=g) < 0.6
    mask[0] = True
    mask[-1] = False
    tensors = [torch.randn(batch, length, generator=g, dtype=torch.float64) for _ in range(names)]
    return mask, [t.masked_fill(~mask, NAN) for t in tensors]


def tokens_of(mask: Tensor) -> list[tuple[int, int]]:
    return [(int(b), int(t)) for b, t in mask.nonzero()]


def padded(t: Tensor, left: int) -> Tensor:
    """Columns of NaN (of False in a mask): `left` before the rows, one after them."""
    fill = NAN if t.is_floating_point() else False
    return torch.nn.functional.pad(t, (left, 1), value=fill)


def gradient(f: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(f(*leaves).sum(), leaves))


def assert_same(actual: Tensor | float, expected: Tensor | float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=1e-12,
        atol=1e-12,
    )


# ---- aggregate


def test_aggregate_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN], [NAN, NAN, NAN]], dtype=torch.float64)
    mask = ~x.isnan()
    assert_same(losses.aggregate(x, mask), 7 / 3)
    assert_same(losses.aggregate(x, mask, num_items=10), 0.7)
    assert_same(
        losses.aggregate(x, mask, aggregation="sequence"), (1.5 + 4) / 2
    )  # the empty row: no part
    assert_same(losses.aggregate(x, mask, aggregation="sequence", num_items=4), (1.5 + 4) / 4)
    assert_same(losses.aggregate(x, mask, aggregation="constant", num_items=9), 7 / 9)
    assert_same(losses.aggregate(x, mask.long()), 7 / 3)


@pytest.mark.parametrize("how", ["token", "sequence"])
def test_a_mean_over_nothing_is_zero_with_gradient_zero(how) -> None:
    x = torch.full((2, 3), NAN, requires_grad=True)
    loss = losses.aggregate(x, torch.zeros(2, 3, dtype=torch.bool), aggregation=how)
    loss.backward()
    assert loss == 0 and x.grad is not None and (x.grad == 0).all()


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_a_step_without_items_has_loss_zero(how) -> None:
    x, mask = torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)
    for none in (0, torch.tensor(0)):
        assert losses.aggregate(x, mask, aggregation=how, num_items=none) == 0


# ---- what holds for every loss over tokens


def policy(logp, old, ref, advantages, mask, num_items):
    del ref
    return losses.ppo_policy_loss(logp, old, advantages, mask, num_items=num_items)


def policy_dual(logp, old, ref, advantages, mask, num_items):
    del ref
    return losses.ppo_policy_loss(logp, old, advantages, mask, dual_clip=3.0, num_items=num_items)


def value(values, old, ref, returns, mask, num_items):
    del ref
    return losses.ppo_value_loss(values, old, returns, mask, num_items=num_items)


def policy_high(logp, old, ref, advantages, mask, num_items):
    del ref
    return losses.ppo_policy_loss(
        logp, old, advantages, mask, clip_range_high=0.5, num_items=num_items
    )


def grpo(how: str, level: str = "token"):
    def loss(logp, old, ref, advantages, mask, num_items):
        row = torch.where(mask, advantages, 0).double().sum(1)  # one number per row
        return losses.grpo_loss(
            logp, old, ref, row, mask, beta=0.1, aggregation=how, num_items=num_items,
            importance_sampling_level=level,
        )  # fmt: skip

    return loss


TOKEN_LOSSES = {
    "ppo_policy": policy,
    "ppo_policy dual": policy_dual,
    "ppo_policy high": policy_high,
    "ppo_value": value,
    "grpo token": grpo("token"),
    "grpo sequence": grpo("sequence"),
    "grpo constant": grpo("constant"),
    "gspo sequence": grpo("sequence", "sequence"),
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@given(
    seed=st.integers(0, 10_000),
    cuts=st.lists(st.integers(0, 5), max_size=3),
    padding=st.integers(0, 3),
)
@settings(max_examples=20, deadline=None)
def test_loss_gradient_and_metrics_do_not_depend_on_the_split(name, seed, cuts, padding) -> None:
    """Micro-batches (an empty one among them), each with padding of its own, against the whole."""
    mask, (x, *others) = ragged(seed)
    count = int((mask.any(1) if "sequence" in name else mask).sum())
    loss = TOKEN_LOSSES[name]
    whole_x = x.clone().requires_grad_()
    expected, metrics = loss(whole_x, *others, mask, count)
    expected.backward()
    split_x = x.clone().requires_grad_()
    total, parts = 0.0, []
    bounds = [0, *sorted(cuts), len(mask)]
    for begin, end in pairwise(bounds):
        part = [padded(t[begin:end], padding) for t in (split_x, *others, mask)]
        part_loss, actual = loss(*part, count)
        part_loss.backward()
        total = total + part_loss.detach()
        parts.append(actual)
    assert_same(total, expected.detach())
    assert_same(split_x.grad, whole_x.grad)
    for key, actual in losses.pool_metrics(parts).items():
        assert_same(actual, metrics[key])


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_masked_positions_are_never_read(name) -> None:
    mask, tensors = ragged(1)
    count = int(mask.sum())
    results = []
    for fill in (NAN, math.inf, 1e30, 0.0):
        x, *others = (t.masked_fill(~mask, fill) for t in tensors)
        x.requires_grad_()
        loss, metrics = TOKEN_LOSSES[name](x, *others, mask, count)
        loss.backward()
        assert x.grad is not None and (x.grad[~mask] == 0).all()
        results.append([loss.detach(), x.grad, *metrics.values()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    assert torch.isfinite(results[0][0])


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_bfloat16_arguments_are_computed_in_float32(name) -> None:
    mask, tensors = ragged(2)
    narrow = [t.bfloat16() for t in tensors]
    loss, _ = TOKEN_LOSSES[name](*narrow, mask, 7)
    truth, _ = TOKEN_LOSSES[name](*(t.double() for t in narrow), mask, 7)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)


# ---- formulas


def test_kl_penalty() -> None:
    mask, (logp, ref) = ragged(3, names=2)
    for kind, formula in {
        "k1": lambda p, q: p - q,
        "k2": lambda p, q: (p - q) ** 2 / 2,
        "k3": lambda p, q: math.exp(q - p) - 1 - (q - p),
    }.items():
        actual = losses.kl_penalty(logp, ref, kind, mask=mask)
        assert (actual[~mask] == 0).all()
        for b, t in tokens_of(mask):
            assert_same(actual[b, t], formula(float(logp[b, t]), float(ref[b, t])))
    (grad,) = gradient(
        lambda p: losses.kl_penalty(p, torch.zeros_like(p), "k3"),
        torch.tensor([-1000.0, -21.0, -1.0, 30.0, 1000.0], dtype=torch.float64),
    )
    assert_same(
        grad, torch.tensor([0.0, 0.0, 1 - math.e, 1 - math.exp(-30), 1.0], dtype=torch.float64)
    )


def test_only_k2_has_the_gradient_of_the_kl() -> None:
    """Exact expectations over a distribution of five tokens that the policy itself draws from."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    (truth,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    drawn = logp.exp().detach()
    for kind in ("k1", "k2", "k3"):
        expected = (drawn * losses.kl_penalty(logp, ref, kind)).sum()
        (actual,) = torch.autograd.grad(expected, logits, retain_graph=True)
        near = torch.allclose(actual, truth, rtol=1e-10, atol=1e-12)
        assert near == (kind == "k2"), kind
    # grpo_loss: k3's value, the KL's gradient
    mask = torch.ones(5, 1, dtype=torch.bool)
    rows = logp[:, None]
    loss = sum(
        p
        * losses.grpo_loss(
            rows[i : i + 1], rows[i : i + 1], ref[i, None, None], torch.zeros(1), mask[:1], beta=1.0
        )[0]
        for i, p in enumerate(drawn)
    )
    (actual,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert_same(actual, truth)
    (k3_gradient,) = torch.autograd.grad(
        sum(
            p * losses.grpo_loss(
                rows[i : i + 1], rows[i : i + 1], ref[i, None, None], torch.zeros(1), mask[:1],
                beta=1.0, kl_gradient="k3",
            )[0]
            for i, p in enumerate(drawn)
        ),
        logits,
        retain_graph=True,
    )  # fmt: skip
    (expected,) = torch.autograd.grad(
        (drawn * losses.kl_penalty(logp, ref, "k3")).sum(), logits, retain_graph=True
    )
    assert_same(k3_gradient, expected)
    k3 = (drawn * losses.kl_penalty(logp, ref, "k3")).sum()
    assert_same(loss.detach(), k3.detach())
    assert_same(k3.detach(), (drawn * (logp - ref)).sum().detach())


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.0, 0.0)])
def test_gae_is_the_sum_of_discounted_deltas(gamma, lam) -> None:
    mask, (rewards, values) = ragged(4, names=2)
    advantages, returns = losses.gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for b in range(len(mask)):
        places = mask[b].nonzero().flatten().tolist()
        r, v = ([float(t[b, p]) for p in places] for t in (rewards, values))
        v.append(0.0)
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
        for i, index in enumerate(places):
            expected = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(r)))
            assert_same(advantages[b, index], expected)
            assert_same(returns[b, index], expected + v[i])


def test_gae_with_lambda_one_is_reward_to_go_minus_value() -> None:
    mask, (rewards, values) = ragged(5, names=2)
    advantages, returns = losses.gae(rewards, values, mask, lam=1.0)
    to_go = torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)
    assert_same(returns, torch.where(mask, to_go, 0))
    assert_same(advantages, torch.where(mask, to_go - values, 0))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shift_mean) -> None:
    mask, (x,) = ragged(6, names=1)
    selected = x[mask]
    actual = losses.whiten(x, mask, shift_mean=shift_mean)
    std = selected.var(unbiased=False).add(1e-8).sqrt()
    expected = (selected - selected.mean()) / std + (0 if shift_mean else selected.mean())
    assert_same(actual[mask], expected)
    assert (actual[~mask] == 0).all()
    assert_same(actual[mask].mean(), 0 if shift_mean else selected.mean())


def test_whiten_of_one_token_and_of_none() -> None:
    x = torch.tensor([[3.0, NAN]])
    assert losses.whiten(x, ~x.isnan()).tolist() == [[0.0, 0.0]]
    assert losses.whiten(x, ~x.isnan(), shift_mean=False).tolist() == [[3.0, 0.0]]
    assert losses.whiten(x, torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def policy_token(logp, old, advantage, clip, high, dual=None) -> float:
    ratio = math.exp(logp - old)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + high))
    return min(loss, -advantage * dual) if dual and advantage < 0 else loss


@pytest.mark.parametrize("dual", [None, 1.5])
@pytest.mark.parametrize("high", [None, 0.8])
def test_ppo_policy_loss(dual, high) -> None:
    mask, (logp, old, advantages) = ragged(7, names=3)
    loss, metrics = losses.ppo_policy_loss(
        logp, old, advantages, mask, clip_range=0.3, clip_range_high=high, dual_clip=dual
    )
    high = high or 0.3
    places = tokens_of(mask)
    rows = [(float(logp[p]), float(old[p]), float(advantages[p])) for p in places]
    assert_same(loss, sum(policy_token(*row, 0.3, high, dual) for row in rows) / len(rows))
    ratios = [math.exp(a - b) for a, b, _ in rows]
    assert_same(metrics["ratio"], sum(ratios) / len(rows))
    assert_same(metrics["approx_kl"], sum(r - 1 - math.log(r) for r in ratios) / len(rows))
    above = sum(r > 1 + high and a > 0 for r, (*_, a) in zip(ratios, rows))
    below = sum(r < 0.7 and a < 0 for r, (*_, a) in zip(ratios, rows))
    assert above and below and above + below < len(rows)
    assert_same(metrics["clip_fraction"], (above + below) / len(rows))
    assert_same(metrics["clip_fraction_high"], above / len(rows))
    assert_same(metrics["clip_fraction_low"], below / len(rows))


def test_a_symmetric_clip_is_the_default() -> None:
    mask, (logp, old, advantages) = ragged(13, names=3)
    results = [
        losses.ppo_policy_loss(
            logp.float(), old.float(), advantages.float(), mask, clip_range_high=high
        )
        for high in (None, 0.2)
    ]
    for a, b in zip(*([loss, *metrics.values()] for loss, metrics in results), strict=True):
        assert torch.equal(a, b)


def test_overlong_penalty() -> None:
    """Equation 13 of the DAPO paper, by hand: a buffer of 4 of 10 tokens."""
    lengths = torch.tensor([1, 6, 7, 8, 9, 10])
    expected = torch.tensor([0, 0, -0.25, -0.5, -0.75, -1])
    assert_same(losses.overlong_penalty(lengths, 10, 4), expected)
    assert_same(losses.overlong_penalty(lengths, 10, 0), torch.zeros(6))


def test_ppo_policy_loss_of_the_sampling_policy_is_the_policy_gradient() -> None:
    mask, (logp, advantages) = ragged(8, names=2)
    (actual,) = gradient(
        lambda x: losses.ppo_policy_loss(x, logp, advantages, mask, num_items=1)[0], logp
    )
    assert_same(actual, torch.where(mask, -advantages, 0))


def test_a_token_whose_ratio_is_clipped_has_no_gradient() -> None:
    logp = torch.tensor([[0.5, 0.5, -0.5, -0.5, 100.0, -100.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    (actual,) = gradient(
        lambda x: losses.ppo_policy_loss(x, torch.zeros_like(x), advantages, x == x)[0], logp
    )
    assert (actual != 0).tolist() == [[False, True, True, False, False, False]]


def test_ppo_value_loss() -> None:
    mask, (values, old, returns) = ragged(9, names=3)
    loss, metrics = losses.ppo_value_loss(values, old, returns, mask, clip_range=0.4)
    total = clips = 0.0
    for p in tokens_of(mask):
        v, o, r = (float(t[p]) for t in (values, old, returns))
        near = o + min(max(v - o, -0.4), 0.4)
        total += max((v - r) ** 2, (near - r) ** 2) / 2
        clips += (near - r) ** 2 > (v - r) ** 2
    count = int(mask.sum())
    assert_same(loss, total / count)
    assert 0 < clips < count
    assert_same(metrics["clip_fraction"], clips / count)
    assert_same(metrics["value"], values[mask].mean())
    assert_same(metrics["return"], returns[mask].mean())
    assert_same(metrics["value_error"], (values - returns)[mask].square().mean())


def test_a_value_within_the_clip_range_does_not_count_as_clipped() -> None:
    """Not even by the rounding of old + (value - old)."""
    g = torch.Generator().manual_seed(9)
    values, old, returns = (torch.rand(4, 50, generator=g) / 5 for _ in range(3))
    _, metrics = losses.ppo_value_loss(values, old, returns, returns == returns, clip_range=0.2)
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("scale", [True, False])
def test_grpo_advantages(scale) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    actual = losses.grpo_advantages(rewards, 4, scale=scale)
    std = math.sqrt(4 * 0.25 / 3)
    first = [x / (std + 1e-4) if scale else x for x in (0.5, -0.5, -0.5, 0.5)]
    assert_same(actual, torch.tensor([*first, 0, 0, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("reward", [1000.1, 100.1, 5.3, 12345.67])
@pytest.mark.parametrize("group_size", [7, 8])
def test_equal_rewards_have_no_advantage(reward, group_size) -> None:
    rewards = torch.full((group_size,), reward)
    assert (losses.grpo_advantages(rewards, group_size) == 0).all()
    assert (losses.rloo_advantages(rewards, group_size) == 0).all()


def test_rloo_advantages() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3]
    assert_same(losses.rloo_advantages(rewards, 3), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_grpo_loss(how) -> None:
    mask, (logp, old, ref) = ragged(10, names=3)
    advantages = torch.linspace(-1, 1, len(mask), dtype=torch.float64)
    loss, metrics = losses.grpo_loss(
        logp, old, ref, advantages, mask, clip_range=0.3, beta=0.2, aggregation=how,
        num_items=40 if how == "constant" else None,
    )  # fmt: skip
    rows = []
    for b in range(len(mask)):
        row = []
        for t in mask[b].nonzero().flatten().tolist():
            p, o, q = (float(x[b, t]) for x in (logp, old, ref))
            k3 = math.exp(q - p) - 1 - (q - p)
            row.append((policy_token(p, o, float(advantages[b]), 0.3, 0.3) + 0.2 * k3, k3))
        rows.append(row)

    def mean(index: int) -> float:
        sums = [sum(token[index] for token in row) for row in rows]
        if how == "sequence":
            means = [total / len(row) for total, row in zip(sums, rows) if row]
            return sum(means) / len(means)
        return sum(sums) / (40 if how == "constant" else int(mask.sum()))

    assert_same(loss, mean(0))
    k3 = sum(token[1] for row in rows for token in row) / int(mask.sum())
    assert_same(metrics["kl"], k3)  # metrics are means over tokens, whatever `how`
    assert metrics["tokens"] == mask.sum()


def test_gspo_loss_and_gradient() -> None:
    """arXiv:2507.18071 in loops: a ratio and a clip per sequence."""
    mask, (logp, old) = ragged(14, batch=20, names=2)
    advantages = torch.linspace(-1, 1, 20, dtype=torch.float64) * (-1) ** torch.arange(20)
    kwargs = {"clip_range": 0.1, "clip_range_high": 0.2, "aggregation": "sequence"}

    def gspo(x):
        return losses.grpo_loss(
            x, old, None, advantages, mask, importance_sampling_level="sequence", **kwargs
        )

    loss, metrics = gspo(logp)
    total, kl, below, above = 0.0, 0.0, 0, 0
    expected = torch.zeros_like(logp)
    rows = [b for b in range(len(mask)) if mask[b].any()]
    assert len(rows) < len(mask)  # an empty one does not count
    for b in rows:
        gaps = [float(logp[b, t] - old[b, t]) for t in mask[b].nonzero().flatten().tolist()]
        a, ratio = float(advantages[b]), math.exp(sum(gaps) / len(gaps))
        total -= min(ratio * a, min(max(ratio, 0.9), 1.2) * a) / len(rows)
        is_low, is_high = ratio < 0.9 and a < 0, ratio > 1.2 and a > 0
        below, above = below + is_low * len(gaps), above + is_high * len(gaps)
        kl += sum(math.exp(gap) - 1 - gap for gap in gaps)
        if not is_low and not is_high:
            expected[b, mask[b]] = -a * ratio / len(gaps) / len(rows)
    tokens = int(mask.sum())
    assert below and above and below + above < tokens
    assert_same(loss, total)
    assert_same(metrics["clip_fraction_low"], below / tokens)
    assert_same(metrics["clip_fraction_high"], above / tokens)
    assert_same(metrics["approx_kl"], kl / tokens)  # of tokens, as for the other losses
    (actual,) = gradient(lambda x: gspo(x)[0], logp)
    assert_same(actual, expected)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("kind", ["sigmoid", "smoothed", "ipo", "hinge"])
@pytest.mark.parametrize("by_length", [False, True])
def test_dpo_loss(kind, by_length) -> None:
    g = torch.Generator().manual_seed(11)
    tensors = torch.randn(4, 6, generator=g, dtype=torch.float64) * 5
    lengths = (torch.arange(1, 7), torch.arange(7, 1, -1)) if by_length else None
    smoothing = 0.1 if kind == "smoothed" else 0.0
    actual = losses.dpo_loss(
        *tensors,
        beta=0.3,
        label_smoothing=smoothing,
        loss_type="sigmoid" if kind == "smoothed" else kind,
        lengths=lengths,
    )
    for i in range(6):
        chosen, rejected, ref_chosen, ref_rejected = (float(t[i]) for t in tensors)
        of = [1, 1] if lengths is None else [int(n[i]) for n in lengths]
        h = (chosen - ref_chosen) / of[0] - (rejected - ref_rejected) / of[1]
        expected = {
            "sigmoid": -log_sigmoid(0.3 * h),
            "smoothed": -0.9 * log_sigmoid(0.3 * h) - 0.1 * log_sigmoid(-0.3 * h),
            "ipo": (h - 1 / 0.6) ** 2,
            "hinge": max(0.0, 1 - 0.3 * h),
        }[kind]
        assert_same(actual[i], expected)


def test_dpo_loss_does_not_train_the_reference() -> None:
    leaves = [torch.randn(3, requires_grad=True) for _ in range(4)]
    losses.dpo_loss(*leaves).sum().backward()
    assert [t.grad is None for t in leaves] == [False, False, True, True]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_loss(smoothing) -> None:
    g = torch.Generator().manual_seed(12)
    chosen, rejected = torch.randn(2, 6, generator=g, dtype=torch.float64) * 9 - 20
    lengths = torch.arange(6), torch.arange(7, 1, -1)  # an empty answer, too
    actual = losses.simpo_loss(
        chosen, rejected, lengths, beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing
    )
    for i in range(6):
        means = [float(t[i]) / max(int(n[i]), 1) for t, n in zip((chosen, rejected), lengths)]
        z = 2 * (means[0] - means[1]) - 0.7
        assert_same(actual[i], -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z))


def test_orpo_loss() -> None:
    chosen = torch.tensor([-0.02, -3.0, -9.0, -60.0], dtype=torch.float64)
    rejected = torch.tensor([-4.0, -2.5, -0.1, -30.0], dtype=torch.float64)
    lengths = torch.tensor([2, 3, 1, 4]), torch.tensor([1, 5, 2, 3])
    actual, metrics = losses.orpo_loss(chosen, rejected, lengths, beta=0.3)
    assert set(metrics) == {"nll", "log_odds"}
    for i in range(4):
        p, q = (math.exp(float(t[i]) / int(n[i])) for t, n in zip((chosen, rejected), lengths))
        log_odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
        assert_same(metrics["log_odds"][i], log_odds)
        assert_same(metrics["nll"][i], -math.log(p))
        assert_same(actual[i], -math.log(p) - 0.3 * log_sigmoid(log_odds))


def test_orpo_loss_of_float32_and_of_certain_answers() -> None:
    """As accurate as float64 where p is near 0 or 1; finite, also the gradient, where p is 1."""
    logp = torch.tensor([0.0, -1e-6, -1e-3, -0.5, -0.7, -5.0, -30.0, -200.0])
    chosen, rejected = torch.cartesian_prod(logp, logp).T
    lengths = torch.ones(2, 64).unbind()
    leaves = [t.clone().requires_grad_() for t in (chosen, rejected)]
    actual, _ = losses.orpo_loss(*leaves, lengths)
    gradients = torch.autograd.grad(actual.sum(), leaves)
    assert actual.isfinite().all() and all(g.isfinite().all() for g in gradients)
    inside = (chosen < 0) & (rejected < 0)
    wide = [t.double().requires_grad_() for t in (chosen, rejected)]
    expected, _ = losses.orpo_loss(*wide, lengths)
    torch.testing.assert_close(actual.double()[inside], expected[inside], rtol=1e-6, atol=1e-6)
    for g, e in zip(gradients, torch.autograd.grad(expected.sum(), wide)):
        torch.testing.assert_close(g.double()[inside], e[inside], rtol=1e-5, atol=1e-6)


def test_kto_loss() -> None:
    logp = torch.tensor([1.0, 1.0, -2.0, -2.0], dtype=torch.float64)
    ref = torch.tensor([0.0, 0.5, 0.0, -1.0], dtype=torch.float64)
    good = torch.tensor([True, False, True, False])
    for kl in (0.7, -3.0):
        actual = losses.kto_loss(
            logp, ref, good, kl, beta=0.5, desirable_weight=1.5, undesirable_weight=0.8
        )
        for i in range(4):
            gain = 0.5 * (float(logp[i] - ref[i]) - max(kl, 0.0))
            sigmoid = 1 / (1 + math.exp(-gain))
            assert_same(actual[i], 1.5 * (1 - sigmoid) if good[i] else 0.8 * sigmoid)


def test_bradley_terry_loss() -> None:
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64)
    for margin in (None, 0.5, torch.rand(5, dtype=torch.float64)):
        actual = losses.bradley_terry_loss(chosen, rejected, margin=margin)
        by = torch.zeros(5) if margin is None else torch.as_tensor(margin).expand(5)
        for i in range(5):
            assert_same(actual[i], -log_sigmoid(float(chosen[i] - rejected[i] - by[i])))


def test_plackett_luce_loss() -> None:
    scores = torch.randn(3, 4, dtype=torch.float64)
    ranks = torch.tensor([[2, 0, 1, 3], [1, -1, 0, -1], [0, -1, -1, -1]])
    actual = losses.plackett_luce_loss(scores.masked_fill(ranks < 0, NAN), ranks)
    for row in range(3):
        order = [int((ranks[row] == k).nonzero()) for k in range(int(ranks[row].max()) + 1)]
        expected = 0.0
        for k, answer in enumerate(order):
            rest = sum(math.exp(float(scores[row, j])) for j in order[k:])
            expected -= float(scores[row, answer]) - math.log(rest)
        assert_same(actual[row], expected)
    assert_same(
        losses.plackett_luce_loss(scores[:, :2], torch.tensor([[0, 1], [1, 0], [0, 1]])),
        losses.bradley_terry_loss(scores[[0, 1, 2], [0, 1, 0]], scores[[0, 1, 2], [1, 0, 1]]),
    )
    (grad,) = gradient(lambda s: losses.plackett_luce_loss(s, ranks).sum(), scores)
    assert grad.isfinite().all() and (grad[ranks < 0] == 0).all()


# ---- refusals

ONES = torch.ones(2, 3)
MASK = ONES.bool()
REFUSED = {
    "aggregation: expected token or sequence or constant, got 'mean'": lambda: losses.aggregate(
        ONES, MASK, aggregation="mean"
    ),
    "num_items: expected a number with aggregation='constant', got None": lambda: losses.aggregate(
        ONES, MASK, aggregation="constant"
    ),
    "kl_gradient: expected k2 or k3, got 'k1'": lambda: losses.grpo_loss(
        ONES, ONES, ONES, ONES[:, 0], MASK, beta=0.1, kl_gradient="k1"
    ),
    "importance_sampling_level: expected token or sequence, got 'word'": lambda: losses.grpo_loss(
        ONES, ONES, None, ONES[:, 0], MASK, importance_sampling_level="word"
    ),
    "estimator: expected k1 or k2 or k3, got 'k4'": lambda: losses.kl_penalty(ONES, ONES, "k4"),
    "loss_type: expected sigmoid or ipo or hinge, got 'orpo'": lambda: losses.dpo_loss(
        *torch.ones(4, 2), loss_type="orpo"
    ),
    "mask: expected x's shape (2, 3), got (2, 4)": lambda: losses.aggregate(ONES, torch.ones(2, 4)),
    "rewards[1]: expected a finite number, got nan": lambda: losses.rloo_advantages(
        torch.tensor([1.0, NAN]), 2
    ),
    "lengths: expected two tensors of shape (2,), got [(2, 1), (2, 1)]": lambda: losses.dpo_loss(
        *torch.ones(4, 2), lengths=(torch.ones(2, 1), torch.ones(2, 1))
    ),
    "lengths: expected two tensors of shape (2,), got [(3,), (2,)]": lambda: losses.orpo_loss(
        *torch.ones(2, 2), (torch.ones(3), torch.ones(2))
    ),
    "margin: expected a number or shape (2,), got (2, 1)": lambda: losses.bradley_terry_loss(
        *torch.ones(2, 2), margin=torch.ones(2, 1)
    ),
    "kl: expected a number or shape (2,), got (2, 1)": lambda: losses.kto_loss(
        *torch.ones(2, 2), torch.ones(2).bool(), torch.ones(2, 1)
    ),
    "ref_logp: expected logp's shape (2, 3), got (3,)": lambda: losses.kl_penalty(ONES, ONES[0]),
    "group_size: expected at least 2, got 1": lambda: losses.rloo_advantages(torch.ones(4), 1),
    "rewards: expected (n * 3,), got shape (4,)": lambda: losses.grpo_advantages(torch.ones(4), 3),
    "advantages: expected one per row, (2,), or per token, (2, 3), got shape (2, 2)": lambda: (
        losses.grpo_loss(ONES, ONES, None, ONES[:, :2], MASK)
    ),
    "ref_logp: expected log-probabilities with beta=0.1, got None": lambda: losses.grpo_loss(
        ONES, ONES, None, ONES[:, 0], MASK, beta=0.1
    ),
    "desirable: expected bool of shape (2,), got torch.float32 of (2,)": lambda: losses.kto_loss(
        *torch.ones(3, 2), 0.0
    ),
    "ranks: row 1: expected 0 to k - 1 once each (-1: no answer), got [0, 0]": (
        lambda: losses.plackett_luce_loss(torch.ones(2, 2), torch.tensor([[0, 1], [0, 0]]))
    ),
    "ranks: expected integers of shape (2, 2), got torch.float32 of (2, 2)": (
        lambda: losses.plackett_luce_loss(torch.ones(2, 2), torch.ones(2, 2))
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message) -> None:
    with pytest.raises(InputError) as refusal:
        REFUSED[message]()
    assert str(refusal.value) == message
