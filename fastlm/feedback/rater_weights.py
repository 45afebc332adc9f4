"""Estimate how reliable each rater is, from the answers that several raters judged.

Each rater has two rates: how often it says yes where the answer is yes, and no where it is no
(Dawid and Skene 1979, doi:10.2307/2346806). The truth is not known. Each rater is compared with a
belief instead: what the votes of the other raters say, weighted by their own rates. The rater's own
vote is left out of that belief; otherwise the only two raters of an answer would each confirm
themselves. The rates have a prior worth `PRIOR` votes, so that few votes move them little.

Rejected: to reverse the votes of a rater who says the opposite of the others. Such a rater is not
always wrong, and a good rater with another taste would be reversed too.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

PRIOR = (4.0, 1.0)  # right and wrong votes, of either answer, that every rater starts with
FULL_WEIGHT = 0.75  # of Youden's index of the prior: from there on the weight is 1
MAX_ITERATIONS = 50
KEY_LETTERS = re.compile(r"[a-p]{12}:")
TOLERANCE = 1e-6  # of the rates, to stop before

Vote = tuple[bytes, str, bool]  # (item, rater, yes or no)


@dataclass(frozen=True)
class RaterWeight:
    """The weight of a rater's votes.

    weight: Youden's index of the rates (right of yes + right of no - 1), divided by `FULL_WEIGHT`
        of the prior's, from 0 to 1; 0 where the votes are random, or the opposite of the others'.
    shared_votes: how many votes are about items that others judged, too.
    agreement: the share of those that agrees with the belief of the others; None without any.
    """

    weight: float
    shared_votes: int
    agreement: float | None


def key_of(rater: str) -> str:
    """Return the letters of the API key in a rater's name (`fastlm.serve.rater_api.rater_of`), ""
    if there are none: the server has one key.
    """
    match = KEY_LETTERS.match(rater)
    return match[0] if match else ""


def estimate_rater_weights(votes: Iterable[Vote]) -> dict[str, RaterWeight]:
    """Return the weight of each rater's votes. A rater without an item in common with another has
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
    shared = np.bincount(item, minlength=1)[item] > 1  # votes on items that others judged
    item, rater, yes = item[shared], rater[shared], yes[shared]
    prior = (yes.sum() + 1) / (len(yes) + 2)  # the share of yes, kept off 0 and 1

    def per_rater(weights: "np.ndarray") -> "np.ndarray":
        return np.bincount(rater, weights, minlength=len(names))

    right, wrong = PRIOR
    start = right / (right + wrong)
    rates = np.full((2, len(names)), start)  # how often right: where it is yes, where it is no
    belief = np.zeros(len(yes))  # that it is yes, by the votes of the others
    for _ in range(MAX_ITERATIONS):
        if_yes, if_no = rates[:, rater]
        # the log-odds of yes that each vote adds
        evidence = np.where(yes, np.log(if_yes / (1 - if_no)), np.log((1 - if_yes) / if_no))
        others = np.bincount(item, evidence, minlength=1)[item] - evidence
        belief = 1 / (1 + np.exp(-np.clip(others + np.log(prior / (1 - prior)), -500, 500)))
        before, hits = rates, np.stack([belief * yes, (1 - belief) * ~yes])
        cast = np.stack([per_rater(belief), per_rater(1 - belief)])
        rates = (right + np.stack([*map(per_rater, hits)])) / (right + wrong + cast)
        if np.abs(rates - before).max(initial=0.0) < TOLERANCE:
            break
    weights = np.clip((rates.sum(0) - 1) / (FULL_WEIGHT * (2 * start - 1)), 0, 1)
    counts = per_rater(np.ones(len(yes)))
    agreement = per_rater(np.where(yes, belief, 1 - belief)) / np.maximum(counts, 1)
    return {
        name: RaterWeight(
            float(weights[i]), int(counts[i]), float(agreement[i]) if counts[i] else None
        )
        for i, name in enumerate(names)
    }
