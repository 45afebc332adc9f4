"""The accuracy of a judge on labelled answers, and shares corrected for its errors."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlm.errors import InputError
from fastlm.stats.agreement import cohen_kappa
from fastlm.stats.intervals import CorrectedRate, rogan_gladen, wilson

# What a judge must reach on labelled answers of a model to be valid for that model
MIN_LABELS, MIN_AGREEMENT, MIN_KAPPA = 30, 0.85, 0.5


@dataclass(frozen=True)
class JudgeAccuracy:
    """A judge's accuracy on labelled examples, as (right, total) with and without the property.

    Args:
        labels: where the labels come from, for the report.
        domain: the models with the labelled answers, in a word or two.
        constructed: (passed, total) of constructed answers without the property, per kind. They
            correct no score, because a kind's frequency in a model's answers is not known.
        other_domains: the same judge's accuracy on answers of other domains.
    """

    sensitivity: tuple[int, int]
    specificity: tuple[int, int]
    labels: str
    domain: str = ""
    constructed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    other_domains: tuple["JudgeAccuracy", ...] = ()

    @classmethod
    def from_pairs(
        cls, pairs: Iterable[tuple[bool, bool]], labels: str, domain: str
    ) -> "JudgeAccuracy":
        """Count pairs (verdict, label)."""
        n = Counter(pairs)
        right, wrong = (n[True, True], n[False, True]), (n[False, False], n[True, False])
        return cls((right[0], sum(right)), (wrong[0], sum(wrong)), labels, domain)

    @property
    def agreement(self) -> tuple[int, int]:
        """(answers on which judge and labels agree, total)."""
        return self.sensitivity[0] + self.specificity[0], self.sensitivity[1] + self.specificity[1]

    @property
    def kappa(self) -> float:
        """Cohen's kappa of judge and labels: 0 is chance, 1 full agreement."""
        return cohen_kappa(self._table)[0]

    @property
    def objection(self) -> str:
        """Why the labels do not confirm the judge; "" if they do. Kappa counts if both labels
        occur: a model on which no attack succeeds has none that do.
        """
        agreed, n = self.agreement
        if n < MIN_LABELS:
            return f"{n} of the model's answers are labelled, of at least {MIN_LABELS}"
        has_both = all(total for _, total in (self.sensitivity, self.specificity))
        if agreed < MIN_AGREEMENT * n or (has_both and self.kappa < MIN_KAPPA):
            return (
                f"judge and labels agree on {agreed} of {n} answers with a kappa of"
                f" {self.kappa:.2f}, where {MIN_AGREEMENT:.0%} and {MIN_KAPPA} are needed"
            )
        return ""

    @property
    def _table(self) -> list[list[int]]:
        """The numbers of answers: a row per verdict, a column per label."""
        (hits, with_property), (passed, without) = self.sensitivity, self.specificity
        return [[hits, without - passed], [with_property - hits, passed]]

    def intervals(self, confidence: float = 0.95) -> dict[str, tuple[float, float] | None]:
        """Return the intervals of agreement, sensitivity and specificity (Wilson) and of kappa.
        None: there is no label for it."""
        intervals: dict[str, tuple[float, float] | None] = {}
        for name in ("agreement", "sensitivity", "specificity"):
            right, total = getattr(self, name)
            ends = wilson(right, total, confidence) if total else None
            intervals[name] = None if ends is None else (ends.low, ends.high)
        kappa = cohen_kappa(self._table, confidence)[1] if self.agreement[1] else None
        intervals["kappa"] = None if kappa is None else (kappa.low, kappa.high)
        return intervals

    def corrected_rate(
        self, rate: float, n: int, *, min_labels: int = 1, confidence: float = 0.95
    ) -> CorrectedRate | None:
        """Return the ``rate`` of ``n`` answers, corrected for the judge's errors (`rogan_gladen`).
        The labels must be those of a random sample of these answers.

        None: fewer than ``min_labels`` labels, or only one of both. If the judge is no better than
        chance, it determines no rate: the interval is [0, 1].
        """
        if self.agreement[1] < min_labels or not self.sensitivity[1] or not self.specificity[1]:
            return None
        try:
            return rogan_gladen(
                rate, n, sensitivity=self.sensitivity, specificity=self.specificity,
                confidence=confidence,
            )  # fmt: skip
        except InputError:
            return CorrectedRate(rate, 0.0, 1.0)

    def as_dict(self, confidence: float = 0.95) -> dict[str, Any]:
        table: dict[str, Any] = {
            "domain": self.domain, "agreement": list(self.agreement), "kappa": self.kappa,
            "sensitivity": list(self.sensitivity), "specificity": list(self.specificity),
            "intervals": self.intervals(confidence), "labels": self.labels,
        }  # fmt: skip
        if self.constructed:
            table["constructed"] = {kind: list(passed) for kind, passed in self.constructed.items()}
        if self.other_domains:
            table["other_domains"] = [other.as_dict(confidence) for other in self.other_domains]
        return table
