"""What is stored at a path, from headers alone: for ``fastlm info --model``."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from fastlm.checkpoint.architectures import config_of, expected_shapes
from fastlm.checkpoint.folder import load_state
from fastlm.checkpoint.gguf_file import GGUFFile
from fastlm.checkpoint.tensor_folder import TensorFolder
from fastlm.pipeline.run_folder import locate_model


def describe_model(path: str | Path) -> dict[str, Any]:
    """``{"path", "model_type", "parameters", "stored", "found"}``; JSON-serialisable.

    stored: type -> number of tensors, in the file's words. found: how the weights are quantized,
    by the tensors, which may differ from what the file says of itself; None if they are not.

    Raises InputError: see `fastlm.checkpoint.folder.load_state`.
    """
    place = locate_model(Path(path))
    config, _ = load_state(place)
    if place.suffix == ".gguf":
        stored = Counter(info.kind.name for info in GGUFFile(place).tensors.values())
    else:
        stored = Counter(header.dtype for header in TensorFolder(place).headers.values())
    entry = config.get("quantization_config") or {}
    found = entry.get("found")
    if found is None and entry:
        found = f"fastlm {entry.get('format')}, groups of {entry.get('group_size')}"
    shapes = expected_shapes(config_of(config, place)).values()
    return {
        "path": str(place),
        "model_type": config["model_type"],
        "parameters": sum(map(math.prod, shapes)),
        "stored": dict(stored.most_common()),
        "found": found,
    }
