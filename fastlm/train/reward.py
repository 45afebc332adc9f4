"""Train a reward model, which scores answers as people would rank them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastlm.pipeline.stage import InputSpec, ReportSection, StageContext
from fastlm.train.encoding import rows_summary
from fastlm.train.metrics import correlation
from fastlm.train.objective import EpochObjective
from fastlm.train.preference_stage import (
    PreferenceDataset,
    PreferenceExample,
    PreferenceStage,
    accuracy_error,
    margin_accuracy,
)
from fastlm.train.training_stage import FEEDBACK, MODEL, TrainingSetup

if TYPE_CHECKING:
    from torch import Tensor

    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.reward_model import RewardModel
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.options import TrainOptions

BINS = 5  # of the predicted probability, between 0.5 and 1
DRAWS = 2000  # simulated outcomes under perfect calibration: at most 0.6 % error of the mean
MAX_EXACT_PAIRS = 2000  # beyond them a bin's number of right pairs is drawn from a normal


@dataclass(frozen=True)
class RankingBatch:
    """A micro-batch of rows. ``ids`` (1, total) and ``cu_seqlens`` pack all their answers.
    ``ranks`` (n, K): 0, 1, ... per row, -1 where a row has fewer answers. ``margins`` (n,).
    """

    ids: "Tensor"
    cu_seqlens: "Tensor"
    ranks: "Tensor"
    margins: "Tensor"


class RewardObjective(EpochObjective):
    """The objective of `Reward`: the Bradley-Terry loss of pairs and the Plackett-Luce loss of
    longer lists, a mean over the comparisons of a step. A list of k answers counts as k - 1
    comparisons, one for each choice of the next best.

    ``margins``: whether to subtract a pair's margin. For the other arguments see `EpochObjective`.
    """

    def __init__(self, *args: Any, margins: bool = False, **common: Any):
        super().__init__(*args, **common)
        self.margins = margins

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "margins": self.margins}

    def collate(self, examples: Sequence[PreferenceExample]) -> RankingBatch:
        import numpy as np
        import torch

        answers = [answer for e in examples for answer in e.answers]
        ids = np.concatenate([answer.ids for answer in answers]).astype(np.int64)
        ends = np.cumsum([0, *(len(answer.ids) for answer in answers)], dtype=np.int32)
        ranks = torch.full((len(examples), max(len(e.answers) for e in examples)), -1)
        for row, example in enumerate(examples):
            ranks[row, : len(example.answers)] = torch.arange(len(example.answers))
        margins = torch.tensor([(e.margin or 0.0) * self.margins for e in examples])
        return RankingBatch(
            torch.from_numpy(ids)[None].to(self.device), torch.from_numpy(ends).to(self.device),
            ranks.to(self.device), margins.to(self.device),
        )  # fmt: skip

    def num_items(self, batch: RankingBatch) -> int:
        return int((batch.ranks > 0).sum())

    def tokens(self, batch: RankingBatch) -> int:
        return batch.ids.numel()

    def loss(self, batch: RankingBatch, num_items: int) -> "Tensor":
        scores = self.scores(batch)
        self.step_measurements.append(pair_margins(scores.detach(), batch.ranks)[0])
        return self.losses(scores, batch).sum() / num_items

    def scores(self, batch: RankingBatch) -> "Tensor":
        """Return the scores (n, K), 0 where a row has fewer answers."""
        model = cast(Any, self.trained)
        values = model.values(batch.ids, batch.cu_seqlens)[0, batch.cu_seqlens[1:].long() - 1]
        return values.new_zeros(batch.ranks.shape).masked_scatter(batch.ranks >= 0, values)

    def losses(self, scores: "Tensor", batch: RankingBatch) -> "Tensor":
        """Return the loss of each row, (n,): a sum over its comparisons."""
        import torch

        from fastlm.train.losses import bradley_terry_loss, plackett_luce_loss

        if batch.ranks.shape[1] == 2:
            return bradley_terry_loss(scores[:, 0], scores[:, 1], margin=batch.margins)
        # for a pair with the margin subtracted, Plackett-Luce equals Bradley-Terry
        first = scores[:, :1] - batch.margins.to(scores.dtype)[:, None]
        return plackett_luce_loss(torch.cat([first, scores[:, 1:]], 1), batch.ranks)

    def measurements(self) -> list[float]:
        return [margin for margins in self.step_measurements for margin in margins.tolist()]

    def scalars(self, measurements: Sequence[list[float]]) -> dict[str, float]:
        import torch

        margins = torch.tensor([margin for part in measurements for margin in part])
        return {
            **super().scalars(measurements),
            "margin": float(margins.mean()),
            "accuracy": float(margin_accuracy(margins).mean()),
        }

    def validate(self) -> dict[str, float]:
        """Return loss, accuracy with its standard error, and margin of the held-out rows, of at
        most `val_tokens` tokens.
        """
        import torch

        total, items, margins, locations = 0.0, 0, [], []
        for rows, batch in self.heldout_batches():
            scores = self.scores(batch)
            total += float(self.losses(scores, batch).sum())
            items += self.num_items(batch)
            batch_margins, pair_rows = pair_margins(scores, batch.ranks)
            margins.append(batch_margins)
            locations += [rows[i].location for i in pair_rows.tolist()]
        if not items:
            return {}
        joined = torch.cat(margins)
        return {
            "val_loss": total / items,
            "val_accuracy": float(margin_accuracy(joined).mean()),
            "val_margin": float(joined.mean()),
            "val_accuracy_error": accuracy_error(margin_accuracy(joined), locations),
        }


def pair_margins(scores: "Tensor", ranks: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return the score differences, better minus worse, of all pairs of a row, and their rows."""
    better = ranks[:, :, None] < ranks[:, None, :]
    pairs = better & (ranks >= 0)[:, :, None]
    margins = scores[:, :, None] - scores[:, None, :]
    return margins[pairs], pairs.nonzero()[:, 0]


