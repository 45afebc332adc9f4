"""What a canary's experiment is about."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastlm.errors import InputError
from fastlm.serve.options import ServeOptions
from fastlm.serve.ratings import BUILT_IN, Rating

RULES = ("superiority", "non-inferiority")


@dataclass(frozen=True)
class CanaryConfig:
    """share: of the conversations that the canary gets. metric: what is a success: a thumb up among
    thumbs; being preferred over an answer of the other model; an answer that ended by itself; or,
    by its name, a ``rating`` in the better half of its range.

    rule: with "superiority" the canary is promoted when it is better, with "non-inferiority" when
    it is worse by less than ``margin``. alpha: the chance that a canary that is not takes over; and
    so for each of the guards. most: outcomes after which the old model stays.
    """

    share: float
    metric: str
    rule: str
    margin: float
    alpha: float
    most: int
    rating: Rating | None = None

    @staticmethod
    def of(options: ServeOptions, ratings: Sequence[Rating] = ()) -> "CanaryConfig":
        """Read the options of the server. ``ratings``: the numbers that people may give."""
        metric = options.canary_metric
        return CanaryConfig(
            options.share, metric, options.canary_rule, options.canary_margin,
            options.canary_alpha, options.canary_most,
            next((rating for rating in ratings if rating.name == metric), None),
        )  # fmt: skip

    def __post_init__(self) -> None:
        for name, good, wanted, value in (
            ("share", 0 < self.share < 1, "a number between 0 and 1", self.share),
            (
                "canary_metric",
                self._known,
                f"{', '.join(BUILT_IN)}, or a declared number",
                self.metric,
            ),
            ("canary_rule", self.rule in RULES, " or ".join(RULES), self.rule),
            ("canary_margin", 0 < self.margin < 1, "a number between 0 and 1", self.margin),
            ("canary_alpha", 0 < self.alpha < 1, "a number between 0 and 1", self.alpha),
            ("canary_most", self.most >= 1, "at least 1", self.most),
        ):
            if not good:
                raise InputError(f"{name}: wanted {wanted}, got {value!r:.80}")

    @property
    def _known(self) -> bool:
        rated = self.rating is not None and self.rating.name == self.metric
        return rated or self.metric in BUILT_IN

    @property
    def bound(self) -> float:
        """What the difference new - old must be above."""
        return -self.margin if self.rule == "non-inferiority" else 0.0
