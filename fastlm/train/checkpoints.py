"""Checkpoints of a run in progress: everything needed to continue to the same losses, bit for bit.

``checkpoints/step-00000200/`` holds the trained parameters, the optimizer, the random state and, as
JSON, step, seconds, position in the data, length of metrics.jsonl and the identity of the run
(options, model, data). A checkpoint is written under a temporary name and renamed; an old one is
renamed before it is deleted. A folder named step-* is therefore whole at any moment. No pickles:
tensors are in safetensors with a checksum, the rest is JSON. `fastlm.train.sharded_checkpoints`
writes those of sharded models.

``checkpoints/best-00000200/`` holds the weights of the lowest ``val_loss`` or the highest
``val_score``. A checkpoint records which were the best at its step. They are removed only after a
later checkpoint is whole, so a training that was killed finds those of the checkpoint it continues
from.
"""

import math
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from fastlm.checkpoint.folder import TENSORS, load_tensors, save_tensors
from fastlm.errors import InputError
from fastlm.files import make_folder, reason, temporary_name
from fastlm.model.quantized_modules import QuantizedEmbedding, QuantizedLinear
from fastlm.schema import Count, Finite, validate
from fastlm.train.distributed import SingleDevice, SingleProcess

FOLDER = "checkpoints"
STEP_NAME, BEST_NAME = re.compile(r"step-(\d{8,})"), re.compile(r"best-(\d{8,})")

# keys of an identity whose values are hashes -> what differs where they do
CONTENT = {
    "parameters": "what is trained (the model, or options of adapters) is",
    "base": "the model is",
    "teacher": "the teacher is",
    "data": "the rows of the data are",
    "heldout": "the held-out rows are",
    "data.data": "the shards are",
}


@dataclass
class TrainState:
    """How far a training has come."""

    step: Count
    tokens: Count
    seconds: Annotated[Finite, Ge(0)]  # of all sessions
    done: Finite  # as `fastlm.train.loop` counts it
    training_seconds: Annotated[Finite, Ge(0)]
    loss: Finite | None
    last_metrics: dict[str, Any]
    metrics_bytes: Count
    objective: dict[str, Any]
    losses: list[Finite]  # of the last steps, for `fastlm.train.loss_spikes.SpikeDetector`
    best_step: int | None  # of `BestCheckpoint`
    best_loss: Finite | None


@dataclass
class PackedOptimizer:
    """The part of an optimizer's state that is not tensors: ``<parameter>.<slot>`` -> value."""

    state: dict[str, Any]
    groups: int


