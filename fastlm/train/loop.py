"""The training loop, one for every stage. An objective (`fastlm.train.objective`) defines what is
trained and on what.

A step is: micro-batches of the objective, backward with the global token count, clip and update in
one pass, one line in metrics.jsonl. A checkpoint records the length of metrics.jsonl. Starting the
same command again truncates the file there and continues, so that it holds every step once. Ctrl-C
ends the running step, saves a checkpoint and reports where. With ``async_checkpoints`` a thread
writes what `collect` copied; whoever names a checkpoint waits for it.

The loss is read back every step: a loss that is not finite has to stop the run before it spoils the
next checkpoint. A spike (`fastlm.train.loss_spikes`) is named with its batch.
"""

import fcntl
import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fastlm.errors import InputError
from fastlm.memory import keep_freed_memory
from fastlm.model.layers import checkpoint_activations
from fastlm.muon import Muon, muon_groups
from fastlm.optim import AdamW
from fastlm.progress import silent
from fastlm.train.best import Best
from fastlm.train.checkpoint_writer import CheckpointWriter
from fastlm.train.distributed import SingleProcess, process_group
from fastlm.train.loss_spikes import Spikes
from fastlm.train.metrics import METRICS
from fastlm.train.objective import DivergedError, Objective
from fastlm.train.options import BUDGET, GUARDS, TrainOptions
from fastlm.train.parallel import parallel
from fastlm.train.schedule import due, learning_rate, micro_batches, progress
from fastlm.train.state import (
    FOLDER,
    Progress,
    checkpoint_before,
    checkpoint_path,
    collect,
    list_checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from fastlm.train.trackers import trackers

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class NonFiniteError(DivergedError):
    """The loss or the gradient is not finite. The message also names the batch."""


class SpikeError(DivergedError):
    """The loss is far above those before it, and ``on_spike`` is "stop"."""


class Interrupted(KeyboardInterrupt):
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

    def facts(self, load: float) -> dict[str, Any]:
        """Return what every training stage's result has. ``load``: the machine's when it began."""
        facts = asdict(self)
        facts["used_seconds"] = facts.pop("seconds")  # of all sessions
        now = os.getloadavg()[0]
        return {**facts, "load": f"{load:.1f} when the training began, {now:.1f} when it ended"}


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
    ``run_dir`` if there is one. It then has the weights of the last step, or with ``take="best"``
    those of the lowest val_loss. The checkpoint may be from a run with another budget. From here on
    the learning rate follows the schedule of the new budget, so the rate of a finished training
    rises again.

    Writes metrics.jsonl and checkpoints/ to ``run_dir``; ``on_event`` receives every line of
    metrics as it is written. InputError: options, a checkpoint of another run, a folder that cannot
    be written. DivergedError, with which ``on_diverged`` was called; Interrupted. Under torchrun
    each process takes a share of the micro-batches (`fastlm.train.distributed`), rank 0 writes and
    calls ``on_diverged``, and LostRankError says that another one has ended. All of them return the
    result. The process keeps its freed memory from here on (`fastlm.memory.keep_freed_memory`).
    """
    options.check()
    keep_freed_memory()
    device = next(objective.trained.parameters()).device
    with process_group(device) as world, _among(objective, world), _diverging(world, on_diverged):
        if not world.is_main_process:
            track, on_event = silent, None
        loop = _Loop(objective, options, Path(run_dir), on_event, world)
        names = options.report_to if world.is_main_process else ()
        mirrored = trackers(names, loop.run_dir, on_event)
        with (
            loop.metrics, _deferred_interrupt() as interrupted, loop.writer,
            mirrored as loop.on_event,
        ):  # fmt: skip
            loop.begin()
            ticks = loop.ticks(interrupted)
            total = loop.total_ticks() - loop.used_ticks()
            for _ in track(ticks, "training", total=total, unit=loop.unit()):
                pass
            loop.writer.wait()
            loop.leave_if(interrupted)  # after the last step too: no more was wanted
            if options.take == "best":
                loop.best.take()
            loop.parallel.keep_gathered()
            loop.check_pending()
            loop.leave_if(interrupted)
            return loop.result()


@contextmanager
def _among(objective: Objective, world: SingleProcess) -> Iterator[None]:
    """Context: the objective knows the processes of its training."""
    objective.world = world
    try:
        yield
    finally:
        objective.world = SingleProcess()


@contextmanager
def _diverging(world: SingleProcess, do: Callable[[DivergedError], Any] | None) -> Iterator[None]:
    """Context: rank 0 has called ``do`` with a DivergedError before a process leaves. torchrun ends
    the others when the first one does.
    """
    try:
        yield
    except DivergedError as error:
        if do is not None:
            world.on_first(partial(do, error))
        raise


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
    def __init__(
        self,
        objective: Objective,
        options: TrainOptions,
        run_dir: Path,
        on_event: Callable[[dict[str, Any]], None] | None,
        world: SingleProcess,
    ):
        self.model, self.objective, self.options = objective.trained, objective, options
        self.run_dir, self.on_event, self.world = run_dir, on_event, world
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
        self.parallel.to(DTYPES[options.dtype])
        self.model.train()
        if options.checkpoint_activations:
            checkpoint_activations(self.model, options.checkpoint_activations)
        self.step = self.tokens = 0
        self.used = 0.0  # seconds of earlier sessions
        self.training_seconds = 0.0  # of steps alone: the basis of tokens_per_second
        self.done = -1.0  # progress at the end of the last step; below 0: nothing happened yet
        self.loss: float | None = None
        self.spikes = Spikes(options.spike_factor, options.spike_window)
        self.last_metrics: dict[str, float] = {}
        self.writer = CheckpointWriter(options.async_checkpoints)
        self.best = Best(run_dir / FOLDER, options.keeps_best, self.writer, self.parallel, world)
        self.saved_step = -1
        self.started = time.perf_counter()
        self.metrics = world.on_first(self.open_metrics) or open(os.devnull, "a+b")

    def open_metrics(self) -> BinaryIO:
        """Open metrics.jsonl, and lock it until it is closed, by train()."""
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

    # the budget

    def seconds(self) -> float:
        return self.used + time.perf_counter() - self.started

    def progress(self, steps: float = 0, tokens: float = 0) -> float:
        """Return the progress after this many more steps and tokens."""
        o = self.options
        seconds = self.seconds() if o.max_seconds is None else self.world.from_first(self.seconds())
        return progress(
            self.step + steps, seconds, o.max_steps, o.max_seconds,
            self.tokens + tokens, o.max_tokens,
        )  # fmt: skip

    def finished(self) -> bool:
        return self.done >= 1.0

    def unit(self) -> str:
        """Return the unit of a tick of the progress bar: a second, a thousand tokens or a step."""
        o = self.options
        if o.max_seconds is not None:
            return "s"
        return "steps" if o.max_tokens is None else "k tokens"

    def total_ticks(self) -> int:
        o = self.options
        most = {"s": o.max_seconds, "k tokens": (o.max_tokens or 0) / 1000, "steps": o.max_steps}
        return int(most[self.unit()] or 0)

    def used_ticks(self) -> int:
        used = {"s": self.seconds(), "k tokens": self.tokens / 1000, "steps": self.step}
        return min(int(used[self.unit()]), self.total_ticks())

    def ticks(self, interrupted: threading.Event) -> Iterator[None]:
        """Train to the end or to an interrupt. Yield once per tick of the budget that is used."""
        ticks = self.used_ticks()
        while not self.finished():
            self.advance()
            if self.world.any(interrupted.is_set()):
                return
            while ticks < self.used_ticks():
                ticks += 1
                yield

    # a step

    def advance(self) -> None:
        """Run one step and what is due after it."""
        o = self.options
        self.writer.check()
        began = time.perf_counter()
        position = self.objective.position()
        count = micro_batches(self.progress(), o.accumulate, o.batch_warmup)
        try:
            batches = self.objective.next_batches(count)
        except DivergedError as error:
            raise self.diverged(DivergedError, str(error), steps=error.steps) from None
        num_items = sum(self.objective.num_items(batch) for batch in batches)
        tokens = sum(self.objective.tokens(batch) for batch in batches)
        lr = learning_rate(
            self.progress(0.5, 0.5 * tokens),
            lr=o.lr, schedule=o.schedule, warmup=o.warmup, decay=o.decay, final_lr=o.final_lr,
        )  # fmt: skip
        loss_value, scalars = self.gradients(batches, num_items)
        for group, factor in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * factor
        if not math.isfinite(loss_value):
            raise self.diverged(NonFiniteError, f"the loss is {loss_value}", position)
        found = self.on_spike(loss_value, position)
        norm = self.update(skip="skipped" in found)
        if not math.isfinite(norm):
            raise self.diverged(NonFiniteError, f"the gradient norm is {norm}", position)
        self.step += 1
        self.tokens += tokens
        took = time.perf_counter() - began
        self.training_seconds += took
        self.loss = loss_value
        line = {
            "step": self.step, "loss": loss_value, "lr": lr, "grad_norm": norm,
            "tokens": self.tokens, "tokens_per_second": tokens / took, "seconds": self.seconds(),
            "progress": self.progress(), **found,
        }  # fmt: skip
        if taken := line.keys() & scalars.keys():
            raise ValueError(f"scalars: wanted names that the loop has not, got {min(taken)!r}")
        self.log({**line, **scalars})
        self.moments()
        if self.finished() or self.step % o.checkpoint_every == 0:
            self.save()

    def gradients(self, batches: list[Any], num_items: int) -> tuple[float, dict[str, float]]:
        """Add up the gradients of the step's micro-batches. Return its loss and its scalars."""
        world, objective = self.world, self.objective
        world.seed(self.seed, self.step)
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
        parts = world.gather((float(total), measured))
        losses = [loss for loss, _ in parts]
        # fsum refuses inf - inf
        loss = math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses)
        return loss, objective.scalars([found for _, found in parts])

    def update(self, *, skip: bool) -> float:
        """Clip and step. Return the gradient's norm before clipping; 0 for a skipped step."""
        norm = 0.0
        if not skip:
            self.optimizer.step()
            assert self.optimizer.grad_norm is not None  # max_grad_norm is never None here
            norm = float(self.optimizer.grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def on_spike(self, loss: float, position: str) -> dict[str, Any]:
        """Do what `on_spike` says where the loss is a spike. Return what the step's line says."""
        what = self.spikes.check(loss)
        if what is None:
            return {}
        policy = self.options.on_spike
        if policy == "stop":
            raise self.diverged(SpikeError, what, position)
        if self.on_event is not None:
            done = "; the step is skipped" if policy == "skip" else ""
            told = f"step {self.step + 1}: {what}; batch: {position}{done}"
            self.on_event({"warning": told})
        return {"spike": position, **({"skipped": True} if policy == "skip" else {})}

    def leave_if(self, interrupted: threading.Event) -> None:
        """Raise Interrupted in all processes if one was."""
        if self.world.any(interrupted.is_set()):
            raise Interrupted(f"stopped after step {self.step}; saved in {self.saved()}")

    def check_pending(self) -> None:
        """Check the steps that no later one does."""
        try:
            self.objective.check_pending()
        except DivergedError as error:
            told = self.diverged(DivergedError, str(error), steps=error.steps, step=self.step)
            raise told from None

    def diverged(
        self,
        kind: type[DivergedError],
        what: str,
        position: str = "",
        steps: int = 0,
        step: int | None = None,
    ) -> DivergedError:
        """The error of ``step`` (the one that runs), after ``steps`` that cannot be trusted."""

        def good() -> Path | None:
            self.writer.wait()
            return checkpoint_before(self.run_dir, self.step - steps)

        last = self.world.from_first(self.world.on_first(good))  # others may look too early
        batch = f"batch: {position}; " if position else ""
        error = kind(
            f"step {self.step + 1 if step is None else step}: {what}; {batch}last good checkpoint:"
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
        o, before = self.options, self.done
        self.done = self.progress()
        if due(
            (i / o.validations for i in range(o.validations + 1 if o.validations else 0)),
            before,
            self.done,
        ):
            with _evaluating(self.model):
                metrics = self.parallel.run(self.objective.validate)
            self.last_metrics = self.world.from_first(metrics)
            self.log({"step": self.step, **self.last_metrics})
            self.best.offer(self.step, self.last_metrics, self.model)
        if due(o.sample_at, before, self.done):
            with _evaluating(self.model), self.parallel.gathered():
                text = self.objective.sample() if self.world.is_main_process else None
            if text is not None:
                self.log({"step": self.step, "sample": text, "progress": self.done})
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
            prune(self.run_dir, self.options.keep + 1)  # one may be a trusted one
        found = self.world.from_first(list_checkpoints(self.run_dir))
        length = 0
        if found:
            state = load_checkpoint(
                found[-1], self.model, self.optimizer, self.identity(), self.world,
                may_differ=(*BUDGET, *GUARDS, "take"),
            )  # fmt: skip
            self.objective.load_state_dict(state.objective)
            self.step, self.tokens, self.used = state.step, state.tokens, state.seconds
            self.done, self.loss, self.last_metrics = state.done, state.loss, state.last_metrics
            self.training_seconds = state.training_seconds
            self.spikes.losses = state.losses[-self.options.spike_window :]
            self.best.resume(state.best_step, state.best_loss)
            length, self.saved_step = state.metrics_bytes, self.step
        self.world.on_first(partial(self.cut_metrics, length, found))
        self.started = time.perf_counter()
        if found:
            if self.world.is_main_process:  # a kill between a checkpoint's write and the deletions
                prune(self.run_dir, self.options.keep, self.step - self.objective.pending_steps())
            self.done = min(self.done, self.progress())  # less under a larger budget
        else:
            self.best.prune(None)
            self.moments()

    def cut_metrics(self, length: int, found: list[Path]) -> None:
        """Remove the lines that were written after the last of these checkpoints."""
        have = self.metrics.seek(0, os.SEEK_END)
        if have < length:
            raise InputError(
                f"{self.run_dir / METRICS}: wanted the {length} bytes that {found[-1].name}"
                f" continues from, got {have}; delete {found[-1].parent} to start again"
            )
        self.metrics.truncate(length)

    def saved(self) -> Path:
        """Return the checkpoint of this step; write it if it does not exist."""
        path = checkpoint_path(self.run_dir, self.step)
        if self.saved_step != self.step:
            path = self.save()
        self.writer.wait()
        self.world.any(False)  # none leaves before it is written: torchrun would end the others
        return path

    def save(self) -> Path:
        path = checkpoint_path(self.run_dir, self.step)
        self.saved_step = self.step
        if not (self.world.is_main_process or self.parallel.sharded):
            self.world.on_first(lambda: None)
            return path
        if self.world.is_main_process:
            os.fsync(self.metrics.fileno())
        state = Progress(
            step=self.step, tokens=self.tokens, seconds=self.seconds(), done=self.done,
            training_seconds=self.training_seconds, loss=self.loss,
            last_metrics=self.last_metrics, metrics_bytes=self.metrics.tell(),
            objective=self.objective.state_dict(), losses=self.spikes.losses,
            best_step=self.best.step, best_loss=self.best.loss,
        )  # fmt: skip
        tensors, rest = collect(
            self.model, self.optimizer, state, self.identity(), copy=self.writer.beside
        )
        step, best = self.step, self.best.step
        trusted = step - self.objective.pending_steps()

        def write() -> None:
            save_checkpoint(
                self.run_dir, step, tensors, rest, keep=self.options.keep, trusted=trusted
            )
            self.best.prune(best)

        if self.parallel.sharded:
            from fastlm.train.sharded import save_sharded

            save_sharded(path, tensors, rest, self.world)
            if self.world.is_main_process:
                prune(self.run_dir, self.options.keep, trusted)
            self.best.prune(best)
        else:
            self.world.on_first(lambda: self.writer.submit(write))
        return path

    def result(self) -> TrainResult:
        rate = self.tokens / self.training_seconds if self.training_seconds else 0.0
        metrics = self.best.metrics or self.last_metrics  # of the weights that are left
        return TrainResult(
            self.step, self.tokens, self.seconds(), rate, self.loss, metrics,
            self.best.step, self.best.loss,
        )  # fmt: skip
