"""How far to trust each rater, from the answers that several raters judged.

Each rater has two rates: how often it says yes where the answer is yes, and no where it is no
(Dawid and Skene 1979, doi:10.2307/2346806). The truth is not known; what the other raters say of
it, each by its own rates, is the belief that a rater is measured against. A rater's own vote does
not count in that belief (leave one out), else the only two raters of an answer would each confirm
themselves. The rates have a prior worth `PRIOR` judgements, so that few judgements move them
little.

Rejected: to turn the votes of a rater who says the opposite of the others. Who is wrong on purpose
is not wrong always, and a good rater of another taste would be turned too.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PRIOR = (4.0, 1.0)  # right and wrong judgements, of either answer, that everybody begins with
TRUSTED = 0.75  # of what the prior's rates tell: whoever tells that much or more has weight 1
ROUNDS = 50  # of the iteration; it ends before, where nothing moves
STILL = 1e-6

Vote = tuple[bytes, str, bool]  # of what, by whom, yes or no


@dataclass(frozen=True)
class Rater:
    """What a rater's word is worth.

    weight: Youden's index of the rates (right of yes + right of no - 1) over `TRUSTED` of the
        prior's, at most 1; 0 where yes and no say nothing, or the opposite.
    judged: how many of its votes are about what others judged, too.
    agreed: the share of those that the belief of the others shares; None without any.
    """

    weight: float
    judged: int
    agreed: float | None


def rate(votes: Iterable[Vote]) -> dict[str, Rater]:
    """Return what each rater's votes are worth. A rater without a vote in common with another has
    the prior's weight, 1.
    """
    last = {(item, rater): yes for item, rater, yes in votes}
    items: dict[bytes, list[tuple[str, bool]]] = defaultdict(list)
    for (item, rater), yes in last.items():
        items[item].append((rater, yes))
    shared = [cast for cast in items.values() if len(cast) > 1]
    rates = {rater: (_share(*PRIOR), _share(*PRIOR)) for _, rater in last}
    beliefs: list[tuple[str, bool, float]] = []
    for _ in range(ROUNDS):
        beliefs = [one for cast in shared for one in _beliefs(cast, rates, shared_prior(shared))]
        moved = _rates(beliefs, rates)
        still = max((abs(a - b) for r in rates for a, b in zip(rates[r], moved[r])), default=0.0)
        rates = moved
        if still < STILL:
            break
    full = TRUSTED * (2 * _share(*PRIOR) - 1)
    own: dict[str, list[float]] = defaultdict(list)
    for rater, yes, belief in beliefs:
        own[rater].append(belief if yes else 1 - belief)
    return {
        rater: Rater(
            min(1.0, max(0.0, (sum(both) - 1) / full)),
            len(own[rater]),
            math.fsum(own[rater]) / len(own[rater]) if own[rater] else None,
        )
        for rater, both in rates.items()
    }


def shared_prior(shared: Sequence[Sequence[tuple[str, bool]]]) -> float:
    """The share of yes among the votes, kept off 0 and 1."""
    yes = sum(vote for cast in shared for _, vote in cast)
    return (yes + 1) / (sum(map(len, shared)) + 2)


def _share(a: float, b: float) -> float:
    return a / (a + b)


def _beliefs(
    cast: Sequence[tuple[str, bool]], rates: dict[str, tuple[float, float]], prior: float
) -> list[tuple[str, bool, float]]:
    """(rater, its vote, the probability of yes by the votes of the others)."""
    told = [_evidence(rates[rater], yes) for rater, yes in cast]
    total = math.fsum(told) + math.log(prior / (1 - prior))
    return [
        (rater, yes, 1 / (1 + math.exp(-max(-500.0, min(500.0, total - own)))))
        for (rater, yes), own in zip(cast, told, strict=True)
    ]


def _evidence(rate: tuple[float, float], yes: bool) -> float:
    """The log-odds of yes that a vote adds. ``rate``: right where it is yes, where it is no."""
    a, b = rate
    return math.log(a / (1 - b)) if yes else math.log((1 - a) / b)


def _rates(
    beliefs: Iterable[tuple[str, bool, float]], rates: dict[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    right, wrong = PRIOR
    counts = {rater: [right, wrong, right, wrong] for rater in rates}
    for rater, yes, belief in beliefs:
        own = counts[rater]
        own[0 if yes else 1] += belief
        own[3 if yes else 2] += 1 - belief
    return {rater: (_share(c[0], c[1]), _share(c[2], c[3])) for rater, c in counts.items()}
