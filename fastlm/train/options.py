"""The options of every training and of trainings on rollouts, and the schedules that depend on
them. Nothing here imports torch, because ``--help`` reads this module.

All schedules (learning rate, batch, validations, samples) are functions of
`TrainOptions.progress`, 0 to 1. A run with a budget of ten minutes therefore anneals to its end on
any machine, and a run with a budget of tokens ends at the same quality on every machine. Rejected:
schedules in steps, which cannot end a run on time.
"""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastlm.errors import InputError
from fastlm.pipeline.stage import at_least_one, not_negative, one_of, positive, select_options
from fastlm.torchrun import node_size, rank_and_world_size
from fastlm.train.metrics import check_report_to

# Options that change no bit of the trained weights: they use no random numbers of the training
NEUTRAL_OPTIONS = (
    "validations", "val_tokens", "sample_at", "sample_prompt", "sample_tokens", "save_steps",
    "save_total_limit", "save_best", "checkpoint_activations", "async_checkpoints", "parallel",
    "report_to",
)  # fmt: skip
# The budget. A training can continue with another one; the schedule then spans the new budget
BUDGET_OPTIONS = ("max_steps", "max_seconds", "max_tokens")
# The handling of loss spikes. These options change the weights only if spikes are skipped
SPIKE_OPTIONS = ("spike_factor", "spike_window", "on_spike")
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
Aggregation = Literal["token", "sequence", "constant"]
# loss_type -> aggregation of the loss, whether advantages are divided by the group's deviation
LOSS_TYPES: dict[str, tuple[Aggregation, bool]] = {
    "dapo": ("token", True),  # Yu et al. 2025, arXiv:2503.14476
    "grpo": ("sequence", True),  # Shao et al. 2024, arXiv:2402.03300
    "dr_grpo": ("constant", False),  # Liu et al. 2025, arXiv:2503.20783
    "gspo": ("sequence", True),  # Zheng et al. 2025, arXiv:2507.18071
    "rloo": ("sequence", False),  # Ahmadian et al. 2024, arXiv:2402.14740
}


def expect(holds: object, name: str, expected: str, got: Any) -> None:
    """Raise InputError for the option ``name`` unless ``holds`` is true."""
    if not holds:
        raise InputError(f"{name}: expected {expected}, got {got}")


def check_unsharded(name: str, parallel: str) -> None:
    """Raise InputError if torchrun's processes shard the model, which ``name`` does not support."""
    expect(
        parallel == "ddp" or rank_and_world_size()[1] == 1, "parallel", f"ddp with {name}", parallel
    )


