"""Answers of two models to the same prompts, their scores by a judge, and what follows."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastlm.data.conversations import said
from fastlm.data.preferences import Comparison, read_preferences
from fastlm.data.prompts import Prompt
from fastlm.errors import InputError
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Completion, Request, request_seed
from fastlm.inference.sampling import Sampling
from fastlm.model.load import load_model
from fastlm.model.reward_model import RewardModel, scored_tokens, scores
from fastlm.progress import silent
from fastlm.stats.intervals import Interval, clustered_wilson, compare, wilson
from fastlm.tokenizer.load import load_tokenizer
from fastlm.tokenizer.tokenizer import Tokenizer


def answer(
    model: str | Path,
    prompts: Sequence[Prompt],
    *,
    answers: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    track: Callable = silent,
) -> list[Completion]:
    """Return ``answers`` answers to each prompt, those to one prompt together. An answer depends on
    model, prompt and seed alone.
    """
    loaded, tokenizer = load_model(model)
    engine = Engine(loaded, tokenizer)
    requests = []
    for prompt in prompts:
        tools: dict[str, Any] = {} if prompt.tools is None else {"tools": prompt.tools}
        ids = tokenizer.encode_chat(prompt.messages, **tools)
        for i in range(answers):
            own = request_seed(seed, prompt.key(), i)
            requests.append(Request(ids, max_new_tokens, Sampling(temperature), seed=own))
    bar = iter(track(range(len(requests)), "answering", unit="answers"))
    completions = engine.generate(requests, on_completion=lambda _: next(bar, None))
    next(bar, None)
    if failed := [one.error for one in completions if one.error]:
        raise InputError(f"{model}: expected a model that answers, got: {failed[0]}")
    return completions


def judged(
    judges: Sequence[Path],
    prompts: Sequence[Prompt],
    answered: Sequence[Sequence[str]],
    warn: Callable[[str], None] = lambda line: None,
) -> list[list[float]]:
    """Return the mean score of every answer by the reward models ``judges``, whose scores have one
    scale (standard deviations over the answers of their training). An empty answer has the lowest
    score of all: no template writes one.
    """
    talks = []
    for texts in answered:
        for i, text in enumerate(texts):
            asked = prompts[i // (len(texts) // len(prompts))].messages
            if text.strip():
                talks.append([*asked, {"role": "assistant", "content": text}])
    # one judge in memory at a time
    points = [fmean(p) for p in zip(*(scores(*_judge(j), talks).tolist() for j in judges))]
    least, following = min(points, default=0.0), iter(points)
    if empty := sum(map(len, answered)) - len(points):
        warn(f"empty answers have the lowest score of all: {empty:,}")
    return [[next(following) if text.strip() else least for text in texts] for texts in answered]


def _judge(path: Path) -> tuple[RewardModel, Tokenizer]:
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
    """Return how often the mean score of the reward models prefers what preferences that they have
    not been trained on say: "value" (a tie counts half) of "n" rows, each of which counts once,
    however many pairs it has, with an interval (`clustered_wilson`). None where ``sources`` hold
    none; ``warn`` is told of rows beyond a judge's context.
    """
    rows = [row for row in read_preferences(sources, cache=cache) if isinstance(row, Comparison)]
    rows = [row for row in rows if row.pairs()]
    if not rows:
        return None
    told = [_points_of_rows(path, rows) for path in judges]
    right, prompts = [], []
    for row, found in zip(rows, zip(*told, strict=True), strict=True):
        known = [points for points in found if points is not None]
        if len(known) == len(judges):
            points = [fmean(of_one) for of_one in zip(*known, strict=True)]
            pairs = zip(points[::2], points[1::2], strict=True)
            right.append(fmean(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs))
            prompts.append(json.dumps(said(row.prompt)))
    if left := len(rows) - len(right):
        warn(f"{left:,} of {len(rows):,} preferences that measure the judge exceed its context")
    if not right:
        return None
    interval = clustered_wilson(right, prompts, confidence)
    return {
        "value": fmean(right), "low": interval.low, "high": interval.high, "n": len(right),
        "better": "higher",
    }  # fmt: skip


def _points_of_rows(judge: Path, rows: Sequence[Comparison]) -> list[list[float] | None]:
    """Per row, the scores of its pairs' answers, the better one of each first; None where one
    exceeds the judge's context."""
    model, tokenizer = _judge(judge)
    texts = [
        [scored_tokens(tokenizer, [*p.prompt, *one]) for p in row.pairs() for one in p.answers]
        for row in rows
    ]
    fits = [max(map(len, own)) <= model.trunk.context_limit for own in texts]
    asked = [text for own, fit in zip(texts, fits, strict=True) if fit for text in own]
    points = iter(model.score(asked).tolist() if asked else [])
    return [
        [next(points) for _ in own] if fit else None for own, fit in zip(texts, fits, strict=True)
    ]


def compared(
    old: Sequence[Completion],
    new: Sequence[Completion],
    points: Sequence[Sequence[float]],
    answers: int,
    confidence: float,
) -> dict[str, Any]:
    """Return how often the new answers win, and what else has changed.

    "scores" has, per name, a value with its interval ``low`` to ``high`` (None where one prompt
    tells none) and ``n`` prompts:

    - rate: share of prompts that the new model wins, a tie counts half (`share`);
    - score: change of the judge's mean score, in standard deviations of its training;
    - length: mean tokens of the new answers, divided by the old model's;
    - ended: share of the new answers that ended by themselves;
    - distinct: how many different answers there are, divided by the old model's; below 1 the new
      model says the same to more prompts.
    """
    before, now = points
    wins = [1.0 if b > a else 0.5 if a == b else 0.0 for a, b in zip(before, now, strict=True)]
    prompts = len(wins) // answers
    clusters = [str(i // answers) for i in range(len(wins))] if answers > 1 else None
    won = share(wins, answers, confidence)
    score = compare(now, before, clusters=clusters, confidence=confidence)
    lengths = [[float(len(one.token_ids)) for one in texts] for texts in (new, old)]
    longer = compare(*lengths, clusters=clusters, confidence=confidence)
    usual = max(1e-9, fmean(lengths[1]))
    ended = wilson(sum(one.ended for one in new) / answers, prompts, confidence)
    distinct = len({one.text for one in new}) / max(1, len({one.text for one in old}))
    measured = {
        "rate": (fmean(wins), won.low, won.high),
        "score": (score.difference, score.low, score.high),
        "length": (fmean(lengths[0]) / usual, 1 + longer.low / usual, 1 + longer.high / usual),
        "ended": (fmean(one.ended for one in new), ended.low, ended.high),
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
            for name, (value, low, high) in measured.items()
        },
        "compared": {
            "wins": wins.count(1.0), "ties": wins.count(0.5), "losses": wins.count(0.0),
            "new": fmean(now), "old": fmean(before), "p": score.p, "test": score.test,
        },
    }  # fmt: skip


def share(wins: Sequence[float], answers: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's interval of the mean of ``wins`` (0, 0.5 or 1), where each ``answers`` in a
    row are to one prompt (`fastlm.stats.intervals.clustered_wilson`)."""
    return clustered_wilson(wins, [i // answers for i in range(len(wins))], confidence)
