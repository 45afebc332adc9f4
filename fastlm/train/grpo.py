"""GRPO and its relatives: a policy learns which of its own answers to a prompt are better than the
others.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastlm.pipeline.stage import select_options
from fastlm.train.online_stage import OnlineStage
from fastlm.train.rollout_options import GrpoOptions

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.reward_model import RewardModel
    from fastlm.train.online import Online


@dataclass(frozen=True)
class Grpo(GrpoOptions, OnlineStage):
    """Train a policy on scores of its own answers, relative to its other answers to the prompt.

    Scores come from a function, from a reward model, or from both. The same command run again
    resumes from the last checkpoint.
    """

    kind = "grpo"
    command = ("grpo",)

    def online(
        self, policy: "CausalLM", reward_model: "RewardModel | None", *args: Any, **more: Any
    ) -> "Online":
        del reward_model
        from fastlm.train.grpo_objective import GroupRelative

        return GroupRelative(policy, *args, select_options(self, GrpoOptions), **more)

    def title(self) -> str:
        return "Preference training (RLOO)" if self.loss_type == "rloo" else "GRPO"
