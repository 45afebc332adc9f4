"""The server of models as a process: load the models, and run the server."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from fastlm.checkpoint.digest import model_digest
from fastlm.errors import InputError
from fastlm.files import read_text
from fastlm.inference.fair_lock import FairLock
from fastlm.serve.app import Server
from fastlm.serve.loading import ModelLoader, default_model_name
from fastlm.serve.middleware import RequestLimits
from fastlm.serve.model_manager import AllowedModels, ModelManager
from fastlm.serve.models import ServedModels
from fastlm.serve.options import ServeOptions
from fastlm.serve.uvicorn_server import listen, run_server

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore
    from fastlm.serve.ratings import Rating

MAX_TEMPLATE_BYTES = 2**20  # published templates have up to 20,000


def run(options: ServeOptions, keys: Sequence[str] = (), admin_keys: Sequence[str] = ()) -> None:
    """Serve until SIGTERM or Ctrl-C.

    InputError: a model, draft model or database cannot be used, the files of metrics or alerts are
    wrong, the port is in use, or the cache exceeds the memory.
    """
    with ExitStack() as stack:
        listening = stack.enter_context(listen(options.host, options.port))
        store = monitor = None
        if options.feedback is not None:
            from fastlm.serve.feedback_store import FeedbackStore  # SQLAlchemy takes 0.2 s
            from fastlm.serve.monitor.monitor import Monitor, MonitorConfig

            monitor_config = MonitorConfig.from_options(options)
            store = stack.enter_context(FeedbackStore(options.feedback))
            monitor = Monitor(store, monitor_config)
        models, manager = _load(options, store, () if monitor is None else monitor.ratings)
        ranking = None
        if options.rank is not None:
            from fastlm.serve.ranking import RankingStore

            ranking = stack.enter_context(RankingStore(options.rank, create=False))
        server = Server(
            models,
            limits=RequestLimits(
                body_bytes=options.max_body, answer_seconds=options.max_seconds,
                max_new_tokens=options.max_new_tokens,
            ),
            keys=keys, origins=options.allow_origin, feedback=store, ranking=ranking,
            manager=manager, admin_keys=admin_keys, monitor=monitor,
            hosts=options.host_names(),
        )  # fmt: skip
        run_server(server, listening, max_connections=options.max_connections, drain=options.drain)


def _load(
    options: ServeOptions, store: "FeedbackStore | None", ratings: Sequence["Rating"]
) -> tuple[ServedModels, ModelManager | None]:
    """Load the models as the last decision left them; return them with their manager, if these
    options allow changes. ``ratings``: the numbers that people may give."""
    adapters, state_file = options.adapters(), options.state_file()
    name = options.name or default_model_name(options.model)
    if name in adapters:
        raise InputError(f"adapter: expected another name than the model's, got {name!r:.80}")
    template = options.chat_template
    loader = ModelLoader(
        name, options.act_bits, options.engine(), options.draft_model,
        FairLock() if state_file or adapters else None, versioned_names=state_file is not None,
        template=None if template is None else read_text(template, MAX_TEMPLATE_BYTES),
        num_engines=len(adapters) + 1,
    )  # fmt: skip
    manager = None
    if state_file is None:
        models = ServedModels(loader.load(options.model, model_digest(options.model)))
    else:
        base = str(options.model)
        paths = [base] if options.canary is None else [base, options.canary]
        allowed = AllowedModels(paths, options.models_dir)
        if store is None:
            manager = ModelManager(loader, base, state_file, allowed)
            manager.start()
        else:
            from fastlm.serve.canary.canary_manager import CanaryManager
            from fastlm.serve.canary.canary_store import CanaryStore
            from fastlm.serve.canary.decision import CanaryConfig

            config = CanaryConfig.from_options(options, ratings)
            canary_store = CanaryStore(store, config.rating)
            manager = CanaryManager(loader, base, state_file, allowed, canary_store, config)
            manager.start(options.canary)
        models = manager.models
    for adapter, path in adapters.items():
        adapter_loader = replace(loader, name=adapter, versioned_names=False)
        models.add_adapter(adapter_loader.load(path, model_digest(path)))
    return models, manager
