"""Metrics from the records of a task, per question and as means.

A multiple-choice question has several metrics. Models of up to a billion parameters have an
accuracy near chance, while the likelihood of the right answer already separates them (Olmo 3,
arXiv:2512.13961):

    bits_per_byte   -log2 p(right answer) / its bytes, without the leading space; lower is better
    acc             1 if the likeliest answer is right
    acc_olmes       the same after OLMES' normalisation of the task: per character (with the leading
                    space), or minus the log-likelihood without the question
    acc_norm        the same, log-likelihood per character (lm-evaluation-harness)
    acc_bytes       the same, per byte (lm-evaluation-harness)

If n answers share the best score and one of them is right, the question counts 1/n.

Several samples of an `OpenQuestion` also have, for each k:

    pass@k          the probability that one of k samples is right
    majority@k      the score of the final answer that most of k samples have; if m final answers
                    share the most votes, the mean of their scores
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastlm.evals.results import Record
from fastlm.evals.task import MultipleChoice, OpenQuestion, Question, Task
from fastlm.stats.intervals import majority_at_k, mean_error, pass_at_k
from fastlm.stats.power import mean_mde, rate_mde, share_mde

HEADLINE = "bits_per_byte"  # lower is better; not a share
QuestionMetrics = dict[str, np.ndarray]  # metric -> (questions,)
SAMPLES_AT_K = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # and the number of samples


def question_metrics(
    task: Task, records: Sequence[Record], k: Sequence[int] = ()
) -> QuestionMetrics:
    """Return each metric of each question, in the order of the task. ``k``: of pass@k and
    majority@k, at most the number of samples; default: those of `SAMPLES_AT_K`."""
    metrics_of = _metrics_function(task, k)
    rows = [metrics_of(*pair) for pair in zip(task.questions, records, strict=True)]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: np.array([row[name] for row in rows]) for name in names}


def _metrics_function(task: Task, k: Sequence[int]) -> Callable[[Any, Record], Mapping[str, float]]:
    if task.question_metrics is not None:
        return task.question_metrics
    return partial(_open_metrics, task, k) if task.is_open else partial(_choice_metrics, task)


def bits_per_byte(question: MultipleChoice, logprob: float, delimiter: str) -> float:
    """Return bits per byte of the right answer, without the delimiter before it."""
    answer = question.requests[question.gold][1].removeprefix(delimiter)
    return -logprob / math.log(2) / max(1, len(answer.encode()))


def _choice_metrics(task: Task, question: MultipleChoice, record: Record) -> dict[str, float]:
    logprobs, gold = record["logprob"], question.gold
    answers = [continuation for _, continuation in question.requests]
    plain = [answer.removeprefix(task.delimiter) for answer in answers]
    by_olmes = logprobs
    if task.normalisation == "characters":
        by_olmes = [p / len(a) for p, a in zip(logprobs, answers)]
    elif task.normalisation == "unconditional":
        by_olmes = [p - q for p, q in zip(logprobs, record["unconditional"])]
    return {
        HEADLINE: bits_per_byte(question, logprobs[gold], task.delimiter),
        "acc": argmax_score(logprobs, gold),
        "acc_olmes": argmax_score(by_olmes, gold),
        "acc_norm": argmax_score([p / max(1, len(a)) for p, a in zip(logprobs, plain)], gold),
        "acc_bytes": argmax_score(
            [p / max(1, len(a.encode())) for p, a in zip(logprobs, plain)], gold
        ),
    }


def argmax_score(scores: Sequence[float], gold: int) -> float:
    """Return 1 if answer ``gold`` has the highest score, 1/n if n answers share it, else 0."""
    best = max(scores)
    return 1 / sum(score == best for score in scores) if scores[gold] == best else 0.0


def _open_metrics(
    task: Task, k: Sequence[int], question: OpenQuestion, record: Record
) -> dict[str, float]:
    scores, count = record["scores"], len(record["scores"])
    passed = sum(score >= 1 for score in scores)
    sizes = k or (*(size for size in SAMPLES_AT_K if size < count), count)
    metrics = {}
    if record["gold"] is not None:
        size = len(question.gold.strip().encode())
        metrics[HEADLINE] = -record["gold"] / math.log(2) / max(1, size)
    if task.judge is not None and task.metric == "pass":
        metrics |= {f"pass@{size}": pass_at_k(count, passed, size) for size in sizes}
    elif task.judge is not None:
        metrics[task.metric] = sum(scores) / count
        if task.vote is not None and count > 1:
            votes = _votes(map(task.vote, record["answers"]), scores)
            for size in sizes if k else sizes[1:]:  # of one sample it is the mean
                metrics[f"pass@{size}"] = pass_at_k(count, passed, size)
                metrics[f"majority@{size}"] = majority_at_k(*votes, count, size)
    for name, judge in task.extra_judges.items():
        extra_scores = judge([(answer, question.row) for answer in record["answers"]])
        metrics[name] = sum(extra_scores) / len(extra_scores)
    return metrics


def _votes(
    final_answers: Iterable[Hashable], scores: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Return how many samples have each final answer, and its mean score."""
    scores_of: dict[Hashable, list[float]] = {}
    for answer, score in zip(final_answers, scores, strict=True):
        if answer is not None:
            scores_of.setdefault(answer, []).append(score)
    groups = list(scores_of.values())
    return [len(group) for group in groups], [sum(group) / len(group) for group in groups]


