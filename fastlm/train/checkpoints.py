"""Checkpoints of a training: all that it needs to continue to the same losses, bit for bit.

``checkpoints/step-00000200/`` holds the trained parameters, the optimizer, the random state and, as
JSON, step, seconds, position in the data, length of metrics.jsonl and the identity of the run
(options, model, data). A checkpoint is written under a temporary name and renamed; an old one is
renamed before it is deleted. A folder named step-* is therefore complete at any moment. There are
no pickles: tensors are in safetensors with a checksum, the rest is JSON.
`fastlm.train.sharded_checkpoints` writes those of sharded models.

``checkpoints/best-00000200/`` holds the weights of the lowest ``val_loss`` or the highest
``val_score``. A checkpoint records which weights were the best at its step. They are removed only
after a later checkpoint is complete, so a killed training finds the best weights that its last
checkpoint names.
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

# keys of an identity whose values are hashes -> the message where they differ
CONTENT = {
    "parameters": "the trained parameters (the model, or options of adapters) are",
    "base": "the model is",
    "teacher": "the teacher is",
    "data": "the rows of the data are",
    "heldout": "the held-out rows are",
    "data.data": "the shards are",
}


@dataclass
class TrainState:
    """The progress of a training and what it has measured."""

    step: Count
    tokens: Count
    seconds: Annotated[Finite, Ge(0)]  # of all sessions
    progress: Finite  # 0 to 1, below 0 before the first validation
    training_seconds: Annotated[Finite, Ge(0)]
    loss: Finite | None
    last_metrics: dict[str, Any]  # of the last validation
    metrics_bytes: Count
    objective: dict[str, Any]
    losses: list[Finite]  # of the last steps, for `fastlm.train.loss_spikes.SpikeDetector`
    best_step: int | None  # of `BestCheckpoint`
    best_loss: Finite | None


@dataclass
class PackedOptimizer:
    """The values of an optimizer's state that are not tensors: ``<parameter>.<slot>`` -> value."""

    state: dict[str, Any]
    groups: int


