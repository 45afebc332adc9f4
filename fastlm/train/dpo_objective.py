"""The objective of DPO, SimPO, ORPO and KTO, on pairs or labelled answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastlm.progress import silent
from fastlm.train.losses import dpo_loss, kto_loss, orpo_loss, simpo_loss
from fastlm.train.objective import (
    IGNORE,
    EpochObjective,
    Example,
    examples_digest,
    in_dtype,
    pack,
    pack_groups,
    without_dropout,
)
from fastlm.train.preference_stage import (
    DPOOptions,
    PreferenceExample,
    accuracy_error,
    margin_accuracy,
    pairwise_accuracy,
)

if TYPE_CHECKING:
    from fastlm.train.options import TrainOptions


@dataclass(frozen=True)
class PreferenceBatch:
    """A micro-batch of n pairs or labels. ``ids`` and ``labels`` (1, total) and ``cu_seqlens`` are
    packed: chosen and rejected alternate and share their prompt (``keys``: see
    `CausalLM.hidden`), or there are n labelled answers.

    ``lengths``: loss tokens per sequence. ``reference`` (n, 2): log-probabilities of the base model
    for chosen and rejected, or for the answer and the answer to another prompt; zeros for a loss
    without a reference. ``kl``: the reference point of the whole step.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    keys: tuple[Tensor, Tensor] | None
    lengths: Tensor
    reference: Tensor
    desirable: Tensor
    kl: Tensor | None = None


