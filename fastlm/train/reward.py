"""A reward model: scores answers as people would rank them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastlm.data.conversations import FORMATS
from fastlm.errors import InputError
from fastlm.pipeline.stage import Job, Part, Takes
from fastlm.sources.input_digest import Contents
from fastlm.train.chat_stage import FEEDBACK
from fastlm.train.encoding import Example, rows_text
from fastlm.train.epochs import Epochs
from fastlm.train.preferences import (
    Judged,
    Preferences,
    PreferenceStage,
    accuracy_error,
    digest_of,
    right,
)
from fastlm.train.training_stage import MODEL, Training

if TYPE_CHECKING:
    from torch import Tensor

    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.reward_model import RewardModel
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.options import TrainOptions

SHOWN = 1000  # answers in the figure of lengths


@dataclass(frozen=True)
class Batch:
    """A micro-batch of rows. ``ids`` (1, total) and ``cu_seqlens``: all their answers, packed.
    ``ranks`` (n, K): 0, 1, ... per row, -1 where it has fewer answers. ``margins`` (n,).
    """

    ids: "Tensor"
    cu_seqlens: "Tensor"
    ranks: "Tensor"
    margins: "Tensor"


class RankedAnswers(Epochs):
    """The objective of `Reward`: Bradley-Terry's loss of pairs, Plackett-Luce's of longer lists, a
    mean over the comparisons of a step. A list of k answers counts as k - 1 comparisons, one for
    each choice of the next best.

    ``margins``: whether a pair's margin is subtracted. ``reference``: the answers whose scores have
    mean 0 and deviation 1 after the training. For the other arguments see `Epochs`.
    """

    def __init__(
        self,
        model: "RewardModel",
        judged: Sequence[Judged],
        heldout: Sequence[Judged],
        options: "TrainOptions",
        *,
        margins: bool = False,
        reference: Sequence[Judged] = (),
        **common: Any,
    ):
        places = [one.answers[0].place for one in judged]
        super().__init__(
            model, judged, heldout, options, places=places, data=digest_of(judged), **common
        )
        self.margins, self.reference = margins, reference
        self.measured: list[tuple[Tensor, Tensor]] = []

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "margins": self.margins}

    def next_batches(self, count: int) -> list[Batch]:
        self.measured = []
        return super().next_batches(count)

    def collate(self, judged: Sequence[Judged]) -> Batch:
        import numpy as np
        import torch

        answers = [answer for one in judged for answer in one.answers]
        ids = np.concatenate([answer.ids for answer in answers]).astype(np.int64)
        ends = np.cumsum([0, *(len(answer.ids) for answer in answers)], dtype=np.int32)
        ranks = torch.full((len(judged), max(len(one.answers) for one in judged)), -1)
        for row, one in enumerate(judged):
            ranks[row, : len(one.answers)] = torch.arange(len(one.answers))
        margins = torch.tensor([(one.margin or 0.0) * self.margins for one in judged])
        return Batch(
            torch.from_numpy(ids)[None].to(self.device), torch.from_numpy(ends).to(self.device),
            ranks.to(self.device), margins.to(self.device),
        )  # fmt: skip

    def num_items(self, batch: Batch) -> int:
        return int((batch.ranks > 0).sum())

    def tokens(self, batch: Batch) -> int:
        return batch.ids.numel()

    def loss(self, batch: Batch, num_items: int) -> "Tensor":
        scores = self.scores(batch)
        self.measured.append(pairs_of(scores.detach(), batch.ranks))
        return self.losses(scores, batch).sum() / num_items

    def scores(self, batch: Batch) -> "Tensor":
        """Return the scores (n, K), 0 where a row has fewer answers."""
        model = cast(Any, self.trained)
        values = model.values(batch.ids, batch.cu_seqlens)[0, batch.cu_seqlens[1:].long() - 1]
        return values.new_zeros(batch.ranks.shape).masked_scatter(batch.ranks >= 0, values)

    def losses(self, scores: "Tensor", batch: Batch) -> "Tensor":
        """Return the loss of each row, (n,): a sum over its comparisons."""
        from fastlm.train.losses import bradley_terry_loss, plackett_luce_loss

        if batch.ranks.shape[1] == 2:
            return bradley_terry_loss(scores[:, 0], scores[:, 1], margin=batch.margins)
        # of a pair, Plackett-Luce's loss is Bradley-Terry's of a first score less the margin
        first = scores[:, :1] - batch.margins.to(scores.dtype)[:, None]
        return plackett_luce_loss(first_replaced(scores, first), batch.ranks)

    def measurements(self) -> list[float]:
        return [margin for margins, _ in self.measured for margin in margins.tolist()]

    def scalars(self, measured: Sequence[list[float]]) -> dict[str, float]:
        import torch

        margins = torch.tensor([margin for part in measured for margin in part])
        return {
            **super().scalars(measured),
            "margin": float(margins.mean()),
            "accuracy": float(right(margins).mean()),
        }

    def validate(self) -> dict[str, float]:
        """Return loss, accuracy with its standard error, and margin of the held-out rows, of at
        most `val_tokens` tokens.
        """
        import torch

        total, items, tokens = 0.0, 0, 0
        margins, places = [], []
        for start in range(0, len(self.heldout), self.batch_size):
            rows = self.heldout[start : start + self.batch_size]
            batch = self.collate(rows)
            scores = self.scores(batch)
            total += float(self.losses(scores, batch).sum())
            items += self.num_items(batch)
            tokens += self.tokens(batch)
            found, of = pairs_of(scores, batch.ranks)
            margins.append(found)
            places += [rows[i].answers[0].place for i in of.tolist()]
            if tokens >= self.options.val_tokens:
                break
        if not items:
            return {}
        joined = torch.cat(margins)
        return {
            "val_loss": total / items,
            "val_accuracy": float(right(joined).mean()),
            "val_margin": float(joined.mean()),
            "val_accuracy_error": accuracy_error(right(joined), places),
        }

    def sample(self) -> None:
        return None


def first_replaced(scores: "Tensor", first: "Tensor") -> "Tensor":
    import torch

    return torch.cat([first, scores[:, 1:]], 1)


def pairs_of(scores: "Tensor", ranks: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return score of the better minus score of the worse of all pairs of a row, and the rows."""
    better = ranks[:, :, None] < ranks[:, None, :]
    wanted = better & (ranks >= 0)[:, :, None]
    margins = scores[:, :, None] - scores[:, None, :]
    return margins[wanted], wanted.nonzero()[:, 0]


