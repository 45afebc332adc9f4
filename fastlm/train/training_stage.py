"""What all stages that train share: the loop, what they leave, the result and the report."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.errors import InputError
from fastlm.pipeline.stage import Job, Part, Stage
from fastlm.torchrun import is_main_process
from fastlm.train.best import taken
from fastlm.train.metrics import METRICS, read_metrics
from fastlm.train.options import OPTIMIZERS, TrainOptions

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.objective import DivergedError, Objective

MODEL = "model"


@dataclass
class Training:
    """A training that can begin.

    ``model``: what is saved. ``source``: the folder of the model it began as. ``facts``: what the
    result says of the data and the model. ``on_diverged``: see `fastlm.train.loop.train`.
    """

    model: Any
    tokenizer: "Tokenizer | None"
    objective: "Objective"
    options: TrainOptions
    facts: dict[str, Any]
    source: Path | None = None
    on_diverged: "Callable[[DivergedError], Any] | None" = None


@dataclass(frozen=True)
class TrainingStage(TrainOptions, Stage):
    """A stage that trains a model. A subclass defines `prepare`, and for the user `outcome` and
    `section`.
    """

    leaves = {"model": MODEL}
    scratch = ("checkpoints",)
    result = {
        "steps": int, "tokens": int, "tokens_per_second": float, "loss": float | None,
        "metrics": dict, "parameters": int, "used_seconds": float, "load": str,
    }  # fmt: skip

    seed: Annotated[int, "Seed of the order of the data"] = 0

    def check(self) -> None:
        super().check()
        self.check_seed()

    def check_seed(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed: wanted 0 or more, got {self.seed}")

    def prepare(self, job: Job) -> Training:
        """Load the model and read the data."""
        raise NotImplementedError

    def finish(self, training: Training) -> dict[str, Any]:
        """Return what the result says of the trained model, which is saved afterwards."""
        del training
        return {}

    def save_trained(self, model: Any, folder: Path, source: Path | None) -> None:
        """Write the model to ``folder``; it began as the one in ``source``."""
        del source
        model.save_pretrained(folder)

    def save(self, training: Training, folder: Path) -> None:
        """Write the model and its tokenizer."""
        self.save_trained(training.model, folder, training.source)
        if training.tokenizer is not None:
            training.tokenizer.save(folder)

    def run(self, job: Job) -> dict[str, Any]:
        import torch

        from fastlm.train.loop import train

        training = self.prepare(job)
        torch.manual_seed(self.seed)
        load = os.getloadavg()[0]
        done = train(
            training.objective, training.options, job.out, track=job.track,
            on_event=job.on_event, on_diverged=training.on_diverged,
        )  # fmt: skip
        if not is_main_process():
            return {}
        measured = self.finish(training)
        self.save(training, job.out / MODEL)
        return {**done.facts(load), **training.facts, **measured}

    def outcome(self, result: Mapping[str, Any], job: Job) -> tuple[str, list[str]]:
        """Return what was learnt from, and figures of the end, for the user."""
        del job
        return "", [loss_text(result), f"{result['tokens_per_second']:,.0f} tokens/s"]

    def told(self, result: Mapping[str, Any], job: Job) -> str:
        data, figures = self.outcome(result, job)
        parts = [*([data] if data else []), f"{result['steps']} steps", *figures]
        return f"{', '.join(parts)}{taken(result, self.take)}: {job.out / MODEL}"

    def section(self, job: Job, result: Mapping[str, Any], metrics: list[dict[str, Any]]) -> Part:
        """Return the stage's part of report.html, without what `report` adds for all of them."""
        raise NotImplementedError

    def report(self, job: Job, result: Mapping[str, Any]) -> Part:
        from fastlm.pipeline.text import seconds_text

        metrics = read_metrics(job.out / METRICS)
        part = self.section(job, result, metrics)
        part.facts = {
            **part.facts,
            "schedule": f"{OPTIMIZERS[self.optimizer]}, {self.schedule}, peak {self.lr},"
            f" weight decay {self.weight_decay}, {self.dtype}",
            "time": f"{seconds_text(result['used_seconds'])}, steps and checkpoints",
            "machine load": result["load"],
        }
        if part.template == Part.template:
            part.template = "training.html.jinja"
            part.values = {
                "samples": [m for m in metrics if "sample" in m],
                "how": self.sampled(result),
            }
        return part

    def sampled(self, result: Mapping[str, Any]) -> str:
        """Return how the samples of the report were made."""
        return f"Answers to “{shorten(result['prompt'], 200)}”, at temperature 0."


def loss_text(result: Mapping[str, Any]) -> str:
    return "no loss" if result["loss"] is None else f"loss {result['loss']:.4f}"
