"""Which of two models answers slower, from pairs of conversations that were answered in turn.

Times of answers are not independent: a machine's load comes in bursts, and within one all answers
are slow. A share of slow answers per model, tested as if they were independent, rolled back a model
equal to the old one after some 45 answers.

So conversations are taken two by two in the order in which their first answers ended. Where the two
models have one each, the pair says which was slower by more than `SLOWDOWN`. Which model a
conversation gets is drawn by a hash: given all times, a pair of equal models says "new" and "old"
with the same probability, whatever the load did. That is all that the always-valid test of the mean
(`fastlm.stats.sequential.SequentialTest`) needs, whose chance to roll back such a model is at most
alpha, at any time. tests/unit/test_simulations.py has the rates.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastlm.stats.sequential import SequentialResult

SLOWDOWN = 2.0  # times as long per token as the other conversation of the pair
BOUND = 0.25  # mean of a pair: so many more pairs in which the new model is the slower one


@dataclass(frozen=True)
class PairCounts:
    """Pairs of conversations: in which the "new" model, the "old" one, or neither was slower."""

    new: int = 0
    old: int = 0
    neither: int = 0

    @property
    def total(self) -> int:
        return self.new + self.old + self.neither


class PacePairs:
    """Counts pairs. ``pace``: seconds per token; ``arm``: "old" or "new"."""

    def __init__(self) -> None:
        self.counts = PairCounts()
        self._first: tuple[str, float] | None = None

    def add(self, arm: str, pace: float) -> None:
        """Add the first answer of a conversation."""
        if self._first is None:
            self._first = arm, pace
            return
        (other, before), self._first = self._first, None
        if arm == other:
            return
        slower = "neither"
        if pace > SLOWDOWN * before:
            slower = arm
        elif before > SLOWDOWN * pace:
            slower = other
        self.counts = replace(self.counts, **{slower: getattr(self.counts, slower) + 1})


@lru_cache(64)  # most counts are those of the last look
def compare_paces(counts: PairCounts, alpha: float) -> "SequentialResult":
    """Return the difference of the shares of pairs in which the new and the old model were slower,
    with its always-valid interval and p-value."""
    from fastlm.stats.sequential import SequentialTest

    test = SequentialTest(alpha)
    test.add(1, 0, times=counts.new)
    test.add(0, 1, times=counts.old)
    test.add(0, 0, times=counts.neither)
    return test.result()
