"""Show the events of runs and trainings to the user on stderr."""

import os
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from fastlm.progress import bars
from fastlm.terminal import visible

EVERY_SECONDS = 30.0  # between two lines of steps where nothing else asks for one
REDRAW_SECONDS = 0.1  # at least, between two drawings of the live line
WINDOW = 20  # steps whose mean loss, median speed and pace the live line shows

START = {"seconds": 0.0, "progress": 0.0}  # of a training


class View:
    """Show events on stderr: ``track`` and ``on_event`` of a command.

    Stages, validations, samples and warnings are lines. On a terminal, the steps of a training are
    one line that is redrawn: the step, the share of the budget, mean loss, speed, and the time left
    at the pace of the last steps. Elsewhere the steps are lines, too: at every multiple of
    ``log_every`` and after half a minute without one, with the means since the last line. Without
    ``log_every``, they also stand at the end of the line of a validation.
    """

    def __init__(self, log_every: int | None = None, stream: TextIO | None = None) -> None:
        self.log_every = log_every
        self._stream = stream
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.name = ""  # of the stage
        self.drawn = ""  # the live line on the screen
        self.start()

    @property
    def stream(self) -> TextIO:
        return self._stream or sys.stderr  # which a bar replaces while it is shown

    def start(self) -> None:
        """Forget the previous training."""
        self.before: dict[str, Any] = START
        self.steps: list[dict[str, Any]] = []  # since the last line
        self.recent: deque[dict[str, Any]] = deque(maxlen=WINDOW + 1)
        self.steps_left: int | None = None  # steps, where the budget is in steps
        self.written_at = self.drawn_at = time.monotonic()

    def track(
        self, iterable: Iterable, description: str, total: float | None = None, unit: str = ""
    ) -> Iterator[Any]:
        """See `fastlm.progress`. A training shows the live line instead of a bar."""
        if not self.live or description != "training":
            yield from bars(iterable, description, total, unit)
            return
        self.steps_left = int(total) if unit == "steps" and total is not None else None
        try:
            yield from iterable
        finally:
            self.draw("")

    def __call__(self, event: dict[str, Any]) -> None:
        if "stage" in event:
            took = f" in {event['seconds']:.1f} s" if "seconds" in event else ""
            if "path" in event:
                took = (
                    f": it no longer fits its recipe or data; its files are now in {event['path']}"
                )
            self.write_line(f"{event['stage']}: {event['state']}{took}")
            self.name = event["stage"]
            self.start()
        elif "warning" in event or "info" in event:
            self.write_line(event["info"] if "info" in event else f"warning: {event['warning']}")
        elif "loss" in event:
            self.step(event)
        elif "val_loss" in event:
            text = f"step {event['step']}: held-out loss {event['val_loss']:.4f}"
            if "bits_per_byte" in event:
                text += f", {event['bits_per_byte']:.4f} bits per byte"
            if self.steps and not self.log_every:
                text += f"; {self.training_text()}"
            self.write_line(text)
        elif "sample" in event:
            self.write_line(f"step {event['step']} writes: {event['sample']!r}")
        else:  # a validation of another kind
            values = [f"{key} {value:.4g}" for key, value in event.items() if key != "step"]
            self.write_line(f"step {event['step']}: {', '.join(values)}")

    def step(self, event: dict[str, Any]) -> None:
        if self.live:
            if not self.recent and self.steps_left is not None:
                self.steps_left += event["step"] - 1  # of the whole training
            self.recent.append(event)
            if time.monotonic() - self.drawn_at >= REDRAW_SECONDS:
                self.draw(self.status_line())
            return
        self.steps.append(event)
        due = self.log_every and event["step"] % self.log_every == 0
        if due or time.monotonic() - self.written_at >= EVERY_SECONDS:
            self.write_line(f"step {event['step']}: {self.training_text()}")

    def training_text(self) -> str:
        """Return the text about the steps since the last line."""
        steps, self.steps = self.steps, []
        text, self.before = _measured(self.before, steps), steps[-1]
        return f"training {text}"

    def status_line(self) -> str:
        """Return the live line."""
        first, *others = self.recent
        last = self.recent[-1]
        measured = _measured(first, others) if others else _measured(START, [first])
        steps_text = f" of {self.steps_left:,}" if self.steps_left else ""
        processes = int(os.environ.get("WORLD_SIZE") or 1)
        rank = f"rank {os.environ.get('RANK', '0')} of {processes}" if processes > 1 else ""
        begin = " ".join(filter(None, (self.name, rank)))
        share = f"step {last['step']:,}{steps_text} ({last['progress']:.0%})"
        return f"{begin}: {share}, {measured}" if begin else f"{share}, {measured}"

    def write_line(self, text: str) -> None:
        """Write a line, above the live one."""
        below = self.drawn
        self.draw("")
        self.stream.write(f"{visible(text)}\n")
        self.stream.flush()
        self.written_at = time.monotonic()
        self.draw(below)

    def draw(self, text: str) -> None:
        """Replace the live line by ``text``."""
        if text != self.drawn:
            width = shutil.get_terminal_size().columns - 1  # a full line would wrap
            self.stream.write(f"\r\x1b[K{text[:width]}")
            self.stream.flush()
        self.drawn, self.drawn_at = text, time.monotonic()


def _measured(before: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """Return the means of ``steps``, and the time left at their pace since ``before``."""
    from fastlm.pipeline.text import seconds_text

    last = steps[-1]
    loss = statistics.fmean(step["loss"] for step in steps)
    rate = statistics.median(step["tokens_per_second"] for step in steps)
    took, done = (last[key] - before[key] for key in ("seconds", "progress"))
    left = f", {seconds_text((1 - last['progress']) * took / done)} left" if done > 0 else ""
    return f"loss {loss:.4g}, lr {last['lr']:.3g}, {rate:,.0f} tokens/s{left}"
