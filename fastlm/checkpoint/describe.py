"""Describe a stored model from its headers alone, for ``fastlm info --model``."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from fastlm.checkpoint.architectures import expected_shapes, parse_config
from fastlm.checkpoint.folder import load_state
from fastlm.checkpoint.gguf_file import GGUFFile
from fastlm.checkpoint.tensor_folder import TensorFolder
from fastlm.pipeline.run_folder import locate_model


def describe_model(path: str | Path) -> dict[str, Any]:
    """Return ``{"path", "model_type", "parameters", "dtypes", "quantization"}``, JSON-serialisable.

    dtypes: type -> number of tensors, in the file's words. quantization: how the weights are
    quantized according to the tensors, which may differ from the file's config; None if they are
    not.

    Raises InputError: see `fastlm.checkpoint.folder.load_state`.
    """
    model_path = locate_model(Path(path))
    config, _ = load_state(model_path)
    if model_path.suffix == ".gguf":
        dtypes = Counter(info.ggml_type.name for info in GGUFFile(model_path).tensors.values())
    else:
        dtypes = Counter(header.dtype for header in TensorFolder(model_path).headers.values())
    entry = config.get("quantization_config") or {}
    quantization = entry.get("description")
    if quantization is None and entry:
        quantization = f"fastlm {entry.get('format')}, groups of {entry.get('group_size')}"
    shapes = expected_shapes(parse_config(config, model_path)).values()
    return {
        "path": str(model_path),
        "model_type": config["model_type"],
        "parameters": sum(map(math.prod, shapes)),
        "dtypes": dict(dtypes.most_common()),
        "quantization": quantization,
    }