@dataclass
class CheckpointMetadata:
    """The part of a checkpoint that is not tensors."""

    progress: TrainState
    identity: dict[str, Any]
    optimizer: PackedOptimizer


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints, oldest first."""
    folder = run_dir / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        (p for p in found if STEP_NAME.fullmatch(p.name)),
        key=lambda p: int(p.name.removeprefix("step-")),
    )


def checkpoint_before(run_dir: Path, step: int) -> Path | None:
    """Return the newest checkpoint of this step or before it."""
    last = checkpoint_path(run_dir, step).name
    found = [path for path in list_checkpoints(run_dir) if path.name <= last]
    return found[-1] if found else None


def prune_checkpoints(run_dir: Path, keep: int, trusted: int | None = None) -> None:
    """Keep only the newest ``keep`` checkpoints, and the newest one of the step ``trusted`` or
    before it; remove the remains of interrupted writes and deletions.
    """
    folder = run_dir / FOLDER
    spared = None if trusted is None else checkpoint_before(run_dir, trusted)
    for path in list_checkpoints(run_dir)[:-keep]:
        if path == spared:
            continue
        path.rename(temporary_name(path))
    for stray in folder.glob(".step-*"):
        shutil.rmtree(stray, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], PackedOptimizer]:
    """Return ``optimizer.state_dict()`` as flat named tensors and the rest."""
    state = optimizer.state_dict()
    flat = {f"{i}.{name}": v for i, slots in state["state"].items() for name, v in slots.items()}
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    rest = {key: value for key, value in flat.items() if key not in tensors}
    return tensors, PackedOptimizer(rest, len(state["param_groups"]))


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], packed: PackedOptimizer
) -> None:
    """Undo `pack_optimizer`. param_groups stay those of ``optimizer``: their options were compared
    as part of the run identity.
    """
    groups = optimizer.state_dict()["param_groups"]
    if packed.groups != len(groups):
        raise InputError(f"optimizer: expected {len(groups)} parameter groups, got {packed.groups}")
    slots = {f"{index}": {} for group in groups for index in group["params"]}
    for key, value in [*tensors.items(), *packed.state.items()]:
        index, _, name = key.partition(".")
        if index not in slots:
            raise InputError(f"optimizer: expected states of {len(slots)} parameters, got {key!r}")
        slots[index][name] = value
    state = {int(index): named for index, named in slots.items() if named}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's ``state_dict()`` without what training leaves as it is: frozen parameters and
    quantized weights, which the identity of the run stands for.
    """
    frozen = {
        name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            frozen |= {f"{name}.{key}" for key, _ in module.named_buffers(recurse=False)}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def checkpoint_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: TrainState,
    identity: dict[str, Any],
    *,
    copy: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a checkpoint holds: tensors, and the rest as JSON values. ``identity`` is
    JSON-serialisable; so is ``progress.objective``, except for values that are tensors. ``copy``:
    the tensors are copies in memory, which the training does not change.
    """
    optimizer_tensors, packed = pack_optimizer(optimizer)
    kept = {k: v for k, v in progress.objective.items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in progress.objective.items() if k not in kept}
    tensors = {
        **{f"model.{k}": v for k, v in trained_state(model).items()},
        **{f"optimizer.{k}": v for k, v in optimizer_tensors.items()},
        **{f"objective.{k}": v for k, v in kept.items()},
        "rng.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if copy:
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    # asdict copies lists and dicts as well
    return tensors, asdict(CheckpointMetadata(replace(progress, objective=rest), identity, packed))


def _read(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: SingleProcess
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if (path / TENSORS).exists() and not any(hasattr(param, "to_local") for param in params):
        return load_tensors(path)
    from fastlm.train.sharded_checkpoints import (
        load_sharded,  # imports torch.distributed.checkpoint
    )

    own = {f"model.{name}": tensor for name, tensor in trained_state(model).items()}
    return load_sharded(path, own, params, world)


def identity_difference(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Collection[str] = ()
) -> str:
    """Say in which options two identities of runs differ; where in none, what they read that is
    not the same. "" if they are equal."""
    keys = [k for k in dict.fromkeys([*now, *saved]) if saved.get(k) != now.get(k)]
    keys = [k for k in keys if k not in may_differ]
    if options := [k for k in keys if k not in CONTENT]:
        return ", ".join(f"{k} was {saved.get(k)!r:.60}, now {now.get(k)!r:.60}" for k in options)
    return " and ".join(f"{CONTENT[k]} not the same" for k in keys)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    world: SingleProcess,
    *,
    may_differ: Sequence[str] = (),
) -> TrainState:
    """Load everything in place, in all processes. InputError: corrupt, or of another run (the
    message names the first difference of ``identity``, apart from the keys in
    ``may_differ``).
    """
    tensors, metadata = _read(path, model, optimizer, world)
    try:
        rest = validate(metadata, CheckpointMetadata, "", extra="forbid")
    except InputError as error:
        raise InputError(f"{path}: expected a training checkpoint: {error}") from None
    if differs := identity_difference(rest.identity, identity, may_differ):
        raise InputError(
            f"{path}: is of another run: {differs}; choose another folder, or delete it to start"
            " again"
        )
    part = {
        prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in ("model.", "optimizer.", "objective.", "rng.")
    }
    try:
        for prefix, own in (
            ("model.", trained_state(model)),
            ("rng.", {"cpu": torch.get_rng_state()}),
        ):
            _check_tensors(prefix, part[prefix], own)
        model.load_state_dict(part["model."], strict=False)  # whole: _check_tensors
        unpack_optimizer(optimizer, part["optimizer."], rest.optimizer)
        torch.set_rng_state(part["rng."]["cpu"])
        if "cuda" in part["rng."] and torch.cuda.is_available():
            torch.cuda.set_rng_state(part["rng."]["cuda"])
    except (InputError, RuntimeError) as error:  # RuntimeError: not a generator's state
        raise InputError(f"{path}: {reason(error)}") from None
    rest.progress.objective |= part["objective."]
    return rest.progress


def _check_tensors(prefix: str, came: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, tensor in own.items():
        wanted = (tensor.dtype, tuple(tensor.shape))
        got = (came[name].dtype, tuple(came[name].shape)) if name in came else "none"
        if got != wanted:
            raise InputError(f"{prefix}{name}: expected {wanted[0]} {wanted[1]}, got {got}")
    if other := came.keys() - own.keys() - {"cuda"}:
        raise InputError(f"{prefix}{min(other)}: is not of the model")


class CheckpointWriter:
    """Context: runs jobs one at a time, in the caller's thread, or with ``beside`` in a thread of
    its own, and then the caller does not wait. The caller must not change what a job reads.

    An error of a job is raised by the next `submit` or `wait`. A process that ends waits for it.
    """

    def __init__(self, beside: bool):
        self.pool = ThreadPoolExecutor(1, "fastlm-writer") if beside else None
        self.job: Future[object] | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Run the job after the one before it is done."""
        self.wait()
        if self.pool is None:
            job()
        else:
            self.job = self.pool.submit(job)

    def check(self) -> None:
        """Raise the error of a job that is over; do not wait."""
        if self.job is not None and self.job.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        job, self.job = self.job, None
        if job is not None:
            job.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait. An error that already ends the training is not hidden by one of a job."""
        if self.pool is not None:
            self.pool.shutdown()
        if kind is None:
            self.wait()


class BestCheckpoint:
    """``step`` and ``loss`` of the best weights in ``folder``; None: there are none yet."""

    def __init__(
        self,
        folder: Path,
        enabled: bool,
        writer: CheckpointWriter,
        parallel: SingleDevice,
        world: SingleProcess,
    ):
        self.folder, self.enabled, self.writer = folder, enabled, writer
        self.parallel, self.world = parallel, world
        self.step: int | None = None
        self.loss: float | None = None
        self.metrics: dict[str, float] = {}

    def path(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}"

    def offer(self, step: int, metrics: Mapping[str, float], model: nn.Module) -> None:
        """Keep the model's weights if its validation is the best so far."""
        if not self.enabled:
            return
        if "val_loss" in metrics:
            loss = metrics["val_loss"]
        elif "val_score" in metrics:  # of answers: higher is better
            loss = -metrics["val_score"]
        else:
            raise InputError(
                "save_best: expected held-out data to validate on, got none; raise heldout, give"
                " more rows or feedback, or do without save_best and with keep = last"
            )
        if not loss < (math.inf if self.loss is None else self.loss):
            return
        make_folder(self.folder)
        path, told = self.path(step), dict(metrics)
        tensors = self.parallel.full(trained_state(model))
        if self.writer.pool:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self.world.on_main_process(
            lambda: self.writer.submit(lambda: save_tensors(path, tensors, told))
        )
        self.step, self.loss = step, loss

    def resume(self, step: int | None, loss: float | None) -> None:
        """Go on from what a checkpoint recorded."""
        if not self.enabled:
            return
        if step is not None and not self.path(step).is_dir():
            raise InputError(
                f"{self.path(step)}: expected the best weights of the checkpoint that continues,"
                f" got no such folder; delete {self.folder} to start again"
            )
        self.step, self.loss = step, loss
        self.prune(step)

    def prune(self, step: int | None) -> None:
        """Remove all but the weights of ``step``, and the remains of interrupted writes."""
        if not self.enabled or not self.world.is_main_process or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if BEST_NAME.fullmatch(path.name) and (step is None or path != self.path(step)):
                path.rename(temporary_name(path))
        for stray in self.folder.glob(".best-*"):
            shutil.rmtree(stray, ignore_errors=True)

    def load(self) -> None:
        """Load the best weights in place."""
        if self.step is None:
            raise InputError(
                "keep: expected save_best from the start, and a validation, for best; got none"
            )
        tensors, metrics = load_tensors(self.path(self.step))
        self.metrics = dict(metrics)
        self.parallel.load(tensors)  # what is frozen is not in them
