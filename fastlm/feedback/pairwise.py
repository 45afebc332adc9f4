"""Compare two models by their answers to the same prompts and the scores of a judge."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastlm.data.conversations import message_contents
from fastlm.data.preferences import Comparison, read_preferences
from fastlm.data.prompts import Prompt
from fastlm.inference.requests import Completion
from fastlm.model.reward_model import RewardModel, scored_tokens
from fastlm.model.reward_model import scores as score_conversations
from fastlm.stats.intervals import Interval, clustered_wilson, compare, wilson
from fastlm.tokenizer.load import load_tokenizer
from fastlm.tokenizer.tokenizer import Tokenizer


def judge_answers(
    judges: Sequence[Path],
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]],
    warn: Callable[[str], None] = lambda line: None,
) -> list[list[float]]:
    """Return the mean score of every answer by the reward models ``judges``. Their scores have the
    same scale (standard deviations over the answers of their training). An empty answer has the
    lowest score of all, since chat templates have none.
    """
    conversations = []
    for texts in answers:
        for i, text in enumerate(texts):
            prompt = prompts[i // (len(texts) // len(prompts))].messages
            if text.strip():
                conversations.append([*prompt, {"role": "assistant", "content": text}])
    # one judge in memory at a time
    by_judge = (
        score_conversations(*_load_judge(judge), conversations).tolist() for judge in judges
    )
    means = [fmean(values) for values in zip(*by_judge)]
    lowest, remaining = min(means, default=0.0), iter(means)
    if empty := sum(map(len, answers)) - len(means):
        warn(f"empty answers have the lowest score of all: {empty:,}")
    return [[next(remaining) if text.strip() else lowest for text in texts] for texts in answers]


def _load_judge(path: Path) -> tuple[RewardModel, Tokenizer]:
    model = RewardModel.from_pretrained(path)
    return model, load_tokenizer(path, model.config.to_dict())


def judge_accuracy(
    judges: Sequence[Path],
    sources: Sequence[str],
    *,
    cache: Path,
    confidence: float = 0.95,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Return how often the mean score of the reward models agrees with preferences that they have
    not been trained on: "value" (a tie counts half) of "n" rows, with an interval
    (`clustered_wilson`). A row counts once, however many pairs it has. Return None if ``sources``
    have no preferences. ``warn`` is called if rows exceed a judge's context.
    """
    rows = [row for row in read_preferences(sources, cache=cache) if isinstance(row, Comparison)]
    rows = [row for row in rows if row.pairs()]
    if not rows:
        return None
    by_judge = [_score_rows(path, rows) for path in judges]
    right, prompts = [], []
    for row, row_scores in zip(rows, zip(*by_judge, strict=True), strict=True):
        in_context = [values for values in row_scores if values is not None]
        if len(in_context) == len(judges):
            means = [fmean(values) for values in zip(*in_context, strict=True)]
            pairs = zip(means[::2], means[1::2], strict=True)
            right.append(fmean(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs))
            prompts.append(json.dumps(message_contents(row.prompt)))
    if skipped := len(rows) - len(right):
        warn(f"{skipped:,} of {len(rows):,} preferences that measure the judge exceed its context")
    if not right:
        return None
    interval = clustered_wilson(right, prompts, confidence)
    return {
        "value": fmean(right), "low": interval.low, "high": interval.high, "n": len(right),
        "better": "higher",
    }  # fmt: skip


def _score_rows(judge: Path, rows: Sequence[Comparison]) -> list[list[float] | None]:
    """Return per row the scores of its pairs' answers, the better one of each first; None if one
    exceeds the judge's context."""
    model, tokenizer = _load_judge(judge)
    texts = [
        [
            scored_tokens(tokenizer, [*p.prompt, *answer])
            for p in row.pairs()
            for answer in p.answers
        ]
        for row in rows
    ]
    fits = [max(map(len, row)) <= model.trunk.context_limit for row in texts]
    batch = [text for row, fit in zip(texts, fits, strict=True) if fit for text in row]
    values = iter(model.score(batch).tolist() if batch else [])
    return [
        [next(values) for _ in row] if fit else None for row, fit in zip(texts, fits, strict=True)
    ]


def compare_models(
    old: Sequence[Completion],
    new: Sequence[Completion],
    scores: Sequence[Sequence[float]],
    num_generations: int,
    confidence: float,
) -> dict[str, Any]:
    """Return how often the new answers win, and other changes.

    "scores" has, per name, a value with its interval ``low`` to ``high`` (None for a single prompt)
    and ``n`` prompts:

    - rate: share of prompts that the new model wins, a tie counts half (`win_rate_interval`);
    - score: change of the judge's mean score, in standard deviations of its training;
    - length: mean tokens of the new answers, divided by the old model's;
    - ended: share of the new answers that ended by themselves;
    - distinct: number of different answers, divided by the old model's; below 1 the new model
      repeats its answers more.
    """
    before, now = scores
    wins = [1.0 if b > a else 0.5 if a == b else 0.0 for a, b in zip(before, now, strict=True)]
    prompts = len(wins) // num_generations
    clusters = None
    if num_generations > 1:
        clusters = [str(i // num_generations) for i in range(len(wins))]
    rate = win_rate_interval(wins, num_generations, confidence)
    score = compare(now, before, clusters=clusters, confidence=confidence)
    lengths = [[float(len(c.token_ids)) for c in answers] for answers in (new, old)]
    length = compare(*lengths, clusters=clusters, confidence=confidence)
    old_length = max(1e-9, fmean(lengths[1]))
    ended = wilson(sum(c.is_stopped for c in new) / num_generations, prompts, confidence)
    distinct = len({c.text for c in new}) / max(1, len({c.text for c in old}))
    values = {
        "rate": (fmean(wins), rate.low, rate.high),
        "score": (score.difference, score.low, score.high),
        "length": (
            fmean(lengths[0]) / old_length,
            1 + length.low / old_length,
            1 + length.high / old_length,
        ),
        "ended": (fmean(c.is_stopped for c in new), ended.low, ended.high),
        "distinct": (distinct, distinct, distinct),
    }
    return {
        "prompts": prompts,
        "scores": {
            name: {
                "value": value,
                "low": low if math.isfinite(low) else None,
                "high": high if math.isfinite(high) else None,
                "n": prompts,
                "better": "" if name in ("length", "distinct") else "higher",
            }
            for name, (value, low, high) in values.items()
        },
        "outcomes": {
            "wins": wins.count(1.0), "ties": wins.count(0.5), "losses": wins.count(0.0),
            "new_score": fmean(now), "old_score": fmean(before), "p": score.p, "test": score.test,
        },
    }  # fmt: skip


def win_rate_interval(
    wins: Sequence[float], num_generations: int, confidence: float = 0.95
) -> Interval:
    """Return Wilson's interval of the mean of ``wins`` (0, 0.5 or 1); each ``num_generations`` in
    a row belong to one prompt (`fastlm.stats.intervals.clustered_wilson`)."""
    clusters = [i // num_generations for i in range(len(wins))]
    return clustered_wilson(wins, clusters, confidence)
