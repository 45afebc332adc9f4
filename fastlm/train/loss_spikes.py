"""Detect spikes of the loss."""

import math


class SpikeDetector:
    """Detects loss spikes: losses that exceed the mean of the last ``window`` losses by more than
    ``factor`` of their standard deviations (None: no loss does).

    Every loss then joins the window, spikes included, so a lasting change of level is soon
    accepted.
    """

    def __init__(self, factor: float | None, window: int):
        self.factor, self.window = factor, window
        self.losses: list[float] = []

    def check(self, loss: float) -> str | None:
        """Add the next loss. Return a description if it is a spike, otherwise None."""
        window, self.losses = self.losses, [*self.losses, loss][-self.window :]
        if self.factor is None or len(window) < self.window:
            return None
        mean = math.fsum(window) / len(window)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / len(window))
        if loss <= mean + self.factor * deviation or deviation == 0:
            return None
        return (
            f"the loss {loss:.4g} is {(loss - mean) / deviation:.1f} standard deviations above"
            f" the mean {mean:.4g} of the previous {len(window)} steps"
        )
