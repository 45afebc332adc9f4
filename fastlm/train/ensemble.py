"""One score from several reward models, against the overoptimisation of one (Coste et al. 2023,
"Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from fastlm.model.reward_model import RewardModel

ENSEMBLES = ("mean", "min", "uwo")


class RewardEnsemble:
    """``models``: at least one. ``how``: see `combined`."""

    def __init__(self, models: "Sequence[RewardModel]", how: str, coefficient: float):
        self.models, self.how, self.coefficient = models, how, coefficient

    @property
    def context_limit(self) -> int:
        return min(model.trunk.context_limit for model in self.models)

    def identity(self) -> list[str]:
        """Identify the models, and of several how they count."""
        from fastlm.train.encoding import weights_digest

        parts = []
        for model in self.models:
            parts += [weights_digest(model), f"{model.mean!r} {model.std!r}"]
        if len(self.models) > 1:
            parts += [self.how, repr(self.coefficient)] if self.how == "uwo" else [self.how]
        return parts

    def score(self, sequences: Sequence[Sequence[int]]) -> "tuple[np.ndarray, np.ndarray]":
        """Return the score of each sequence, and the standard deviation over the models."""
        import numpy as np

        scores = np.array([model.score(sequences).tolist() for model in self.models], np.float64)
        return combined(scores, self.how, self.coefficient), scores.std(axis=0)


def combined(scores: "np.ndarray", how: str, coefficient: float = 0.0) -> "np.ndarray":
    """(models, B) -> (B,): "mean"; "min", the paper's worst-case optimisation; "uwo", its
    uncertainty-weighted optimisation, ``mean - coefficient * variance`` (over n).
    """
    if how == "min":
        return scores.min(axis=0)
    mean = scores.mean(axis=0)
    return mean - coefficient * scores.var(axis=0) if how == "uwo" else mean