@dataclass(frozen=True)
class TrainOptions:
    """The options of every training.

    ``max_steps``, ``max_seconds`` or ``max_tokens`` ends the run, whichever comes first; the
    schedule spans the run. The loss defines which tokens count; the last step may exceed the limit.
    Seconds count steps and checkpoints, but not validations and samples.

    ``validations`` are evenly spaced; ``sample_at`` are points between 0 (before the first step)
    and 1 (the end).
    """

    max_steps: Annotated[int | None, "Stop after this many steps"] = None
    max_seconds: Annotated[
        float | None, "Stop after this many seconds, without validations and samples"
    ] = None
    max_tokens: Annotated[int | None, "Stop after this many tokens"] = None
    gradient_accumulation_steps: Annotated[
        int, "Accumulate gradients over this many micro-batches per step, of all processes together"
    ] = 1
    batch_warmup: Annotated[
        float,
        "Grow the micro-batches per step from 1 to gradient_accumulation_steps over this share of"
        " the run",
    ] = 0.0
    dtype: Annotated[
        str, "Keep the weights in this type: bfloat16 (with float32 master weights) or float32"
    ] = "bfloat16"
    optimizer: Annotated[
        str, "Use this optimizer: adamw, or muon (for the layers' matrices; AdamW for the rest)"
    ] = "adamw"
    checkpoint_activations: Annotated[
        int,
        "Recompute the activations of this many first layers in the backward, which saves memory",
    ] = 0
    lr: Annotated[float, "Warm up to this peak learning rate"] = 1e-3
    schedule: Annotated[
        str, "Use this learning rate schedule: cosine or wsd (warmup, stable, decay)"
    ] = "cosine"
    warmup_ratio: Annotated[float, "Warm up the learning rate over this share of the run"] = 0.02
    decay_ratio: Annotated[float, "Decay the learning rate of wsd over this share of the run"] = 0.2
    final_lr: Annotated[float, "End at this learning rate, as a share of the peak"] = 0.0
    betas: Annotated[tuple[float, float], "Use these betas in AdamW"] = (0.9, 0.95)
    eps: Annotated[float, "Add this epsilon to AdamW's denominator"] = 1e-8
    weight_decay: Annotated[float, "Apply this weight decay to matrices"] = 0.1
    max_grad_norm: Annotated[float | None, "Clip the gradient to this norm"] = 1.0
    on_spike: Annotated[
        str, "Handle a loss spike this way: warn, skip (drop the gradients) or stop"
    ] = "warn"
    spike_factor: Annotated[
        float | None,
        "Count a loss this many standard deviations above the mean of spike_window as a spike",
    ] = 6.0
    spike_window: Annotated[int, "Take the mean loss over this many previous steps"] = 128
    validations: Annotated[int, "Validate this many times, evenly spaced over the run"] = 20
    val_tokens: Annotated[int, "Validate on this many tokens each time"] = 1 << 16
    sample_at: Annotated[
        tuple[float, ...], "Let the model write a sample at these points of the run, 0 to 1"
    ] = (0.0, 0.02, 0.1, 0.3, 1.0)
    sample_prompt: Annotated[str, "Continue this text in samples"] = ""
    sample_tokens: Annotated[int, "Generate this many tokens per sample; 0: no samples"] = 80
    save_steps: Annotated[int, "Save checkpoints this many steps apart"] = 200
    save_total_limit: Annotated[int, "Keep at most this many checkpoints on disk"] = 2
    async_checkpoints: Annotated[
        bool, "Write checkpoints in the background, from copies in memory"
    ] = False
    save_best: Annotated[bool, "Also save the weights of the best validation"] = False
    keep: Annotated[
        str, "Keep these weights at the end: last, or best (of the best validation)"
    ] = "last"
    parallel: Annotated[
        str,
        "Parallelize under torchrun by ddp (a replica per process), fsdp (a shard per process) or"
        " hsdp (shards within a node, replicas between nodes)",
    ] = "ddp"
    report_to: Annotated[
        tuple[str, ...], "Also send the metrics to these trackers: tensorboard, trackio"
    ] = ()

    def loop_options(self) -> "TrainOptions":
        """Return these options without those that a stage adds."""
        return select_options(self, TrainOptions)

    def identity(self) -> dict[str, Any]:
        """Return the options that determine the trained weights: all but NEUTRAL_OPTIONS, and but
        SPIKE_OPTIONS unless spikes are skipped.
        """
        neutral = NEUTRAL_OPTIONS if self.on_spike == "skip" else (*NEUTRAL_OPTIONS, *SPIKE_OPTIONS)
        return {k: v for k, v in asdict(self).items() if k not in neutral}

    def can_continue(self, changed: Collection[str], folder: Path, finished: bool) -> bool:
        """Return whether the training in ``folder`` can continue although these options changed.

        ``changed`` includes SPIKE_OPTIONS only if spikes are or were skipped (`identity`): a
        finished training would then have ended at other weights.
        """
        allowed = {"keep"} if finished else {"keep", *SPIKE_OPTIONS}
        has_best = any((folder / "checkpoints").glob("best-*"))
        return set(changed) <= allowed and (self.keep == "last" or has_best)

    def check(self) -> None:
        """Check the values. InputError names the option."""
        if self.max_steps is None and self.max_seconds is None and self.max_tokens is None:
            raise InputError(
                "max_tokens, max_steps, max_seconds: expected at least one of them, got none"
            )
        positive(
            self, "max_steps", "max_seconds", "max_tokens", "max_grad_norm", "lr", "eps",
            "spike_factor",
        )  # fmt: skip
        at_least_one(
            self,
            "gradient_accumulation_steps",
            "save_steps",
            "save_total_limit",
            "val_tokens",
            "spike_window",
        )
        not_negative(self, "validations", "sample_tokens", "weight_decay", "checkpoint_activations")
        shares = {
            n: getattr(self, n) for n in ("warmup_ratio", "decay_ratio", "final_lr", "batch_warmup")
        }
        shares |= {f"betas[{i}]": b for i, b in enumerate(self.betas)}
        shares |= {f"sample_at[{i}]": s for i, s in enumerate(self.sample_at)}
        for name, value in shares.items():
            expect(0 <= value <= 1, name, "0 to 1", value)
        one_of(
            self, schedule=("cosine", "wsd"), dtype=("bfloat16", "float32"), optimizer=OPTIMIZERS,
            on_spike=("warn", "skip", "stop"), keep=("last", "best"),
            parallel=("ddp", "fsdp", "hsdp"),
        )  # fmt: skip
        max_decay = 1 - self.warmup_ratio
        expect(
            self.schedule != "wsd"
            or self.decay_ratio <= max_decay + 1e-9,  # the sum may be rounded
            "decay_ratio",
            f"at most 1 - warmup_ratio = {max_decay:g} for wsd, whose rate else jumps at the end"
            " of the warm-up",
            f"{self.decay_ratio:g}",
        )
        check_report_to(self.report_to)
        can_find_best = not self.saves_best or self.validations
        expect(can_find_best, "validations", "1 or more to find the best weights", 0)
        self._check_processes(rank_and_world_size()[1])

    def _check_processes(self, size: int) -> None:
        lower = self.gradient_accumulation_steps // size * size
        valid = " or ".join(str(n) for n in (lower, lower + size) if n)
        expect(
            self.gradient_accumulation_steps % size == 0, "gradient_accumulation_steps",
            f"micro-batches that {size} processes can share evenly ({valid})",
            self.gradient_accumulation_steps,
        )  # fmt: skip
        if size == 1 or self.parallel == "ddp":
            return
        node = node_size()
        expect(size % node == 0, "parallel", f"whole nodes of {node} processes", size)
        for name, required in (("optimizer", "adamw"), ("async_checkpoints", False)):
            value = getattr(self, name)
            expect(value == required, name, f"{required} with parallel = {self.parallel!r}", value)

    @property
    def saves_best(self) -> bool:
        """Whether the training saves the weights of the best validation."""
        return self.save_best or self.keep == "best"

    def progress(self, steps: float, tokens: float, seconds: float) -> float:
        """Return the progress: 0 at the start, 1 when the first budget is used up."""
        used = (steps, self.max_steps), (tokens, self.max_tokens), (seconds, self.max_seconds)
        return min(max(amount / budget for amount, budget in used if budget is not None), 1.0)

    def learning_rate(self, progress: float) -> float:
        """Return the learning rate at ``progress`` (0..1): linear from 0 to ``lr`` within
        ``warmup_ratio``, ``final_lr * lr`` at 1.

        cosine: falls from the end of the warm-up. wsd: stays constant, then falls linearly within
        the last ``decay_ratio``.
        """
        if progress < self.warmup_ratio:
            return self.lr * progress / self.warmup_ratio
        if self.schedule == "cosine":
            falling = (progress - self.warmup_ratio) / max(1 - self.warmup_ratio, 1e-9)
            share = 0.5 * (1 + math.cos(math.pi * min(falling, 1.0)))
        else:
            share = min(1.0, (1 - progress) / self.decay_ratio) if self.decay_ratio > 0 else 1.0
        return self.lr * (self.final_lr + (1 - self.final_lr) * share)

    def micro_batches(self, progress: float) -> int:
        """Return the micro-batches of the step that begins at ``progress`` (0..1): 1 to
        ``gradient_accumulation_steps - 1`` in equal parts of ``batch_warmup``, then
        ``gradient_accumulation_steps``.

        Early in a run the gradient noise is small compared with the gradient, so a small batch
        learns as much per step (McCandlish et al. 2018, arXiv:1812.06162).
        """
        if progress >= self.batch_warmup:
            return self.gradient_accumulation_steps
        return 1 + int((self.gradient_accumulation_steps - 1) * progress / self.batch_warmup)