def is_share(values: np.ndarray) -> bool:
    """Return True if a metric is between 0 and 1 for each question."""
    return bool(((values >= 0) & (values <= 1)).all())


def summarize_metrics(task: Task, values_of: QuestionMetrics) -> dict[str, dict[str, Any]]:
    """Return the mean ``value`` of each metric, its standard ``error`` and
    ``min_detectable_effect``, the minimum detectable effect at 80 % power compared with another
    model whose scores are independent. None where the questions give no estimate of the variance.
    """
    clusters = passage_clusters(task)
    metrics = {}
    for name, values in values_of.items():
        mean, is_bits = mean_error(values, clusters=clusters), name == HEADLINE
        if not is_bits and clusters is None and np.isin(values, (0, 1)).all():
            effect = rate_mde(mean.n, mean.mean)
        elif not math.isfinite(mean.error):
            effect = math.inf
        elif not is_bits and is_share(values):
            effect = share_mde(mean.n, mean.mean, mean.error, df=mean.df)
        elif mean.error:
            effect = mean_mde(mean.n, math.sqrt(2 * mean.n) * mean.error, df=mean.df)
        else:
            effect = math.inf
        metrics[name] = finite_or_none(
            {"value": mean.mean, "error": mean.error, "min_detectable_effect": effect}
        )
    return metrics


def passage_clusters(task: Task, rows: Iterable[int] | None = None) -> list[Hashable] | None:
    """Return the passage of each question (default: of all), as clusters for `mean_error`; copies
    of a question without a passage are a cluster, too. None if no two questions share a cluster.
    """
    indices = range(len(task.questions)) if rows is None else rows
    groups = [_cluster(task.questions[i]) for i in indices]
    return groups if len(set(groups)) < len(groups) else None


def _cluster(q: Question) -> Hashable:
    is_choice = isinstance(q, MultipleChoice)
    return q.group or (q.requests if is_choice else (q.earlier_messages, q.prompt, q.gold))


def part_metrics(task: Task, values_of: QuestionMetrics) -> dict[str, dict[str, Any]]:
    """Return the number of questions and the mean of each metric with its standard error, for each
    part of the set and each group of parts (``task.group_of_part``)."""
    members: dict[str, list[int]] = {}
    for i, q in enumerate(task.questions):
        if q.part:
            members.setdefault(q.part, []).append(i)
            if q.part in task.group_of_part:
                members.setdefault(task.group_of_part[q.part], []).append(i)
    return {
        part: {"questions": len(rows), "metrics": mean_metrics(task, values_of, rows)}
        for part, rows in sorted(members.items())
    }


def mean_metrics(
    task: Task, values_of: QuestionMetrics, rows: Sequence[int] | np.ndarray
) -> dict[str, Any]:
    """Return the mean of each metric on some questions, with its standard error (None for a single
    question or passage)."""
    clusters = passage_clusters(task, rows)
    errors = {
        name: mean_error(values[rows], clusters=clusters) for name, values in values_of.items()
    }
    return {
        name: finite_or_none({"value": mean.mean, "error": mean.error})
        for name, mean in errors.items()
    }


def finite_or_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace numbers that are not finite by None, for JSON."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
