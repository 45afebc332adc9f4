"""GRPO and its relatives: the advantage of an answer is relative to the others of its prompt, so
there is no value model.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

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

How = Literal["token", "sequence", "constant"]
# loss_type -> how the loss is aggregated, whether advantages are divided by the group's deviation
LOSS_TYPES: dict[str, tuple[How, bool]] = {
    "grpo": ("sequence", True),  # Shao et al. 2024, arXiv:2402.03300
    "dapo": ("token", True),  # Yu et al. 2025, arXiv:2503.14476
    "dr_grpo": ("constant", False),  # Liu et al. 2025, arXiv:2503.20783
    "rloo": ("sequence", False),  # Ahmadian et al. 2024, arXiv:2402.14740
}


@dataclass(frozen=True)
class GroupRules:
    """The options of `fastlm.train.grpo.Grpo` of the same names."""

    loss_type: str = "dapo"
    clip: float = 0.2
    entropy: float = 0.0
    mask_truncated: bool = False


class GroupRelative(Online):
    """The objective of `fastlm.train.grpo.Grpo`.

    The KL to the reference is a term of the loss, but for RLOO: there it is subtracted from the
    score of the answer, and an answer is one action, whose log-probability is the sum of its
    tokens'.
    """

    columns = ("advantages", "ref_logp", "learnt")

    def __init__(self, *args: Any, group: GroupRules, **options: Any):
        super().__init__(*args, **options)
        self.group = group
        how, self.scaled = LOSS_TYPES[group.loss_type]
        self.how: How = how

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **asdict(self.group)}

    def estimate(self, scores: Tensor, mask: Tensor, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        size, difference = self.rules.answers, kept["difference"]
        if self.group.loss_type == "rloo":
            difference = torch.where(mask, difference, 0.0).sum(1, keepdim=True)
            gap = torch.where(mask, kept["logp"] - kept["ref_logp"], 0.0).sum(1)
            advantages = rloo_advantages(scores - self.beta * gap, size)
        else:
            advantages = grpo_advantages(scores, size, scale=self.scaled)
        low, high = scores.view(-1, size).aminmax(dim=1)
        self.made["groups_apart"] = float((high > low).float().mean())  # others teach nothing
        learnt = mask
        if self.group.mask_truncated:
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
        return answers * self.rules.max_new_tokens if self.how == "constant" else answers

    def micro_loss(self, batch: Batch, num_items: int) -> tuple[Tensor, tuple[Metrics, ...]]:
        c, group = batch.columns, self.group
        logp, entropy = self.logprobs(self.policy, batch.packed)
        if group.loss_type == "rloo":
            new, old = (
                torch.where(c["learnt"], x, 0.0).sum(1, keepdim=True) for x in (logp, c["old_logp"])
            )
            some = c["learnt"].any(1, keepdim=True)
            loss, _ = ppo_policy_loss(
                new, old, c["advantages"][:, :1], some, clip=group.clip, num_items=num_items
            )
            _, metrics = ppo_policy_loss(  # per token, as those of the others
                logp.detach(), c["old_logp"], c["advantages"], c["learnt"], clip=group.clip
            )
        else:
            loss, metrics = grpo_loss(
                logp, c["old_logp"], c["ref_logp"], c["advantages"], c["learnt"], clip=group.clip,
                beta=self.beta, how=self.how, num_items=num_items,
            )  # fmt: skip
            metrics["update_kl"] = metrics.pop("kl")
        if group.entropy:
            bonus = aggregate(entropy, c["learnt"], how=self.how, num_items=num_items)
            loss = loss - group.entropy * bonus
        return loss, (metrics, self.mean_entropy(entropy, batch.packed.mask))