@dataclass(frozen=True)
class RolloutOptions:
    """The options that PPO and GRPO share: sampling, scoring and training on rollouts."""

    seed: Annotated[int, "Seed the data order and the sampling with this"] = 0
    prompts_per_round: Annotated[int, "Sample completions of this many prompts per round"] = 16
    num_generations: Annotated[int, "Sample this many completions per prompt"] = 4
    num_iterations: Annotated[int, "Train for this many epochs on the completions of a round"] = 1
    batch_size: Annotated[int, "Pack this many completions into a micro-batch, without padding"] = 8
    decode_batch_size: Annotated[int, "Sample this many completions in one batch"] = 64
    max_new_tokens: Annotated[int, "Generate at most this many tokens per completion"] = 128
    max_turns: Annotated[int, "Let a completion take at most this many turns in an environment"] = 4
    temperature: Annotated[
        float, "Use this temperature for sampling, the policy and the reference"
    ] = 1.0
    clip_range: Annotated[float, "Clip probability ratios to 1 ± this (PPO's clip range)"] = 0.2
    clip_range_high: Annotated[
        float | None, "Clip probability ratios to 1 + this from above; default: clip_range"
    ] = None
    beta: Annotated[float, "Penalize the KL divergence to the reference with this coefficient"] = (
        0.0
    )
    kl_target: Annotated[float | None, "Adapt beta to this KL, in nats per completion"] = None
    kl_horizon: Annotated[float, "Adapt beta over this many completions"] = 10_000.0
    max_kl: Annotated[float, "Stop if the KL exceeds this, in nats per completion"] = 100.0
    max_update_kl: Annotated[
        float | None, "End a round if the KL of its update exceeds this, in nats per token"
    ] = None
    entropy_coef: Annotated[float, "Add the entropy bonus with this coefficient"] = 0.0
    async_rollouts: Annotated[
        bool, "Sample the next round during the update, from the policy before the update"
    ] = False
    missing_eos_penalty: Annotated[
        float | None,
        "Give a completion without an EOS token this score; default: scored like any other",
    ] = None
    overlong_tokens: Annotated[
        int, "Lower the score linearly, by up to 1, over this many last tokens of max_new_tokens"
    ] = 0
    mismatch_threshold: Annotated[
        float,
        "Use importance weights if sampling and training differ by more, in nats per token",
    ] = 0.05
    val_prompts: Annotated[
        int, "Validate on this many held-out prompts each time, sampled greedily"
    ] = 64

    def check_rollouts(self) -> None:
        """Check the values. InputError names the option."""
        at_least_one(
            self,
            "prompts_per_round",
            "num_generations",
            "num_iterations",
            "decode_batch_size",
            "max_new_tokens",
            "max_turns",
            "val_prompts",
        )
        positive(
            self, "temperature", "clip_range", "clip_range_high", "kl_horizon", "max_kl",
            "mismatch_threshold", "kl_target", "max_update_kl",
        )  # fmt: skip
        if self.kl_target is not None:
            size = self.prompts_per_round * self.num_generations
            expect(self.beta, "kl_target", "a beta above 0 to adapt", 0)
            expected = f"at least the {size} completions of a round"
            expect(self.kl_horizon >= size, "kl_horizon", expected, f"{self.kl_horizon:g}")
        not_negative(self, "beta", "entropy_coef", "overlong_tokens")
        expected = f"at most max_new_tokens {self.max_new_tokens}"
        fits = self.overlong_tokens <= self.max_new_tokens
        expect(fits, "overlong_tokens", expected, self.overlong_tokens)
        finite = self.missing_eos_penalty is None or math.isfinite(self.missing_eos_penalty)
        expect(finite, "missing_eos_penalty", "a finite number", self.missing_eos_penalty)