@dataclass
class CheckpointMetadata:
    """The part of a checkpoint that is not tensors, stored as JSON."""

    state: TrainState
    identity: dict[str, Any]
    optimizer: PackedOptimizer


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints, oldest first."""
    folder = run_dir / FOLDER
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        (p for p in paths if STEP_NAME.fullmatch(p.name)),
        key=lambda p: int(p.name.removeprefix("step-")),
    )


def checkpoint_before(run_dir: Path, step: int) -> Path | None:
    """Return the newest checkpoint of this step or an earlier one."""
    last = checkpoint_path(run_dir, step).name
    paths = [path for path in list_checkpoints(run_dir) if path.name <= last]
    return paths[-1] if paths else None


def prune_checkpoints(run_dir: Path, keep: int, trusted: int | None = None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the newest one up to the step ``trusted``.
    Also remove the remains of interrupted writes and deletions.
    """
    folder = run_dir / FOLDER
    trusted_path = None if trusted is None else checkpoint_before(run_dir, trusted)
    for path in list_checkpoints(run_dir)[:-keep]:
        if path == trusted_path:
            continue
        path.rename(temporary_name(path))
    for remains in folder.glob(".step-*"):
        shutil.rmtree(remains, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], PackedOptimizer]:
    """Split ``optimizer.state_dict()`` into flat named tensors and the other values."""
    state = optimizer.state_dict()
    flat = {f"{i}.{name}": v for i, slots in state["state"].items() for name, v in slots.items()}
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    scalars = {key: value for key, value in flat.items() if key not in tensors}
    return tensors, PackedOptimizer(scalars, len(state["param_groups"]))


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], packed: PackedOptimizer
) -> None:
    """Load what `pack_optimizer` returned. The param_groups of ``optimizer`` stay: their options
    were compared as part of the run's identity.
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
    state = {int(index): values for index, values in slots.items() if values}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's ``state_dict()`` without what training does not change: frozen parameters
    and quantized weights. The run's identity has a hash of those.
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
    state: TrainState,
    identity: dict[str, Any],
    *,
    copy: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a checkpoint and its metadata, as JSON values. ``identity`` is
    JSON-serialisable; so is ``state.objective``, except for values that are tensors. ``copy``: copy
    the tensors, so that the training does not change them.
    """
    optimizer_tensors, packed = pack_optimizer(optimizer)
    objective_tensors = {k: v for k, v in state.objective.items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in state.objective.items() if k not in objective_tensors}
    tensors = {
        **{f"model.{k}": v for k, v in trained_state(model).items()},
        **{f"optimizer.{k}": v for k, v in optimizer_tensors.items()},
        **{f"objective.{k}": v for k, v in objective_tensors.items()},
        "rng.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if copy:
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    # asdict copies lists and dicts too
    return tensors, asdict(CheckpointMetadata(replace(state, objective=rest), identity, packed))


def _read(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: SingleProcess
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if (path / TENSORS).exists() and not any(hasattr(param, "to_local") for param in params):
        return load_tensors(path)
    from fastlm.train.sharded_checkpoints import (
        load_sharded,  # imports torch.distributed.checkpoint
    )

    targets = {f"model.{name}": tensor for name, tensor in trained_state(model).items()}
    return load_sharded(path, targets, params, world)


def identity_difference(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Collection[str] = ()
) -> str:
    """Describe how the identities of two runs differ: by options, or else by the inputs that are
    not the same. Return "" if they are equal.
    """
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
    """Load model, optimizer and random state in place, in all processes. InputError: the checkpoint
    is corrupt, or of another run (the message names the first difference of ``identity``, apart
    from the keys in ``may_differ``).
    """
    tensors, metadata = _read(path, model, optimizer, world)
    try:
        checkpoint = validate(metadata, CheckpointMetadata, "", extra="forbid")
    except InputError as error:
        raise InputError(f"{path}: expected a training checkpoint: {error}") from None
    if differs := identity_difference(checkpoint.identity, identity, may_differ):
        raise InputError(
            f"{path}: expected a training with these options, got another: {differs}; choose"
            " another folder, or delete it to start again"
        )
    parts = {
        prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in ("model.", "optimizer.", "objective.", "rng.")
    }
    try:
        for prefix, expected in (
            ("model.", trained_state(model)),
            ("rng.", {"cpu": torch.get_rng_state()}),
        ):
            _check_tensors(prefix, parts[prefix], expected)
        model.load_state_dict(parts["model."], strict=False)  # complete: _check_tensors
        unpack_optimizer(optimizer, parts["optimizer."], checkpoint.optimizer)
        torch.set_rng_state(parts["rng."]["cpu"])
        if "cuda" in parts["rng."] and torch.cuda.is_available():
            torch.cuda.set_rng_state(parts["rng."]["cuda"])
    except (InputError, RuntimeError) as error:  # RuntimeError: not a generator's state
        raise InputError(f"{path}: {reason(error)}") from None
    checkpoint.state.objective |= parts["objective."]
    return checkpoint.state


def _check_tensors(
    prefix: str, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> None:
    for name, target in targets.items():
        expected = (target.dtype, tuple(target.shape))
        got = (tensors[name].dtype, tuple(tensors[name].shape)) if name in tensors else "none"
        if got != expected:
            raise InputError(f"{prefix}{name}: expected {expected[0]} {expected[1]}, got {got}")
    if other := tensors.keys() - targets.keys() - {"cuda"}:
        raise InputError(f"{prefix}{min(other)}: expected only tensors of the model, got this one")


class CheckpointWriter:
    """Runs jobs one at a time, within its context: in the caller's thread, or with ``asynchronous``
    in a background thread, and then the caller does not wait. The caller must not change what a job
    reads.

    The next `submit` or `wait` raises the error of a job. A process that ends waits for the job.
    """

    def __init__(self, asynchronous: bool):
        self.pool = ThreadPoolExecutor(1, "fastlm-writer") if asynchronous else None
        self.job: Future[object] | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Run the job after the previous one is done."""
        self.wait()
        if self.pool is None:
            job()
        else:
            self.job = self.pool.submit(job)

    def check(self) -> None:
        """Raise the error of a finished job; do not wait."""
        if self.job is not None and self.job.done():
            self.wait()

    def wait(self) -> None:
        """Wait until no job runs."""
        job, self.job = self.job, None
        if job is not None:
            job.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        """Wait. The error of a job does not hide an error that already ends the training."""
        if self.pool is not None:
            self.pool.shutdown()
        if error_type is None:
            self.wait()


class BestCheckpoint:
    """The best weights of the training, in ``folder``. ``step`` and ``loss`` are None as long as
    there are none.
    """

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

    def update(self, step: int, metrics: Mapping[str, float], model: nn.Module) -> None:
        """Save the model's weights if its validation is the best so far."""
        if not self.enabled:
            return
        if "val_loss" in metrics:
            loss = metrics["val_loss"]
        elif "val_score" in metrics:  # of rollouts: higher is better
            loss = -metrics["val_score"]
        else:
            raise InputError(
                "save_best: expected held-out data to validate on, got none; raise heldout, give"
                " more rows or feedback, or do without save_best and with keep = last"
            )
        if not loss < (math.inf if self.loss is None else self.loss):
            return
        make_folder(self.folder)
        path, metadata = self.path(step), dict(metrics)
        tensors = self.parallel.full_tensors(trained_state(model))
        if self.writer.pool:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self.world.on_main_process(
            lambda: self.writer.submit(lambda: save_tensors(path, tensors, metadata))
        )
        self.step, self.loss = step, loss

    def resume(self, step: int | None, loss: float | None) -> None:
        """Continue from what a checkpoint recorded."""
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
        """Delete all but the weights of ``step``, and the remains of interrupted writes."""
        if not self.enabled or not self.world.is_main_process or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if BEST_NAME.fullmatch(path.name) and (step is None or path != self.path(step)):
                path.rename(temporary_name(path))
        for remains in self.folder.glob(".best-*"):
            shutil.rmtree(remains, ignore_errors=True)

    def load(self) -> None:
        """Load the best weights in place."""
        if self.step is None:
            raise InputError(
                "keep: expected save_best from the start, and a validation, for best; got none"
            )
        tensors, metrics = load_tensors(self.path(self.step))
        self.metrics = dict(metrics)
        self.parallel.load(tensors)  # frozen weights are not among them
