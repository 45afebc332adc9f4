"""The base class of PPO's and GRPO's objectives: rounds of rollouts from the current policy, each
trained on for several iterations.

A round draws prompts, samples completions of them (`fastlm.train.rollouts`), scores them, and
stores what the update needs: advantages, and log-probabilities of the sampling policy and of the
reference. An iteration takes all completions of the round once, in a new order. An optimizer step
takes ``batch_size * gradient_accumulation_steps`` of them.

Temperature divides the logits everywhere: in sampling, in the policy, in the reference and in the
update. Dropout is off in all of them.

Each of several processes samples, scores and evaluates its shard of a round's completions:
consecutive ones (`fastlm.train.distributed.SingleProcess.shard`), whose seeds do not depend on the
shard. Rejected: every n-th completion. Sampling a batch takes as long as its longest completion,
and then every process would have a long one.

With `async_rollouts` the next round is made while this one is trained on (`RoundSampler`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastlm.checkpoint.folder import load_tensors
from fastlm.errors import InputError
from fastlm.inference.requests import Completion
from fastlm.model.lora import without_adapter
from fastlm.model.lora_merge import merged_lora
from fastlm.model.quantized_modules import QuantizedLinear
from fastlm.train.async_rollouts import RoundSampler
from fastlm.train.distributed import weighted_means
from fastlm.train.losses import Metrics, aggregate, kl_penalty, overlong_penalty, pool_metrics
from fastlm.train.metrics import correlation
from fastlm.train.objective import DivergedError, Objective, without_dropout
from fastlm.train.options import RolloutOptions
from fastlm.train.rollouts import (
    Episode,
    PackedRollouts,
    completions_from_tensors,
    completions_to_tensors,
    pack_rollouts,
    sample_completions,
    sampled_mask,
)

if TYPE_CHECKING:
    from fastlm.data.prompts import Prompt
    from fastlm.model.causal_lm import CausalLM
    from fastlm.train.episodes import EpisodeSampler

# Attributes that a checkpoint stores
STATE = (
    "round", "next_prompt", "next_index", "steps", "steps_before", "stop", "beta", "next_beta",
    "round_metrics",
)  # fmt: skip
PENDING = "pending."  # prefix of the state of a round that was made in the background
# Returns the score of each completion, given the indices of their prompts
ScoreFunction = Callable[[Sequence[int], Sequence[Completion]], Sequence[float]]
KL_ALARM = 3.0  # standard errors: a KL estimate this far below 0 is not chance
NGRAM_SIZE = 4  # tokens of a repetition
MAX_IMPORTANCE_WEIGHT = 2.0  # truncated importance sampling (Yao et al. 2025; verl's default)
T = TypeVar("T")


@dataclass(frozen=True)
class RolloutBatch:
    """A micro-batch: ``packed`` tokens, and ``columns`` (B, S) of its completions' tokens."""

    packed: PackedRollouts
    columns: Mapping[str, Tensor]