@dataclass(frozen=True)
class Reward(PreferenceStage):
    """Train a reward model on preferences: the model's layers with a head that scores an answer.

    Its scores have mean 0 and standard deviation 1 over the answers of the training. The same
    command run again resumes from the last checkpoint.
    """

    kind = "reward"
    command = ("reward",)
    reads = {
        "model": Takes(("model",), "Model to begin with: a run, a Hugging Face folder"),
        "feedback": FEEDBACK,
    }
    leaves = {"reward": MODEL}
    sources_in = ("data", "normalise_on")
    result = {
        **PreferenceStage.result, "comparisons": int, "calibration": dict,
        "length_bias": dict, "measured_on": str, "lengths": list, "scores": list,
    }  # fmt: skip
    notes = """Read are .jsonl and .json files of pairs (prompt, chosen, rejected), ranked lists
(prompt, answers, ranks or scores) and corrections (prompt, answer, corrected)."""
    unused = ("sample_at", "sample_prompt", "sample_tokens")

    normalise_on: Annotated[
        tuple[str, ...], "Preferences whose answers' scores have mean 0; default: those of training"
    ] = ()
    judge: Annotated[
        bool, "Learn from the part of the feedback that no other training sees, to judge those"
    ] = False
    use_margins: Annotated[bool, "Subtract the margins of the data from a pair's scores"] = False
    batch_size: Annotated[int, "Rows per micro-batch, joined without padding"] = 4
    lr: Annotated[float, "Peak learning rate"] = 1e-5

    def part(self) -> str:
        return "judge" if self.judge else super().part()

    def contents(self, contents: Contents) -> Any:
        reference = contents.sources(self.normalise_on, FORMATS) if self.normalise_on else None
        return [super().contents(contents), reference]

    def unit(self) -> str:
        return "pairs"

    def read_data(self, tokenizer: "Tokenizer", context: int, job: Job) -> Preferences:
        return Preferences(self, tokenizer, self.longest(context), context, job, kind="lists")

    def module(self, model: "CausalLM") -> "RewardModel":
        from fastlm.model.reward_model import RewardModel

        return RewardModel.from_causal_lm(model, seed=self.seed)

    def objective(
        self, job: Job, model: Any, data: Any, options: "TrainOptions", **common: Any
    ) -> RankedAnswers:
        reference = data.training
        if self.normalise_on:
            stage = replace(self, data=self.normalise_on, heldout=0.0)
            other = stage.read_data(data.tokenizer, data.context, job)
            if not (reference := other.training):
                raise InputError(f"normalise_on: wanted answers, got none in {other.told()}")
        return RankedAnswers(
            model, data.training, data.heldout, options, margins=self.use_margins,
            reference=reference, **common,
        )  # fmt: skip

    def data_facts(self, data: Any) -> dict[str, Any]:
        comparisons = sum(len(one.answers) - 1 for one in data.training)
        return {"comparisons": comparisons, "heldout": len(data.heldout)}

    def finish(self, training: Training) -> dict[str, Any]:
        model: RewardModel = training.model
        objective = cast(RankedAnswers, training.objective)
        model.eval()
        model.normalise(model.score(ids_of(answers_of(objective.reference))))
        return {
            **measure(model, objective.heldout or objective.examples),
            "measured_on": "held-out" if objective.heldout else "training",
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def outcome(self, result: Mapping[str, Any], job: Job) -> tuple[str, list[str]]:
        return f"{result['comparisons']:,} comparisons", self.figures(result)

    def section(self, job: Job, result: Mapping[str, Any], metrics: list[dict[str, Any]]) -> Part:
        from fastlm.pipeline.charts import loss_chart
        from fastlm.train.charts import accuracy_chart, calibration_chart, length_chart

        cards = []
        if (accuracy := result["metrics"].get("val_accuracy")) is not None:
            error = result["metrics"]["val_accuracy_error"]
            cards = [
                (f"{100 * accuracy:.0f} ± {100 * error:.0f} %", "of held-out pairs ranked right")
            ]
        bias, calibrated = result["length_bias"], result["calibration"]
        return Part(
            "Reward model",
            "Scores have mean 0 and standard deviation 1 over the answers of the training.",
            facts={
                "preferences": rows_text(result, f"{result['comparisons']:,} comparisons"),
                "batch": f"{self.batch_size * self.accumulate} rows without padding",
            },
            charts=[
                loss_chart(metrics, "loss per comparison"),
                accuracy_chart(metrics),
                calibration_chart(calibrated["bins"]),
                length_chart(result["lengths"], result["scores"]),
            ],
            cards=cards,
            template="reward.html.jinja",
            values={"c": calibrated, "b": bias, "on": result["measured_on"]},
        )


def answers_of(judged: Sequence[Judged]) -> list[Example]:
    return [answer for one in judged for answer in one.answers]


def ids_of(answers: Sequence[Example]) -> list[list[int]]:
    return [answer.ids.tolist() for answer in answers]


def measure(model: "RewardModel", judged: Sequence[Judged]) -> dict[str, Any]:
    """Return how well the probabilities of a model fit, and how it treats length: "calibration",
    "length_bias", and lengths and scores of the first answers.
    """
    from fastlm.train.reward_report import calibration, length_bias  # numpy

    answers = answers_of(judged)
    scores = model.score(ids_of(answers)).double().cpu().tolist()
    lengths = [answer.learnt for answer in answers]
    pairs, at = [], 0
    for one in judged:
        row = range(at, at + len(one.answers))
        pairs += [(i, j) for i in row for j in row if i < j]
        at += len(one.answers)
    # the probability of a preference comes from the score before it was normalised
    margins = [(scores[i] - scores[j]) * model.std for i, j in pairs]
    return {
        "calibration": calibration(margins),
        "length_bias": length_bias(lengths, scores, pairs),
        "lengths": lengths[:SHOWN],
        "scores": [round(score, 4) for score in scores[:SHOWN]],
    }
