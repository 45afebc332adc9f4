"""GRPO and its relatives: the advantage of an answer is relative to the others of its prompt, so
there is no value model.
"""

from typing import Any

import torch
from torch import Tensor

from fastlm.train.losses import (
    Metrics,
    aggregate,
    grpo_advantages,
    grpo_loss,
    ppo_policy_loss,
    rloo_advantages,
)
from fastlm.train.online import Batch, Online, importance
from fastlm.train.rollout_options import LOSS_TYPES, GrpoOptions, How


class GroupRelative(Online):
    """The objective of `fastlm.train.grpo.Grpo`.

    The KL to the reference is a term of the loss, but for RLOO: there it is subtracted from the
    score of the answer, and an answer is one action, whose log-probability is the sum of its
    tokens'.
    """

    columns = ("advantages", "ref_logp", "learnt")

    options: GrpoOptions

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        how, self.scaled = LOSS_TYPES[self.options.loss_type]
        self.how: How = how

    def estimate(self, scores: Tensor, mask: Tensor, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        size, difference = self.options.answers, kept["difference"]
        if self.options.loss_type == "rloo":
            difference = torch.where(mask, difference, 0.0).sum(1, keepdim=True)
            gap = torch.where(mask, kept["logp"] - kept["ref_logp"], 0.0).sum(1)
            advantages = rloo_advantages(scores - self.beta * gap, size)
        else:
            advantages = grpo_advantages(scores, size, scale=self.scaled)
        low, high = scores.view(-1, size).aminmax(dim=1)
        self.made["groups_apart"] = float((high > low).float().mean())  # others teach nothing
        learnt = mask
        if self.options.mask_truncated:
            ended = torch.tensor([answer.ended for answer in self.answers], device=mask.device)
            learnt = mask & ended[:, None]
        weighted = advantages[:, None] * importance(difference)
        return {
            "advantages": weighted.expand_as(mask).contiguous(),
            "ref_logp": kept["ref_logp"],
            "learnt": learnt,
        }

    def num_items(self, batch: Batch) -> int:
        learnt = batch.columns["learnt"]
        if self.how == "token":
            return int(learnt.sum())
        answers = int(learnt.any(1).sum())
        return answers * self.options.max_new_tokens if self.how == "constant" else answers

    def micro_loss(self, batch: Batch, num_items: int) -> tuple[Tensor, tuple[Metrics, ...]]:
        c, options = batch.columns, self.options
        logp, entropy = self.logprobs(self.policy, batch.packed)
        if options.loss_type == "rloo":
            new, old = (
                torch.where(c["learnt"], x, 0.0).sum(1, keepdim=True) for x in (logp, c["old_logp"])
            )
            some = c["learnt"].any(1, keepdim=True)
            loss, _ = ppo_policy_loss(
                new, old, c["advantages"][:, :1], some, clip=options.clip, num_items=num_items
            )
            _, metrics = ppo_policy_loss(  # per token, as those of the others
                logp.detach(), c["old_logp"], c["advantages"], c["learnt"], clip=options.clip
            )
        else:
            loss, metrics = grpo_loss(
                logp, c["old_logp"], c["ref_logp"], c["advantages"], c["learnt"], clip=options.clip,
                beta=self.beta, how=self.how, num_items=num_items,
            )  # fmt: skip
            metrics["update_kl"] = metrics.pop("kl")
        if options.entropy:
            bonus = aggregate(entropy, c["learnt"], how=self.how, num_items=num_items)
            loss = loss - options.entropy * bonus
        return loss, (metrics, self.mean_entropy(entropy, batch.packed.mask))
