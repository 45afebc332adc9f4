"""How often an epoch takes each source of the data. Nothing here imports numpy before a model is
trained.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Mixture:
    """Sources of ``counts`` examples, one after another, each with a weight. An epoch takes
    ``max(1, round(weight * count))`` examples of a source: with weight 2 each twice, with weight
    0.5 a random half, another one in each epoch.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]

    def taken(self) -> list[int]:
        """How many examples of each source an epoch takes."""
        pairs = zip(self.counts, self.weights, strict=True)
        return [max(1, round(weight * count)) if count else 0 for count, weight in pairs]

    def order(self, rng: "np.random.Generator") -> "np.ndarray":
        """The indices of an epoch's examples, shuffled."""
        import numpy as np

        if set(self.weights) == {1.0}:
            return rng.permutation(sum(self.counts))
        chosen, start = [], 0
        for count, taken in zip(self.counts, self.taken()):
            every = np.arange(start, start + count)
            whole, rest = divmod(taken, count) if count else (0, 0)
            chosen += [every] * whole + [rng.choice(every, rest, replace=False)]
            start += count
        return rng.permutation(np.concatenate(chosen))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint records; nothing where no weight was given."""
        if set(self.weights) == {1.0}:
            return {}
        return {"mixture": [list(self.counts), list(self.weights)]}