class DPOObjective(EpochObjective):
    """The objective of `fastlm.train.dpo.DPO`. The loss is a mean over the pairs (KTO: the labels)
    of a step, however they are spread over its micro-batches.

    The reference is the base model. Its log-probabilities are measured once, before the first step
    (`measure_reference`), and stored in the checkpoints. So there is no second model in memory, and
    a resumed training has the same reference. They are measured in the micro-batches and the dtype
    of the first epoch: before the first update, policy and reference are equal to the last bit.
    SimPO and ORPO have no reference, and measure none.

    ``examples`` and ``heldout``: pairs, or with loss_type "kto" labels. For the other arguments see
    `EpochObjective`.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[PreferenceExample],
        heldout: Sequence[PreferenceExample],
        options: "TrainOptions",
        dpo_options: DPOOptions,
        **common: Any,
    ):
        super().__init__(model, examples, heldout, options, **common)
        without_dropout(model)  # the reference is measured without it
        self.dpo_options = dpo_options
        self.reference: Tensor | None = None
        self.reference_heldout: Tensor | None = None

    def identity(self) -> dict[str, Any]:
        return {
            **super().identity(),
            **asdict(self.dpo_options),
            "heldout": examples_digest(self.heldout),  # the checkpoint stores their reference
        }

    # the reference

    def measure_reference(self, dtype: torch.dtype, *, track: Callable = silent) -> None:
        """Measure the reference with the current weights, rounded to ``dtype``. It is zero for a
        loss that does not use it.
        """
        self.reference = torch.zeros(len(self.examples), 2)
        self.reference_heldout = torch.zeros(len(self.heldout), 2)
        if not self.dpo_options.uses_reference:
            return
        training, heldout = self.order.tolist(), list(range(len(self.heldout)))
        work = [
            *((self.examples, rows, self.reference) for rows in self._split(training)),
            # all of them, because a resumed training may validate on more
            *((self.heldout, rows, self.reference_heldout) for rows in self._split(heldout)),
        ]
        with in_dtype(self.trained, dtype), torch.no_grad():
            for source, rows, target in track(work, "reference", unit="batches"):
                target[rows] = self.logps([source[i].answers for i in rows]).cpu()

    def logps(self, answers: Sequence[tuple[Example, ...]]) -> Tensor:
        """Return the model's log-probabilities of both answers, (n, 2)."""
        if self.dpo_options.loss_type != "kto":
            return self.sums(*self._pack(answers)).view(-1, 2)
        sides = ([(pair[side],) for pair in answers] for side in (0, 1))
        return torch.stack([self.sums(*self._pack(side)) for side in sides], 1)

    def _pack(self, answers: Sequence[tuple[Example, ...]]) -> tuple[Any, ...]:
        """Pack single answers, or pairs with their keys, for `sums`."""
        if len(answers[0]) == 1:
            return *pack([answer for (answer,) in answers], self.device), None
        packed, keys = pack_groups(answers, self.device)
        return *packed, keys

    def sums(
        self,
        ids: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor,
        keys: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the log-probability of each sequence's loss tokens, (sequences,) float32."""
        model = cast(Any, self.trained)
        logps = model.logprobs(ids, labels, cu_seqlens=cu_seqlens, keys=keys)[0]
        rows = torch.arange(len(cu_seqlens) - 1, device=ids.device)
        rows = rows.repeat_interleave(cu_seqlens.diff(), output_size=len(logps))
        return logps.new_zeros(len(cu_seqlens) - 1).index_add(0, rows, logps)

    # steps

    def next_batches(self, count: int) -> list[PreferenceBatch]:
        """Return ``count`` micro-batches, or the rest of the epoch."""
        assert self.reference is not None  # by measure_reference or load_state_dict
        return self._batches(self.next_rows(count), self.examples, self.reference)

    def _batches(
        self,
        batch_rows: Sequence[list[int]],
        source: Sequence[PreferenceExample],
        reference: Tensor,
    ) -> list[PreferenceBatch]:
        batches, device = [], self.device
        kto = self.dpo_options.loss_type == "kto"
        kl = self._reference_point(batch_rows, source, reference) if kto else None
        for rows in batch_rows:
            examples = [source[i] for i in rows]
            answers = [e.answers[:1] if kto else e.answers for e in examples]
            lengths = torch.tensor(
                [e.num_loss_tokens for row in answers for e in row], device=device
            )
            desirable = torch.tensor([e.desirable for e in examples], device=device)
            row_reference = reference[rows].to(device)
            ids, labels, cu_seqlens, keys = self._pack(answers)
            batches.append(
                PreferenceBatch(
                    ids, labels, cu_seqlens, keys, lengths, row_reference, desirable, kl
                )
            )
        return batches

    def _reference_point(
        self,
        batch_rows: Sequence[list[int]],
        source: Sequence[PreferenceExample],
        reference: Tensor,
    ) -> Tensor:
        """Return KTO's reference point: the mean log-ratio of answers to other prompts, at least 0.
        Each process measures its shard of the micro-batches.
        """
        shard, _ = self.world.split_batches(batch_rows)
        ratios = [torch.zeros(0)]
        with torch.no_grad():
            for rows in shard:
                others = self.sums(*self._pack([source[i].answers[1:] for i in rows]))
                ratios.append(others.cpu() - reference[rows, 1])
        all_ratios = torch.cat(self.world.gather(torch.cat(ratios)))
        return all_ratios.mean().clamp(min=0).to(self.device)

    def num_items(self, batch: PreferenceBatch) -> int:
        return len(batch.reference)

    def tokens(self, batch: PreferenceBatch) -> int:
        return int((batch.labels != IGNORE).sum())

    def loss(self, batch: PreferenceBatch, num_items: int) -> Tensor:
        losses, metrics = self.losses(batch)
        self.step_measurements.append({name: values.detach() for name, values in metrics.items()})
        return losses.sum() / num_items

    def losses(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses (n,) and the metrics of the pairs or labels."""
        o, desirable = self.dpo_options, batch.desirable
        logps = self.sums(batch.ids, batch.labels, batch.cu_seqlens, batch.keys)
        if o.loss_type == "kto":
            assert batch.kl is not None
            losses = kto_loss(
                logps, batch.reference[:, 0], desirable, batch.kl, beta=o.beta,
                desirable_weight=o.desirable_weight, undesirable_weight=o.undesirable_weight,
            )  # fmt: skip
            rewards = o.beta * (logps - batch.reference[:, 0])
            columns = {"reward": rewards, "logp": logps, "length": batch.lengths.float()}
            return losses, {
                "kl": batch.kl.view(1),
                **{f"{name}_chosen": values[desirable] for name, values in columns.items()},
                **{f"{name}_rejected": values[~desirable] for name, values in columns.items()},
            }
        logps, lengths, reference = logps.view(-1, 2), batch.lengths.view(-1, 2), batch.reference
        chosen, rejected, sides = logps[:, 0], logps[:, 1], (lengths[:, 0], lengths[:, 1])
        extra: dict[str, Tensor] = {}
        if o.loss_type == "orpo":
            losses, extra = orpo_loss(chosen, rejected, sides, beta=o.beta)
        elif o.loss_type == "simpo":
            losses = simpo_loss(
                chosen, rejected, sides, beta=o.beta, simpo_gamma=o.simpo_gamma,
                label_smoothing=o.label_smoothing,
            )  # fmt: skip
        else:
            losses = dpo_loss(
                chosen, rejected, reference[:, 0], reference[:, 1], beta=o.beta,
                label_smoothing=o.label_smoothing, loss_type=cast(Any, o.loss_type),
                lengths=sides if o.length_normalise else None,
            )  # fmt: skip
        if o.sft_weight:
            losses = losses - o.sft_weight * chosen / lengths[:, 0]
        rewards = o.beta * (logps - reference)
        if o.length_normalise or not o.uses_reference:
            rewards = rewards / lengths
        margins = rewards[:, 0] - rewards[:, 1]
        columns = {"reward": rewards, "logp": logps, "length": lengths.float()}
        return losses, {
            **extra,
            "margin": margins,
            "accuracy": margin_accuracy(margins),
            **{f"{name}_chosen": values[:, 0] for name, values in columns.items()},
            **{f"{name}_rejected": values[:, 1] for name, values in columns.items()},
        }

    def measurements(self) -> dict[str, Tensor]:
        return {name: values.cpu() for name, values in _concatenate(self.step_measurements).items()}

    def scalars(self, measurements: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        return {
            **super().scalars(measurements),
            **_means(_concatenate([m for m in measurements if m])),
        }

    def state_dict(self) -> dict[str, Any]:
        names = ("reference", "reference_heldout")
        return {**super().state_dict(), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.reference, self.reference_heldout = state["reference"], state["reference_heldout"]

    def _split(self, rows: list[int]) -> list[list[int]]:
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def validate(self) -> dict[str, float]:
        """Return loss, accuracy with its standard error, and margin of the held-out rows, of at
        most `val_tokens` tokens.
        """
        if not self.heldout:
            return {}
        assert self.reference_heldout is not None
        batch_rows, tokens = [], 0
        for rows in self._split(list(range(len(self.heldout)))):
            batch_rows.append(rows)
            tokens += sum(e.num_loss_tokens for i in rows for e in self.heldout[i].answers)
            if tokens >= self.options.val_tokens:
                break
        batches = self._batches(batch_rows, self.heldout, self.reference_heldout)
        results = [self.losses(batch) for batch in batches]
        joined = _concatenate([metrics for _, metrics in results])
        means = _means(joined)
        if self.dpo_options.loss_type == "kto":
            error = pairwise_accuracy(joined["reward_chosen"], joined["reward_rejected"])[1]
        else:
            locations = [self.heldout[i].location for rows in batch_rows for i in rows]
            error = accuracy_error(joined["accuracy"], locations)
        names = ("accuracy", "margin", "reward_chosen", "reward_rejected", "nll", "log_odds")
        return {
            "val_loss": float(torch.cat([losses for losses, _ in results]).mean()),
            **{f"val_{name}": means[name] for name in names if name in means},
            **({"val_accuracy_error": error} if "accuracy" in means else {}),
        }


def _concatenate(metrics: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([m[name] for m in metrics]) for name in (metrics or [{}])[0]}


def _means(joined: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the means; an empty tensor has none. KTO's labels are not paired: its margin is a
    difference of means, its accuracy a share of all pairs of a desirable and an undesirable answer.
    """
    means = {name: float(values.mean()) for name, values in joined.items() if len(values)}
    if "accuracy" not in joined and {"reward_chosen", "reward_rejected"} <= means.keys():
        means["margin"] = means["reward_chosen"] - means["reward_rejected"]
        means["accuracy"] = pairwise_accuracy(joined["reward_chosen"], joined["reward_rejected"])[0]
    return means
