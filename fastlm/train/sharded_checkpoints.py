"""Checkpoints of a model that is sharded over processes, by ``torch.distributed.checkpoint``.

Each process writes its shards to ``step-*/shard-*.safetensors``, with their offsets in the header.
``manifest.json`` has the files' checksums and the metadata. Any number of processes can read them,
each only the parts it needs; so can one process without torchrun. Sharded processes can also read
the checkpoint of one process (``tensors.safetensors``). Rejected: torch's own format, whose
``.metadata`` is a pickle.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fastlm.checkpoint.folder import MANIFEST, TENSORS, write_json
from fastlm.errors import InputError
from fastlm.files import open_regular, read_json, reason, sync, temporary_name, write_error
from fastlm.train.distributed import SingleProcess


def save_sharded(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], world: SingleProcess
) -> None:
    """Write the folder ``path``. All processes call this. DTensors are written shard by shard;
    plain tensors, which are equal in all processes, once.
    """
    part = world.broadcast(temporary_name(path))
    world.on_main_process(lambda: _make_folder(part))
    # safetensors cannot slice a tensor without dimensions
    flat = {name: t if t.dim() else t.reshape(1) for name, t in tensors.items()}
    writer = HuggingFaceStorageWriter(str(part), save_distributed=True)

    def write() -> dict[str, str]:
        try:
            with _raise_first_cause():
                save(flat, storage_writer=writer)
            shards = sorted(part.glob(f"shard-{world.rank + 1:05d}-*"))
            return {file.name: _sha256(file) for file in shards}
        except OSError as error:
            raise write_error(path, error) from error

    files = {name: digest for sums in world.gather_results(write) for name, digest in sums.items()}

    def finish() -> None:
        try:
            write_json(part / MANIFEST, {"files": files, "metadata": metadata})
            for item in [*part.iterdir(), part]:
                sync(item)
            part.rename(path)
            sync(path.parent)
        except OSError as caught:
            raise write_error(path, caught) from caught

    world.on_main_process(finish)


@contextmanager
def _raise_first_cause() -> Iterator[None]:
    """Replace torch's CheckpointException by its first cause, within this context. torch's is no
    Exception and prints the tracebacks of all processes.
    """
    try:
        yield
    except CheckpointException as error:
        raise error.failures[min(error.failures)][0] from None


def _make_folder(part: Path) -> None:
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise write_error(part, error) from error


def load_sharded(
    path: Path, targets: Mapping[str, Tensor], params: list[Tensor], world: SingleProcess
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and metadata of the folder ``path``. All processes call this.

    A tensor named in ``targets`` is sharded like its target, and ``optimizer.<i>.<slot>`` of the
    size of ``params[i]`` like that parameter. All others are not sharded. InputError: a byte has
    changed, or a size does not fit.
    """
    manifest = read_json(path / MANIFEST)
    sums = manifest.get("files") or {TENSORS: manifest.get("sha256")}
    try:
        bad = [
            name
            for name, digest in sorted(sums.items())[world.rank :: world.size]
            if _sha256(path / name) != digest
        ]
        for name in (name for names in world.gather(bad) for name in names):
            raise InputError(f"{path / name}: corrupt: its sha256 is not that of {MANIFEST}")
        reader = HuggingFaceStorageReader(str(path))
        entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
        into = {}
        for name, entry in entries.items():
            like = targets.get(name)
            words = name.split(".")
            if words[0] == "optimizer" and words[1].isdecimal() and int(words[1]) < len(params):
                like = params[int(words[1])]
            dtype = entry.properties.dtype
            if like is not None and like.shape == entry.size:
                into[name] = torch.zeros_like(like, dtype=dtype, requires_grad=False)
            else:
                into[name] = torch.zeros(entry.size, dtype=dtype)
        with warnings.catch_warnings(), _raise_first_cause():
            warnings.simplefilter("ignore", UserWarning)  # it warns that one process loads
            load(into, storage_reader=reader, no_dist=world.size == 1)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    return into, manifest.get("metadata") or {}


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
