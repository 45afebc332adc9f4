"""Losses and advantages of fine-tuning and alignment: pure functions of log-probabilities, rewards
and values.

Shapes: logp, values, rewards and mask are (B, S) unless stated otherwise; mask is true (or 1) on
response tokens. Masked positions are never read: they may hold NaN or infinity, and their gradient
is 0. Arithmetic is float32, or float64 if an argument is.

`aggregate` defines every denominator. With `num_items` (the number of all tokens or sequences of an
optimizer step) the losses of micro-batches and ranks add up to the loss of the whole batch, and so
do their gradients. Functions that return (B,) leave the mean to the caller, with the same
`num_items`. Metrics are means over the response tokens of one call, with their number in "tokens";
`pool_metrics` combines those of several calls.

Log-ratios are clamped to [-20, 20] before they are exponentiated: beyond that a ratio is far
outside any clip range, and its exponential could overflow.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.errors import InputError

MAX_LOG_RATIO = 20.0
WHITEN_EPS = 1e-8  # added to the variance
GROUP_EPS = 1e-4  # added to a group's standard deviation
Metrics = dict[str, Tensor]
Count = int | float | Tensor


def aggregate(
    x: Tensor,
    mask: Tensor,
    *,
    aggregation: Literal["token", "sequence", "constant"] = "token",
    num_items: Count | None = None,
) -> Tensor:
    """Return the masked sum or mean of x (B, S), one row per sequence, as a scalar.

    - "token": ``x[mask].sum() / (num_items or mask.sum())``;
    - "sequence": the mean over sequences of their token means, divided by `num_items` sequences
      if given. A sequence without tokens does not count;
    - "constant": the same as "token", with `num_items` (Liu et al. 2025, arXiv:2503.20783).

    An empty mean is 0. InputError: shapes do not fit.
    """
    _one_of(aggregation=(aggregation, "token", "sequence", "constant"))
    if aggregation == "constant" and num_items is None:
        raise InputError("num_items: expected a number with aggregation='constant', got None")
    keep, x = _apply_mask(mask, x=x)
    if aggregation == "sequence":
        counts = keep.sum(1)
        means = x.sum(1) / counts.clamp(min=1)
        return means.sum() / _at_least_one((counts > 0).sum() if num_items is None else num_items)
    return x.sum() / _at_least_one(keep.sum() if num_items is None else num_items)


def pool_metrics(metrics: Sequence[Metrics]) -> Metrics:
    """Combine the metrics of several calls (micro-batches, ranks) into those of one call on all
    their tokens: means weighted by "tokens". A call without tokens does not count.
    """
    tokens = torch.stack([m["tokens"] for m in metrics])
    total = tokens.sum()
    means = {
        name: (torch.stack([m[name] for m in metrics]) * tokens).sum() / _at_least_one(total)
        for name in metrics[0]
    }
    return {**means, "tokens": total}


def kl_penalty(
    logp: Tensor,
    ref_logp: Tensor,
    estimator: Literal["k1", "k2", "k3"] = "k1",
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Estimate KL(policy || reference) per token, from tokens that the policy sampled.

    - "k1": ``logp - ref_logp``, unbiased;
    - "k2": ``(logp - ref_logp) ** 2 / 2``, whose gradient is that of the KL;
    - "k3": ``exp(r) - 1 - r`` with ``r = ref_logp - logp``, unbiased and never negative.

    (Schulman 2020, "Approximating KL divergence".) As a penalty in the reward, which is a constant,
    all of them work. As a loss on tokens of the current policy, only k2 has the gradient of
    KL(policy || reference); k3 has that of KL(reference || policy), and k1 one of mean 0.

    Returns the shape of logp; 0 where `mask` is false.
    """
    _one_of(estimator=(estimator, "k1", "k2", "k3"))
    if mask is not None:
        _, logp, ref_logp = _apply_mask(mask, logp=logp, ref_logp=ref_logp)
    else:
        logp, ref_logp = _floats(logp=logp, ref_logp=ref_logp)
    difference = logp - ref_logp
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    r = (-difference).clamp(
        max=MAX_LOG_RATIO
    )  # clamped once for both terms, so that the gradient is 0 beyond it
    return torch.expm1(r) - r


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates (Schulman et al. 2015, arXiv:1506.02438).

    ``advantage[t] = delta[t] + gamma lam advantage[t + 1]`` with ``delta[t] = rewards[t] + gamma
    values[t + 1] - values[t]``, where t + 1 is the next response token of the row. The value after
    the last one is 0. Padding on either side and gaps (the messages of a tool) are skipped.

    Returns:
        (advantages, returns), each (B, S) and 0 where masked; returns = advantages + values. No
        gradient flows through either.
    """
    keep, rewards, values = _apply_mask(mask, rewards=rewards.detach(), values=values.detach())
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[:1])
    for t in range(rewards.shape[1] - 1, -1, -1):
        is_token, value = keep[:, t], values[:, t]
        advantage = rewards[:, t] + gamma * next_value - value + gamma * lam * next_advantage
        next_advantage = torch.where(is_token, advantage, next_advantage)
        next_value = torch.where(is_token, value, next_value)
        advantages[:, t] = torch.where(is_token, advantage, 0.0)
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Return ``(x - mean) / sqrt(variance + 1e-8)`` over response tokens, 0 where masked.

    With ``shift_mean=False`` the mean is added back, as for rewards. The variance is the biased one
    (``unbiased=False``), as in OpenAI's code, so that a single token has variance 0 and not 0 / 0.
    """
    keep, x = _apply_mask(mask, x=x)
    count = _at_least_one(keep.sum())
    mean = x.sum() / count
    centred = torch.where(keep, x - mean, 0.0)
    scaled = centred * torch.rsqrt(centred.square().sum() / count + WHITEN_EPS)
    return scaled if shift_mean else torch.where(keep, scaled + mean, 0.0)


