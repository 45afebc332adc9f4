"""PPO: a policy learns from the scores of its own answers, beside a model of their value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastlm.errors import InputError
from fastlm.pipeline.stage import select_options
from fastlm.train.online_stage import OnlineStage
from fastlm.train.rollout_options import PpoOptions

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.reward_model import RewardModel
    from fastlm.train.online import Online


@dataclass(frozen=True)
class Ppo(PpoOptions, OnlineStage):
    """Train a policy on scores of its own answers by PPO, with a value model.

    Scores come from a function, from a reward model, or from both. The same command run again
    resumes from the last checkpoint. docs/ppo.md lists every convention.
    """

    kind = "ppo"
    command = ("ppo",)

    def check(self) -> None:
        super().check()
        steps = self.critic_warmup * self.steps_of_round()
        if self.max_steps is not None and self.max_steps <= steps:
            raise InputError(
                f"critic_warmup: expected rounds of fewer than the {self.max_steps} steps of the"
                f" run, or the policy learns nothing, got {self.critic_warmup} of {steps} steps"
            )

    def check_models(self, names: Sequence[str]) -> None:
        super().check_models(names)
        if self.value == "reward" and not names:
            raise InputError("value: wanted a reward_model to begin with, got none")

    def online(
        self, policy: "CausalLM", reward_model: "RewardModel | None", *args: Any, **more: Any
    ) -> "Online":
        from fastlm.train.ppo_objective import ActorCritic, value_model

        value = value_model(
            policy, shared=self.value == "shared",
            reward=reward_model if self.value == "reward" else None,
        )  # fmt: skip
        settings = select_options(self, PpoOptions)
        return ActorCritic(policy, *args, settings, value=value, **more)

    def charts(self, metrics: list[dict[str, Any]]) -> list[str]:
        from fastlm.train.charts import value_chart

        return [value_chart(metrics)]

    def title(self) -> str:
        return "PPO"
