"""A reward model: scores answers as people would rank them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastlm.pipeline.stage import InputSpec, ReportSection, StageContext
from fastlm.train.encoding import rows_summary
from fastlm.train.metrics import correlation
from fastlm.train.objective import EpochObjective
from fastlm.train.preferences import (
    PreferenceDataset,
    PreferenceExample,
    PreferenceStage,
    accuracy_error,
    right,
)
from fastlm.train.training_stage import FEEDBACK, MODEL, TrainingSetup

if TYPE_CHECKING:
    from torch import Tensor

    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.reward_model import RewardModel
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.options import TrainOptions

BINS = 5  # of the predicted probability, from 0.5 to 1
DRAWS = 2000  # of outcomes under perfect calibration: the mean is 0.6 % of itself off, or less
EXACT = 2000  # pairs of a bin from which on how many are right is drawn from a normal distribution


@dataclass(frozen=True)
class RankingBatch:
    """A micro-batch of rows. ``ids`` (1, total) and ``cu_seqlens``: all their answers, packed.
    ``ranks`` (n, K): 0, 1, ... per row, -1 where it has fewer answers. ``margins`` (n,).
    """

    ids: "Tensor"
    cu_seqlens: "Tensor"
    ranks: "Tensor"
    margins: "Tensor"


class RewardObjective(EpochObjective):
    """The objective of `Reward`: Bradley-Terry's loss of pairs, Plackett-Luce's of longer lists, a
    mean over the comparisons of a step. A list of k answers counts as k - 1 comparisons, one for
    each choice of the next best.

    ``margins``: whether a pair's margin is subtracted. For the other arguments see
    `EpochObjective`.
    """

    def __init__(self, *args: Any, margins: bool = False, **common: Any):
        super().__init__(*args, **common)
        self.margins = margins

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "margins": self.margins}

    def collate(self, judged: Sequence[PreferenceExample]) -> RankingBatch:
        import numpy as np
        import torch

        answers = [answer for one in judged for answer in one.answers]
        ids = np.concatenate([answer.ids for answer in answers]).astype(np.int64)
        ends = np.cumsum([0, *(len(answer.ids) for answer in answers)], dtype=np.int32)
        ranks = torch.full((len(judged), max(len(one.answers) for one in judged)), -1)
        for row, one in enumerate(judged):
            ranks[row, : len(one.answers)] = torch.arange(len(one.answers))
        margins = torch.tensor([(one.margin or 0.0) * self.margins for one in judged])
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
        # of a pair, Plackett-Luce's loss is Bradley-Terry's of a first score less the margin
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
            "accuracy": float(right(margins).mean()),
        }

    def validate(self) -> dict[str, float]:
        """Return loss, accuracy with its standard error, and margin of the held-out rows, of at
        most `val_tokens` tokens.
        """
        import torch

        total, items, margins, places = 0.0, 0, [], []
        for rows, batch in self.heldout_batches():
            scores = self.scores(batch)
            total += float(self.losses(scores, batch).sum())
            items += self.num_items(batch)
            found, of = pair_margins(scores, batch.ranks)
            margins.append(found)
            places += [rows[i].location for i in of.tolist()]
        if not items:
            return {}
        joined = torch.cat(margins)
        return {
            "val_loss": total / items,
            "val_accuracy": float(right(joined).mean()),
            "val_margin": float(joined.mean()),
            "val_accuracy_error": accuracy_error(right(joined), places),
        }


def pair_margins(scores: "Tensor", ranks: "Tensor") -> "tuple[Tensor, Tensor]":
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
    inputs = {
        "model": InputSpec(("model",), "Model to begin with: a run, a Hugging Face folder"),
        "feedback": FEEDBACK,
    }
    outputs = {"reward": MODEL}
    result = {
        **PreferenceStage.result, "comparisons": int, "calibration": dict,
        "length_bias": dict, "evaluated_on": str,
    }  # fmt: skip
    notes = """Read are .jsonl and .json files of pairs (prompt, chosen, rejected), ranked lists
