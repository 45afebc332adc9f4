"""What runs and trainings report to the user on stderr, one line each."""

import statistics
from typing import Any

import typer


class EventLines:
    """Print stages, validations and samples. The steps since the last line (mean loss, median
    speed, time left at their pace) get a line at every multiple of `every`; without `every` they
    are appended to the line of a validation.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self.start()

    def start(self) -> None:
        """Forget the previous training."""
        self.before: dict[str, Any] = {"seconds": 0.0, "progress": 0.0}
        self.steps: list[dict[str, Any]] = []

    def __call__(self, event: dict[str, Any]) -> None:
        if "stage" in event:
            took = f" in {event['seconds']:.1f} s" if "seconds" in event else ""
            if "path" in event:
                took = f", it no longer fits; what was trained is now in {event['path']}"
            typer.echo(f"{event['stage']}: {event['state']}{took}", err=True)
            self.start()
        elif "warning" in event:
            typer.echo(event["warning"], err=True)
        elif "loss" in event:
            self.steps.append(event)
            if self.every and event["step"] % self.every == 0:
                typer.echo(f"step {event['step']}: {self._training()}", err=True)
        elif "val_loss" in event:
            training = "" if self.every or not self.steps else f"; {self._training()}"
            bits = (
                f", {event['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in event else ""
            )
            typer.echo(
                f"step {event['step']}: held-out loss {event['val_loss']:.4f}{bits}{training}",
                err=True,
            )
        elif "sample" in event:
            typer.echo(f"step {event['step']} writes: {event['sample']!r}", err=True)
        else:  # a validation of another kind
            values = [f"{key} {value:.4g}" for key, value in event.items() if key != "step"]
            typer.echo(f"step {event['step']}: {', '.join(values)}", err=True)

    def _training(self) -> str:
        from fastlm.runs.text import seconds_text

        last = self.steps[-1]
        loss = statistics.fmean(step["loss"] for step in self.steps)
        rate = statistics.median(step["tokens_per_second"] for step in self.steps)
        took, done = (last[key] - self.before[key] for key in ("seconds", "progress"))
        left = (1 - last["progress"]) * took / done
        self.before, self.steps = last, []
        return (
            f"training loss {loss:.4g}, lr {last['lr']:.3g}, {rate:,.0f} tokens/s,"
            f" {seconds_text(left)} left"
        )
