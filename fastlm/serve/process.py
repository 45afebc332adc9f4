"""The server as a process: a model, its engine, uvicorn, and an orderly end."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastlm.checkpoint.digest import model_digest
from fastlm.errors import InputError
from fastlm.files import read_text, reason
from fastlm.inference.fair_lock import FairLock
from fastlm.serve.app import Server
from fastlm.serve.loading import ModelLoader, default_model_name
from fastlm.serve.middleware import RequestLimits, log
from fastlm.serve.model_manager import AllowedModels, ModelManager
from fastlm.serve.models import ServedModels
from fastlm.serve.options import LOCAL_NAMES, ServeOptions

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore
    from fastlm.serve.ratings import Rating

MOST_TEMPLATE = 2**20  # bytes; published ones have up to 20,000


def run(options: ServeOptions, keys: Sequence[str] = (), admin_keys: Sequence[str] = ()) -> None:
    """Serve until SIGTERM or Ctrl-C.

    InputError: a model, draft model, database or store that cannot be used, metrics or alerts that
    are refused, a port that is taken, more pages than fit the memory.
    """
    logging.getLogger("uvicorn.error").addHandler(_Lines())
    logging.getLogger("uvicorn").propagate = False
    with ExitStack() as stack:
        listening = stack.enter_context(_listen(options.host, options.port))
        store = monitor = None
        if options.feedback is not None:
            from fastlm.serve.feedback_store import FeedbackStore  # SQLAlchemy takes 0.2 s
            from fastlm.serve.monitor.monitor import Monitor, Settings

            settings = Settings.of(options)
            store = stack.enter_context(FeedbackStore(options.feedback))
            monitor = Monitor(store, settings)
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
            manager=manager, admins=admin_keys, monitor=monitor,
            hosts=frozenset((*LOCAL_NAMES, *map(str.lower, options.allow_host)))
            if options.host in LOCAL_NAMES else None,
        )  # fmt: skip
        config = config_of(server, options.max_connections, options.drain)
        bound = listening.getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        cache = models.stats()
        log(
            "listening", url=f"http://{shown}:{bound[1]}", model=models.name, pages=cache.pages,
            page_bytes=cache.page_bytes, cache_mib=cache.pages * cache.page_bytes // 2**20,
        )  # fmt: skip
        _Process(config, server, options.drain).run(sockets=[listening])


def _load(
    options: ServeOptions, store: "FeedbackStore | None", ratings: Sequence["Rating"]
) -> tuple[ServedModels, ModelManager | None]:
    """Load the models that answer, as was decided last, with what changes them, if anything does.
    ``ratings``: the numbers that people may give."""
    adapters, state_file = options.adapters(), options.state_file()
    name = options.name or default_model_name(options.model)
    if name in adapters:
        raise InputError(f"adapter: expected another name than the model's, got {name!r:.80}")
    template = options.chat_template
    loader = ModelLoader(
        name, options.act_bits, options.engine(), options.draft_model,
        FairLock() if state_file or adapters else None, versions=state_file is not None,
        template=None if template is None else read_text(template, MOST_TEMPLATE),
        share=len(adapters) + 1,
    )  # fmt: skip
    manager = None
    if state_file is None:
        models = ServedModels(loader.load(options.model, model_digest(options.model)))
    else:
        base = str(options.model)
        named = [base] if options.canary is None else [base, options.canary]
        allowed = AllowedModels(named, options.models_dir)
        if store is None:
            manager = ModelManager(loader, base, state_file, allowed)
            manager.begin()
        else:
            from fastlm.serve.canary.canary_manager import CanaryManager
            from fastlm.serve.canary.canary_store import CanaryStore
            from fastlm.serve.canary.decision import CanaryConfig

            config = CanaryConfig.from_options(options, ratings)
            counts = CanaryStore(store, config.rating)
            manager = CanaryManager(loader, base, state_file, allowed, counts, config)
            manager.begin(options.canary)
        models = manager.models
    for key, place in adapters.items():
        models.add(replace(loader, name=key, versions=False).load(place, model_digest(place)))
    return models, manager


def config_of(server: Server, max_connections: int, drain: float) -> uvicorn.Config:
    """How uvicorn serves ``server``."""
    http: Any = partial(_Connection, server.limits)
    return uvicorn.Config(
        server.app, log_config=None, access_log=False, server_header=False,
        http=http, proxy_headers=False,  # bounded headers; addresses that nobody can make up
        limit_concurrency=max_connections, h11_max_incomplete_event_size=server.limits.header_bytes,
        timeout_graceful_shutdown=int(drain) + 5, ws="none",
    )  # fmt: skip


class _Connection(H11Protocol):
    """uvicorn's connection, which also ends where whole headers do not come in time, where nobody
    takes the rest of a response, and where a body that no route reads is too large or too slow:
    each connection counts towards ``max_connections``. ``scope["state"]["abort"]`` ends it at once.

    An idle one between requests has uvicorn's own timeout.
    """

    def __init__(self, limits: RequestLimits, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.limits = limits
        self._timers: dict[str, asyncio.TimerHandle] = {}  # "headers", "reader", "body"
        self._unread = 0  # bytes of a body after the response to its request
        self.app_state = {**self.app_state, "abort": lambda: self.transport.abort()}

    def _abort_after(self, seconds: float, name: str) -> None:
        self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, *names: str) -> None:
        for name in names:
            if (timer := self._timers.pop(name, None)) is not None:
                timer.cancel()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._abort_after(self.limits.header_seconds, "headers")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop("headers", "reader")  # the next response is written, too
        elif "headers" not in self._timers:
            self._abort_after(self.limits.header_seconds, "headers")
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop("body")
        elif "body" in self._timers:
            self._unread += len(data)
            if self._unread > self.limits.body_bytes:
                self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop("reader")
        self._wait_for_reader(None)
        if self.conn.their_state is h11.SEND_BODY:
            self._unread = 0
            self._abort_after(self.limits.body_seconds, "body")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop(*self._timers)

    def _wait_for_reader(self, before: int | None) -> None:
        """Give up a client that took nothing since ``before`` bytes were left to send."""
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
        elif left:
            wait = self.limits.write_seconds
            self._timers["reader"] = self.loop.call_later(wait, self._wait_for_reader, left)


class _Process(uvicorn.Server):
    """uvicorn's server, whose engine ends answers at the bound, so that clients are told."""

    def __init__(self, config: uvicorn.Config, server: Server, drain: float):
        super().__init__(config)
        self.server, self.drain = server, drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:  # it listens: whoever reads this line may connect
            log("ready", model=self.server.models.name)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server.stopping = True
        log("stopping", seconds=self.drain)
        answered = asyncio.Event()

        async def close() -> None:
            # not before: requests that were accepted may still come to the engine
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(answered.wait(), self.drain)
            await asyncio.get_running_loop().run_in_executor(None, self.server.models.close)

        ending = asyncio.create_task(close())
        await super().shutdown(sockets)
        answered.set()
        await ending
        for store in (self.server.feedback, self.server.ranking):
            if store is not None:
                # here: a signal that ended the server ends the process before `run` returns
                await asyncio.get_running_loop().run_in_executor(None, store.close)


class _Lines(logging.Handler):
    """uvicorn's warnings as lines of our log."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            what: dict[str, Any] = {"level": record.levelname.lower()}
            kind = record.exc_info[0] if record.exc_info else None
            # an exception's message may quote a request
            log("uvicorn", **what, message=kind.__name__ if kind else record.getMessage()[:200])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise InputError(
            f"port: expected a free one on {host}, got {port}: {reason(error)}"
        ) from None
    return listening
