"""From what and how a stage made its output: the part of its record that says where a model comes
from.

A run keeps it in stages.json, beside what it needs to plan; a stage that runs alone, in record.json
in its folder. Inputs and outputs have the id of their content, so that folders may be moved and
copied. The id of one file (a .gguf model, one tokenizer.json) is its SHA-256, as ``sha256sum``
prints it. That of several is the SHA-256 of the JSON list of [name, SHA-256] of them, sorted. Files
that are no part of it (README.md, reports, the records of a run) do not count, so that a model
keeps its id when a card is written beside it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.machine import code, hardware
from fastlm.pipeline.run_folder import locate_model
from fastlm.pipeline.stage import Input, Stage, StageContext
from fastlm.schema import Count, RelativePath
from fastlm.sources.input_digest import InputDigest
from fastlm.sources.packages import SCHEMES

MAX_FILES = 1000  # of a source that are listed one by one
MODEL = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.gguf",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template*",
    "adapter_config.json", "hf_quant_config.json",
)  # fmt: skip
MODELS = ("model", "reward", "quantized", "exported")
# what the artifacts of each type consist of; of other types all files
PARTS: dict[str, Sequence[str]] = {
    **dict.fromkeys(MODELS, MODEL),
    "corpus": ("train.jsonl.zst", "heldout.jsonl.zst"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "chat_template*"),
    "shards": ("index.json", "*.bin", "*.starts"),
    "scores": ("scores.json",),
}
NOT_CONTENT = ("README.md", "record.json", "forget_log.jsonl", ".*")


class InputRecord(TypedDict):
    """What a stage read; ``id`` is None where it is no file."""

    name: str
    path: str
    id: str | None


class SourceRecord(TypedDict):
    """What an option names; ``files``: name -> SHA-256."""

    spec: str
    package: NotRequired[str | None]
    licence: NotRequired[str | None]
    count: NotRequired[Count | None]
    files: NotRequired[dict[str, str]]


@dataclass
class Provenance:
    """How an output came to be.

    finished: ISO 8601, UTC. code: as `fastlm.machine.code`. machine: as `fastlm.machine.hardware`.
    recipe: SHA-256 of the recipe. ids: type -> id of what was left. hashes: SHA-256 of every file
    in ``file_sizes``. inputs: by name. earlier: ids that ``ids`` replaced when rows were forgotten
    (`fastlm.feedback.forget`), oldest first.
    """

    finished: str
    code: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    command: str | None = None
    ids: dict[str, str] = field(default_factory=dict)
    hashes: dict[RelativePath, str] = field(default_factory=dict)
    inputs: dict[str, list[InputRecord]] = field(default_factory=dict)
    sources: list[SourceRecord] = field(default_factory=list)
    earlier: list[dict[str, str]] = field(default_factory=list)


def describe(
    stage: Stage,
    ctx: StageContext,
    outputs: Mapping[str, int],
    input_digest: InputDigest,
    *,
    known: Callable[[str, Input], str | None] = lambda key, given: None,
    recipe: str | None = None,
    command: str | None = None,
) -> Provenance:
    """Return how ``stage`` made its ``outputs``, which are hashed here.

    ``known``: the id of an input that has a record already.
    """
    inputs: dict[str, list[InputRecord]] = {}
    for key, given in ctx.inputs.items():
        types = stage.inputs[key].types
        inputs[key] = [
            {
                "name": g.name,
                "path": g.source,
                "id": known(key, g) or _id(types, g.source, input_digest),
            }
            for g in given
        ]
    hashes = {name: digest(ctx.out / name) for name in outputs}
    specs = [spec for name in stage.sources_in for spec in getattr(stage, name)]
    return Provenance(
        datetime.now(UTC).isoformat(timespec="milliseconds"), code(), hardware(), recipe, command,
        ids_of(stage.outputs, hashes), hashes, inputs,
        [_source(spec, input_digest) for spec in specs],
    )  # fmt: skip


def own_files(outputs: Mapping[str, str], out: Path, since: float = math.inf) -> dict[str, int]:
    """Return the bytes of the files of a stage in a folder that may hold others, too: those that
    its ``outputs`` consist of, and those beside them that were written after ``since``.
    """
    places = {place for place in outputs.values() if place != "."}
    places |= {"train", "heldout"} if outputs.get("shards") == "." else set()
    kinds = [kind for kind, place in outputs.items() if place == "."]
    parts = [pattern for kind in kinds for pattern in PARTS.get(kind, ())]
    found = []
    for path in sorted(out.iterdir()):
        if path.name in places:
            found += [path] if path.is_file() else sorted(path.rglob("*"))
        elif _matches(path.name, parts) or path.stat().st_mtime >= since:
            found.append(path)
    sizes = {str(p.relative_to(out)): p.stat().st_size for p in found if p.is_file()}
    return {name: size for name, size in sizes.items() if not _matches(name, NOT_CONTENT)}


def ids_of(outputs: Mapping[str, str], hashes: Mapping[str, str]) -> dict[str, str]:
    """Return type -> id of what a stage left, from the hashes of its files."""
    found = {}
    for kind, place in outputs.items():
        below = "" if place == "." else f"{place}/"
        parts = [(n.removeprefix(below), h) for n, h in hashes.items() if n.startswith(below)]
        if place in hashes:  # one file
            parts = [(place, hashes[place])]
        if parts:
            found[kind] = combined((kind,), parts)
    return found


def artifact_id(types: Sequence[str], path: Path, input_digest: InputDigest) -> str:
    """Return the id of what is at ``path``, which is of one of ``types``. Reads every file that
    ``input_digest`` does not know. InputError: a file that cannot be read.
    """
    if path.is_file():
        return input_digest.hash_tree(path)[0][2]
    return combined(types, ((name, digest) for name, _, digest in input_digest.hash_tree(path)))


def model_id(where: str | Path, input_digest: InputDigest) -> str:
    """Return the id of the model at ``where``, as `locate_model` finds it. InputError: no model."""
    return artifact_id(("model",), locate_model(Path(where)), input_digest)


def combined(types: Sequence[str], hashes: Iterable[tuple[str, str]]) -> str:
    """Return the id of an artifact from the names and SHA-256 sums of its files."""
    whole = sorted(pair for pair in hashes if not _matches(pair[0], NOT_CONTENT))
    patterns = [pattern for kind in types for pattern in PARTS.get(kind, ("*",))]
    parts = [pair for pair in whole if _matches(pair[0], patterns)] or whole
    return parts[0][1] if len(parts) == 1 else json_hash(parts)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value: Any) -> str:
    """Return the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether the last part of a name is one of these."""
    return any(fnmatch(name.rpartition("/")[2], pattern) for pattern in patterns)


def _source(spec: str, input_digest: InputDigest) -> SourceRecord:
    """Describe a source that an option names: its files with their hashes, its licence."""
    from fastlm.sources.licences import licence_of

    ((_, entries),) = input_digest.hash_sources([spec])
    files = {e[0]: e[2] for e in entries if isinstance(e, list)}
    package, licence = licence_of(spec, input_digest.cache)
    return {
        "spec": spec, "package": package, "licence": licence, "count": len(files) or None,
        "files": files if len(files) <= MAX_FILES else {},
    }  # fmt: skip


def _id(types: Sequence[str], where: str, input_digest: InputDigest) -> str | None:
    """Return the id of an input from outside; None if it is a package, or no longer there."""
    path = Path(where)
    try:
        if set(types) & {*MODELS}:
            return model_id(where, input_digest)
        if not path.exists() and where.partition(":")[0] in SCHEMES:
            return None
        return artifact_id(types, path, input_digest)
    except (InputError, OSError):
        return None
