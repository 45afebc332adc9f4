"""Test which of two models answers slower, from pairs of conversations.

Latencies are not independent: load comes in bursts, and all answers within a burst are slow. A test
of the share of slow answers that assumed independence rolled back a model equal to the old one
after some 45 answers.

So conversations are paired in the order in which their first answers ended. If the two models have
one each, the pair records which was slower by more than a factor of `SLOWDOWN`. A hash assigns
conversations to models. So, given all times, a pair of equal models gives "new" and "old" with the
same probability, whatever the load. The always-valid test of the mean
(`fastlm.stats.sequential.SequentialTest`) needs no more: it rolls back an equal model with a
probability of at most alpha, at any time. tests/unit/test_simulations.py has the rates.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastlm.stats.sequential import SequentialResult

SLOWDOWN = 2.0  # factor in seconds per token between the conversations of a pair
BOUND = 0.25  # allowed mean of a pair: share of "new slower" minus share of "old slower"


@dataclass(frozen=True)
class PairCounts:
    """Counts of pairs of conversations in which "new", "old" or neither model was slower."""

    new: int = 0
    old: int = 0
    neither: int = 0

    @property
    def total(self) -> int:
        return self.new + self.old + self.neither


class PacePairs:
    """Forms and counts pairs. ``pace``: seconds per token; ``arm``: "old" or "new"."""

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


@lru_cache(64)  # most calls repeat the last counts
def compare_paces(counts: PairCounts, alpha: float) -> "SequentialResult":
    """Return the share of pairs with the new model slower minus that with the old model slower,
    with its always-valid interval and p-value."""
    from fastlm.stats.sequential import SequentialTest

    test = SequentialTest(alpha)
    test.add(1, 0, times=counts.new)
    test.add(0, 1, times=counts.old)
    test.add(0, 0, times=counts.neither)
    return test.result()
