"""How often the judge of a win rate is right, and the rate that follows from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.checkpoint.folder import load_tokenizer
from fastlm.data.preferences import Comparison, read_preferences
from fastlm.evals.statistics import wilson
from fastlm.model.reward_model import RewardModel, scored_tokens


@dataclass(frozen=True)
class Accuracy:
    """The judge is ``right`` in so many of ``pairs`` (a tie counts half)."""

    right: float
    pairs: int


def judge_accuracy(
    judge: Path,
    sources: Sequence[str],
    *,
    cache: Path,
    warn: Callable[[str], None] = lambda line: None,
) -> Accuracy | None:
    """Return how often the reward model agrees with people on comparisons that it has not been
    trained on; None where ``sources`` hold none. Pairs beyond its context are left out, and
    ``warn`` is told.
    """
    rows = [row for row in read_preferences(sources, cache=cache) if isinstance(row, Comparison)]
    pairs = [pair for row in rows for pair in row.pairs()]
    if not pairs:
        return None
    model = RewardModel.from_pretrained(judge)
    tokenizer = load_tokenizer(judge, model.config.to_dict())
    texts = [[scored_tokens(tokenizer, [*p.prompt, *one]) for one in p.answers] for p in pairs]
    fit = [two for two in texts if max(map(len, two)) <= model.trunk.context_limit]
    if left := len(pairs) - len(fit):
        warn(f"{left:,} of {len(pairs):,} pairs that measure the judge are beyond its context")
    if not fit:
        return None
    points = model.score([text for two in fit for text in two]).tolist()
    right = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, b in zip(points[::2], points[1::2], strict=True)
    ]
    return Accuracy(sum(right), len(fit))


def corrected(rate: dict[str, Any], judge: Accuracy, confidence: float) -> dict[str, Any]:
    """Return the share of prompts won, corrected for a judge that is right with probability a:

        p = (w - (1 - a)) / (2 a - 1)        Rogan and Gladen 1978, sensitivity = specificity = a

    clipped to [0, 1]. The interval holds each p that follows from a w and an a in their own
    intervals (`rate`'s, and Wilson's of the judge's): it is no narrower than it says.

    Where the interval of a reaches 0.5 no rate follows: value 0.5, interval 0 to 1, and ``why``.
    """
    of = wilson(judge.right, judge.pairs, confidence)
    told = {"n": rate["n"], "better": rate["better"]}
    told["judge"] = {
        "accuracy": judge.right / judge.pairs, "low": of.low, "high": of.high, "pairs": judge.pairs,
    }  # fmt: skip
    if of.low <= 0.5:
        why = (
            f"the judge agrees with people in {judge.right:g} of {judge.pairs} pairs"
            f" ({100 * of.low:.0f} to {100 * of.high:.0f} %): it may be no better than chance"
        )
        return {"value": 0.5, "low": 0.0, "high": 1.0, **told, "why": why}

    def p(w: float, a: float) -> float:
        return min(1.0, max(0.0, (w + a - 1) / (2 * a - 1)))

    ends = (of.low, of.high)
    return {
        "value": p(rate["value"], judge.right / judge.pairs),
        "low": min(p(rate["low"], a) for a in ends),
        "high": max(p(rate["high"], a) for a in ends),
        **told,
    }
