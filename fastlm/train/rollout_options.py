"""The options of trainings on a policy's own answers: keys, flags and arguments of the stages `ppo`
and `grpo`, and what their objectives read. Nothing here imports torch.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from fastlm.pipeline.stage import at_least_one, not_negative, one_of, positive
from fastlm.train.options import expect

How = Literal["token", "sequence", "constant"]
# loss_type -> how the loss is aggregated, whether advantages are divided by the group's deviation
LOSS_TYPES: dict[str, tuple[How, bool]] = {
    "dapo": ("token", True),  # Yu et al. 2025, arXiv:2503.14476
    "grpo": ("sequence", True),  # Shao et al. 2024, arXiv:2402.03300
    "dr_grpo": ("constant", False),  # Liu et al. 2025, arXiv:2503.20783
    "rloo": ("sequence", False),  # Ahmadian et al. 2024, arXiv:2402.14740
}


@dataclass(frozen=True)
class RolloutOptions:
    """How rollouts are made, scored and learnt from: what PPO and GRPO share."""

    seed: Annotated[int, "Seed of the order of the data"] = 0
    prompts: Annotated[int, "Prompts per round"] = 16
    answers: Annotated[int, "Answers to each of them"] = 4
    passes: Annotated[int, "Passes over the answers of a round"] = 1
    batch_size: Annotated[int, "Answers per micro-batch, joined without padding"] = 8
    decode_batch: Annotated[int, "Answers that are sampled side by side"] = 64
    max_new_tokens: Annotated[int, "Most tokens per answer"] = 128
    temperature: Annotated[float, "Of sampling, of the policy and of the reference"] = 1.0
    clip: Annotated[float, "The ratio of probabilities counts up to 1 ± this"] = 0.2
    beta: Annotated[float, "Coefficient of the KL to the reference"] = 0.0
    kl_target: Annotated[float | None, "Adapt beta to this KL, nats per answer"] = None
    kl_horizon: Annotated[float, "Answers over which beta adapts"] = 10_000.0
    max_kl: Annotated[float, "Stop where the KL is larger, nats per answer"] = 100.0
    max_update_kl: Annotated[
        float | None, "End a round where the policy has moved further, nats per token"
    ] = None
    entropy: Annotated[float, "Coefficient of the entropy that the loss subtracts"] = 0.0
    missing_end: Annotated[
        float | None, "Score of an answer that did not end; default: as any other"
    ] = None
    mismatch: Annotated[
        float, "Use importance weights where sampling and training differ by more, nats per token"
    ] = 0.05
    val_prompts: Annotated[int, "Held-out prompts per validation, answered greedily"] = 64

    def check_rollouts(self) -> None:
        """Check the values. InputError names the option."""
        at_least_one(
            self, "prompts", "answers", "passes", "decode_batch", "max_new_tokens", "val_prompts"
        )
        positive(
            self, "temperature", "clip", "kl_horizon", "max_kl", "mismatch", "kl_target",
            "max_update_kl",
        )  # fmt: skip
        if self.kl_target is not None:
            size = self.prompts * self.answers
            expect(self.beta, "kl_target", "a beta above 0 to adapt", 0)
            least = f"at least the {size} answers of a round"
            expect(self.kl_horizon >= size, "kl_horizon", least, f"{self.kl_horizon:g}")
        not_negative(self, "beta", "entropy")
        finite = self.missing_end is None or math.isfinite(self.missing_end)
        expect(finite, "missing_end", "a finite number", self.missing_end)


@dataclass(frozen=True)
class PpoOptions(RolloutOptions):
    """The options of PPO. docs/ppo.md lists its conventions."""

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

    def check_rollouts(self) -> None:
        super().check_rollouts()
        positive(self, "value_weight", "value_clip", "value_lr")
        not_negative(self, "critic_warmup")
        for name in ("gamma", "lam"):
            expect(0 <= getattr(self, name) <= 1, name, "0 to 1", getattr(self, name))
        bound = self.dual_clip
        expect(bound is None or 1 < bound < math.inf, "dual_clip", "a number above 1", bound)
        one_of(self, value=("own", "shared", "reward"), kl_penalty=("k1", "k2", "k3"))


@dataclass(frozen=True)
class GrpoOptions(RolloutOptions):
    """The options of GRPO and its relatives."""

    answers: Annotated[int, "Answers to each of them, the group"] = 8
    loss_type: Annotated[str, "dapo, grpo, dr_grpo or rloo; see docs/ppo.md"] = "dapo"
    mask_truncated: Annotated[bool, "Do not learn from answers that did not end"] = False

    def check_rollouts(self) -> None:
        super().check_rollouts()
        expect(self.answers >= 2, "answers", "2 or more to compare", self.answers)
        one_of(self, loss_type=LOSS_TYPES)