def ppo_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    num_items: Count | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute PPO's clipped objective (Schulman et al. 2017, arXiv:1707.06347), a mean over tokens.

    ``max(-A ratio, -A clamp(ratio, 1 - clip_range, 1 + clip_range_high))`` with ``ratio = exp(logp
    - old_logp)``. `clip_range_high` is `clip_range` by default; a larger one lets unlikely tokens
    with A > 0 grow faster (DAPO's clip-higher, Yu et al. 2025, arXiv:2503.14476). With `dual_clip`
    c > 1 the loss of a token with A < 0 is at most ``-A c`` (Ye et al. 2019, arXiv:1912.09729).

    Returns:
        (loss, metrics): "ratio", "clip_fraction" (tokens where the clip is active), its parts
        "clip_fraction_low" (A < 0) and "clip_fraction_high" (A > 0), and "approx_kl" (k3 of the
        update).
    """
    keep, logp, old_logp, advantages = _apply_mask(
        mask, logp=logp, old_logp=old_logp.detach(), advantages=advantages.detach()
    )
    log_ratio = logp - old_logp
    loss, metrics = _clipped(log_ratio, advantages, clip_range, clip_range_high, dual_clip)
    metrics["approx_kl"] = _update_kl(log_ratio)
    return aggregate(loss, keep, num_items=num_items), _means(metrics, keep)


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    num_items: Count | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute PPO's clipped value loss, a mean over tokens.

    ``max((values - returns)^2, (clipped - returns)^2) / 2`` with ``clipped`` = values clamped to
    old_values +- clip_range.

    Returns:
        (loss, metrics): "value", "return", "value_error" (the square without clipping) and
        "clip_fraction".
    """
    keep, values, old_values, returns = _apply_mask(
        mask, values=values, old_values=old_values.detach(), returns=returns.detach()
    )
    plain = (values - returns).square()
    # not old_values + (values - old_values).clamp(...), which rounds even without clipping
    clipped = (values.clamp(old_values - clip_range, old_values + clip_range) - returns).square()
    metrics = {
        "value": values,
        "return": returns,
        "value_error": plain,
        "clip_fraction": (clipped > plain).to(plain.dtype),
    }
    loss = aggregate(torch.maximum(plain, clipped) / 2, keep, num_items=num_items)
    return loss, _means(metrics, keep)


def grpo_advantages(rewards: Tensor, group_size: int, *, scale: bool = True) -> Tensor:
    """Return ``(r - mean) / (std + 1e-4)`` within each group of answers to one prompt (Shao et al.
    2024, arXiv:2402.03300); std is the unbiased one.

    ``scale=False`` omits the division, which gives easy and hard prompts more weight than others
    (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).

    Args:
        rewards: (n * group_size,), group after group; finite.
        group_size: at least 2.

    Returns (n * group_size,). Raises InputError where the sizes do not fit.
    """
    groups = _groups(rewards, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (groups.std(1, keepdim=True) + GROUP_EPS)
    return centred.flatten()


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    beta: float = 0.0,
    aggregation: Literal["token", "sequence", "constant"] = "token",
    importance_sampling_level: Literal["token", "sequence"] = "token",
    num_items: Count | None = None,
    kl_gradient: Literal["k2", "k3"] = "k2",
) -> tuple[Tensor, Metrics]:
    """Compute `ppo_policy_loss` with one advantage per answer, plus `beta` times the KL to the
    reference.

    The KL term has k3's value. Its gradient is k2's, which on tokens of the current policy is that
    of the KL (`kl_penalty`), or k3's, as in the paper (Shao et al. 2024, arXiv:2402.03300, equation
    4). On tokens of an older policy, in later epochs, either is an approximation.

    Args:
        ref_logp: (B, S); None only with beta = 0.
        advantages: (B,), of `grpo_advantages` or `rloo_advantages`; (B, S) if each token
            has its own weight.
        aggregation: "sequence" is GRPO's mean over answers of token means; "token" is DAPO's (Yu et
            al. 2025, arXiv:2503.14476); "constant" with num_items = B * max length is Dr. GRPO's.
        importance_sampling_level: "token", or "sequence": all tokens of an answer have the ratio
            ``exp(mean over its tokens of logp - old_logp)``, which is clipped once. With
            aggregation "sequence" this is GSPO (Zheng et al. 2025, arXiv:2507.18071), in which a
            token's gradient is ``-A ratio / (B * tokens of the answer)`` where the clip is not
            active.

    Returns:
        (loss, metrics): those of `ppo_policy_loss`, and "kl" (k3) if there is a reference.
    """
    if advantages.shape not in (logp.shape[:1], logp.shape):
        raise InputError(
            f"advantages: expected one per row, {tuple(logp.shape[:1])}, or per token,"
            f" {tuple(logp.shape)}, got shape {tuple(advantages.shape)}"
        )
    if ref_logp is None and beta:
        raise InputError(f"ref_logp: expected log-probabilities with beta={beta:g}, got None")
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand_as(logp)
    keep, logp, old_logp = _apply_mask(mask, logp=logp, old_logp=old_logp.detach())
    _, advantages = _apply_mask(mask, advantages=advantages.detach().to(logp.dtype))
    _one_of(importance_sampling_level=(importance_sampling_level, "token", "sequence"))
    update = log_ratio = logp - old_logp
    if importance_sampling_level == "sequence":
        means = update.sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)
        log_ratio = torch.where(keep, means, 0.0)
    loss, metrics = _clipped(log_ratio, advantages, clip_range, clip_range_high, None)
    metrics["approx_kl"] = _update_kl(update)
    if ref_logp is not None:
        _one_of(kl_gradient=(kl_gradient, "k2", "k3"))
        _, reference = _apply_mask(mask, ref_logp=ref_logp.detach())
        estimate = kl_penalty(logp, reference, kl_gradient)
        metrics["kl"] = k3 = kl_penalty(logp.detach(), reference, "k3")
        loss = loss + beta * (k3 + estimate - estimate.detach())
    return aggregate(loss, keep, aggregation=aggregation, num_items=num_items), _means(
        metrics, keep
    )