@dataclass(frozen=True)
class Rollouts:
    """Scored completions; each field but the last has a value for each of them.

    ``tokens``: values of their sampled tokens, (tokens,) each: "logp", "ref_logp", "difference" and
    what `OnlineObjective.evaluate` adds. ``score_metrics``: means over the completions.
    """

    prompt_indices: Sequence[int]
    completions: Sequence[Completion]
    scores: Sequence[float]
    tokens: Mapping[str, Sequence[Tensor]]
    score_metrics: Mapping[str, float]

    def pad(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mask of the sampled tokens and their values, (R, S) each, 0 where it is
        false.
        """
        mask = pad_sequence([*map(sampled_mask, self.completions)], batch_first=True)
        tokens = {
            name: torch.zeros(mask.shape, dtype=values[0].dtype)
            .masked_scatter(mask, torch.cat([*values]))
            .to(device)
            for name, values in self.tokens.items()
        }
        return mask.to(device), tokens

    def replace_rows(
        self, rows: Sequence[int], other: "Rollouts", other_rows: Sequence[int]
    ) -> "Rollouts":
        """Return these rollouts with completions of ``other`` in place of ``rows``."""

        def replace_values(values: Sequence[T], others: Sequence[T]) -> Sequence[T]:
            replacements = {row: others[i] for row, i in zip(rows, other_rows, strict=True)}
            return [replacements.get(row, value) for row, value in enumerate(values)]

        return replace(
            self,
            prompt_indices=replace_values(self.prompt_indices, other.prompt_indices),
            completions=replace_values(self.completions, other.completions),
            scores=replace_values(self.scores, other.scores),
            tokens={k: replace_values(v, other.tokens[k]) for k, v in self.tokens.items()},
        )


def repetition_rate(completion: Completion, size: int = NGRAM_SIZE) -> float:
    """Return the share of n-grams that occur earlier in the same completion. Those with a token of
    an observation do not count.
    """
    tokens, sampled = completion.token_ids, sampled_mask(completion).tolist()
    starts = range(len(tokens) - size + 1)
    grams = [tuple(tokens[i : i + size]) for i in starts if all(sampled[i : i + size])]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean_turns(mask: Tensor) -> float:
    """Return the mean number of runs of true values in the rows of ``mask`` (R, S)."""
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return float(begins.sum(1).double().mean())


class OnlineObjective(Objective):
    """An objective on completions that the policy samples.

    ``prompts``: the token ids of each. ``score``: see `ScoreFunction`; ``scorer_identity``
    identifies it, and ``score_metrics`` returns means over the completions that it scored last.
    ``reference``: the frozen policy to which KL is measured; None is the policy without its
    adapters (LoRA). ``episodes`` samples completions of several turns, in the environments of
    ``prompt_rows``, ``heldout_rows`` and ``sample_row``; None: of one turn. A subclass defines
    `estimate` (advantages of a round), `num_items` and `micro_loss`.
    """

    # the columns that `estimate` returns; a round also stores "old_logp"
    column_names: tuple[str, ...] = ()

    def __init__(
        self,
        policy: "CausalLM",
        reference: "CausalLM | None",
        prompts: Sequence[Sequence[int]],
        heldout: Sequence[Sequence[int]],
        score: ScoreFunction,
        options: RolloutOptions,
        *,
        base: str,
        scorer_identity: str = "",
        score_heldout: ScoreFunction | None = None,
        stop_ids: frozenset[int] = frozenset(),
        prompt_locations: Sequence[str] = (),
        decode: Callable[[Sequence[int]], str] | None = None,
        sample_prompt: Sequence[int] = (),
        sample_row: "Prompt | None" = None,
        sample_tokens: int = 0,
        score_metrics: Callable[[], Mapping[str, float]] = dict,
        episodes: "EpisodeSampler | None" = None,
        prompt_rows: "Sequence[Prompt]" = (),
        heldout_rows: "Sequence[Prompt]" = (),
        warn: Callable[[str], Any] = lambda message: None,
    ):
        if not prompts:
            raise InputError("prompts: expected at least one, got none")
        self.policy, self.reference = policy, reference
        self.trained: nn.Module = policy
        self.prompts, self.heldout, self.options, self.base = prompts, heldout, options, base
        self.score, self.score_heldout = score, score_heldout or score
        self.scorer_identity, self.score_metrics = scorer_identity, score_metrics
        self.stop_ids, self.prompt_locations, self.warn = stop_ids, prompt_locations, warn
        self.episodes, self.prompt_rows, self.heldout_rows = episodes, prompt_rows, heldout_rows
        self.decode, self.sample_prompt, self.sample_row = decode, sample_prompt, sample_row
        self.sample_tokens = sample_tokens
        self.beta = self.next_beta = options.beta  # of this round and the next
        self.round = -1  # the number of the current rollouts
        self.next_prompt = 0  # counts the prompts of all rounds
        self.next_index = 0  # counts the completions of all iterations
        self.steps = 0  # optimizer steps of the round
        self.steps_before = 0  # of the round before, if this one was sampled before them
        self.prompt_indices: list[int] = []  # one per completion of the round
        self.completions: list[Completion] = []
        self.columns: dict[str, Tensor] = {}
        self.round_metrics: dict[str, float] = {}
        self.step_metrics: list[tuple[Metrics, ...]] = []  # of its micro-batches
        self.stop = False  # the update went too far: the next step begins a new round
        self.sampler = RoundSampler()
        self.on_piece: Callable[..., Any] | None = None  # called while completions are sampled
        without_dropout(policy)
        if reference is not None:
            without_dropout(reference.requires_grad_(False).eval())

    # defined by a subclass

    def estimate(
        self, scores: Tensor, mask: Tensor, tokens: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the columns `column_names` (advantages and others) from the scores (R,) of a
        round. ``tokens`` has "logp", "ref_logp", "difference" and what `evaluate` adds, (R, S)
        each.
        """
        raise NotImplementedError

    def micro_loss(self, batch: RolloutBatch, num_items: int) -> tuple[Tensor, tuple[Metrics, ...]]:
        """Return the loss of a micro-batch, and metrics that are means over its tokens."""
        raise NotImplementedError

    def evaluate(self, packed: PackedRollouts) -> dict[str, Tensor]:
        """Return the policy's "logp" for a micro-batch of a round, and what else the update needs,
        (B, S) each.
        """
        return {"logp": self.logprobs(self.policy, packed)[0]}

    def complete_round(self, rollouts: Rollouts) -> Rollouts:
        """Return the completions to train on, given those of the round's first draw."""
        return rollouts

    # log-probabilities

    def logprobs(
        self, model: "CausalLM", packed: PackedRollouts, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the completions' tokens and entropies, (B, S). ``hidden``:
        the model's hidden states (1, total, E), if they are already computed.
        """
        logp, entropy = model.logprobs_from_hidden(
            packed.hidden(model) if hidden is None else hidden, packed.labels,
            temperature=self.options.temperature, return_entropy=True,
        )  # fmt: skip
        return packed.rows(logp), packed.rows(entropy)

    def _reference_logprobs(self, packed: PackedRollouts) -> Tensor:
        if self.reference is not None:
            return self.logprobs(self.reference, packed)[0]
        with without_adapter(self.policy):
            return self.logprobs(self.policy, packed)[0]

    def mean_entropy(self, entropy: Tensor, mask: Tensor) -> Metrics:
        """Return the mean entropy as a metric."""
        return {"entropy": aggregate(entropy.detach(), mask), "tokens": mask.sum()}

    # a round

    def _draw_prompts(self, count: int) -> list[int]:
        """Return the indices of the next prompts. An epoch takes every prompt once, in a new
        order.
        """
        total, first = len(self.prompts), self.next_prompt
        self.next_prompt += count
        positions = (divmod(i, total) for i in range(first, self.next_prompt))
        return [int(self._order(0, epoch, total)[index]) for epoch, index in positions]

    def _order(self, *key: int) -> np.ndarray:
        """Return a permutation of range(key[-1]) that depends only on the seed and the key."""
        return np.random.Generator(np.random.PCG64([self.options.seed, *key])).permutation(key[-1])

    def _begin_round(self, completions_per_step: int) -> None:
        steps, untrusted_steps = self.steps, self.pending_steps()
        pending = self.sampler.result()
        if pending is None:
            self.sample_round()
        else:
            self.load_state_dict(pending)
        self.steps, self.steps_before = 0, steps if pending else 0
        self._check_round(untrusted_steps)
        if self.options.async_rollouts:
            length = math.ceil(len(self.completions) / completions_per_step)
            length *= self.options.num_iterations
            if self.steps_left is None or self.steps_left > length:
                self.sampler.start(self)

    def sample_round(self) -> None:
        """Sample and evaluate the completions of the next round from the current policy, and
        estimate what its update needs.
        """
        self.round, self.next_index, self.stop = self.round + 1, 0, False
        self.beta = self.next_beta
        rollouts = self.roll_out(self.score, self.options.prompts_per_round)
        self._measure_round(rollouts)
        rollouts = self.complete_round(rollouts)
        self.prompt_indices = [*rollouts.prompt_indices]
        self.completions = [*rollouts.completions]
        device = self.policy.device
        mask, tokens = rollouts.pad(device)
        rewards = torch.tensor(rollouts.scores, dtype=torch.float32, device=device)
        columns = self.estimate(rewards, mask, tokens)
        self.columns = {"old_logp": tokens["logp"], **{k: columns[k] for k in self.column_names}}
        self.policy.train()

    def roll_out(self, score: ScoreFunction, count: int) -> Rollouts:
        """Sample, score and evaluate completions of the next ``count`` prompts.

        Each process handles its shard and receives the others'. All processes then have the same
        numbers, so they estimate, check and decide alike.
        """
        options = self.options
        # every completion of the training has another seed; torch's generator takes 32 bits
        (first,) = np.random.SeedSequence([options.seed, 1]).generate_state(1, np.uint32)
        seed = int(first) // 2 + self.next_prompt * options.num_generations
        prompt_indices = [
            i for i in self._draw_prompts(count) for _ in range(options.num_generations)
        ]

        def roll_out_shard() -> tuple[
            dict[str, Tensor], np.ndarray, dict[str, float], dict[str, Tensor]
        ]:
            rows = self.world.shard(len(prompt_indices))
            indices = prompt_indices[rows.start : rows.stop]
            prompts = [self.prompts[i] for i in indices]
            completions = self._sample(
                prompts, options.temperature, options.max_new_tokens, seed + rows.start,
                rows=[self.prompt_rows[i] for i in indices] if self.episodes else (),
            )  # fmt: skip
            scores = self._score(score, indices, completions)
            tokens = self._evaluate(prompts, completions)
            return completions_to_tensors(completions), scores, dict(self.score_metrics()), tokens

        self.policy.eval()
        shards = [shard for shard in self.world.gather_results(roll_out_shard) if len(shard[1])]
        completion_shards, score_shards, score_metrics, token_shards = zip(*shards)
        completions = [c for part in completion_shards for c in completions_from_tensors(part)]
        lengths = [int(sampled_mask(completion).sum()) for completion in completions]
        tokens = {
            name: torch.cat([tensors[name] for tensors in token_shards]).split(lengths)
            for name in token_shards[0]
        }
        metrics = [(len(shard), metrics) for shard, metrics in zip(score_shards, score_metrics)]
        scores = np.concatenate(score_shards).tolist()
        return Rollouts(prompt_indices, completions, scores, tokens, weighted_means(metrics))

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        temperature: float,
        max_new_tokens: int,
        seed: int = 0,
        rows: "Sequence[Prompt]" = (),
    ) -> Sequence[Completion]:
        """Sample a completion of each prompt; with ``rows``, of several turns."""
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed,
            "stop_ids": self.stop_ids, "max_num_seqs": self.options.decode_batch_size,
            "on_piece": self.on_piece,
        }  # fmt: skip
        quantized = any(isinstance(m, QuantizedLinear) for m in self.policy.modules())
        # merged adapters cost nothing per token; but merging would dequantize a quantized base
        with nullcontext() if quantized else merged_lora(self.policy):
            if self.episodes is None or not rows:
                return sample_completions(self.policy, prompts, **options)
            return self.episodes.sample(
                self.policy, prompts, rows, max_turns=self.options.max_turns, **options
            )

    def _score(
        self, score: ScoreFunction, indices: Sequence[int], completions: Sequence[Completion]
    ) -> np.ndarray:
        if not completions:
            return np.zeros(0)
        scores = np.array(score(indices, completions), np.float64)
        if self.options.missing_eos_penalty is not None:
            scores[[not completion.is_stopped for completion in completions]] = (
                self.options.missing_eos_penalty
            )
        lengths = torch.tensor([len(completion.token_ids) for completion in completions])
        penalty = overlong_penalty(
            lengths, self.options.max_new_tokens, self.options.overlong_tokens
        )
        return scores + penalty.numpy()

    @torch.no_grad()
    def _evaluate(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]
    ) -> dict[str, Tensor]:
        """Return "logp", "ref_logp" and what `evaluate` adds for the sampled tokens, (tokens,)
        each, and "difference": logp minus the log-probabilities of sampling. The sampling engine
        and the training round differently.
        """
        size = self.options.batch_size
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(completions), size):
            packed = pack_rollouts(
                prompts[start : start + size],
                [completion.token_ids for completion in completions[start : start + size]],
                self.policy.device,
                masks=[*map(sampled_mask, completions[start : start + size])],
            )
            values = {**self.evaluate(packed), "ref_logp": self._reference_logprobs(packed)}
            for name, value in values.items():
                parts.setdefault(name, []).append(value[packed.mask].cpu())
        tokens = {name: torch.cat(values) for name, values in parts.items()}
        if completions:
            sampled = torch.tensor(
                [token.logprob for completion in completions for token in completion.logprobs]
            )
            tokens["difference"] = tokens["logp"] - sampled
        return tokens

    def _measure_round(self, rollouts: Rollouts) -> None:
        """Compute the metrics of a round from its first draw, and the next round's beta.

        The metrics, for metrics.jsonl, are means over the completions:

        - "score", "score_std": the scores, after `missing_eos_penalty` and `overlong_tokens`;
        - "kl", "kl_error": KL(policy || reference) in nats per completion by k1, of the policy that
          sampled, and its standard error; "kl3": by k3, which is never negative;
        - "length" in sampled tokens; "eos_fraction": share that ended with an EOS token;
        - "turns": turns per completion, in an environment;
        - "score_length_correlation": near 1 if the reward pays the policy for length;
        - "repetition": share of sampled 4-grams that occur earlier in the same completion;
        - "mismatch": mean absolute difference per token of log-probabilities in training and
          sampling.
        """
        options, completions, scores = self.options, rollouts.completions, np.array(rollouts.scores)
        mask, tokens = rollouts.pad(self.policy.device)
        lengths = mask.sum(1).cpu().numpy()
        logp, reference = tokens["logp"], tokens["ref_logp"]
        estimates = [kl_penalty(logp, reference, kind, mask=mask) for kind in ("k1", "k3")]
        k1, k3 = (estimate.sum(1).double().cpu().numpy() for estimate in estimates)
        kl, error = float(k1.mean()), float(k1.std()) / math.sqrt(len(k1))
        self.round_metrics = {
            "score": float(scores.mean()),
            "score_std": float(scores.std()),
            "kl": kl,
            "kl_error": error,
            "kl3": float(k3.mean()),
            "length": float(lengths.mean()),
            "eos_fraction": float(np.mean([completion.is_stopped for completion in completions])),
            "score_length_correlation": correlation(scores, lengths) or 0.0,  # type: ignore[arg-type]
            "repetition": float(np.mean([repetition_rate(c) for c in completions])),
            "mismatch": float(tokens["difference"][mask].abs().mean()),
            **({} if self.episodes is None else {"turns": mean_turns(mask)}),
            "round": self.round,
            "beta": self.beta,
            **rollouts.score_metrics,
        }
        if options.kl_target is not None:  # Ziegler et al. 2019, arXiv:1909.08593
            deviation = min(max(kl / options.kl_target - 1, -0.2), 0.2)
            self.next_beta = self.beta * (1 + deviation * len(scores) / options.kl_horizon)

    def _check_round(self, untrusted_steps: int) -> None:
        """Raise DivergedError if the policy that sampled the round is too far from the reference.
        Warn of what looks wrong in its metrics.
        """
        options, metrics = self.options, self.round_metrics
        kl, error, mismatch = metrics["kl"], metrics["kl_error"], metrics["mismatch"]
        if not abs(kl) <= options.max_kl:
            raise DivergedError(
                f"round {self.round}: the KL to the reference is {kl:.3g} nats per completion,"
                f" expected at most max_kl {options.max_kl:g}",
                steps=untrusted_steps,
            )
        if kl < -KL_ALARM * error - 1e-3:
            self.warn(
                f"round {self.round}: the KL estimate is {kl:.3g} nats per completion, more than"
                f" {KL_ALARM:g} standard errors below 0: the policy that samples is not the one"
                " that is trained"
            )
        if mismatch > options.mismatch_threshold:
            self.warn(
                f"round {self.round}: log-probabilities in sampling and in training differ by"
                f" {mismatch:.3g} nats per token, more than mismatch_threshold"
                f" {options.mismatch_threshold:g}: the update has truncated importance "
                "weights"
            )

    def importance_weights(self, difference: Tensor, mask: Tensor) -> Tensor:
        """Return truncated importance weights, or ones if sampling and training differ by at most
        `mismatch_threshold`.

        ``difference`` (R, S) or (R, 1): log-probabilities in training minus those in sampling;
        ``mask``: where they count for the metrics "importance_weight", their mean, and
        "importance_truncated", the share of truncated ones.
        """
        if self.round_metrics["mismatch"] <= self.options.mismatch_threshold:
            difference = torch.zeros_like(difference)
        limit = math.log(MAX_IMPORTANCE_WEIGHT)
        weights, is_truncated = difference.clamp(max=limit).exp(), (difference > limit).float()
        self.round_metrics["importance_weight"] = float(weights[mask].mean())
        self.round_metrics["importance_truncated"] = float(is_truncated[mask].mean())
        return weights

    # Objective

    def identity(self) -> dict[str, Any]:
        digest = sha256()
        for prompt in (*self.prompts, (), *self.heldout):
            digest.update(np.array([len(prompt), *prompt], np.int64).tobytes())
        data = digest.hexdigest()[:16]
        neutral = ("max_kl", "val_prompts")
        options = {k: v for k, v in asdict(self.options).items() if k not in neutral}
        return {
            **options, "base": self.base, "data": data, "scorer_identity": self.scorer_identity,
            "environment": "" if self.episodes is None else self.episodes.identity,
        }  # fmt: skip

    def _is_round_over(self) -> bool:
        return self.stop or self.next_index >= len(self.completions) * self.options.num_iterations

    def next_batches(self, count: int) -> list[RolloutBatch]:
        """Return the micro-batches of a step: ``count``, or the rest of the iteration."""
        size = self.options.batch_size
        if self._is_round_over():
            self._begin_round(count * size)
        self.steps += 1
        self.step_metrics = []
        total = len(self.completions)
        iteration, start = divmod(self.next_index, total)
        rows = self._order(2, self.round, iteration, total)[start : start + count * size].tolist()
        self.next_index += len(rows)
        rows.sort(key=lambda i: self.prompt_indices[i])  # a micro-batch shares prompts
        return [self._batch(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _batch(self, rows: list[int]) -> RolloutBatch:
        packed = pack_rollouts(
            [self.prompts[self.prompt_indices[i]] for i in rows],
            [self.completions[i].token_ids for i in rows], self.policy.device,
            masks=[sampled_mask(self.completions[i]) for i in rows],
        )  # fmt: skip
        width = packed.mask.shape[1]
        return RolloutBatch(
            packed, {name: value[rows, :width] for name, value in self.columns.items()}
        )

    def tokens(self, batch: RolloutBatch) -> int:
        return int(batch.packed.mask.sum())

    def loss(self, batch: RolloutBatch, num_items: int) -> Tensor:
        loss, metrics = self.micro_loss(batch, num_items)
        self.step_metrics.append(metrics)
        return loss

    def measurements(self) -> list[dict[str, float]]:
        return [
            {name: float(value) for name, value in pool_metrics(parts).items()}
            for parts in zip(*self.step_metrics, strict=True)
        ]

    def scalars(self, measurements: Sequence[list[dict[str, float]]]) -> dict[str, float]:
        step: dict[str, float] = {}
        for parts in zip(*filter(None, measurements), strict=True):
            step |= weighted_means([(part["tokens"], part) for part in parts])
        del step["tokens"]
        max_kl = self.options.max_update_kl
        self.stop = max_kl is not None and step["approx_kl"] > max_kl
        return {**self.round_metrics, **step}

    def pending_steps(self) -> int:
        return self.steps_before + self.steps  # a later round measures their KL

    def check_pending(self) -> None:
        """Measure the KL of the final policy; raise DivergedError as a round does."""
        self.sampler.wait()
        state = (self.round, self.next_prompt, self.round_metrics)
        self.round += 1
        self._measure_round(
            self.roll_out(lambda indices, _: [0.0] * len(indices), self.options.prompts_per_round)
        )
        self._check_round(self.pending_steps())
        self.round, self.next_prompt, self.round_metrics = state

    def close(self) -> None:
        self.sampler.close()

    def position(self) -> str:
        if self.round < 0 or self._is_round_over():
            return f"round {self.round + 1}, from its first completion"
        total = len(self.completions)
        iteration, start = divmod(self.next_index, total)
        row = int(self._order(2, self.round, iteration, total)[start])
        locations = self.prompt_locations
        location = f", {locations[self.prompt_indices[row]]}" if locations else ""
        return f"round {self.round}, iteration {iteration}, from completion {start}{location}"

    def state_dict(self) -> dict[str, Any]:
        pending = self.sampler.state()
        return {
            **{PENDING + name: value for name, value in pending.items()},
            **{name: getattr(self, name) for name in STATE},
            "prompt_indices": torch.tensor(self.prompt_indices),
            **completions_to_tensors(self.completions),
            **{f"columns.{name}": value for name, value in self.columns.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.restore({
            name.removeprefix(PENDING): value
            for name, value in state.items()
            if name.startswith(PENDING)
        })  # fmt: skip
        for name in STATE:
            setattr(self, name, state[name])
        self.prompt_indices = state["prompt_indices"].tolist()
        self.completions = completions_from_tensors(state)
        self.columns = {
            name.removeprefix("columns."): value.to(self.policy.device)
            for name, value in state.items()
            if name.startswith("columns.")
        }

    def validate(self) -> dict[str, float]:
        """Return the mean score of greedy completions of held-out prompts, and its standard
        error.
        """
        count = min(len(self.heldout), self.options.val_prompts)
        if not count:
            return {}
        self.sampler.wait()  # it uses the same scorer

        def validate_shard() -> tuple[dict[str, Tensor], np.ndarray]:
            indices = self.world.shard(count)
            prompts = [self.heldout[i] for i in indices]
            completions = self._sample(
                prompts, 0.0, self.options.max_new_tokens,
                rows=[self.heldout_rows[i] for i in indices] if self.episodes else (),
            )  # fmt: skip
            scores = self._score(self.score_heldout, indices, completions)
            return completions_to_tensors(completions), scores

        shards = self.world.gather_results(validate_shard)
        completions = [c for tensors, _ in shards for c in completions_from_tensors(tensors)]
        scores = np.concatenate([scores for _, scores in shards])
        return {
            "val_score": float(scores.mean()),
            "val_score_error": float(scores.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0,
            "val_length": float(np.mean([int(sampled_mask(c).sum()) for c in completions])),
            "val_eos_fraction": float(np.mean([c.is_stopped for c in completions])),
        }

    def load_policy(self, checkpoint: Path) -> None:
        """Load the models of a checkpoint."""
        tensors, _ = load_tensors(checkpoint)
        models = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        self.trained.load_state_dict(models, strict=False)  # perhaps only adapters

    def sample(self) -> str | None:
        if self.decode is None or not self.sample_prompt or not self.sample_tokens:
            return None
        self.sampler.wait()
        rows = [self.sample_row] if self.sample_row and self.episodes else ()
        (completion,) = self._sample([self.sample_prompt], 0.0, self.sample_tokens, rows=rows)
        if isinstance(completion, Episode):
            return completion.transcript
        return self.decode(completion.token_ids)
