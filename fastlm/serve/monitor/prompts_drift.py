"""How far the prompts of a period have moved from those of a reference."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import sqlalchemy as sa
from pydantic import Field

from fastlm.errors import InputError
from fastlm.serve.monitor import features
from fastlm.serve.monitor.window import C, read_features
from fastlm.serve.tables import MEASURES
from fastlm.stats.drift import mmd, psi
from fastlm.stats.intervals import holm

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore

LEAST = 50  # prompts of each side: fewer show nothing
MOST_COUNTED = 5000  # prompts of a histogram: the newest
MOST_COMPARED = 250  # of each side, for MMD: memory and time are quadratic
PERMUTATIONS = 499


@dataclass(frozen=True)
class Reference:
    """The prompts that others are compared with: the ``first`` so many, or those of a period,
    ``begin`` up to ``end`` (a date and, after a T, a time; UTC where it names no zone).
    """

    first: Annotated[int, Field(ge=LEAST, le=MOST_COUNTED)] = 500
    begin: str = ""
    end: str = ""

    def __post_init__(self) -> None:
        if bool(self.begin) != bool(self.end):
            missing, given = ("end", "begin") if self.begin else ("begin", "end")
            raise InputError(f"{missing}: expected with {given}, got none")
        if self.begin:
            begin, end = read_time(self.begin, "begin"), read_time(self.end, "end")
            if begin >= end:
                raise InputError(f"end: expected a time after {self.begin}, got {self.end}")

    @property
    def name(self) -> str:
        return f"{self.begin} to {self.end}" if self.begin else f"the first {self.first:,} prompts"

    def period(self) -> Any:
        """The condition of a period on the table of measures; None: the first prompts."""
        if not self.begin:
            return None
        return sa.and_(C.at >= read_time(self.begin, "begin"), C.at < read_time(self.end, "end"))

    def rows(self, connection: sa.Connection) -> Any:
        """The condition on the table of measures that its rows meet."""
        if (period := self.period()) is not None:
            return period
        ids = sa.select(MEASURES.c.id).where(C.features.is_not(None)).order_by(C.id)
        last = connection.execute(ids.limit(1).offset(self.first - 1)).scalar()
        return C.features.is_not(None) if last is None else C.id <= last


def read_time(text: str, name: str) -> float:
    """Seconds since 1970. InputError: no date."""
    try:
        if not re.match(r"\d{4}-\d\d-\d\d", text):
            raise ValueError
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{name}: expected a date such as 2026-11-28, got {text!r:.40}") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def drift(
    store: "FeedbackStore", reference: Reference, since: float, until: float, *, seed: int = 0
) -> dict[str, Any]:
    """PSI of each feature, and MMD of all of them together; both with the level below which 95 % of
    periods without drift stay, and with a p-value (that of PSI is Holm's, for all features).

    Where a side has fewer than `LEAST` prompts, "enough" is False and nothing is compared.
    """
    period, known = sa.and_(C.at >= since, C.at < until), reference.period()
    if known is not None:
        before, _ = read_features(store, known, MOST_COUNTED)
    else:
        before, last = read_features(store, sa.true(), reference.first, newest=False)
        period = sa.and_(period, C.id > last)  # a prompt is not compared with itself
    now, _ = read_features(store, period, MOST_COUNTED)
    x, y = features.table(before), features.table(now)
    told: dict[str, Any] = {
        "reference": reference.name, "prompts": len(y), "reference_prompts": len(x),
        "least": LEAST, "cut": len(now) == MOST_COUNTED, "enough": min(len(x), len(y)) >= LEAST,
        "features": [], "mmd": None,
    }  # fmt: skip
    if not told["enough"]:
        return told
    was, is_now = features.counts(x), features.counts(y)
    found = [psi(was[name], is_now[name], seed=seed) for name in features.NAMES]
    told["features"] = [
        {"name": name, "psi": one.value, "floor": one.floor, "p": p}
        for name, one, p in zip(features.NAMES, found, holm([one.p for one in found]))
    ]
    # at most `MOST_COMPARED`, evenly from all
    few = (features.vectors(rows[:: -(-len(rows) // MOST_COMPARED)]) for rows in (x, y))
    one = mmd(*few, seed=seed, permutations=PERMUTATIONS)
    told["mmd"] = {"value": one.value, "floor": one.floor, "p": one.p}
    return told