@dataclass(frozen=True)
class PPOOptions(RolloutOptions):
    """The options of PPO. docs/ppo.md lists the conventions."""

    prompts_per_round: Annotated[int, "Sample completions of this many prompts per round"] = 64
    num_generations: Annotated[int, "Sample this many completions per prompt"] = 1
    num_iterations: Annotated[int, "Train for this many epochs on the completions of a round"] = 4
    beta: Annotated[float, "Penalize the KL divergence to the reference with this coefficient"] = (
        0.05
    )
    value_model: Annotated[
        str,
        "Use this value model: copy (of the policy), reward (a copy of the reward model) or"
        " shared (a head on the policy)",
    ] = "copy"
    vf_coef: Annotated[float, "Add the value loss with this coefficient"] = 0.1
    clip_range_value: Annotated[float, "Clip values to this distance from those of the round"] = 0.2
    value_lr_factor: Annotated[
        float, "Train the value model at this learning rate, as a multiple of the policy's"
    ] = 10.0
    critic_warmup: Annotated[int, "Train only the value model in this many first rounds"] = 0
    gamma: Annotated[float, "Discount rewards by this factor per token"] = 1.0
    lam: Annotated[float, "Estimate advantages with this lambda (GAE)"] = 0.95
    dual_clip: Annotated[
        float | None, "Clip the loss at negative advantages to this dual-clip bound, above 1"
    ] = None
    kl_estimator: Annotated[str, "Estimate the KL in the reward by k1, k2 or k3"] = "k1"
    whiten_rewards: Annotated[bool, "Divide the rewards of a round by their standard deviation"] = (
        False
    )
    whiten_advantages: Annotated[
        bool, "Shift and scale the advantages of a round to mean 0 and deviation 1"
    ] = True

    def check_rollouts(self) -> None:
        super().check_rollouts()
        positive(self, "vf_coef", "clip_range_value", "value_lr_factor")
        not_negative(self, "critic_warmup")
        for name in ("gamma", "lam"):
            expect(0 <= getattr(self, name) <= 1, name, "0 to 1", getattr(self, name))
        bound = self.dual_clip
        expect(bound is None or 1 < bound < math.inf, "dual_clip", "a number above 1", bound)
        one_of(self, value_model=("copy", "shared", "reward"), kl_estimator=("k1", "k2", "k3"))


@dataclass(frozen=True)
class GRPOOptions(RolloutOptions):
    """The options of GRPO and its relatives."""

    num_generations: Annotated[int, "Sample this many completions per prompt: the group"] = 8
    loss_type: Annotated[str, "Use the loss dapo, grpo, dr_grpo, gspo or rloo; see docs/ppo.md"] = (
        "dapo"
    )
    dynamic_sampling: Annotated[
        int,
        "Replace groups of equal scores by groups of further prompts, drawn at most this many times"
        " per round",
    ] = 0
    mask_truncated_completions: Annotated[
        bool, "Do not train on completions without an EOS token"
    ] = False

    def check_rollouts(self) -> None:
        super().check_rollouts()
        expect(
            self.num_generations >= 2,
            "num_generations",
            "2 or more to compare",
            self.num_generations,
        )
        not_negative(self, "dynamic_sampling")
        one_of(self, loss_type=LOSS_TYPES)
