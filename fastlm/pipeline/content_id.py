"""The id of an artifact: a hash of its content, whatever its place and its name.

An artifact of one file (a .gguf model, one tokenizer.json) has the SHA-256 of that file, as
``sha256sum`` prints it. One of several has the SHA-256 of the JSON list of [name, SHA-256] of them,
sorted. Files that are no part of it (README.md, reports, the records of a run) do not count, so
that a model keeps its id when a card is written beside it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from fastlm.sources.input_digest import Contents

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
NOT_CONTENT = ("README.md", "record.json", "forgotten.jsonl", ".*")


def artifact_id(types: Sequence[str], path: Path, contents: Contents) -> str:
    """Return the id of what lies at ``path``, which is of one of ``types``. Reads every file that
    ``contents`` does not know. InputError: a file that cannot be read.
    """
    if path.is_file():
        return contents.tree(path)[0][2]
    return combined(types, ((name, digest) for name, _, digest in contents.tree(path)))


def combined(types: Sequence[str], hashes: Iterable[tuple[str, str]]) -> str:
    """Return the id of an artifact from the names and SHA-256 sums of its files."""
    whole = [pair for pair in hashes if not matches(pair[0], NOT_CONTENT)]
    patterns = [pattern for kind in types for pattern in PARTS.get(kind, ("*",))]
    parts = sorted(pair for pair in whole if matches(pair[0], patterns)) or sorted(whole)
    if len(parts) == 1:
        return parts[0][1]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether the last part of a name is one of these."""
    return any(fnmatch(name.rpartition("/")[2], pattern) for pattern in patterns)
