"""PPO: a policy learns from the scores of its own answers, beside a model of their value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.errors import InputError
from fastlm.train.online_stage import OnlineStage

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.reward_model import RewardModel
    from fastlm.train.online import Online

VALUES = ("own", "shared", "reward")
PENALTIES = ("k1", "k2", "k3")


@dataclass(frozen=True)
class Ppo(OnlineStage):
    """Train a policy on scores of its own answers by PPO, with a value model.

    Scores come from a function, from a reward model, or from both. The same command run again
    resumes from the last checkpoint. docs/ppo.md lists every convention.
    """

    kind = "ppo"
    command = ("ppo",)

    prompts: Annotated[int, "Prompts per round"] = 64
    answers: Annotated[int, "Answers to each of them"] = 1
    passes: Annotated[int, "Passes over the answers of a round"] = 4
    beta: Annotated[float, "Coefficient of the KL to the reference"] = 0.05
    value: Annotated[
        str, "Value model: own (a copy of the policy), reward (of the reward model), or shared"
    ] = "own"
    value_weight: Annotated[float, "Coefficient of the value loss"] = 0.1
    value_clip: Annotated[float, "Values count up to this from those of the round"] = 0.2
    value_lr: Annotated[float, "Factor of the learning rate for the value model"] = 10.0
    critic_warmup: Annotated[int, "Rounds in which the value model alone learns"] = 0
    gamma: Annotated[float, "Discount per token"] = 1.0
    lam: Annotated[float, "GAE's lambda"] = 0.95
    dual_clip: Annotated[float | None, "Bound of the loss of bad answers, above 1"] = None
    kl_penalty: Annotated[str, "Estimate of the KL in the reward: k1, k2 or k3"] = "k1"
    whiten_rewards: Annotated[bool, "Divide rewards by their deviation, in each round"] = False
    whiten_advantages: Annotated[bool, "Mean 0 and deviation 1, in each round"] = True

    def check(self) -> None:
        super().check()
        for name in ("value_weight", "value_clip", "value_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}: wanted a positive number, got {getattr(self, name)}")
        if self.critic_warmup < 0:
            raise InputError(f"critic_warmup: expected 0 or more, got {self.critic_warmup}")
        steps = self.critic_warmup * self.steps_of_round()
        if self.max_steps is not None and self.max_steps <= steps:
            raise InputError(
                f"critic_warmup: expected rounds of fewer than the {self.max_steps} steps of the"
                f" run, or the policy learns nothing, got {self.critic_warmup} of {steps} steps"
            )
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: wanted 0 to 1, got {getattr(self, name)}")
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise InputError(f"dual_clip: wanted a number above 1, got {self.dual_clip}")
        for name, known in (("value", VALUES), ("kl_penalty", PENALTIES)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name}: wanted one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    def check_models(self, names: Sequence[str]) -> None:
        super().check_models(names)
        if self.value == "reward" and not names:
            raise InputError("value: wanted a reward_model to begin with, got none")

    def objective(
        self, policy: "CausalLM", reward_model: "RewardModel | None", *args: Any, **options: Any
    ) -> "Online":
        from dataclasses import fields

        from fastlm.train.ppo_objective import ActorCritic, PpoRules, value_model

        ppo = PpoRules(**{f.name: getattr(self, f.name) for f in fields(PpoRules)})
        value = value_model(
            policy, shared=self.value == "shared",
            reward=reward_model if self.value == "reward" else None,
        )  # fmt: skip
        return ActorCritic(policy, *args, value=value, ppo=ppo, **options)

    def charts(self, metrics: list[dict[str, Any]]) -> list[str]:
        from fastlm.train.online_charts import value_chart

        return [value_chart(metrics)]

    def title(self) -> str:
        return "PPO"