def overlong_penalty(lengths: Tensor, max_new_tokens: int, overlong_tokens: int) -> Tensor:
    """Return DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, equation 13), to be
    added to rewards.

    ``-clamp((length - (max_new_tokens - overlong_tokens)) / overlong_tokens, 0, 1)``: 0 up to
    max_new_tokens - overlong_tokens tokens, then linear, -1 at max_new_tokens, where answers are
    cut off. Without `overlong_tokens` it is 0.

    lengths: (B,) tokens of the answers, the end token included -> (B,) float64.
    """
    if not overlong_tokens:
        return torch.zeros(len(lengths), dtype=torch.float64)
    excess = lengths.double() - (max_new_tokens - overlong_tokens)
    return -(excess / overlong_tokens).clamp(0, 1)


def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Return each reward minus the mean of the others of its group (Ahmadian et al. 2024,
    arXiv:2402.14740).

    rewards (n * group_size,), group after group, group_size at least 2 -> the same shape.
    """
    groups = _groups(rewards, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid",
    lengths: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute the losses of preference pairs, with ``h = (chosen - ref_chosen) - (rejected -
    ref_rejected)``.

    - "sigmoid": ``-logsigmoid(beta h)`` (Rafailov et al. 2023, arXiv:2305.18290). With
      `label_smoothing` e, ``-(1 - e) logsigmoid(beta h) - e logsigmoid(-beta h)``: conservative
      DPO, for labels that are wrong with probability e;
    - "ipo": ``(h - 1 / (2 beta)) ** 2`` (Azar et al. 2023, arXiv:2310.12036). The paper's h is of
      sums; its authors' code and TRL take means over tokens: pass `lengths`;
    - "hinge": ``relu(1 - beta h)`` (Zhao et al. 2023, SLiC, arXiv:2305.10425).

    Args:
        chosen, rejected, ref_chosen, ref_rejected: (B,), log-probabilities summed over answers.
        lengths: (tokens of chosen, tokens of rejected), each (B,): the log-ratio of each answer is
            divided by its length first (by 1 if it is empty).

    Returns (B,).
    """
    chosen, rejected, ref_chosen, ref_rejected = _floats(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen.detach(),
        ref_rejected=ref_rejected.detach(),
    )  # fmt: skip
    _one_of(loss_type=(loss_type, "sigmoid", "ipo", "hinge"))
    ratios = chosen - ref_chosen, rejected - ref_rejected
    if lengths is not None:
        ratios = _per_token(*ratios, lengths)
    h = ratios[0] - ratios[1]
    if loss_type == "sigmoid":
        return _smoothed_sigmoid_loss(beta * h, label_smoothing)
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)).square()
    return torch.relu(1 - beta * h)


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    lengths: tuple[Tensor, Tensor],
    *,
    beta: float = 0.1,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute SimPO's losses of preference pairs (Meng et al. 2024, arXiv:2405.14734), which need
    no reference: ``-logsigmoid(z)`` with ``z = beta (chosen / n_chosen - rejected / n_rejected) -
    simpo_gamma``. With `label_smoothing` e, ``-(1 - e) logsigmoid(z) - e logsigmoid(-z)``.

    Args:
        chosen, rejected: (B,), log-probabilities summed over answers.
        lengths: (tokens of chosen, tokens of rejected), each (B,); an empty answer counts as 1.

    Returns (B,).
    """
    chosen, rejected = _floats(chosen=chosen, rejected=rejected)
    chosen, rejected = _per_token(chosen, rejected, lengths)
    return _smoothed_sigmoid_loss(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def orpo_loss(
    chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor], *, beta: float = 0.1
) -> tuple[Tensor, Metrics]:
    """Compute ORPO's losses of preference pairs (Hong et al. 2024, arXiv:2403.07691), which need no
    reference: ``nll - beta logsigmoid(log_odds)``.

    With p the geometric mean of the probabilities of an answer's tokens, ``nll = -log
    p(chosen)`` and ``log_odds = log(p / (1 - p))`` of chosen minus that of rejected. `beta` is the
    paper's lambda. TRL's nll also counts the tokens of the prompt.

    Args:
        chosen, rejected: (B,), log-probabilities summed over answers.
        lengths: (tokens of chosen, tokens of rejected), each (B,); an empty answer counts as 1.

    Returns:
        (losses, metrics): (B,) each; "nll" and "log_odds", without gradients.
    """
    chosen, rejected = _floats(chosen=chosen, rejected=rejected)
    chosen, rejected = _per_token(chosen, rejected, lengths)
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    metrics = {"nll": -chosen.detach(), "log_odds": log_odds.detach()}
    return -chosen - beta * F.logsigmoid(log_odds), metrics


def kto_loss(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute the losses of answers with a thumb up or down (Ethayarajh et al. 2024,
    arXiv:2402.01306).

    With ``r = logp - ref_logp``: ``desirable_weight * (1 - sigmoid(beta (r - kl)))`` of a desirable
    answer, ``undesirable_weight * (1 - sigmoid(beta (kl - r)))`` of another.

    Args:
        logp, ref_logp: (B,), log-probabilities summed over answers.
        desirable: (B,) bool.
        kl: the reference point: the mean of ``logp - ref_logp`` over answers to other prompts, a
            number or (B,). A negative one counts as 0; no gradient flows through it.

    Returns (B,).
    """
    logp, ref_logp = _floats(logp=logp, ref_logp=ref_logp.detach())
    if desirable.shape != logp.shape or desirable.dtype != torch.bool:
        raise InputError(
            f"desirable: expected bool of shape {tuple(logp.shape)}, got {desirable.dtype} of"
            f" {tuple(desirable.shape)}"
        )
    kl = _per_row("kl", kl, logp).detach().clamp(min=0)
    gain = beta * (logp - ref_logp - kl)
    return torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-gain),
        undesirable_weight * torch.sigmoid(gain),
    )


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float | None = None
) -> Tensor:
    """Return ``-logsigmoid(chosen - rejected - margin)`` of rewards (B,) (Bradley and Terry 1952;
    the margin: Touvron et al. 2023, arXiv:2307.09288) -> (B,).
    """
    chosen, rejected = _floats(chosen=chosen, rejected=rejected)
    return -F.logsigmoid(
        chosen - rejected - _per_row("margin", 0.0 if margin is None else margin, chosen)
    )


