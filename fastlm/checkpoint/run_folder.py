"""The models in the folder of a run (`fastlm.runs.run` writes it)."""

from collections.abc import Mapping
from pathlib import Path

from fastlm.files import read_json

STAGES = "stages.json"  # stage -> its outputs by type, in the order in which the stages ran


def last_model(run: Path) -> Path | None:
    """Return a run's last finished model that can be trained further, or None if there is none or
    ``run`` is not a run's folder.
    """
    if not (run / STAGES).is_file():
        return None
    stages, found = read_json(run / STAGES).get("stages"), None
    for name, entry in stages.items() if isinstance(stages, Mapping) else ():
        if isinstance(entry, Mapping) and "outputs" in entry:
            leaves = entry.get("leaves")
            if isinstance(leaves, Mapping) and isinstance(model := leaves.get("model"), str):
                found = run / str(name) / model
    return found
