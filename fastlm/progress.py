"""Show the progress of long work. Library functions take ``track=silent``, commands pass ``bars``.

``track(iterable, description, total=None, unit="")`` returns an iterable over the same items.
Any other display of progress (a notebook widget, a log line per minute) is a function with the same
signature.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from fastlm.terminal import console

T = TypeVar("T")
Track = Callable[..., Iterable]


def silent(
    iterable: Iterable[T], description: str, total: float | None = None, unit: str = ""
) -> Iterable[T]:
    """Show no progress: the default."""
    del description, total, unit
    return iterable


def bars(
    iterable: Iterable[T], description: str, total: float | None = None, unit: str = ""
) -> Iterator[T]:
    """Show a progress bar on stderr with rate and remaining time.

    ``total`` defaults to ``len(iterable)``.
    """
    from rich import progress as rich

    class Rate(rich.TextColumn):
        def render(self, task):  # type: ignore[override]
            speed = task.finished_speed or task.speed
            self.text_format = f"{speed:,.1f} {unit}/s" if speed and unit != "s" else ""
            return super().render(task)

    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    name, remaining = rich.TextColumn("{task.description}"), rich.TimeRemainingColumn()
    columns = (name, rich.BarColumn(), rich.MofNCompleteColumn(), Rate(""), remaining)
    with rich.Progress(*columns, console=console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        try:
            for item in iterable:
                yield item
                progress.advance(task)
        except BaseException:  # hide the stopped bar: an error is one line on its own
            progress.update(task, visible=False)
            raise
