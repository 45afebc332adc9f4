"""The id of a model: a hash of its files, whatever their place."""

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
    (0.6 s per GB); of an adapter one of its files and its base's, which that command does not know.
    InputError: a file cannot be read.
    """
    place = locate_model(path)
    own = model_id(place, InputDigest(Path(os.devnull), cache=default_cache()))
    if not is_adapter(place):
        return own
    return hashlib.sha256((own + model_digest(Path(find_base_model(place)))).encode()).hexdigest()
