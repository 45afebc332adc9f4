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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

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
    import numpy as np  # not above: recipes are read without it

    last = {(item, rater): yes for item, rater, yes in votes}
    names = list(dict.fromkeys(rater for _, rater in last))
    numbers = {name: i for i, name in enumerate(names)}
    items = {item: i for i, item in enumerate(dict.fromkeys(item for item, _ in last))}
    item = np.array([items[item] for item, _ in last], int)
    rater = np.array([numbers[rater] for _, rater in last], int)
    yes = np.array([*last.values()], bool)
    shared = np.bincount(item, minlength=1)[item] > 1  # votes on what another rater judged
    item, rater, yes = item[shared], rater[shared], yes[shared]
    prior = (yes.sum() + 1) / (len(yes) + 2)  # the share of yes, kept off 0 and 1

    def per_rater(weights: "np.ndarray") -> "np.ndarray":
        return np.bincount(rater, weights, minlength=len(names))

    right, wrong = PRIOR
    start = right / (right + wrong)
    rates = np.full((2, len(names)), start)  # how often right: where it is yes, where it is no
    belief = np.zeros(len(yes))  # that it is yes, by the votes of the others
    for _ in range(ROUNDS):
        if_yes, if_no = rates[:, rater]
        # the log-odds of yes that each vote adds
        evidence = np.where(yes, np.log(if_yes / (1 - if_no)), np.log((1 - if_yes) / if_no))
        others = np.bincount(item, evidence, minlength=1)[item] - evidence
        belief = 1 / (1 + np.exp(-np.clip(others + np.log(prior / (1 - prior)), -500, 500)))
        before, hits = rates, np.stack([belief * yes, (1 - belief) * ~yes])
        cast = np.stack([per_rater(belief), per_rater(1 - belief)])
        rates = (right + np.stack([*map(per_rater, hits)])) / (right + wrong + cast)
        if np.abs(rates - before).max(initial=0.0) < STILL:
            break
    weights = np.clip((rates.sum(0) - 1) / (TRUSTED * (2 * start - 1)), 0, 1)
    judged = per_rater(np.ones(len(yes)))
    agreed = per_rater(np.where(yes, belief, 1 - belief)) / np.maximum(judged, 1)
    return {
        name: Rater(float(weights[i]), int(judged[i]), float(agreed[i]) if judged[i] else None)
        for i, name in enumerate(names)
    }
