"""The id of a model: a hash of its files, independent of their path."""

import hashlib
import os
from pathlib import Path

from fastlm.checkpoint.folder import find_base_model
from fastlm.pipeline.provenance import model_id
from fastlm.pipeline.run_folder import is_adapter, locate_model
from fastlm.sources.input_digest import InputDigest
from fastlm.sources.packages import default_cache


def model_digest(path: Path) -> str:
    """Return the id by which `fastlm runs show` finds the model at ``path``: a hash of its files
    (0.6 s per GB). The id of an adapter is a hash of its files and its base's; that command does
    not know it. InputError: a file cannot be read.
    """
    folder = locate_model(path)
    digest = model_id(folder, InputDigest(Path(os.devnull), cache=default_cache()))
    if not is_adapter(folder):
        return digest
    return hashlib.sha256(
        (digest + model_digest(Path(find_base_model(folder)))).encode()
    ).hexdigest()