def plackett_luce_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Return minus the log-probability of a ranking: the best answer is drawn first with
    probability ``softmax(scores)``, then the best of the rest, and so on (Plackett 1975).

    Args:
        scores: (B, K) rewards.
        ranks: (B, K) integers, 0 is the best; -1 where a row has fewer answers. Each row has the
            ranks 0 .. k - 1 once each.

    Returns (B,). With two answers it is `bradley_terry_loss`.
    """
    (scores,) = _floats(scores=scores)
    if ranks.shape != scores.shape or ranks.is_floating_point() or ranks.dtype == torch.bool:
        raise InputError(
            f"ranks: expected integers of shape {tuple(scores.shape)}, got {ranks.dtype} of"
            f" {tuple(ranks.shape)}"
        )
    missing = ranks < 0
    order = torch.where(missing, ranks.shape[1], ranks).argsort(dim=1, stable=True)
    ordered = ranks.gather(1, order)
    present = ~missing.gather(1, order)
    expected = torch.arange(ranks.shape[1], device=ranks.device).expand_as(ranks)
    bad = (present & (ordered != expected)).any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise InputError(
            f"ranks: row {row}: expected 0 to k - 1 once each (-1: no answer),"
            f" got {ranks[row].tolist()}"
        )
    sorted_scores = torch.where(present, scores.gather(1, order), -torch.inf)
    rest = sorted_scores.flip(1).logcumsumexp(1).flip(1)  # over this answer and the worse ones
    return torch.where(present, rest - sorted_scores, 0.0).sum(1)


def _per_token(
    chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Divide the sums of answers by their lengths, or by 1 if an answer is empty."""
    if len(lengths) != 2 or any(n.shape != chosen.shape for n in lengths):
        raise InputError(
            f"lengths: expected two tensors of shape {tuple(chosen.shape)},"
            f" got {[tuple(n.shape) for n in lengths]}"
        )
    return chosen / lengths[0].clamp(min=1), rejected / lengths[1].clamp(min=1)


