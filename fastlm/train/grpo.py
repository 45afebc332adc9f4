"""GRPO and its relatives: a policy learns which of its own answers to a prompt are better than the
others.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.errors import InputError
from fastlm.train.online_stage import OnlineStage

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.reward_model import RewardModel
    from fastlm.train.online import Online

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "rloo")


@dataclass(frozen=True)
class Grpo(OnlineStage):
    """Train a policy on scores of its own answers, relative to its other answers to the prompt.

    Scores come from a function, from a reward model, or from both. The same command run again
    resumes from the last checkpoint.
    """

    kind = "grpo"
    command = ("grpo",)

    loss_type: Annotated[str, "dapo, grpo, dr_grpo or rloo; see docs/ppo.md"] = "dapo"
    answers: Annotated[int, "Answers to each of them, the group"] = 8
    mask_truncated: Annotated[bool, "Do not learn from answers that did not end"] = False

    def check(self) -> None:
        super().check()
        if self.answers < 2:
            raise InputError(f"answers: wanted 2 or more to compare, got {self.answers}")
        if self.loss_type not in LOSS_TYPES:
            raise InputError(
                f"loss_type: wanted one of {', '.join(LOSS_TYPES)}, got {self.loss_type!r}"
            )

    def objective(
        self, policy: "CausalLM", reward_model: "RewardModel | None", *args: Any, **options: Any
    ) -> "Online":
        del reward_model
        from fastlm.train.grpo_objective import GroupRelative, GroupRules

        group = GroupRules(self.loss_type, self.clip, self.entropy, self.mask_truncated)
        return GroupRelative(policy, *args, group=group, **options)

    def title(self) -> str:
        return "Preference training (RLOO)" if self.loss_type == "rloo" else "GRPO"