(prompt, answers, ranks or scores) and corrections (prompt, answer, corrected)."""
    unused = ("sample_at", "sample_prompt", "sample_tokens")

    judge: Annotated[
        bool, "Learn from the part of the feedback that no other training sees, to judge those"
    ] = False
    use_margins: Annotated[bool, "Subtract the margins of the data from a pair's scores"] = False
    batch_size: Annotated[int, "Rows per micro-batch, joined without padding"] = 4
    lr: Annotated[float, "Peak learning rate"] = 1e-5

    def feedback_file(self) -> str:
        return f"judge/{self.feedback_format}.jsonl" if self.judge else super().feedback_file()

    def unit(self) -> str:
        return "pairs"

    def read_data(
        self, tokenizer: "Tokenizer", context: int, ctx: StageContext
    ) -> PreferenceDataset:
        return PreferenceDataset(
            self, tokenizer, self.example_length(context), context, ctx, kind="lists"
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
        comparisons = sum(len(one.answers) - 1 for one in data.training)
        return {"comparisons": comparisons, "heldout": len(data.heldout)}

    def finish(self, training: TrainingSetup) -> dict[str, Any]:
        model: RewardModel = training.model
        objective = cast(RewardObjective, training.objective)
        model.eval()
        model.normalise(model.score(answer_ids(objective.examples)))
        return {
            **measure(model, objective.heldout or objective.examples),
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
            "Scores have mean 0 and standard deviation 1 over the answers of the training.",
            facts={
                "preferences": rows_summary(result, f"{result['comparisons']:,} comparisons"),
                "batch": f"{self.step_size()} rows without padding",
            },
            charts=[
                loss_chart(metrics, "loss per comparison"), calibration_chart(calibrated["bins"])
            ],
            cards=self.cards(result),
            template="reward.html.jinja",
            values={"c": calibrated, "b": bias, "on": result["evaluated_on"]},
        )  # fmt: skip


def answer_ids(judged: Sequence[PreferenceExample]) -> list[list[int]]:
    return [answer.ids.tolist() for one in judged for answer in one.answers]


def measure(model: "RewardModel", judged: Sequence[PreferenceExample]) -> dict[str, Any]:
    """Return how well the probabilities of a model fit, and how it treats length: "calibration"
    and "length_bias".
    """
    scores = model.score(answer_ids(judged)).double().cpu().tolist()
    lengths = [answer.num_loss_tokens for one in judged for answer in one.answers]
    pairs, at = [], 0
    for one in judged:
        pairs += combinations(range(at, at + len(one.answers)), 2)
        at += len(one.answers)
    # the probability of a preference comes from the score before it was normalised
    margins = [(scores[i] - scores[j]) * model.std for i, j in pairs]
    return {
        "calibration": calibration(margins),
        "length_bias": length_bias(lengths, scores, pairs),
    }


def calibration(margins: Sequence[float], bins: int = BINS) -> dict[str, Any]:
    """Compare the probabilities ``sigmoid(|margin|)``, with which a model predicts the better
    answer, with how often it is right.

    Args:
        margins: score of the better answer minus score of the worse, before normalisation.

    Returns:
        "bins" that are not empty: "predicted" (mean probability), "observed" (share that is right;
        a tie is half right) and "count"; and "ece", the expected calibration error: the mean of
        ``|predicted - observed|`` weighted by count (Guo et al. 2017, arXiv:1706.04599).

        It is above 0 for a perfectly calibrated model, too: 0.11 in the mean on 40 pairs. "null"
        says what it would be if each pair were right with exactly the predicted probability,
        independently: "mean", "p95" (in 19 of 20 cases it is less), and "p", the share of such
        cases whose error is at least "ece". "excess" is "ece" minus that mean.
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
        # how many of the pairs are right that are so with these probabilities
        if len(p) > EXACT:
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
    """Return "correlation" (Pearson's, of score and length; None if either is constant), and
    accuracy and number of the pairs whose better answer is "shorter" or "longer".

    Args:
        pairs: (better, worse) as indices of the answers.
    """
    found: dict[str, Any] = {"correlation": correlation(lengths, scores)}
    sides = {
        "shorter": [(i, j) for i, j in pairs if lengths[i] < lengths[j]],
        "longer": [(i, j) for i, j in pairs if lengths[i] > lengths[j]],
    }
    for name, side in sides.items():
        right = [0.5 if scores[i] == scores[j] else scores[i] > scores[j] for i, j in side]
        found[name] = {"pairs": len(side), "accuracy": sum(right) / len(side) if side else None}
    return found
