"""Detect spikes of the loss."""

import math


class SpikeDetector:
    """A loss is a spike if it exceeds the mean of the last ``window`` losses by more than
    ``factor`` of their standard deviations (None: nothing is).

    Every loss then joins the window, spikes included: a lasting change of level is soon accepted.
    """

    def __init__(self, factor: float | None, window: int):
        self.factor, self.window = factor, window
        self.losses: list[float] = []

    def check(self, loss: float) -> str | None:
        """Take in the next loss. Return what is wrong with it, or None."""
        before, self.losses = self.losses, [*self.losses, loss][-self.window :]
        if self.factor is None or len(before) < self.window:
            return None
        mean = math.fsum(before) / len(before)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in before) / len(before))
        if loss <= mean + self.factor * deviation or deviation == 0:
            return None
        return (
            f"the loss {loss:.4g} is {(loss - mean) / deviation:.1f} standard deviations above"
            f" the mean {mean:.4g} of the {len(before)} steps before"
        )