def _smoothed_sigmoid_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    e = label_smoothing
    return -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)


def _log_odds(logp: Tensor) -> Tensor:
    """Return ``log(p / (1 - p))`` with ``p = exp(logp)``, at most 1 - eps: at 1 it is infinite."""
    return logp - torch.log(-torch.expm1(logp.clamp(max=-torch.finfo(logp.dtype).eps)))


def _clipped(
    log_ratio: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None,
    dual_clip: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return PPO's loss and metrics per token. Masked positions are 0 in all operands."""
    high = clip_range if clip_range_high is None else clip_range_high
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    is_active = clipped > plain
    metrics = {
        "ratio": ratio,
        "clip_fraction": is_active.to(plain.dtype),
        "clip_fraction_low": (is_active & (advantages < 0)).to(plain.dtype),
        "clip_fraction_high": (is_active & (advantages > 0)).to(plain.dtype),
    }
    return loss, metrics


def _update_kl(log_ratio: Tensor) -> Tensor:
    """Return k3 of the update per token."""
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def _means(metrics: dict[str, Tensor], keep: Tensor) -> Metrics:
    means = {name: aggregate(x.detach(), keep) for name, x in metrics.items()}
    return {**means, "tokens": keep.sum()}


def _apply_mask(mask: Tensor, **tensors: Tensor) -> Sequence[Any]:
    """Return the mask as bool, and the tensors as floats with 0 where it is false. So a NaN there
    does not reach a product, in the backward either.
    """
    floats = _floats(**tensors)
    if mask.shape != floats[0].shape:
        (name, *_) = tensors
        raise InputError(
            f"mask: expected {name}'s shape {tuple(floats[0].shape)}, got {tuple(mask.shape)}"
        )
    keep = mask if mask.dtype == torch.bool else mask != 0
    return [keep, *(torch.where(keep, t, 0.0) for t in floats)]


def _floats(**tensors: Tensor) -> list[Tensor]:
    """Return the tensors in float32, or in float64 if one is. InputError: their shapes differ."""
    (first, shape), *_ = ((name, t.shape) for name, t in tensors.items())
    for name, t in tensors.items():
        if t.shape != shape:
            raise InputError(
                f"{name}: expected {first}'s shape {tuple(shape)}, got {tuple(t.shape)}"
            )
    wide = torch.float64 in [t.dtype for t in tensors.values()]
    return [t.to(torch.float64 if wide else torch.float32) for t in tensors.values()]


def _one_of(**choices: tuple[str, ...]) -> None:
    ((name, (value, *valid)),) = choices.items()
    if value not in valid:
        raise InputError(f"{name}: expected {' or '.join(valid)}, got {value!r}")


def _at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _per_row(name: str, value: Tensor | float, rows: Tensor) -> Tensor:
    """Return ``value``, a number or a tensor of the shape of ``rows``, as a tensor of their
    dtype.
    """
    value = torch.as_tensor(value, dtype=rows.dtype, device=rows.device)
    if value.shape not in ((), rows.shape):
        raise InputError(
            f"{name}: expected a number or shape {tuple(rows.shape)}, got {tuple(value.shape)}"
        )
    return value


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise InputError(f"group_size: expected at least 2, got {group_size}")
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise InputError(f"rewards: expected (n * {group_size},), got shape {tuple(rewards.shape)}")
    (rewards,) = _floats(rewards=rewards)
    if not rewards.isfinite().all():
        row = int((~rewards.isfinite()).nonzero()[0])
        raise InputError(f"rewards[{row}]: expected a finite number, got {float(rewards[row])}")
    groups = rewards.view(-1, group_size)
    return groups - groups[:, :1]  # equal rewards then give exactly 0
