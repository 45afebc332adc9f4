"""The training loop, one for every stage. An objective (`fastlm.train.objective`) defines what is
trained and on what.

A step is: micro-batches of the objective, backward with the global token count, clip and update in
one pass, one line in metrics.jsonl. A checkpoint records the length of metrics.jsonl. Starting the
same command again truncates the file there and continues, so that it holds every step once. Ctrl-C
ends the running step, saves a checkpoint and reports where. With ``async_checkpoints`` a thread
writes what `checkpoint_state` copied; whoever names a checkpoint waits for it.

The loss is read back every step: a loss that is not finite has to stop the run before it spoils the
next checkpoint. A spike (`fastlm.train.loss_spikes.SpikeDetector`) is named with its batch.
"""

import fcntl
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
from fastlm.files import make_folder
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
from fastlm.train.parallel import parallel, process_group


class NonFiniteError(DivergedError):
    """The loss or the gradient is not finite. The message also names the batch."""


class SpikeError(DivergedError):
    """The loss is far above those before it, and ``on_spike`` is "stop"."""


class TrainingInterrupted(KeyboardInterrupt):
    """Raised on Ctrl-C, after the checkpoint that its message names was saved."""


@dataclass(frozen=True)
class TrainResult:
    """``seconds`` and ``tokens`` are those of the whole run, across interruptions; ``metrics`` are
    those of the weights that are left, the last or the best. ``best_step`` and ``best_loss`` are of
    the lowest val_loss, where the options keep its weights.
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
    ``run_dir`` if there is one. It then has the weights of the last step, or with ``keep="best"``
    those of the lowest val_loss. The checkpoint may be from a run with another budget. From here on
    the learning rate follows the schedule of the new budget, so the rate of a finished training
    rises again.

    Writes metrics.jsonl and checkpoints/ to ``run_dir``; ``on_event`` receives every line of
    metrics as it is written. InputError: options, a checkpoint of another run, a folder that cannot
    be written. DivergedError, with which ``on_diverged`` was called; TrainingInterrupted. Under
    torchrun each process takes a share of the micro-batches (`fastlm.train.distributed`), rank 0
    writes and calls ``on_diverged``, and LostRankError says that another one has ended. All of them
    return the result. The process keeps its freed memory from here on
    (`fastlm.memory.keep_freed_memory`).
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
            # before a process leaves: torchrun ends the others when the first one does
            if on_diverged is not None:
                world.on_main_process(partial(on_diverged, error))
            raise
        finally:
            objective.world = SingleProcess()


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) only sets the event; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals belong to the main thread
        return

    def ask(number, frame) -> None:
        del number, frame
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Disable gradients and dropout, and leave training's random numbers untouched."""
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
        self.parallel = parallel(self.model, options, world)
        groups = objective.parameter_groups(options.weight_decay)
        kind = {"adamw": AdamW, "muon": Muon}[options.optimizer]
        if kind is Muon:
            groups = muon_groups(groups, self.model)
        self.rates = [group.pop("lr", 1.0) for group in groups]  # factors of the scheduled rate
        self.optimizer = kind(
            groups,
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            master_weights=options.dtype != "float32",
            max_grad_norm=options.max_grad_norm or math.inf,  # the norm is measured either way
        )
        self.optimizer.keep_masters()  # the bits that bfloat16 would cut off a new model's weights
        self.parallel.to(getattr(torch, options.dtype))
        self.model.train()
        if options.checkpoint_activations:
            checkpoint_activations(self.model, options.checkpoint_activations)
        # done below 0: nothing happened yet. seconds: of earlier sessions
        self.state = TrainState(
            step=0, tokens=0, seconds=0.0, done=-1.0, training_seconds=0.0, loss=None,
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
        """Open metrics.jsonl, and lock it until it is closed, by `run`."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            metrics = open(self.run_dir / METRICS, "a+b")
        except OSError as e:
            raise InputError(f"{self.run_dir}: cannot be written: {e.strerror}") from None
        try:
            fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            metrics.close()
            raise InputError(
                f"{self.run_dir}: another training is at work in this folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        return metrics

    def run(
        self,
        track: Callable[..., Iterable[None]],
        on_event: Callable[[dict[str, Any]], None] | None,
    ) -> TrainResult:
        """Train to the end of the budget."""
        names = self.options.report_to if self.world.is_main_process else ()
        mirrored = trackers(names, self.run_dir, on_event)
        with (
            self.metrics, _deferred_interrupt() as interrupted, self.writer,
            mirrored as self.on_event,
        ):  # fmt: skip
            self.begin()
            used, total, unit = self.budget()
            for _ in track(self.ticks(interrupted), "training", total=total - used, unit=unit):
                pass
            self.writer.wait()
            self.leave_if(interrupted)  # after the last step too: no more was wanted
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
            self.leave_if(interrupted)
        state, seconds = self.state, self.state.training_seconds
        return TrainResult(
            state.step, state.tokens, self.seconds(), state.tokens / seconds if seconds else 0.0,
            state.loss, self.best.metrics or state.last_metrics, self.best.step, self.best.loss,
        )  # fmt: skip

    # the budget

    def seconds(self) -> float:
        return self.state.seconds + time.perf_counter() - self.started

    def progress(self, steps: float = 0, tokens: float = 0) -> float:
        """Return the progress after this many more steps and tokens."""
        o = self.options
        seconds = self.seconds() if o.max_seconds is None else self.world.broadcast(self.seconds())
        return o.progress(self.state.step + steps, self.state.tokens + tokens, seconds)

    def budget(self) -> tuple[int, int, str]:
        """Return what is used of the budget, the whole, and their unit, a tick of the progress
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
        """Train to the end or to an interrupt. Yield once per tick of the budget that is used."""
        ticks = self.budget()[0]
        while self.state.done < 1.0:
            self.advance()
            if self.world.any(interrupted.is_set()):
                return
            while ticks < self.budget()[0]:
                ticks += 1
                yield

    # a step

    def advance(self) -> None:
        """Run one step and what is due after it."""
        o, state = self.options, self.state
        if o.async_checkpoints:
            self.writer.check()
        began = time.perf_counter()
        position = self.objective.position()
        try:
            batches = self.objective.next_batches(o.micro_batches(self.progress()))
        except DivergedError as error:
            raise self.diverged(DivergedError, str(error), steps=error.steps) from None
        num_items = sum(self.objective.num_items(batch) for batch in batches)
        tokens = sum(self.objective.tokens(batch) for batch in batches)
        lr = o.learning_rate(self.progress(0.5, 0.5 * tokens))
        loss, scalars = self.gradients(batches, num_items)
        for group, factor in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * factor
        if not math.isfinite(loss):
            raise self.diverged(NonFiniteError, f"the loss is {loss}", position)
        spike = self.on_spike(loss, position)
        norm = 0.0  # before clipping; of a skipped step
        if "skipped" not in spike:
            self.optimizer.step()
            assert self.optimizer.grad_norm is not None  # max_grad_norm is never None here
            norm = float(self.optimizer.grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(norm):
            raise self.diverged(NonFiniteError, f"the gradient norm is {norm}", position)
        took = time.perf_counter() - began
        state.step, state.tokens, state.loss = state.step + 1, state.tokens + tokens, loss
        state.training_seconds += took
        line = {
            "step": state.step, "loss": loss, "lr": lr, "grad_norm": norm,
            "tokens": state.tokens, "tokens_per_second": tokens / took, "seconds": self.seconds(),
            "progress": self.progress(), **spike,
        }  # fmt: skip
        if taken := line.keys() & scalars.keys():
            raise ValueError(f"scalars: expected names that the loop has not, got {min(taken)!r}")
        self.log({**line, **scalars})
        self.moments()
        if state.done >= 1.0 or state.step % o.save_steps == 0:
            self.save()

    def gradients(self, batches: list[Any], num_items: int) -> tuple[float, dict[str, float]]:
        """Add up the gradients of the step's micro-batches. Return its loss and its scalars."""
        world, objective = self.world, self.objective
        world.seed(self.seed, self.state.step)
        mine, filler = world.split_batches(batches)
        total: Tensor | float = 0.0
        for left, batch in zip(reversed(range(len(mine))), mine, strict=True):
            loss = self.parallel.backward(
                partial(objective.loss, batch, num_items), last=not left and filler is None
            )
            total = total + loss.float()
        measured = objective.measurements()  # without the filler's
        if filler is not None:
            self.parallel.backward(
                partial(objective.loss, filler, num_items), last=True, factor=0.0
            )
        losses, parts = zip(*world.gather((float(total), measured)))
        # fsum refuses inf - inf
        loss = math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses)
        return loss, objective.scalars(parts)

    def on_spike(self, loss: float, position: str) -> dict[str, Any]:
        """Do what `on_spike` says where the loss is a spike. Return what the step's line says."""
        what = self.spikes.check(loss)
        if what is None:
            return {}
        policy = self.options.on_spike
        if policy == "stop":
            raise self.diverged(SpikeError, what, position)
        skipped = {"skipped": True} if policy == "skip" else {}
        if self.on_event is not None:
            done = "; the step is skipped" if skipped else ""
            message = f"step {self.state.step + 1}: {what}; batch: {position}{done}"
            self.on_event({"warning": message})
        return {"spike": position, **skipped}

    def leave_if(self, interrupted: threading.Event) -> None:
        """Raise TrainingInterrupted in all processes if one was, with the checkpoint of
        this step.
        """
        if not self.world.any(interrupted.is_set()):
            return
        step = self.state.step
        if self.saved_step != step:
            self.save()
        self.writer.wait()
        self.world.any(False)  # none leaves before it is written: torchrun would end the others
        path = checkpoint_path(self.run_dir, step)
        raise TrainingInterrupted(f"stopped after step {step}; saved in {path}")

    def diverged(
        self,
        kind: type[DivergedError],
        what: str,
        position: str = "",
        steps: int = 0,
        step: int | None = None,
    ) -> DivergedError:
        """The error of ``step`` (the one that runs), after ``steps`` that cannot be trusted."""
        now = self.state.step

        def good() -> Path | None:
            self.writer.wait()
            return checkpoint_before(self.run_dir, now - steps)

        last = self.world.broadcast(self.world.on_main_process(good))  # others may look too early
        batch = f"batch: {position}; " if position else ""
        error = kind(
            f"step {now + 1 if step is None else step}: {what}; {batch}last good checkpoint:"
            f" {last or 'none'}",
            steps=steps,
        )
        error.good = last
        return error

    def moments(self) -> None:
        """Run the validations and samples that fall between the last step and now. Their time does
        not count towards the budget, which they would use up on a slow machine. When it did count,
        a validation before the first step moved that step into the middle of the warm-up and cost
        the demo 0.1 bits per byte.
        """
        began = time.perf_counter()
        o, state, before = self.options, self.state, self.state.done
        state.done = self.progress()

        def due(moments: Iterable[float]) -> bool:
            return any(before < moment <= state.done for moment in moments)

        if o.validations and due(i / o.validations for i in range(o.validations + 1)):
            with _evaluating(self.model):
                metrics = self.parallel.run(self.objective.validate)
            state.last_metrics = self.world.broadcast(metrics)
            self.log({"step": state.step, **state.last_metrics})
            self.best.offer(state.step, state.last_metrics, self.model)
        if due(o.sample_at):
            with _evaluating(self.model), self.parallel.full_parameters():
                text = self.objective.sample() if self.world.is_main_process else None
            if text is not None:
                self.log({"step": state.step, "sample": text, "progress": state.done})
        self.started += time.perf_counter() - began

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
        return json.loads(json.dumps(parts))  # as a checkpoint stores it

    def begin(self) -> None:
        """Load the last checkpoint; start from the beginning if there is none."""
        if self.world.is_main_process:
            prune_checkpoints(
                self.run_dir, self.options.save_total_limit + 1
            )  # one may be a trusted one
        found = self.world.broadcast(list_checkpoints(self.run_dir))
        if found:
            self.state = state = load_checkpoint(
                found[-1], self.model, self.optimizer, self.identity(), self.world,
                may_differ=(*BUDGET_OPTIONS, *SPIKE_OPTIONS, "keep"),
            )  # fmt: skip
            self.objective.load_state_dict(state.objective)
            self.spikes.losses = state.losses[-self.options.spike_window :]
            self.best.resume(state.best_step, state.best_loss)
            self.saved_step = state.step
        self.world.on_main_process(partial(self.cut_metrics, self.state.metrics_bytes, found))
        self.started = time.perf_counter()
        if found:
            step = self.state.step
            if self.world.is_main_process:  # a kill between a checkpoint's write and the deletions
                prune_checkpoints(
                    self.run_dir,
                    self.options.save_total_limit,
                    step - self.objective.pending_steps(),
                )
            # less under a larger budget
            self.state.done = min(self.state.done, self.progress())
        else:
            self.best.prune(None)
            self.moments()

    def cut_metrics(self, length: int, found: list[Path]) -> None:
        """Remove the lines that were written after the last of these checkpoints."""
        have = self.metrics.seek(0, os.SEEK_END)
        if have < length:
            raise InputError(
                f"{self.run_dir / METRICS}: expected the {length} bytes that {found[-1].name}"
                f" continues from, got {have}; delete {found[-1].parent} to start again"
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
        tensors, rest = checkpoint_state(
            self.model, self.optimizer, state, self.identity(), copy=self.options.async_checkpoints
        )
        path, trusted = checkpoint_path(self.run_dir, step), step - self.objective.pending_steps()

        def finish() -> None:
            if self.world.is_main_process:
                prune_checkpoints(self.run_dir, self.options.save_total_limit, trusted)
            self.best.prune(state.best_step)

        def write() -> None:
            make_folder(path.parent)
            save_tensors(path, tensors, rest)
            finish()

        if self.parallel.sharded:
            from fastlm.train.sharded_checkpoints import save_sharded

            save_sharded(path, tensors, rest, self.world)
            finish()
        else:
            self.world.on_main_process(lambda: self.writer.submit(write))
