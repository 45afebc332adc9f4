"""The objectives of PPO, with a value model that predicts the final score at every token, and of
GRPO and its relatives, in which an advantage is relative to the other completions of the prompt.
"""

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.train.async_rollouts import frozen_tensors
from fastlm.train.losses import (
    Metrics,
    aggregate,
    gae,
    grpo_advantages,
    grpo_loss,
    kl_penalty,
    overlong_penalty,
    ppo_policy_loss,
    ppo_value_loss,
    rloo_advantages,
    whiten,
)
from fastlm.train.objective import decay_matrices, without_dropout
from fastlm.train.online import OnlineObjective, RolloutBatch, Rollouts
from fastlm.train.options import LOSS_TYPES, Aggregation, GRPOOptions, PPOOptions
from fastlm.train.rollouts import PackedRollouts

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.reward_model import RewardModel

MAX_BAD_ROUNDS = 5  # a value model that fails in this many rounds does not fail by chance


class ValueModel(nn.Module):
    """A model of the final score at every token: a trunk, and a head from its hidden states to a
    number.

    With ``trunk`` None it shares the policy's trunk, whose hidden states `values` then takes.
    ``kind``: the option `value_model` of `fastlm.train.online_stage.PPO`.
    """

    def __init__(self, trunk: "CausalLM | None", width: int, kind: str):
        super().__init__()
        self.kind = kind
        self.trunk = trunk
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def values(self, packed: PackedRollouts, hidden: Tensor | None = None) -> Tensor:
        """Return the values before each token of the completions, (B, S)."""
        if hidden is None:
            assert self.trunk is not None  # otherwise the caller passes the policy's hidden states
            hidden = packed.hidden(self.trunk)
        head = self.head  # in float32: bfloat16 would round a value to 8 bits
        return packed.rows(F.linear(hidden.float(), head.weight.float(), head.bias.float())[..., 0])


class PPOObjective(OnlineObjective):
    """The objective of `fastlm.train.online_stage.PPO`. docs/ppo.md lists its conventions.

    ``value_model``: see `ValueModel`. ``offset`` is added to its values. It is the mean score of
    the first round, so that a head of zeros starts at the mean return and not at 0, which it would
    take long to leave at a learning rate fit for a policy. The offset is not a parameter, because
    its distance from 0 has nothing to do with the scale of the parameters.
    """

    column_names = ("advantages", "returns", "values")

    options: PPOOptions

    def __init__(self, *args: Any, value_model: ValueModel, **more: Any):
        super().__init__(*args, **more)
        self.value_model = value_model
        self.offset: float | None = (
            0.0 if value_model.kind == "reward" else None
        )  # None: no round yet
        self.bad_rounds = 0  # in a row, in which the value model explained less than the mean
        self.trained = nn.ModuleDict({"policy": self.policy, "value": value_model})
        without_dropout(value_model)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "value_model": self.value_model.kind}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        value = decay_matrices(self.value_model, weight_decay)
        return [
            *decay_matrices(self.policy, weight_decay),
            *({**group, "lr": self.options.value_lr_factor} for group in value),
        ]

    def forward(self, packed: PackedRollouts) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities, entropies and values, (B, S) each, from one forward of each
        trunk. While the value model warms up, nothing else has a gradient.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.warming_up()):
            hidden = packed.hidden(self.policy)
            logp, entropy = self.logprobs(self.policy, packed, hidden)
        values = self.value_model.values(
            packed, None if self.value_model.trunk is not None else hidden
        )
        return logp, entropy, values + (self.offset or 0.0)

    def evaluate(self, packed: PackedRollouts) -> dict[str, Tensor]:
        logp, _, values = self.forward(packed)
        return {"logp": logp, "values": values}

    def estimate(
        self, scores: Tensor, mask: Tensor, tokens: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        options, logp, values = self.options, tokens["logp"], tokens["values"]
        if self.offset is None:
            self.offset = float(scores.mean())
            values = values + self.offset
        kind = cast(Any, options.kl_estimator)
        rewards = -self.beta * kl_penalty(logp, tokens["ref_logp"], kind, mask=mask)
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        rewards[torch.arange(len(last)), last] += scores
        if options.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, gamma=options.gamma, lam=options.lam)
        variance = float(aggregate((returns - aggregate(returns, mask)).square(), mask))
        error = float(aggregate((returns - values).square(), mask))
        self.round_metrics["explained_variance"] = explained = (
            1 - error / variance if variance > 0 else 0.0
        )
        self.bad_rounds = self.bad_rounds + 1 if explained < 0 else 0
        if options.whiten_advantages:
            advantages = whiten(advantages, mask)
        return {
            "advantages": advantages * self.importance_weights(tokens["difference"], mask),
            "returns": returns,
            "values": values,
        }

    def _check_round(self, untrusted_steps: int) -> None:
        super()._check_round(untrusted_steps)
        explained = self.round_metrics.get("explained_variance")  # None: the last measurement
        if explained is not None and self.bad_rounds and self.bad_rounds % MAX_BAD_ROUNDS == 0:
            self.warn(
                f"round {self.round}: for {self.bad_rounds} rounds the value model has predicted"
                f" the returns worse than their mean does (explained_variance {explained:.3g}): it"
                " adds noise to the advantages; a higher value_lr_factor or critic_warmup may"
                " help"
            )

    def warming_up(self) -> bool:
        """Return whether only the value model learns from the current round."""
        return self.round < self.options.critic_warmup

    def num_items(self, batch: RolloutBatch) -> int:
        return self.tokens(batch)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bad_rounds": self.bad_rounds, "offset": self.offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.bad_rounds, self.offset = state["bad_rounds"], state["offset"]

    def micro_loss(self, batch: RolloutBatch, num_items: int) -> tuple[Tensor, tuple[Metrics, ...]]:
        columns, mask, options = batch.columns, batch.packed.mask, self.options
        logp, entropy, values = self.forward(batch.packed)
        loss, metrics = ppo_policy_loss(
            logp, columns["old_logp"], columns["advantages"], mask, clip_range=options.clip_range,
            clip_range_high=options.clip_range_high, dual_clip=options.dual_clip,
            num_items=num_items,
        )  # fmt: skip
        value_loss, value_metrics = ppo_value_loss(
            values,
            columns["values"],
            columns["returns"],
            mask,
            clip_range=options.clip_range_value,
            num_items=num_items,
        )
        value_metrics["value_clip_fraction"] = value_metrics.pop("clip_fraction")
        value_loss = options.vf_coef * value_loss
        if self.warming_up():
            loss = value_loss
        else:
            loss = loss + value_loss
            if options.entropy_coef:
                loss = loss - options.entropy_coef * aggregate(entropy, mask, num_items=num_items)
        return loss, (metrics, value_metrics, self.mean_entropy(entropy, mask))


