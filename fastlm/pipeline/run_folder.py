"""Find the model that a path names: a folder, a .gguf file, or the last model of a run."""

from collections.abc import Mapping
from pathlib import Path

from fastlm.errors import InputError
from fastlm.files import read_json
from fastlm.sources.packages import model_path

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
STAGES = "stages.json"  # stage -> its outputs by type, in the order in which the stages ran


def last_model(run: Path) -> Path | None:
    """Return a run's last finished model that can be trained further, or None if there is none or
    ``run`` is not a run's folder.
    """
    if not (run / STAGES).is_file():
        return None
    stages, model_path = read_json(run / STAGES).get("stages"), None
    for name, entry in stages.items() if isinstance(stages, Mapping) else ():
        if isinstance(entry, Mapping) and "file_sizes" in entry:
            outputs = entry.get("outputs")
            if isinstance(outputs, Mapping) and isinstance(model := outputs.get("model"), str):
                model_path = run / str(name) / model
    return model_path


def locate_model(path: Path) -> Path:
    """Return the folder with config.json (or an adapter), or the .gguf file, that ``path`` refers
    to.

    That is ``path`` itself, the ``model`` folder inside it, or the last model of a run.
    """
    path = model_path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path}: expected a model folder or a .gguf file, got another file")
        return path
    for folder in (path, path / "model"):  # "model": where training writes it
        if (folder / CONFIG).is_file() or is_adapter(folder):
            return folder
    if (trained := last_model(path)) is not None:
        return trained
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(files) == 1:
        return files[0]
    actual = f"neither there ({len(files)} .gguf files)"
    if not path.exists():
        actual = "no such path"
        if len(path.parts) == 2 and not path.is_absolute():  # looks like OWNER/NAME
            actual += (
                " (fastlm downloads nothing from the Hugging Face Hub:"
                f" hf download {path} --local-dir FOLDER)"
            )
    raise InputError(f"{path}: expected a folder with {CONFIG} or a .gguf file, got {actual}")


def is_adapter(folder: Path) -> bool:
    """Return whether the folder holds a LoRA adapter, which needs its base model."""
    return (folder / ADAPTER_CONFIG).is_file()
