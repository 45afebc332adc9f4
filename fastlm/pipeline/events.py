"""What runs and trainings report to the user on stderr."""

import os
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from fastlm.progress import bars

EVERY_SECONDS = 30.0  # between two lines of steps where nothing else asks for one
REDRAW_SECONDS = 0.1  # at least, between two drawings of the live line
WINDOW = 20  # steps whose mean loss, median speed and pace the live line shows

START = {"seconds": 0.0, "progress": 0.0}  # of a training


class View:
    """``track`` and ``on_event`` of a command.

    Stages, validations, samples and warnings are lines. The steps of a training are one line that
    is redrawn, at the bottom of a terminal: the step, the share of the budget, mean loss, speed,
    and the time that is left at the pace of the last steps. Where stderr is no terminal they are
    lines, too: at every multiple of ``every`` and after half a minute without one, with what was
    measured since the last; without ``every``, also at the end of the line of a validation.
    """

    def __init__(self, every: int | None = None, stream: TextIO | None = None) -> None:
        self.every = every
        self.given = stream
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.name = ""  # of the stage
        self.drawn = ""  # the live line on the screen
        self.start()

    @property
    def stream(self) -> TextIO:
        return self.given or sys.stderr  # which a bar replaces while it is shown

    def start(self) -> None:
        """Forget the previous training."""
        self.before: dict[str, Any] = START
        self.steps: list[dict[str, Any]] = []  # since the last line
        self.recent: deque[dict[str, Any]] = deque(maxlen=WINDOW + 1)
        self.to_go: int | None = None  # steps, where the budget is in steps
        self.said_at = self.drawn_at = time.monotonic()

    def track(
        self, iterable: Iterable, description: str, total: float | None = None, unit: str = ""
    ) -> Iterator[Any]:
        """See `fastlm.progress`. A training has the live line in place of a bar."""
        if not self.live or description != "training":
            yield from bars(iterable, description, total, unit)
            return
        self.to_go = int(total) if unit == "steps" and total is not None else None
        try:
            yield from iterable
        finally:
            self.draw("")

    def __call__(self, event: dict[str, Any]) -> None:
        if "stage" in event:
            took = f" in {event['seconds']:.1f} s" if "seconds" in event else ""
            if "path" in event:
                took = f", it no longer fits; what was trained is now in {event['path']}"
            self.say(f"{event['stage']}: {event['state']}{took}")
            self.name = event["stage"]
            self.start()
        elif "warning" in event or "info" in event:
            self.say(event["info"] if "info" in event else f"warning: {event['warning']}")
        elif "loss" in event:
            self.step(event)
        elif "val_loss" in event:
            text = f"step {event['step']}: held-out loss {event['val_loss']:.4f}"
            if "bits_per_byte" in event:
                text += f", {event['bits_per_byte']:.4f} bits per byte"
            if self.steps and not self.every:
                text += f"; {self.training()}"
            self.say(text)
        elif "sample" in event:
            self.say(f"step {event['step']} writes: {event['sample']!r}")
        else:  # a validation of another kind
            values = [f"{key} {value:.4g}" for key, value in event.items() if key != "step"]
            self.say(f"step {event['step']}: {', '.join(values)}")

    def step(self, event: dict[str, Any]) -> None:
        if self.live:
            if not self.recent and self.to_go is not None:
                self.to_go += event["step"] - 1  # of the whole training
            self.recent.append(event)
            if time.monotonic() - self.drawn_at >= REDRAW_SECONDS:
                self.draw(self.status())
            return
        self.steps.append(event)
        due = self.every and event["step"] % self.every == 0
        if due or time.monotonic() - self.said_at >= EVERY_SECONDS:
            self.say(f"step {event['step']}: {self.training()}")

    def training(self) -> str:
        """The steps since the last line."""
        steps, self.steps = self.steps, []
        text, self.before = _measured(self.before, steps), steps[-1]
        return f"training {text}"

    def status(self) -> str:
        """The live line."""
        first, *others = self.recent
        last = self.recent[-1]
        measured = _measured(first, others) if others else _measured(START, [first])
        whole = f" of {self.to_go:,}" if self.to_go else ""
        processes = int(os.environ.get("WORLD_SIZE") or 1)
        rank = f"rank {os.environ.get('RANK', '0')} of {processes}" if processes > 1 else ""
        begin = " ".join(filter(None, (self.name, rank)))
        share = f"step {last['step']:,}{whole} ({last['progress']:.0%})"
        return f"{begin}: {share}, {measured}" if begin else f"{share}, {measured}"

    def say(self, text: str) -> None:
        """Write a line, above the live one."""
        below = self.drawn
        self.draw("")
        self.stream.write(f"{text}\n")
        self.stream.flush()
        self.said_at = time.monotonic()
        self.draw(below)

    def draw(self, text: str) -> None:
        """Put ``text`` in the place of the live line."""
        if text != self.drawn:
            width = shutil.get_terminal_size().columns - 1  # a full line would wrap
            self.stream.write(f"\r\x1b[K{text[:width]}")
            self.stream.flush()
        self.drawn, self.drawn_at = text, time.monotonic()


def _measured(before: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """Say what ``steps`` measured, and the time left at their pace since ``before``."""
    from fastlm.pipeline.text import seconds_text

    last = steps[-1]
    loss = statistics.fmean(step["loss"] for step in steps)
    rate = statistics.median(step["tokens_per_second"] for step in steps)
    took, done = (last[key] - before[key] for key in ("seconds", "progress"))
    left = f", {seconds_text((1 - last['progress']) * took / done)} left" if done > 0 else ""
    return f"loss {loss:.4g}, lr {last['lr']:.3g}, {rate:,.0f} tokens/s{left}"