def build_value_model(
    policy: "CausalLM", *, shared: bool = False, reward: "RewardModel | None" = None
) -> ValueModel:
    """Build a value model: with a copy of the policy's trunk (frozen tensors are shared), with the
    policy's trunk itself (``shared``), or as a copy of a reward model, so that it starts with the
    reward model's score of the unfinished answer.
    """
    if shared:
        return ValueModel(None, policy.config.hidden_size, "shared")
    if reward is None:
        return ValueModel(_trunk_of(policy), policy.config.hidden_size, "copy")
    trunk = copy.deepcopy(reward.trunk).float()
    value_model = ValueModel(trunk, reward.config.hidden_size, "reward")
    with torch.no_grad():
        value_model.head.weight.copy_(reward.head.weight.float() / reward.std)
        value_model.head.bias.fill_(-reward.mean / reward.std)
    return value_model


def _trunk_of(policy: "CausalLM") -> "CausalLM":
    """Copy the policy without an untied head. The copy shares frozen tensors."""
    shared = frozen_tensors(policy)
    if untied := not policy.config.tie_word_embeddings:
        shared.extend(policy.lm_head.parameters())  # would be dropped after the copy
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    trunk = copy.deepcopy(policy, memo)
    if untied:
        del trunk.lm_head
        trunk.config = replace(trunk.config, tie_word_embeddings=True)
    return trunk


def rows_of_groups(groups: Tensor, group_size: int) -> list[int]:
    """Return the indices of the completions of these groups."""
    return (groups[:, None] * group_size + torch.arange(group_size)).flatten().tolist()


