"""Record the inputs and the conditions under which a stage made its outputs.

A run keeps this record in stages.json, a stage that runs alone in record.json in its folder. Inputs
and outputs are named by the id of their content, so that folders may be moved and copied. The id of
one file (a .gguf model, one tokenizer.json) is its SHA-256, as ``sha256sum`` prints it. That of
several is the SHA-256 of the JSON list of [name, SHA-256] of them, sorted. Files that are no part
of it (README.md, reports, the records of a run) do not count, so that a model keeps its id when a
card is written next to it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.machine import code_version, hardware
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
    "corpus": (
        "train/*.jsonl.zst",
        "heldout/*.jsonl.zst",
        "train.jsonl.zst",
        "heldout.jsonl.zst",  # of older corpora
    ),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "chat_template*"),
    "shards": ("index.json", "*.bin", "*.starts"),
    "scores": ("scores.json",),
}
NOT_CONTENT = ("README.md", "record.json", "forget_log.jsonl", ".*")


class InputRecord(TypedDict):
    """An input of a stage. ``id`` is None if it is no file."""

    name: str
    path: str
    id: str | None


class SourceRecord(TypedDict):
    """A source that an option names. ``files``: name -> SHA-256."""

    spec: str
    package: NotRequired[str | None]
    licence: NotRequired[str | None]
    count: NotRequired[Count | None]
    files: NotRequired[dict[str, str]]


@dataclass
class Provenance:
    """The origin of an output.

    finished_at: ISO 8601, UTC. code: as `fastlm.machine.code_version`. machine: as
    `fastlm.machine.hardware`. recipe: SHA-256 of the recipe. ids: type -> id of the output. hashes:
    SHA-256 of every file in ``file_sizes``. inputs: by name. earlier_ids: ids that ``ids`` replaced
    when rows were forgotten (`fastlm.feedback.forget`), oldest first.
    """

    finished_at: str
    code: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    command: str | None = None
    ids: dict[str, str] = field(default_factory=dict)
    hashes: dict[RelativePath, str] = field(default_factory=dict)
    inputs: dict[str, list[InputRecord]] = field(default_factory=dict)
    sources: list[SourceRecord] = field(default_factory=list)
    earlier_ids: list[dict[str, str]] = field(default_factory=list)


def describe(
    stage: Stage,
    ctx: StageContext,
    outputs: Mapping[str, int],
    input_digest: InputDigest,
    *,
    recorded_id: Callable[[str, Input], str | None] = lambda key, inputs_of_key: None,
    recipe: str | None = None,
    command: str | None = None,
) -> Provenance:
    """Return how ``stage`` made its ``outputs``, which are hashed here.

    ``known``: the id of an input that has a record already.
    """
    inputs: dict[str, list[InputRecord]] = {}
    for key, inputs_of_key in ctx.inputs.items():
        types = stage.inputs[key].types
        inputs[key] = [
            {
                "name": g.name,
                "path": g.source,
                "id": recorded_id(key, g) or _id(types, g.source, input_digest),
            }
            for g in inputs_of_key
        ]
    hashes = {name: digest(ctx.out / name) for name in outputs}
    specs = [spec for name in stage.sources_in for spec in getattr(stage, name)]
    return Provenance(
        datetime.now(UTC).isoformat(timespec="milliseconds"), code_version(), hardware(),
        recipe, command,
        ids_of(stage.outputs, hashes), hashes, inputs,
        [_source(spec, input_digest) for spec in specs],
    )  # fmt: skip


def output_files(outputs: Mapping[str, str], out: Path, since: float = math.inf) -> dict[str, int]:
    """Return the sizes of the files of a stage in a folder that may hold other files: those of its
    ``outputs``, and others that were written after ``since``.
    """
    names = {output for output in outputs.values() if output != "."}
    kinds = [kind for kind, output in outputs.items() if output == "."]
    names |= {"train", "heldout"} if {"shards", "corpus"} & {*kinds} else set()
    parts = [pattern for kind in kinds for pattern in PARTS.get(kind, ())]
    files = []
    for path in sorted(out.iterdir()):
        if path.name in names:
            files += [path] if path.is_file() else sorted(path.rglob("*"))
        elif _matches(path.name, parts) or path.stat().st_mtime >= since:
            files.append(path)
    sizes = {str(p.relative_to(out)): p.stat().st_size for p in files if p.is_file()}
    return {name: size for name, size in sizes.items() if not _matches(name, NOT_CONTENT)}


def ids_of(outputs: Mapping[str, str], hashes: Mapping[str, str]) -> dict[str, str]:
    """Return type -> id of the outputs of a stage, from the hashes of its files."""
    ids = {}
    for kind, name in outputs.items():
        prefix = "" if name == "." else f"{name}/"
        parts = [(n.removeprefix(prefix), h) for n, h in hashes.items() if n.startswith(prefix)]
        if name in hashes:  # one file
            parts = [(name, hashes[name])]
        if parts:
            ids[kind] = combined_id((kind,), parts)
    return ids


def split_ids(outputs: Mapping[str, str], hashes: Mapping[str, str]) -> Iterator[str]:
    """Yield the ids of the splits (``train``, ``heldout``) of a corpus or of shards, each of which
    can be the input of a stage.
    """
    for kind in ("corpus", "shards"):
        for split in ("train/", "heldout/") if outputs.get(kind) == "." else ():
            if parts := [
                (n.removeprefix(split), h) for n, h in hashes.items() if n.startswith(split)
            ]:
                yield combined_id((kind,), parts)


def artifact_id(types: Sequence[str], path: Path, input_digest: InputDigest) -> str:
    """Return the id of the artifact at ``path``, which is of one of ``types``. Reads every file
    whose hash ``input_digest`` does not have. InputError: a file that cannot be read.
    """
    if path.is_file():
        return input_digest.hash_tree(path)[0][2]
    return combined_id(types, ((name, digest) for name, _, digest in input_digest.hash_tree(path)))


def model_id(model: str | Path, input_digest: InputDigest) -> str:
    """Return the id of the model at ``where``, as `locate_model` finds it. InputError: no model."""
    return artifact_id(("model",), locate_model(Path(model)), input_digest)


def combined_id(types: Sequence[str], hashes: Iterable[tuple[str, str]]) -> str:
    """Return the id of an artifact from the names and SHA-256 sums of its files."""
    pairs = sorted(pair for pair in hashes if not _matches(pair[0], NOT_CONTENT))
    patterns = [pattern for kind in types for pattern in PARTS.get(kind, ("*",))]
    parts = [pair for pair in pairs if _matches(pair[0], patterns)] or pairs
    return parts[0][1] if len(parts) == 1 else json_hash(parts)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value: Any) -> str:
    """Return the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of the patterns: the complete name if the pattern has a
    folder, else its last part.
    """
    last = name.rpartition("/")[2]
    return any(fnmatch(name if "/" in pattern else last, pattern) for pattern in patterns)


def _source(spec: str, input_digest: InputDigest) -> SourceRecord:
    """Describe a source that an option names: its files with their hashes, its licence."""
    from fastlm.sources.licences import read_licence

    ((_, entries),) = input_digest.hash_sources([spec])
    files = {e[0]: e[2] for e in entries if isinstance(e, list)}
    package, licence = read_licence(spec, input_digest.cache)
    return {
        "spec": spec, "package": package, "licence": licence, "count": len(files) or None,
        "files": files if len(files) <= MAX_FILES else {},
    }  # fmt: skip


def _id(types: Sequence[str], source: str, input_digest: InputDigest) -> str | None:
    """Return the id of an external input, None if it is a package or no longer exists."""
    path = Path(source)
    try:
        if set(types) & {*MODELS}:
            return model_id(source, input_digest)
        if not path.exists() and source.partition(":")[0] in SCHEMES:
            return None
        return artifact_id(types, path, input_digest)
    except (InputError, OSError):
        return None
