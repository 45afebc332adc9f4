"""The weights of the lowest ``val_loss``, or of the highest ``val_score``, beside the checkpoints:
``checkpoints/best-<step>``.

A checkpoint records which weights were the best at its step. They are removed only after a later
checkpoint is whole, so a training that was killed finds those of the checkpoint it continues from.
"""

import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.errors import InputError
from fastlm.train.checkpoint_writer import CheckpointWriter
from fastlm.train.distributed import SingleProcess

if TYPE_CHECKING:
    from torch import nn

    from fastlm.train.parallel import SingleDevice

NAME = re.compile(r"best-(\d{8,})")


class Best:
    """``step`` and ``loss`` of the best weights in ``folder``; None: there are none yet."""

    def __init__(
        self,
        folder: Path,
        enabled: bool,
        writer: CheckpointWriter,
        parallel: "SingleDevice",
        world: SingleProcess,
    ):
        self.folder, self.enabled, self.writer = folder, enabled, writer
        self.parallel, self.world = parallel, world
        self.step: int | None = None
        self.loss: float | None = None
        self.metrics: dict[str, float] = {}

    def path(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}"

    def offer(self, step: int, metrics: Mapping[str, float], model: "nn.Module") -> None:
        """Keep the model's weights if its validation is the best so far."""
        from fastlm.checkpoint.folder import save_tensors
        from fastlm.files import make_folder
        from fastlm.train.state import trained_state

        if not self.enabled:
            return
        if "val_loss" in metrics:
            loss = metrics["val_loss"]
        elif "val_score" in metrics:  # of answers: higher is better
            loss = -metrics["val_score"]
        else:
            raise InputError(
                "keep_best: wanted held-out data to validate on, got none; raise heldout, give more"
                " rows or feedback, or do without keep_best and with take = last"
            )
        if not loss < (math.inf if self.loss is None else self.loss):
            return
        make_folder(self.folder)
        path, told, tensors = (
            self.path(step),
            dict(metrics),
            self.parallel.full(trained_state(model)),
        )
        if self.writer.beside:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self.world.on_first(lambda: self.writer.submit(lambda: save_tensors(path, tensors, told)))
        self.step, self.loss = step, loss

    def resume(self, step: int | None, loss: float | None) -> None:
        """Go on from what a checkpoint recorded."""
        if not self.enabled:
            return
        if step is not None and not self.path(step).is_dir():
            raise InputError(
                f"{self.path(step)}: wanted the best weights of the checkpoint that continues, got"
                f" no such folder; delete {self.folder} to start again"
            )
        self.step, self.loss = step, loss
        self.prune(step)

    def prune(self, step: int | None) -> None:
        """Remove all but the weights of ``step``, and the remains of interrupted writes."""
        from fastlm.files import new_name

        if not self.enabled or not self.world.is_main_process or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if NAME.fullmatch(path.name) and (step is None or path != self.path(step)):
                path.rename(new_name(path))
        for stray in self.folder.glob(".best-*"):
            shutil.rmtree(stray, ignore_errors=True)

    def take(self) -> None:
        """Load the best weights in place."""
        from fastlm.checkpoint.folder import load_tensors

        if self.step is None:
            raise InputError(
                "take: wanted keep_best from the start, and a validation, for best; got none"
            )
        tensors, metrics = load_tensors(self.path(self.step))
        self.metrics = dict(metrics)
        self.parallel.load(tensors)  # what is frozen is not in them


def taken(result: Mapping[str, Any], take: str) -> str:
    """Say which weights a stage left, where they are not the last."""
    if take != "best":
        return ""
    name = "val_loss" if "val_loss" in result["metrics"] else "val_score"
    return f", weights of step {result['best_step']} with {name} {result['metrics'][name]:.4f}"