class GRPOObjective(OnlineObjective):
    """The objective of `fastlm.train.online_stage.GRPO`.

    The KL to the reference is a term of the loss, except for RLOO. RLOO subtracts it from the
    score, and treats a completion as one action, whose log-probability is the sum over its tokens.

    With `dynamic_sampling` a round trains on groups whose scores differ (`complete_round`). Its
    metrics are those of the prompts drawn first, before groups are replaced, so that they do not
    depend on this selection.
    """

    column_names = ("advantages", "ref_logp", "loss_mask")

    options: GRPOOptions

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.aggregation: Aggregation
        self.aggregation, self.scale_advantages = LOSS_TYPES[self.options.loss_type]

    def complete_round(self, rollouts: Rollouts) -> Rollouts:
        """Replace groups of equal scores, in which all advantages are 0 (but for RLOO's KL and the
        overlong penalty), by groups of further prompts (DAPO's dynamic sampling, Yu et al. 2025,
        arXiv:2503.14476).

        Each of at most `dynamic_sampling` draws takes a prompt for each of these groups. Groups
        that are left after the last draw stay in the round. Metrics: "informative_groups", the
        share of groups whose scores differ before any is replaced; "prompts_drawn".
        """
        size, draws = self.options.num_generations, self.options.dynamic_sampling
        informative = self._informative_groups(rollouts)
        self.round_metrics["informative_groups"] = float(informative.float().mean())
        first_prompt = self.next_prompt - len(informative)
        for _ in range(draws):
            missing = (~informative).nonzero().flatten()
            if not len(missing):
                break
            further = self.roll_out(self.score, len(missing))
            new_groups = self._informative_groups(further).nonzero().flatten()
            old_groups = missing[: len(new_groups)]
            rollouts = rollouts.replace_rows(
                rows_of_groups(old_groups, size), further, rows_of_groups(new_groups, size)
            )
            informative[old_groups] = True
        if draws:
            self.round_metrics["prompts_drawn"] = self.next_prompt - first_prompt
        return rollouts

    def _informative_groups(self, rollouts: Rollouts) -> Tensor:
        """Return which groups of completions have scores that differ before the overlong penalty,
        (prompts,). DAPO compares correctness, so that no group teaches the length alone.
        """
        options = self.options
        lengths = torch.tensor([len(completion.token_ids) for completion in rollouts.completions])
        penalty = overlong_penalty(lengths, options.max_new_tokens, options.overlong_tokens)
        # in float32, as adding and subtracting the penalty rounds in float64
        scores = (torch.tensor(rollouts.scores, dtype=torch.float64) - penalty).float()
        low, high = scores.view(-1, self.options.num_generations).aminmax(dim=1)
        return high > low

    def estimate(
        self, scores: Tensor, mask: Tensor, tokens: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        size, difference, weight_mask = self.options.num_generations, tokens["difference"], mask
        if self.options.loss_type in ("rloo", "gspo"):  # a completion has one ratio
            weight_mask = mask.any(1, keepdim=True)
            difference = torch.where(mask, difference, 0.0).sum(1, keepdim=True)
            if self.options.loss_type == "gspo":
                difference = difference / mask.sum(1, keepdim=True)
        if self.options.loss_type == "rloo":
            gap = torch.where(mask, tokens["logp"] - tokens["ref_logp"], 0.0).sum(1)
            advantages = rloo_advantages(scores - self.beta * gap, size)
        else:
            advantages = grpo_advantages(scores, size, scale=self.scale_advantages)
        loss_mask = mask
        if self.options.mask_truncated_completions:
            ended = torch.tensor([c.is_stopped for c in self.completions], device=mask.device)
            loss_mask = mask & ended[:, None]
        weighted = advantages[:, None] * self.importance_weights(difference, weight_mask)
        return {
            "advantages": weighted.expand_as(mask).contiguous(),
            "ref_logp": tokens["ref_logp"],
            "loss_mask": loss_mask,
        }

    def num_items(self, batch: RolloutBatch) -> int:
        loss_mask = batch.columns["loss_mask"]
        if self.aggregation == "token":
            return int(loss_mask.sum())
        count = int(loss_mask.any(1).sum())
        return count * self.options.max_new_tokens if self.aggregation == "constant" else count

    def micro_loss(self, batch: RolloutBatch, num_items: int) -> tuple[Tensor, tuple[Metrics, ...]]:
        columns, options = batch.columns, self.options
        logp, entropy = self.logprobs(self.policy, batch.packed)
        if options.loss_type == "rloo":
            new, old = (
                torch.where(columns["loss_mask"], x, 0.0).sum(1, keepdim=True)
                for x in (logp, columns["old_logp"])
            )
            row_mask = columns["loss_mask"].any(1, keepdim=True)
            loss, _ = ppo_policy_loss(
                new,
                old,
                columns["advantages"][:, :1],
                row_mask,
                clip_range=options.clip_range,
                clip_range_high=options.clip_range_high,
                num_items=num_items,
            )
            _, metrics = ppo_policy_loss(  # per token, as for the other losses
                logp.detach(),
                columns["old_logp"],
                columns["advantages"],
                columns["loss_mask"],
                clip_range=options.clip_range,
                clip_range_high=options.clip_range_high,
            )
        else:
            loss, metrics = grpo_loss(
                logp, columns["old_logp"], columns["ref_logp"], columns["advantages"],
                columns["loss_mask"], clip_range=options.clip_range,
                clip_range_high=options.clip_range_high, beta=self.beta,
                aggregation=self.aggregation, num_items=num_items,
                importance_sampling_level="sequence" if options.loss_type == "gspo" else "token",
            )  # fmt: skip
            metrics["update_kl"] = metrics.pop("kl")
        if options.entropy_coef:
            bonus = aggregate(
                entropy, columns["loss_mask"], aggregation=self.aggregation, num_items=num_items
            )
            loss = loss - options.entropy_coef * bonus
        return loss, (metrics, self.mean_entropy(entropy, batch.packed.mask))
