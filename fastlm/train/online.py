"""What PPO and GRPO share: rounds of rollouts from the current policy, each learnt from in several
passes.

A round draws prompts, samples answers to them (`fastlm.train.rollouts`), scores them, and keeps
what the update needs: log-probabilities of the policy that sampled them and of the reference, and
advantages. A pass takes all answers of the round once, in a fresh order. A step of the optimizer
takes ``batch_size * gradient_accumulation_steps`` of them.

Temperature divides the logits everywhere: in sampling, in the policy, in the reference and in the
update. Dropout is off in all of them.

Of several processes each samples, scores and measures its share of a round's answers: consecutive
answers (`fastlm.train.distributed.SingleProcess.shard`), whose seeds do not depend on the share.
Rejected: every n-th answer. A batch is sampled for as long as its longest answer takes, which every
process would have.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.checkpoint.folder import load_tensors
from fastlm.errors import InputError
from fastlm.inference.requests import Completion
from fastlm.model.lora import without_adapter
from fastlm.model.merged import merged
from fastlm.model.quantized_modules import QuantizedLinear
from fastlm.train.distributed import weighted_means
from fastlm.train.losses import Metrics, aggregate, kl_penalty, pool_metrics
from fastlm.train.metrics import correlation
from fastlm.train.objective import DivergedError, Objective, without_dropout
from fastlm.train.options import RolloutOptions
from fastlm.train.rollouts import (
    PackedRollouts,
    completions_from_tensors,
    completions_to_tensors,
    pack_rollouts,
    sample_completions,
)

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

STATE = ("round", "at", "steps", "stop", "beta", "next_beta", "made")  # of a checkpoint
# Returns the score of each answer, given the places of their prompts in the list of prompts
Score = Callable[[Sequence[int], Sequence[Completion]], Sequence[float]]
KL_ALARM = 3.0  # standard errors below 0 at which a KL estimate is not chance
NGRAM_SIZE = 4  # tokens, of which a repetition consists
MAX_IMPORTANCE_WEIGHT = (
    2.0  # truncated importance_weights sampling (Yao et al. 2025; verl's default)
)


@dataclass(frozen=True)
class RolloutBatch:
    """A micro-batch: ``packed`` tokens, and ``columns``, (B, S), for its answers."""

    packed: PackedRollouts
    columns: Mapping[str, Tensor]


def importance_weights(difference: Tensor) -> Tensor:
    """Truncated importance_weights weights of log-probabilities in training minus those in
    sampling."""
    return difference.clamp(max=math.log(MAX_IMPORTANCE_WEIGHT)).exp()


def repetition(tokens: Sequence[int], size: int = NGRAM_SIZE) -> float:
    """The share of n-grams that occurred before among these tokens."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class OnlineObjective(Objective):
    """An objective (`fastlm.train.objective.Objective`) on answers that the policy samples.

    ``prompts``: token ids of each. ``score``: see `Score`; ``scorer_identity`` identifies it, and
    ``score_metrics`` returns what it says of the answers that it scored last, means over them.
    ``reference``: the frozen policy that KL is measured to; None is the policy without its adapters
    (LoRA). A subclass defines `estimate` (advantages of a round), `num_items` and `micro_loss`.
    """

    # columns of a round that are kept for its updates, beside "old_logp"
    columns: tuple[str, ...] = ()

    def __init__(
        self,
        policy: "CausalLM",
        reference: "CausalLM | None",
        prompts: Sequence[Sequence[int]],
        heldout: Sequence[Sequence[int]],
        score: Score,
        options: RolloutOptions,
        *,
        base: str,
        scorer_identity: str = "",
        score_heldout: Score | None = None,
        stop_ids: frozenset[int] = frozenset(),
        places: Sequence[str] = (),
        answer_text: Callable[[Sequence[int]], str] | None = None,
        sample_prompt: Sequence[int] = (),
        sample_tokens: int = 0,
        score_metrics: Callable[[], Mapping[str, float]] = dict,
        warn: Callable[[str], Any] = lambda message: None,
    ):
        if not prompts:
            raise InputError("prompts: expected at least one, got none")
        self.policy, self.reference = policy, reference
        self.trained: nn.Module = policy
        self.prompts, self.heldout, self.options, self.base = prompts, heldout, options, base
        self.score, self.score_heldout = score, score_heldout or score
        self.scorer_identity, self.score_metrics = scorer_identity, score_metrics
        self.stop_ids, self.places, self.warn = stop_ids, places, warn
        self.answer_text, self.sample_prompt = answer_text, sample_prompt
        self.sample_tokens = sample_tokens
        self.beta = self.next_beta = options.beta  # of this round, of the next one
        self.round = -1  # of the rollouts at hand
        self.at = 0  # answers of all passes that were taken
        self.steps = 0  # of the optimizer, since the round began
        self.chosen: list[int] = []  # prompts of the round, one per answer
        self.answers: list[Completion] = []
        self.kept: dict[str, Tensor] = {}
        self.made: dict[str, float] = {}  # what the round measured
        self.step_metrics: list[tuple[Metrics, ...]] = []  # of its micro-batches
        self.stop = False  # the update moved too far: the next step begins a new round
        without_dropout(policy)
        if reference is not None:
            without_dropout(reference.requires_grad_(False).eval())

    # what a subclass defines

    def estimate(self, scores: Tensor, mask: Tensor, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `columns` from the scores (R,) of a round: advantages and what else there is.
        ``kept`` holds logp, ref_logp and difference (R, S), and what `measure` adds.
        """
        raise NotImplementedError

    def micro_loss(self, batch: RolloutBatch, num_items: int) -> tuple[Tensor, tuple[Metrics, ...]]:
        """Return the loss of a micro-batch, and metrics that are means over its tokens."""
        raise NotImplementedError

    def measure(self, packed: PackedRollouts) -> dict[str, Tensor]:
        """Return "logp" of the policy for a micro-batch of a round, and what else the update needs,
        (B, S) each.
        """
        return {"logp": self.logprobs(self.policy, packed)[0]}

    # log-probabilities

    def logprobs(
        self, model: "CausalLM", packed: PackedRollouts, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the answers' tokens and entropies, (B, S). ``hidden``: the model's
        hidden states (1, total, E), where they are known.
        """
        logp, entropy = model.logprobs_of(
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
        return {"entropy": aggregate(entropy.detach(), mask), "tokens": mask.sum()}

    # a round

    def _prompts_of_round(self) -> list[int]:
        """The places of the next prompts: every prompt once per epoch, in an order of its own."""
        count, size = len(self.prompts), self.options.prompts_per_round
        places = (divmod(i, count) for i in range(self.round * size, (self.round + 1) * size))
        return [int(self._order(0, epoch, count)[at]) for epoch, at in places]

    def _order(self, *key: int) -> np.ndarray:
        """A permutation of range(key[-1]) that depends on the seed and the key alone."""
        return np.random.Generator(np.random.PCG64([self.options.seed, *key])).permutation(key[-1])

    def _begin_round(self) -> None:
        self.round, self.at, self.stop = self.round + 1, 0, False
        scores, mask, kept = self._roll_out(self.score)
        device = self.policy.device
        found = self.estimate(torch.tensor(scores, dtype=torch.float32, device=device), mask, kept)
        self.kept = {"old_logp": kept["logp"], **{k: found[k] for k in self.columns}}
        self.policy.train()

    def _roll_out(self, score: Score) -> tuple[np.ndarray, Tensor, dict[str, Tensor]]:
        """Sample, score and watch the answers of the round. Return their scores (R,), the mask of
        their tokens, and logp, ref_logp and what else is measured of these, (R, S) each.

        Each process makes its share, and learns that of the others. From here on all of them have
        the same numbers, so they estimate, watch and decide alike.
        """
        options = self.options
        self.chosen = [i for i in self._prompts_of_round() for _ in range(options.num_generations)]
        # every answer of the training has a seed of its own; torch's generator takes 32 bits
        (first,) = np.random.SeedSequence([options.seed, 1]).generate_state(1, np.uint32)
        seed = int(first) // 2 + self.round * len(self.chosen)

        def share() -> tuple[dict[str, Tensor], np.ndarray, dict[str, float], dict[str, Tensor]]:
            rows = self.world.shard(len(self.chosen))
            places = self.chosen[rows.start : rows.stop]
            prompts = [self.prompts[i] for i in places]
            answers = self._sample(
                prompts, options.temperature, options.max_new_tokens, seed + rows.start
            )
            scores = self._scored(score, places, answers)
            measured = self._measured(prompts, answers)
            return completions_to_tensors(answers), scores, dict(self.score_metrics()), measured

        self.policy.eval()
        parts = [part for part in self.world.gather_results(share) if len(part[1])]
        answers, scores, scored, measured = zip(*parts)
        self.answers = [
            answer for tensors in answers for answer in completions_from_tensors(tensors)
        ]
        lengths = torch.tensor([len(answer.token_ids) for answer in self.answers])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.policy.device)
        kept = {}
        for name in measured[0]:
            tokens = torch.cat([tensors[name] for tensors in measured]).to(mask.device)
            kept[name] = tokens.new_zeros(mask.shape).masked_scatter(mask, tokens)
        whole = np.concatenate(scores)
        self._watch(whole, kept, mask)
        self.made |= weighted_means([(len(one), said) for one, said in zip(scores, scored)])
        return whole, mask, kept

    def _sample(
        self, prompts: Sequence[Sequence[int]], temperature: float, longest: int, seed: int = 0
    ) -> list[Completion]:
        quantized = any(isinstance(m, QuantizedLinear) for m in self.policy.modules())
        # merged, adapters cost nothing per token; a quantized base would be dequantized for it
        with nullcontext() if quantized else merged(self.policy):
            return sample_completions(
                self.policy, prompts, max_new_tokens=longest, seed=seed, temperature=temperature,
                stop_ids=self.stop_ids, rows=self.options.decode_batch_size,
            )  # fmt: skip

    def _scored(
        self, score: Score, places: Sequence[int], answers: Sequence[Completion]
    ) -> np.ndarray:
        if not answers:
            return np.zeros(0)
        scores = np.array(score(places, answers), np.float64)
        if self.options.missing_eos_penalty is not None:
            scores[[not answer.ended for answer in answers]] = self.options.missing_eos_penalty
        return scores

    @torch.no_grad()
    def _measured(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Completion]
    ) -> dict[str, Tensor]:
        """logp, ref_logp and what `measure` adds, of the answers' tokens, (tokens,) each, and logp
        minus that of sampling, as "difference": the engine that samples and the one that trains
        round differently.
        """
        size = self.options.batch_size
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(answers), size):
            packed = pack_rollouts(
                prompts[start : start + size],
                [answer.token_ids for answer in answers[start : start + size]], self.policy.device,
            )  # fmt: skip
            found = {**self.measure(packed), "ref_logp": self._reference_logprobs(packed)}
            for name, value in found.items():
                parts.setdefault(name, []).append(value[packed.mask].cpu())
        kept = {name: torch.cat(values) for name, values in parts.items()}
        if answers:
            sampled = torch.tensor(
                [token.logprob for answer in answers for token in answer.logprobs]
            )
            kept["difference"] = kept["logp"] - sampled
        return kept

    def _watch(self, scores: np.ndarray, kept: dict[str, Tensor], mask: Tensor) -> None:
        """Measure a round; raise DivergedError where the policy is too far from the reference.

        Measured for metrics.jsonl, means over the answers:

        - "score", "score_std": as the reward gave them, after the rule of missing end tokens;
        - "kl", "kl_error": KL(policy || reference) in nats per answer by k1, and its standard
          error; "kl3": by k3, which is never negative;
        - "length" in tokens; "ended": share that drew an end token;
        - "score_length": correlation of the two. A policy that is paid for length has it near 1;
        - "repetition": share of 4-grams that the same answer had before;
        - "mismatch": mean absolute difference per token of log-probabilities in training and
          sampling.
        """
        options, answers = self.options, self.answers
        lengths = mask.sum(1).cpu().numpy()
        logp, reference = kept["logp"], kept["ref_logp"]
        estimates = [kl_penalty(logp, reference, kind, mask=mask) for kind in ("k1", "k3")]
        k1, k3 = (estimate.sum(1).double().cpu().numpy() for estimate in estimates)
        kl, error = float(k1.mean()), float(k1.std()) / math.sqrt(len(k1))
        mismatch = float(kept["difference"][mask].abs().mean())
        self.made = {
            "score": float(scores.mean()),
            "score_std": float(scores.std()),
            "kl": kl,
            "kl_error": error,
            "kl3": float(k3.mean()),
            "length": float(lengths.mean()),
            "ended": float(np.mean([answer.ended for answer in answers])),
            "score_length": correlation(scores, lengths) or 0.0,  # type: ignore[arg-type]
            "repetition": float(np.mean([repetition(answer.token_ids) for answer in answers])),
            "mismatch": mismatch,
            "round": self.round,
            "beta": self.beta,
        }
        if not abs(kl) <= options.max_kl:
            raise DivergedError(
                f"round {self.round}: the KL to the reference is {kl:.3g} nats per answer, expected"
                f" at most max_kl {options.max_kl:g}",
                steps=self.steps,
            )
        if kl < -KL_ALARM * error - 1e-3:
            self.warn(
                f"round {self.round}: the KL estimate is {kl:.3g} nats per answer, more than"
                f" {KL_ALARM:g} standard errors below 0: the policy that samples is not the one"
                " that is trained"
            )
        if mismatch <= options.mismatch_threshold:
            kept["difference"] = torch.zeros_like(kept["difference"])
        else:
            self.warn(
                f"round {self.round}: log-probabilities in sampling and in training differ by"
                f" {mismatch:.3g} nats per token, more than mismatch_threshold"
                f" {options.mismatch_threshold:g}: the update has truncated importance_weights "
                "weights"
            )
        if options.kl_target is not None:  # Ziegler et al. 2019, arXiv:1909.08593
            off = min(max(kl / options.kl_target - 1, -0.2), 0.2)
            self.next_beta = self.beta * (1 + off * len(scores) / options.kl_horizon)

    # Objective

    def identity(self) -> dict[str, Any]:
        digest = sha256()
        for prompt in (*self.prompts, (), *self.heldout):
            digest.update(np.array([len(prompt), *prompt], np.int64).tobytes())
        data = digest.hexdigest()[:16]
        watching = ("max_kl", "val_prompts")
        options = {k: v for k, v in asdict(self.options).items() if k not in watching}
        return {**options, "base": self.base, "data": data, "scorer_identity": self.scorer_identity}

    def _over(self) -> bool:
        return self.stop or self.at >= len(self.answers) * self.options.num_iterations

    def next_batches(self, count: int) -> list[RolloutBatch]:
        """Return the micro-batches of a step: ``count``, or what the pass has left."""
        if self._over():
            self.beta = self.next_beta
            self._begin_round()
            self.steps = 0
        self.steps += 1
        self.step_metrics = []
        total, size = len(self.answers), self.options.batch_size
        number, start = divmod(self.at, total)
        rows = self._order(2, self.round, number, total)[start : start + count * size].tolist()
        self.at += len(rows)
        rows.sort(key=lambda i: self.chosen[i])  # those of a prompt share it in a micro-batch
        return [self._batch(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _batch(self, rows: list[int]) -> RolloutBatch:
        packed = pack_rollouts(
            [self.prompts[self.chosen[i]] for i in rows],
            [self.answers[i].token_ids for i in rows], self.policy.device,
        )  # fmt: skip
        width = packed.mask.shape[1]
        return RolloutBatch(
            packed, {name: value[rows, :width] for name, value in self.kept.items()}
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
        most = self.options.max_update_kl
        self.stop = most is not None and step["approx_kl"] > most
        return {**self.made, **step}

    def pending_steps(self) -> int:
        return self.steps  # whose KL the next round measures

    def check_pending(self) -> None:
        """Measure the KL of the policy that the last step left; raise DivergedError as a round."""
        before = (self.round, self.chosen, self.answers, self.made)
        self.round += 1
        self._roll_out(lambda places, answers: [0.0] * len(answers))
        self.round, self.chosen, self.answers, self.made = before

    def position(self) -> str:
        if self.round < 0 or self._over():
            return f"round {self.round + 1}, from its first answer"
        number, start = divmod(self.at, len(self.answers))
        first = self.chosen[int(self._order(2, self.round, number, len(self.answers))[start])]
        place = f", {self.places[first]}" if self.places else ""
        return f"round {self.round}, pass {number}, from answer {start}{place}"

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in STATE},
            "chosen": torch.tensor(self.chosen),
            **completions_to_tensors(self.answers),
            **{f"kept.{name}": value for name, value in self.kept.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])
        self.chosen, self.answers = state["chosen"].tolist(), completions_from_tensors(state)
        self.kept = {
            name.removeprefix("kept."): value.to(self.policy.device)
            for name, value in state.items()
            if name.startswith("kept.")
        }

    def validate(self) -> dict[str, float]:
        """Return the mean score of greedy answers to held-out prompts, with its standard error."""
        count = min(len(self.heldout), self.options.val_prompts)
        if not count:
            return {}

        def answered() -> tuple[dict[str, Tensor], np.ndarray]:
            places = self.world.shard(count)
            prompts = [self.heldout[i] for i in places]
            answers = self._sample(prompts, 0.0, self.options.max_new_tokens)
            return completions_to_tensors(answers), self._scored(
                self.score_heldout, places, answers
            )

        parts = self.world.gather_results(answered)
        answers = [answer for tensors, _ in parts for answer in completions_from_tensors(tensors)]
        scores = np.concatenate([scores for _, scores in parts])
        return {
            "val_score": float(scores.mean()),
            "val_score_error": float(scores.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0,
            "val_length": float(np.mean([len(answer.token_ids) for answer in answers])),
            "val_ended": float(np.mean([answer.ended for answer in answers])),
        }

    def load_policy(self, checkpoint: Path) -> None:
        """Put back the models of a checkpoint."""
        tensors, _ = load_tensors(checkpoint)
        models = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        self.trained.load_state_dict(models, strict=False)  # with adapters: they alone are in it

    def sample(self) -> str | None:
        if self.answer_text is None or not self.sample_prompt or not self.sample_tokens:
            return None
        (answer,) = self._sample([self.sample_prompt], 0.0, self.sample_tokens)
        return self.answer_text(answer.token_ids)
