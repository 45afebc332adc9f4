"""A server whose models change, in this process on a port of its own."""

import contextlib
import time

from serve_app import running, tiny_model

from fastlm.inference.fair_lock import Turns
from fastlm.serve.app import Server
from fastlm.serve.canary_store import CanaryStore
from fastlm.serve.loading import Loader
from fastlm.serve.plan import Plan
from fastlm.serve.switch import Allowed, Switch, start_models

OPTIONS = {"pages": 64, "max_rows": 16}


def folders(place, names="abc", context=512):
    """Folders of different models with one tokenizer."""
    made = {}
    for seed, name in enumerate(names, 1):
        model, tokenizer = tiny_model(context, seed)
        made[name] = place / name
        model.save_pretrained(made[name])
        tokenizer.save(made[name])
    return made


@contextlib.contextmanager
def changing(base, state, *, canary=None, store=None, models_dir=None, turns=None, **options):
    """Context: (URL, server) of the model in the folder ``base``. The server's own options are
    ``keys``, ``admins``, ``monitoring``; the others are of the plan of a canary's trial."""
    own = {key: options.pop(key) for key in ("keys", "admins", "monitoring") if key in options}
    loader = Loader("tiny", None, OPTIONS, turns=turns or Turns(), versions=True)
    plan = Plan(**options)
    counts = None if store is None else CanaryStore(store, plan.rating)
    models, known = start_models(
        loader, str(base), state, canary=None if canary is None else str(canary),
        plan=plan, store=counts,
    )  # fmt: skip
    allowed = Allowed([str(base), *([str(canary)] if canary else [])], models_dir)
    switch = Switch(models, loader, known, state, allowed, store=counts, metric=plan.metric)
    server = Server(models, feedback=store, switch=switch, **own)
    with running(server) as url:
        yield url, server


def wait_until_freed(server):
    until = time.monotonic() + 60
    while server.models.leaving or server.models._freeing:
        assert time.monotonic() < until
        time.sleep(0.01)
