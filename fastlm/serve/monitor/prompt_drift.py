"""Measure the drift of the prompts of a period from those of a reference."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import sqlalchemy as sa
from pydantic import Field

from fastlm.errors import InputError
from fastlm.serve.monitor import features
from fastlm.serve.monitor.window import C, read_features
from fastlm.serve.tables import MEASUREMENTS
from fastlm.stats.drift import mmd, psi
from fastlm.stats.intervals import holm

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore

MIN_PROMPTS = 50  # of each side: fewer show nothing
MAX_HISTOGRAM_PROMPTS = 5000  # the newest
MAX_MMD_PROMPTS = 250  # of each side: memory and time are quadratic
PERMUTATIONS = 499


@dataclass(frozen=True)
class DriftReference:
    """The prompts that others are compared with: the ``first`` prompts, or those of a period from
    ``begin`` to ``end`` (a date and, after a T, a time; UTC without a zone).
    """

    first: Annotated[int, Field(ge=MIN_PROMPTS, le=MAX_HISTOGRAM_PROMPTS)] = 500
    begin: str = ""
    end: str = ""

    def __post_init__(self) -> None:
        if bool(self.begin) != bool(self.end):
            missing, other = ("end", "begin") if self.begin else ("begin", "end")
            raise InputError(f"{missing}: expected with {other}, got none")
        if self.begin:
            begin, end = read_time(self.begin, "begin"), read_time(self.end, "end")
            if begin >= end:
                raise InputError(f"end: expected a time after {self.begin}, got {self.end}")

    @property
    def name(self) -> str:
        """A description for the dashboard."""
        return f"{self.begin} to {self.end}" if self.begin else f"the first {self.first:,} prompts"

    def period(self) -> Any:
        """Return the SQL condition of a period on the measures; None for the first prompts."""
        if not self.begin:
            return None
        return sa.and_(C.at >= read_time(self.begin, "begin"), C.at < read_time(self.end, "end"))

    def rows(self, connection: sa.Connection) -> Any:
        """Return the SQL condition on the measures that selects the rows of the reference."""
        if (period := self.period()) is not None:
            return period
        ids = sa.select(MEASUREMENTS.c.id).where(C.features.is_not(None)).order_by(C.id)
        last = connection.execute(ids.limit(1).offset(self.first - 1)).scalar()
        return C.features.is_not(None) if last is None else C.id <= last


def read_time(text: str, name: str) -> float:
    """Return seconds since 1970. InputError: no date."""
    try:
        if not re.match(r"\d{4}-\d\d-\d\d", text):
            raise ValueError
        time = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{name}: expected a date such as 2026-11-28, got {text!r:.40}") from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def drift(
    store: "FeedbackStore", reference: DriftReference, since: float, until: float, *, seed: int = 0
) -> dict[str, Any]:
    """Return the PSI of each feature, and the MMD of all of them together. Both have the 95 %
    quantile without drift ("floor") and a p-value (that of PSI is Holm's, for all features).

    If a side has fewer than `MIN_PROMPTS` prompts, "enough_prompts" is False and nothing is
    compared.
    """
    period, reference_period = sa.and_(C.at >= since, C.at < until), reference.period()
    if reference_period is not None:
        before, _ = read_features(store, reference_period, MAX_HISTOGRAM_PROMPTS)
    else:
        before, last = read_features(store, sa.true(), reference.first, newest=False)
        period = sa.and_(period, C.id > last)  # a prompt is not compared with itself
    now, _ = read_features(store, period, MAX_HISTOGRAM_PROMPTS)
    x, y = features.decode_features(before), features.decode_features(now)
    result: dict[str, Any] = {
        "reference": reference.name, "prompts": len(y), "reference_prompts": len(x),
        "min_prompts": MIN_PROMPTS, "truncated": len(now) == MAX_HISTOGRAM_PROMPTS,
        "enough_prompts": min(len(x), len(y)) >= MIN_PROMPTS,
        "features": [], "mmd": None,
    }  # fmt: skip
    if not result["enough_prompts"]:
        return result
    counts_before, counts_now = features.bin_counts(x), features.bin_counts(y)
    psis = [psi(counts_before[name], counts_now[name], seed=seed) for name in features.NAMES]
    result["features"] = [
        {"name": name, "psi": value.value, "floor": value.floor, "p": p}
        for name, value, p in zip(features.NAMES, psis, holm([value.p for value in psis]))
    ]
    # at most `MAX_MMD_PROMPTS`, evenly from all
    sides = (features.feature_vectors(rows[:: -(-len(rows) // MAX_MMD_PROMPTS)]) for rows in (x, y))
    distance = mmd(*sides, seed=seed, permutations=PERMUTATIONS)
    result["mmd"] = {"value": distance.value, "floor": distance.floor, "p": distance.p}
    return result
