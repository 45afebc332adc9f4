"""The training loop of all stages. An objective (`fastlm.train.objective`) defines the model and
the data.

A step takes micro-batches from the objective, runs their backward with the global token count,
clips and updates in one pass, and writes one line to metrics.jsonl. A checkpoint records the length
of metrics.jsonl. The same command, started again, truncates the file to that length and continues,
so the file holds every step once. Ctrl-C finishes the running step, saves a checkpoint and reports
its path. With ``async_checkpoints`` a thread writes what `checkpoint_state` copied; code that names
a checkpoint waits for it.

The loop reads the loss back in every step, because a loss that is not finite must stop the run
before it spoils the next checkpoint. A warning about a loss spike
(`fastlm.train.loss_spikes.SpikeDetector`) names the batch.
"""

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fastlm.checkpoint.folder import save_tensors
from fastlm.errors import InputError
from fastlm.files import make_folder, try_lock
from fastlm.memory import keep_freed_memory
from fastlm.model.layers import checkpoint_activations
from fastlm.muon import Muon, muon_groups
from fastlm.optim import AdamW
from fastlm.progress import silent
from fastlm.train.checkpoints import (
    FOLDER,
    BestCheckpoint,
    CheckpointWriter,
    TrainState,
    checkpoint_before,
    checkpoint_path,
    checkpoint_state,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
)
from fastlm.train.distributed import SingleProcess
from fastlm.train.loss_spikes import SpikeDetector
from fastlm.train.metrics import METRICS, trackers
from fastlm.train.objective import DivergedError, Objective
from fastlm.train.options import BUDGET_OPTIONS, SPIKE_OPTIONS, TrainOptions
from fastlm.train.parallel import process_group, wrap_model


class NonFiniteError(DivergedError):
    """Raised when the loss or the gradient is not finite. The message also names the batch."""


class SpikeError(DivergedError):
    """Raised when the loss is far above the previous ones and ``on_spike`` is "stop"."""


class TrainingInterrupted(KeyboardInterrupt):
    """Raised on Ctrl-C, after the training has saved the checkpoint that the message names."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a training. ``seconds`` and ``tokens`` count the whole run, across
    interruptions; ``metrics`` belong to the final weights, the last or the best. ``best_step`` and
    ``best_loss`` belong to the lowest val_loss, where the options save its weights.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    loss: float | None
    metrics: dict[str, float]
    best_step: int | None = None
    best_loss: float | None = None


def train(
    objective: Objective,
    options: TrainOptions,
    run_dir: Path,
    *,
    track=silent,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    on_diverged: Callable[[DivergedError], Any] | None = None,
) -> TrainResult:
    """Train ``objective.trained`` in place to the end of the budget, from the last checkpoint in
    ``run_dir`` if there is one. The model ends with the weights of the last step, or with
    ``keep="best"`` with those of the lowest val_loss. The checkpoint may be from a run with another
    budget. The learning rate then follows the schedule of the new budget, so the rate of a finished
    training rises again.

    Writes metrics.jsonl and checkpoints/ to ``run_dir``; ``on_event`` receives every line of
    metrics as it is written. Under torchrun each process takes a shard of the micro-batches
    (`fastlm.train.distributed`), and rank 0 writes and calls ``on_diverged``. All processes return
    the result. The process keeps its freed memory from here on
    (`fastlm.memory.keep_freed_memory`).

    InputError: the options, a checkpoint of another run, a folder that cannot be written.
    DivergedError: ``on_diverged`` was called with it. TrainingInterrupted: on Ctrl-C.
    LostRankError: another process has ended.
    """
    options.check()
    keep_freed_memory()
    device = next(objective.trained.parameters()).device
    with process_group(device) as world:
        objective.world = world
        try:
            if not world.is_main_process:
                track, on_event = silent, None
            return _Loop(objective, options, Path(run_dir), world).run(track, on_event)
        except DivergedError as error:
            # before this process ends: torchrun then ends the others
            if on_diverged is not None:
                world.on_main_process(partial(on_diverged, error))
            raise
        finally:
            objective.close()
            objective.world = SingleProcess()


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Set the event on the first Ctrl-C (or SIGTERM), and interrupt at once on the second."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread can handle signals
        return

    def handle(number, frame) -> None:
        del number, frame
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Disable gradients and dropout, and preserve the training's random state."""
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        model.train()