@dataclass(frozen=True)
class Reward(PreferenceStage):
    """Train a reward model on preferences: the model's layers with a head that scores an answer.

    Its scores have mean 0 and standard deviation 1 over the training answers. The same command run
    again resumes from the last checkpoint.
    """

    kind = "reward"
    command = ("reward",)
    inputs = {
        "model": InputSpec(("model",), "Initial model: a run or a Hugging Face folder"),
        "feedback": FEEDBACK,
    }
    outputs = {"reward": MODEL}
    result = {
        **PreferenceStage.result, "comparisons": int, "calibration": dict,
        "length_bias": dict, "evaluated_on": str,
    }  # fmt: skip
    notes = """Data are .jsonl and .json files of pairs (prompt, chosen, rejected), ranked lists
(prompt, answers, ranks or scores) and corrections (prompt, answer, corrected)."""
    unused = ("sample_at", "sample_prompt", "sample_tokens")

    judge: Annotated[bool, "Train on the part of the feedback that is reserved for judges"] = False
    use_margins: Annotated[bool, "Subtract the margins of the data from the score differences"] = (
        False
    )
    batch_size: Annotated[int, "Pack this many rows into a micro-batch, without padding"] = 4
    lr: Annotated[float, "Warm up to this peak learning rate"] = 1e-5

    def feedback_file(self) -> str:
        return f"judge/{self.feedback_format}.jsonl" if self.judge else super().feedback_file()

    def unit(self) -> str:
        return "pairs"

    def read_data(
        self, tokenizer: "Tokenizer", context: int, ctx: StageContext
    ) -> PreferenceDataset:
        return PreferenceDataset(
            self, tokenizer, self.example_length(context), context, ctx, form="lists"
        )

    def trained_module(self, model: "CausalLM") -> "RewardModel":
        from fastlm.model.reward_model import RewardModel

        return RewardModel.from_causal_lm(model, seed=self.seed)

    def objective(
        self, ctx: StageContext, model: Any, data: Any, options: "TrainOptions", **common: Any
    ) -> RewardObjective:
        return RewardObjective(
            model, data.training, data.heldout, options, margins=self.use_margins, **common
        )

    def data_facts(self, data: Any) -> dict[str, Any]:
        comparisons = sum(len(e.answers) - 1 for e in data.training)
        return {"comparisons": comparisons, "heldout": len(data.heldout)}

    def finish(self, training: TrainingSetup) -> dict[str, Any]:
        model: RewardModel = training.model
        objective = cast(RewardObjective, training.objective)
        model.eval()
        model.normalise(model.score(answer_ids(objective.examples)))
        return {
            **evaluate_reward_model(model, objective.heldout or objective.examples),
            "evaluated_on": "held-out" if objective.heldout else "training",
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def summary_parts(self, result: Mapping[str, Any], ctx: StageContext) -> tuple[str, list[str]]:
        return f"{result['comparisons']:,} comparisons", self.figures(result)

    def section(
        self, ctx: StageContext, result: Mapping[str, Any], metrics: list[dict[str, Any]]
    ) -> ReportSection:
        from fastlm.pipeline.charts import loss_chart
        from fastlm.train.charts import calibration_chart

        bias, calibrated = result["length_bias"], result["calibration"]
        return ReportSection(
            "Reward model",
            "Scores have mean 0 and standard deviation 1 over the training answers.",
            facts={
                "preferences": rows_summary(result, f"{result['comparisons']:,} comparisons"),
                "batch": f"{self.step_size()} rows without padding",
            },
            charts=[
                loss_chart(metrics, "loss per comparison"), calibration_chart(calibrated["bins"])
            ],
            cards=self.cards(result),
            template="reward.html.jinja",
            values={
                "calibration": calibrated, "bias": bias, "evaluated_on": result["evaluated_on"]
            },
        )  # fmt: skip


def answer_ids(examples: Sequence[PreferenceExample]) -> list[list[int]]:
    """Return the token ids of all answers."""
    return [answer.ids.tolist() for e in examples for answer in e.answers]


def evaluate_reward_model(
    model: "RewardModel", examples: Sequence[PreferenceExample]
) -> dict[str, Any]:
    """Return how well the model's probabilities fit, "calibration", and how its scores depend on
    length, "length_bias".
    """
    scores = model.score(answer_ids(examples)).double().cpu().tolist()
    lengths = [answer.num_loss_tokens for e in examples for answer in e.answers]
    pairs, start = [], 0
    for example in examples:
        pairs += combinations(range(start, start + len(example.answers)), 2)
        start += len(example.answers)
    # the probability of a preference is a function of the scores before normalisation
    margins = [(scores[i] - scores[j]) * model.std for i, j in pairs]
    return {
        "calibration": calibration(margins),
        "length_bias": length_bias(lengths, scores, pairs),
    }


def calibration(margins: Sequence[float], bins: int = BINS) -> dict[str, Any]:
    """Compare the probabilities ``sigmoid(|margin|)``, with which a model predicts the better
    answer, with the share of its right predictions.

    Args:
        margins: score of the better answer minus score of the worse, before normalisation.

    Returns:
        "bins" that are not empty: "predicted" (mean probability), "observed" (share of right
        predictions; a tie is half right) and "count"; and "ece", the expected calibration error:
        the mean of ``|predicted - observed|`` weighted by count (Guo et al. 2017,
        arXiv:1706.04599).

        The error is above 0 even for a perfectly calibrated model: 0.11 on average for 40 pairs.
        "null" is its distribution if each pair were right, independently, with exactly the
        predicted probability: "mean", "p95" (the error is lower in 19 of 20 cases), and "p", the
        share of cases with an error of at least "ece". "excess" is "ece" minus that mean.
    """
    import numpy as np

    predicted = 1 / (1 + np.exp(-np.minimum(np.abs(np.asarray(margins, np.float64)), 700.0)))
    observed = (np.sign(np.asarray(margins, np.float64)) + 1) / 2
    index = np.minimum((predicted - 0.5) * 2 * bins, bins - 1).astype(int)
    rows, gap, null = [], 0.0, np.zeros(DRAWS)
    rng = np.random.default_rng(0)
    for i in range(bins):
        p, right = predicted[index == i], observed[index == i]
        if not len(p):
            continue
        row = {"predicted": float(p.mean()), "observed": float(right.mean()), "count": len(p)}
        rows.append(row)
        gap += len(p) * abs(row["predicted"] - row["observed"])
        # draw the number of right pairs
        if len(p) > MAX_EXACT_PAIRS:
            drawn = rng.normal(p.sum(), math.sqrt(float(p @ (1 - p))), DRAWS)
        else:
            drawn = (rng.random((DRAWS, len(p))) < p).sum(1)
        null += np.abs(drawn - p.sum())
    total = max(len(margins), 1)
    ece, null = gap / total, null / total
    return {
        "bins": rows, "ece": ece, "pairs": len(margins),
        "null": {
            "mean": float(null.mean()), "p95": float(np.quantile(null, 0.95)),
            "p": (1 + int((null >= ece - 1e-12).sum())) / (1 + DRAWS),
        },
        "excess": ece - float(null.mean()),
    }  # fmt: skip


def length_bias(
    lengths: Sequence[int], scores: Sequence[float], pairs: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return "correlation" (Pearson's, of score and length; None if either is constant), and the
    accuracy and number of pairs in which the better answer is "shorter" or "longer".

    Args:
        pairs: (better, worse) as indices of the answers.
    """
    bias: dict[str, Any] = {"correlation": correlation(lengths, scores)}
    sides = {
        "shorter": [(i, j) for i, j in pairs if lengths[i] < lengths[j]],
        "longer": [(i, j) for i, j in pairs if lengths[i] > lengths[j]],
    }
    for name, side in sides.items():
        right = [0.5 if scores[i] == scores[j] else scores[i] > scores[j] for i, j in side]
        bias[name] = {"pairs": len(side), "accuracy": sum(right) / len(side) if side else None}
    return bias
