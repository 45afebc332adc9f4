"""Metrics that compare an answer with a reference text (extra ``eval``).

    rouge1, rouge2, rougeL, rougeLsum   F-measure of shared words, per answer (Lin 2004), by
                                        rouge_score; sentences of rougeLsum are lines
    bleu, chrf, chrf++, ter             of all answers together, by sacrebleu

The second row is no mean over questions: n-grams are counted in all answers. So its error is that
of `RESAMPLES` draws of the questions (Koehn 2004, "Statistical Significance Tests for Machine
Translation Evaluation").
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from fastlm.errors import InputError

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
CORPUS = ("bleu", "chrf", "chrf++", "ter")
RESAMPLES = 1000  # the error is exact to 2 %
RESAMPLES_AT_ONCE = 100  # bounds the memory: 8 MB for 10,000 questions


def rouge(metric: str, reference: str, answer: str, *, use_stemmer: bool = False) -> float:
    """Return the F-measure of one of the metrics `ROUGE`, 0 to 1. InputError: no rouge_score."""
    return _rouge_scorer(metric, use_stemmer).score(reference, answer)[metric].fmeasure


@cache
def _rouge_scorer(metric: str, use_stemmer: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise InputError(
            f"{metric}: expected the package rouge_score, which is not installed"
            " (pip install 'fastlm[eval]')"
        ) from None
    return RougeScorer([metric], use_stemmer=use_stemmer)


def register_rouge() -> None:
    """Register `ROUGE` with lm-evaluation-harness, which has BLEU, chrF and TER only."""
    import lm_eval.api.metrics  # noqa: F401  # first: the harness fills only an empty registry
    from lm_eval.api import registry

    def metric_function(name: str) -> Callable[..., float]:
        def compute(references: Sequence[str], predictions: Sequence[str], **options: Any) -> float:
            return rouge(name, references[0], predictions[0], **options)

        return compute

    for name in ROUGE:
        if name not in registry.metric_registry:
            register = registry.register_metric(
                metric=name, higher_is_better=True, output_type="generate_until", aggregation="mean"
            )
            register(metric_function(name))


def corpus_interval(
    metric: str, references: Sequence[Sequence[str]], answers: Sequence[str]
) -> dict[str, float | None]:
    """Return the standard ``error`` and the 95 % interval, ``low`` to ``high``, of one of the
    metrics `CORPUS`, by seeded draws of the questions; None for a single question.

    Args:
        references: those of each answer, equally many.
    """
    from sacrebleu import BLEU, CHRF, TER

    if len(answers) < 2:
        return dict.fromkeys(("error", "low", "high"))
    scorer = {"bleu": BLEU, "chrf": CHRF, "chrf++": lambda: CHRF(word_order=2), "ter": TER}[
        metric
    ]()
    # what sacrebleu's own bootstrap calls; that one copies all counts of all draws
    counts = np.array(scorer._extract_corpus_statistics(answers, [*zip(*references)]), float)
    rng, scores = np.random.default_rng(0), []
    shares = np.full(len(answers), 1 / len(answers))
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        draws = rng.multinomial(len(answers), shares, size=RESAMPLES_AT_ONCE)
        scores += [scorer._compute_score_from_stats(row).score for row in (draws @ counts).tolist()]
    low, high = np.quantile(scores, (0.025, 0.975))
    return {"error": float(np.std(scores)), "low": float(low), "high": float(high)}