class _Loop:
    on_event: Callable[[dict[str, Any]], None] | None = None

    def __init__(
        self, objective: Objective, options: TrainOptions, run_dir: Path, world: SingleProcess
    ):
        self.model, self.objective, self.options = objective.trained, objective, options
        self.run_dir, self.world = run_dir, world
        self.seed = torch.initial_seed()
        self.parallel = wrap_model(self.model, options, world)
        groups = objective.parameter_groups(options.weight_decay)
        optimizer = {"adamw": AdamW, "muon": Muon}[options.optimizer]
        if optimizer is Muon:
            groups = muon_groups(groups, self.model)
        self.lr_factors = [group.pop("lr", 1.0) for group in groups]
        self.optimizer = optimizer(
            groups,
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            master_weights=options.dtype != "float32",
            max_grad_norm=options.max_grad_norm or math.inf,  # measures the norm in any case
        )
        self.optimizer.keep_masters()  # with the bits that the cast to bfloat16 drops
        self.parallel.to(getattr(torch, options.dtype))
        self.model.train()
        if options.checkpoint_activations:
            checkpoint_activations(self.model, options.checkpoint_activations)
        # progress below 0: before the first validation. seconds: of earlier sessions
        self.state = TrainState(
            step=0, tokens=0, seconds=0.0, progress=-1.0, training_seconds=0.0, loss=None,
            last_metrics={}, metrics_bytes=0, objective={}, losses=[], best_step=None,
            best_loss=None,
        )  # fmt: skip
        self.spikes = SpikeDetector(options.spike_factor, options.spike_window)
        self.writer = CheckpointWriter(options.async_checkpoints)
        self.best = BestCheckpoint(
            run_dir / FOLDER, options.saves_best, self.writer, self.parallel, world
        )
        self.saved_step = -1
        self.started = time.perf_counter()
        self.metrics = world.on_main_process(self.open_metrics) or open(os.devnull, "a+b")

    def open_metrics(self) -> BinaryIO:
        """Open metrics.jsonl and lock it until `run` closes it."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            metrics = open(self.run_dir / METRICS, "a+b")
        except OSError as e:
            raise InputError(f"{self.run_dir}: cannot be written: {e.strerror}") from None
        try:
            try_lock(metrics, f"{self.run_dir}: another training is at work in this folder")
        except InputError:
            metrics.close()
            raise
        return metrics

    def run(
        self,
        track: Callable[..., Iterable[None]],
        on_event: Callable[[dict[str, Any]], None] | None,
    ) -> TrainResult:
        """Train to the end of the budget."""
        names = self.options.report_to if self.world.is_main_process else ()
        mirror = trackers(names, self.run_dir, on_event)
        with (
            self.metrics, _deferred_interrupt() as interrupted, self.writer,
            mirror as self.on_event,
        ):  # fmt: skip
            self.resume()
            used, total, unit = self.budget()
            for _ in track(self.ticks(interrupted), "training", total=total - used, unit=unit):
                pass
            self.writer.wait()
            self.stop_if(interrupted)  # also after the last step
            if self.options.keep == "best":
                self.best.load()
            self.parallel.unshard()
            try:
                self.objective.check_pending()
            except DivergedError as error:
                step = self.state.step
                raise self.diverged(
                    DivergedError, str(error), steps=error.steps, step=step
                ) from None
            self.stop_if(interrupted)
        state, seconds = self.state, self.state.training_seconds
        return TrainResult(
            state.step, state.tokens, self.seconds(), state.tokens / seconds if seconds else 0.0,
            state.loss, self.best.metrics or state.last_metrics, self.best.step, self.best.loss,
        )  # fmt: skip

    # the budget

    def seconds(self) -> float:
        return self.state.seconds + time.perf_counter() - self.started

    def progress(self, steps: float = 0, tokens: float = 0) -> float:
        """Return the progress, 0 to 1, after this many more steps and tokens."""
        o = self.options
        seconds = self.seconds() if o.max_seconds is None else self.world.broadcast(self.seconds())
        return o.progress(self.state.step + steps, self.state.tokens + tokens, seconds)

    def budget(self) -> tuple[int, int, str]:
        """Return the used and the total budget, and their unit, which is a tick of the progress
        bar: a second, a thousand tokens or a step.
        """
        o = self.options
        if o.max_seconds is not None:
            used, total, unit = self.seconds(), o.max_seconds, "s"
        elif o.max_tokens is not None:
            used, total, unit = self.state.tokens / 1000, o.max_tokens / 1000, "k tokens"
        else:
            used, total, unit = self.state.step, o.max_steps or 0, "steps"
        return min(int(used), int(total)), int(total), unit

    def ticks(self, interrupted: threading.Event) -> Iterator[None]:
        """Train to the end or to an interrupt. Yield once per tick of the used budget."""
        ticks = self.budget()[0]
        while self.state.progress < 1.0:
            self.advance()
            if self.world.any(interrupted.is_set()):
                return
            while ticks < self.budget()[0]:
                ticks += 1
                yield

    # a step

    def advance(self) -> None:
        """Run one step, and the validation, sample and checkpoint that are due after it."""
        o, state = self.options, self.state
        if o.async_checkpoints:
            self.writer.check()
        start = time.perf_counter()
        position = self.objective.position()
        self.objective.steps_left = None if o.max_steps is None else o.max_steps - state.step
        try:
            batches = self.objective.next_batches(o.micro_batches(self.progress()))
        except DivergedError as error:
            raise self.diverged(DivergedError, str(error), steps=error.steps) from None
        num_items = sum(self.objective.num_items(batch) for batch in batches)
        tokens = sum(self.objective.tokens(batch) for batch in batches)
        lr = o.learning_rate(self.progress(0.5, 0.5 * tokens))
        loss, scalars = self.gradients(batches, num_items)
        for group, factor in zip(self.optimizer.param_groups, self.lr_factors, strict=True):
            group["lr"] = lr * factor
        if not math.isfinite(loss):
            raise self.diverged(NonFiniteError, f"the loss is {loss}", position)
        spike = self.on_spike(loss, position)
        norm = 0.0  # before clipping; 0 for a skipped step
        if "skipped" not in spike:
            self.optimizer.step()
            assert self.optimizer.grad_norm is not None  # max_grad_norm is never None here
            norm = float(self.optimizer.grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(norm):
            raise self.diverged(NonFiniteError, f"the gradient norm is {norm}", position)
        seconds = time.perf_counter() - start
        state.step, state.tokens, state.loss = state.step + 1, state.tokens + tokens, loss
        state.training_seconds += seconds
        line = {
            "step": state.step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": state.tokens,
            "tokens_per_second": tokens / seconds, "seconds": self.seconds(),
            "progress": self.progress(), **spike,
        }  # fmt: skip
        if duplicates := line.keys() & scalars.keys():
            raise ValueError(
                f"scalars: expected names that the loop does not use, got {min(duplicates)!r}"
            )
        self.log({**line, **scalars})
        self.evaluate_if_due()
        if state.progress >= 1.0 or state.step % o.save_steps == 0:
            self.save()

    def gradients(self, batches: list[Any], num_items: int) -> tuple[float, dict[str, float]]:
        """Accumulate the gradients of the step's micro-batches. Return its loss and scalars."""
        world, objective = self.world, self.objective
        world.seed(self.seed, self.state.step)
        shard, filler = world.split_batches(batches)
        total: Tensor | float = 0.0
        for remaining, batch in zip(reversed(range(len(shard))), shard, strict=True):
            loss = self.parallel.backward(
                partial(objective.loss, batch, num_items), last=not remaining and filler is None
            )
            total = total + loss.float()
        measurements = objective.measurements()  # without the filler's
        if filler is not None:
            self.parallel.backward(
                partial(objective.loss, filler, num_items), last=True, factor=0.0
            )
        losses, parts = zip(*world.gather((float(total), measurements)))
        # fsum raises on inf - inf
        loss = math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses)
        return loss, objective.scalars(parts)

    def on_spike(self, loss: float, position: str) -> dict[str, Any]:
        """Apply `on_spike` if the loss is a spike. Return its part of the step's line."""
        spike = self.spikes.check(loss)
        if spike is None:
            return {}
        policy = self.options.on_spike
        if policy == "stop":
            raise self.diverged(SpikeError, spike, position)
        skipped = {"skipped": True} if policy == "skip" else {}
        if self.on_event is not None:
            suffix = "; the step is skipped" if skipped else ""
            message = f"step {self.state.step + 1}: {spike}; batch: {position}{suffix}"
            self.on_event({"warning": message})
        return {"spike": position, **skipped}

    def stop_if(self, interrupted: threading.Event) -> None:
        """Raise TrainingInterrupted in all processes if any was interrupted, after the checkpoint
        of this step is saved.
        """
        if not self.world.any(interrupted.is_set()):
            return
        step = self.state.step
        if self.saved_step != step:
            self.save()
        self.writer.wait()
        self.world.any(False)  # barrier: torchrun ends the others when one process ends
        path = checkpoint_path(self.run_dir, step)
        raise TrainingInterrupted(f"stopped after step {step}; saved in {path}")

    def diverged(
        self,
        error_type: type[DivergedError],
        reason: str,
        position: str = "",
        steps: int = 0,
        step: int | None = None,
    ) -> DivergedError:
        """Return the error of ``step`` (default: the running one), of which the last ``steps``
        cannot be trusted.
        """
        now = self.state.step

        def good_checkpoint() -> Path | None:
            self.writer.wait()
            return checkpoint_before(self.run_dir, now - steps)

        last = self.world.broadcast(self.world.on_main_process(good_checkpoint))
        batch = f"batch: {position}; " if position else ""
        error = error_type(
            f"step {now + 1 if step is None else step}: {reason}; {batch}last good checkpoint:"
            f" {last or 'none'}",
            steps=steps,
        )
        error.checkpoint = last
        return error

    def evaluate_if_due(self) -> None:
        """Run the validations and samples that are due between the last step and now. The budget
        does not include their time, because they would use it up on a slow machine. When it did, a
        validation before the first step moved that step into the middle of the warm-up and cost the
        demo 0.1 bits per byte.
        """
        start = time.perf_counter()
        o, state, before = self.options, self.state, self.state.progress
        state.progress = self.progress()

        def due(moments: Iterable[float]) -> bool:
            return any(before < moment <= state.progress for moment in moments)

        if o.validations and due(i / o.validations for i in range(o.validations + 1)):
            with _evaluating(self.model):
                metrics = self.parallel.run(self.objective.validate)
            state.last_metrics = self.world.broadcast(metrics)
            self.log({"step": state.step, **state.last_metrics})
            self.best.update(state.step, state.last_metrics, self.model)
        if due(o.sample_at):
            with _evaluating(self.model), self.parallel.full_parameters():
                text = self.objective.sample() if self.world.is_main_process else None
            if text is not None:
                self.log({"step": state.step, "sample": text, "progress": state.progress})
        self.started += time.perf_counter() - start

    # output

    def log(self, event: dict[str, Any]) -> None:
        if not self.world.is_main_process:
            return
        try:
            self.metrics.write(json.dumps(event, ensure_ascii=False).encode() + b"\n")
            self.metrics.flush()
        except OSError as e:
            raise InputError(f"{self.run_dir / METRICS}: cannot be written: {e.strerror}") from None
        if self.on_event is not None:
            self.on_event(event)

    def identity(self) -> dict[str, Any]:
        shapes = str([(name, tuple(p.shape)) for name, p in self.model.named_parameters()])
        digest = hashlib.sha256(shapes.encode()).hexdigest()[:16]
        parts = {**self.options.identity(), **self.objective.identity(), "parameters": digest}
        return json.loads(json.dumps(parts))  # as a checkpoint stores them

    def resume(self) -> None:
        """Load the last checkpoint, or start from the beginning if there is none."""
        if self.world.is_main_process:
            prune_checkpoints(
                self.run_dir, self.options.save_total_limit + 1
            )  # one may be a trusted one
        checkpoints = self.world.broadcast(list_checkpoints(self.run_dir))
        if checkpoints:
            self.state = state = load_checkpoint(
                checkpoints[-1], self.model, self.optimizer, self.identity(), self.world,
                may_differ=(*BUDGET_OPTIONS, *SPIKE_OPTIONS, "keep"),
            )  # fmt: skip
            self.objective.load_state_dict(state.objective)
            self.spikes.losses = state.losses[-self.options.spike_window :]
            self.best.resume(state.best_step, state.best_loss)
            self.saved_step = state.step
        self.world.on_main_process(
            partial(self.truncate_metrics, self.state.metrics_bytes, checkpoints)
        )
        self.started = time.perf_counter()
        if checkpoints:
            step = self.state.step
            if self.world.is_main_process:  # a kill may have prevented it
                prune_checkpoints(
                    self.run_dir,
                    self.options.save_total_limit,
                    step - self.objective.pending_steps(),
                )
            # smaller under a larger budget
            self.state.progress = min(self.state.progress, self.progress())
        else:
            self.best.prune(None)
            self.evaluate_if_due()

    def truncate_metrics(self, length: int, checkpoints: list[Path]) -> None:
        """Remove the lines that were written after the last of these checkpoints."""
        size = self.metrics.seek(0, os.SEEK_END)
        if size < length:
            raise InputError(
                f"{self.run_dir / METRICS}: expected the {length} bytes that {checkpoints[-1].name}"
                f" records, got {size}; delete {checkpoints[-1].parent} to start again"
            )
        self.metrics.truncate(length)

    def save(self) -> None:
        """Write the checkpoint of this step."""
        self.saved_step = step = self.state.step
        if not (self.world.is_main_process or self.parallel.sharded):
            self.world.on_main_process(lambda: None)
            return
        if self.world.is_main_process:
            os.fsync(self.metrics.fileno())
        state = replace(
            self.state, seconds=self.seconds(), metrics_bytes=self.metrics.tell(),
            objective=self.objective.state_dict(), losses=self.spikes.losses,
            best_step=self.best.step, best_loss=self.best.loss,
        )  # fmt: skip
        tensors, metadata = checkpoint_state(
            self.model, self.optimizer, state, self.identity(), copy=self.options.async_checkpoints
        )
        path, trusted = checkpoint_path(self.run_dir, step), step - self.objective.pending_steps()

        def finish() -> None:
            if self.world.is_main_process:
                prune_checkpoints(self.run_dir, self.options.save_total_limit, trusted)
            self.best.prune(state.best_step)

        def write() -> None:
            make_folder(path.parent)
            save_tensors(path, tensors, metadata)
            finish()

        if self.parallel.sharded:
            from fastlm.train.sharded_checkpoints import save_sharded

            save_sharded(path, tensors, metadata, self.world)
            finish()
        else:
            self.world.on_main_process(lambda: self.writer.submit(write))
