"""The configuration of a canary's experiment, and the decision from its counts. The tests are
always valid (`fastlm.stats.sequential`), so they may be repeated after every outcome.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from fastlm.errors import InputError
from fastlm.serve.options import ServeOptions
from fastlm.serve.ratings import BUILT_IN, Rating
from fastlm.stats import sequential
from fastlm.stats.latency import BOUND, PairCounts, compare_paces

RULES = ("superiority", "non-inferiority")
Action = Literal["promote", "roll back", "keep"]


@dataclass(frozen=True)
class CanaryConfig:
    """The configuration of an experiment.

    share: the canary's share of the conversations. metric: defines a success: a thumb up among
    thumbs; a preference over an answer of the other model; an answer that ended by itself; or, by
    its name, a ``rating`` in the better half of its range.

    rule: "superiority" promotes a canary that is better, "non-inferiority" one that is worse by
    less than ``margin``. alpha: the probability of a false promotion, and of a false alarm of each
    guard. max_outcomes: the number of outcomes without a decision after which the old model stays.
    """

    share: float
    metric: str
    rule: str
    margin: float
    alpha: float
    max_outcomes: int
    rating: Rating | None = None

    @staticmethod
    def from_options(options: ServeOptions, ratings: Sequence[Rating] = ()) -> "CanaryConfig":
        """Read the options of the server. ``ratings``: the numbers that people may give."""
        metric = options.canary_metric
        return CanaryConfig(
            options.canary_share, metric, options.canary_rule, options.canary_margin,
            options.canary_alpha, options.canary_max_outcomes,
            next((rating for rating in ratings if rating.name == metric), None),
        )  # fmt: skip

    def __post_init__(self) -> None:
        metrics = (*BUILT_IN, *([self.rating.name] if self.rating is not None else []))
        fraction = "a number between 0 and 1"
        for option, is_valid, expected in (
            ("canary_share", 0 < self.share < 1, fraction),
            (
                "canary_metric",
                self.metric in metrics,
                f"{', '.join(BUILT_IN)}, or a declared number",
            ),
            ("canary_rule", self.rule in RULES, " or ".join(RULES)),
            ("canary_margin", 0 < self.margin < 1, fraction),
            ("canary_alpha", 0 < self.alpha < 1, fraction),
            ("canary_max_outcomes", self.max_outcomes >= 1, "at least 1"),
        ):
            if not is_valid:
                got = getattr(self, option.removeprefix("canary_"))
                raise InputError(f"{option}: expected {expected}, got {got!r:.80}")

    @property
    def bound(self) -> float:
        """The bound that the difference new - old must exceed."""
        return -self.margin if self.rule == "non-inferiority" else 0.0


@dataclass(frozen=True)
class Variant:
    """The counts of one model: ``successes`` of ``outcomes``, ``errors`` of ``answers``."""

    outcomes: int = 0
    successes: int = 0
    answers: int = 0
    errors: int = 0


@dataclass(frozen=True)
class DecisionRule:
    """The rule ``name`` that decided: the interval of its ``test`` ("outcome", "errors" or "slow")
    at ``alpha`` is on one side of ``bound``. ``after``: the number of outcomes, answers or pairs of
    conversations. ``metric``: that of outcomes."""

    name: str
    test: str
    bound: float
    alpha: float
    after: int
    metric: str | None = None


@dataclass(frozen=True)
class CanaryVerdict:
    """The end of an experiment. ``rule``: None if an admin ended it."""

    action: Action
    reason: str
    rule: DecisionRule | None = None


def comparisons(
    arms: dict[str, Variant], pairs: PairCounts, config: CanaryConfig
) -> dict[str, sequential.SequentialResult]:
    """Compare outcomes, errors and slowness. Each result has the difference new - old, its
    always-valid interval and its p-value."""
    old, new = arms["old"], arms["new"]
    return {
        "outcome": _compare(new.successes, new.outcomes, old.successes, old.outcomes, config.alpha),
        "errors": _compare(new.errors, new.answers, old.errors, old.answers, config.alpha),
        "slow": compare_paces(pairs, config.alpha),
    }


@lru_cache(64)  # most counts are unchanged since the last check
def _compare(*counts: Any) -> sequential.SequentialResult:
    return sequential.compare_rates(*counts)


def evaluate_counts(
    arms: dict[str, Variant], pairs: PairCounts, config: CanaryConfig
) -> CanaryVerdict | None:
    """Return the verdict of the counts, or None if there is none yet. Guards take precedence over
    outcomes."""
    old, new = arms["old"], arms["new"]
    tests, alpha, metric = comparisons(arms, pairs, config), config.alpha, config.metric
    answers, outcomes = old.answers + new.answers, old.outcomes + new.outcomes
    errors = f"errors: {new.errors} of {new.answers} new, {old.errors} of {old.answers} old"
    slow = (
        f"slow answers: the new model was slower in {pairs.new} of {pairs.total} pairs of"
        f" conversations, the old one in {pairs.old}"
    )
    successes = (
        f"{metric}: {new.successes} of {new.outcomes} new, {old.successes} of {old.outcomes} old"
    )

    def verdict(action: Action, rule: DecisionRule, counts: str) -> CanaryVerdict:
        test = tests[rule.test]
        interval = f"{test.difference:+.3f} in [{test.low:+.3f}, {test.high:+.3f}]"
        side = "above" if test.low > rule.bound else "below"
        reason = f"{side} the bound {rule.bound:g} of the rule {rule.name!r} at alpha {alpha:g}"
        return CanaryVerdict(action, f"{counts}; difference {interval}, {reason}", rule)

    for guard, counts in (
        (DecisionRule("fewer errors", "errors", 0.0, alpha, answers), errors),
        (DecisionRule("as fast", "slow", BOUND, alpha, pairs.total), slow),
    ):
        if tests[guard.test].low > guard.bound:
            return verdict("roll back", guard, counts)
    rule = DecisionRule(config.rule, "outcome", config.bound, alpha, outcomes, metric)
    test = tests["outcome"]
    if old.outcomes and new.outcomes and not test.low <= rule.bound <= test.high:
        return verdict("promote" if test.low > rule.bound else "roll back", rule, successes)
    if outcomes >= config.max_outcomes:
        return CanaryVerdict(
            "keep", f"{metric}: no decision after {config.max_outcomes} outcomes", rule
        )
    return None
