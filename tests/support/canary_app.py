"""A server that swaps its models, in this process on its own port."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path

from serve_app import monitor_of, run_server, tiny_model

from fastlm.inference.fair_lock import FairLock
from fastlm.serve.app import Server
from fastlm.serve.canary.canary_manager import CanaryManager
from fastlm.serve.canary.canary_store import CanaryStore
from fastlm.serve.canary.decision import CanaryConfig
from fastlm.serve.loading import ModelLoader
from fastlm.serve.model_manager import AllowedModels, ModelManager
from fastlm.serve.options import ServeOptions

OPTIONS = {"num_blocks": 64, "max_num_seqs": 16}
DEFAULTS = CanaryConfig.from_options(ServeOptions(Path("model")))


def model_folders(root, names="abc", context=512):
    """Save different models with one tokenizer. Return name -> folder."""
    folders = {}
    for seed, name in enumerate(names, 1):
        model, tokenizer = tiny_model(context, seed)
        folders[name] = root / name
        model.save_pretrained(folders[name])
        tokenizer.save(folders[name])
    return folders


@contextlib.contextmanager
def canary_server(base, state, *, canary=None, store=None, models_dir=None, lock=None, **options):
    """Serve the model in the folder ``base``; yield (URL, server). ``keys``, ``admin_keys`` and
    ``monitoring`` are options of the server; the others are options of the canary's experiment.
    """
    server_options = {key: options.pop(key) for key in ("keys", "admin_keys") if key in options}
    monitor = monitor_of(store, options.pop("monitoring", None))
    loader = ModelLoader("tiny", None, OPTIONS, lock=lock or FairLock(), versioned_names=True)
    config = replace(DEFAULTS, **options)
    allowed = AllowedModels([str(base), *([str(canary)] if canary else [])], models_dir)
    if store is None:
        manager = ModelManager(loader, str(base), state, allowed)
        manager.start()
    else:
        counts = CanaryStore(store, config.rating)
        manager = CanaryManager(loader, str(base), state, allowed, counts, config)
        manager.start(None if canary is None else str(canary))
    server = Server(
        manager.models, feedback=store, manager=manager, monitor=monitor, **server_options
    )
    with run_server(server) as url:
        yield url, server


def wait_until_freed(server):
    until = time.monotonic() + 60
    while server.models.draining or server.models._freeing:
        assert time.monotonic() < until
        time.sleep(0.01)
