"""The server as a process: load the models, run uvicorn, and shut down in order."""

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

MAX_TEMPLATE_BYTES = 2**20  # published templates have up to 20,000


def run(options: ServeOptions, keys: Sequence[str] = (), admin_keys: Sequence[str] = ()) -> None:
    """Serve until SIGTERM or Ctrl-C.

    InputError: a model, draft model or database cannot be used, the files of metrics or alerts are
    wrong, the port is in use, or the cache exceeds the memory.
    """
    logging.getLogger("uvicorn.error").addHandler(_UvicornLogHandler())
    logging.getLogger("uvicorn").propagate = False
    with ExitStack() as stack:
        listening = stack.enter_context(_listen(options.host, options.port))
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
            hosts=frozenset((*LOCAL_NAMES, *map(str.lower, options.allow_host)))
            if options.host in LOCAL_NAMES else None,
        )  # fmt: skip
        config = uvicorn_config(server, options.max_connections, options.drain)
        address, port, *_ = listening.getsockname()
        host = f"[{address}]" if ":" in address else address
        cache = models.stats()
        log(
            "listening", url=f"http://{host}:{port}", model=models.name,
            num_blocks=cache.num_blocks, block_bytes=cache.block_bytes,
            cache_mib=cache.num_blocks * cache.block_bytes // 2**20,
        )  # fmt: skip
        _UvicornServer(config, server, options.drain).run(sockets=[listening])


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


def uvicorn_config(server: Server, max_connections: int, drain: float) -> uvicorn.Config:
    """Return the configuration of uvicorn for ``server``."""
    http: Any = partial(_Connection, server.limits)
    return uvicorn.Config(
        server.app, log_config=None, access_log=False, server_header=False,
        http=http, proxy_headers=False,  # limited headers; the real address of a connection
        limit_concurrency=max_connections, h11_max_incomplete_event_size=server.limits.header_bytes,
        timeout_graceful_shutdown=int(drain) + 5, ws="none",
    )  # fmt: skip


class _Connection(H11Protocol):
    """A connection of uvicorn with more time limits, since each one counts towards
    ``max_connections``. It is closed if the headers do not arrive in time, if the client does not
    receive the rest of a response, and if a body that no route reads is too large or too slow.

    ``scope["state"]["abort"]`` closes it at once. uvicorn itself closes idle connections between
    requests.
    """

    def __init__(self, limits: RequestLimits, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.limits = limits
        self._timers: dict[str, asyncio.TimerHandle] = {}  # "headers", "reader", "body"
        self._unread_bytes = 0  # of a body that arrive after the response to its request
        self.app_state = {**self.app_state, "abort": lambda: self.transport.abort()}

    def _start_timer(self, seconds: float, name: str) -> None:
        self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _stop_timers(self, *names: str) -> None:
        for name in names:
            if (timer := self._timers.pop(name, None)) is not None:
                timer.cancel()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer(self.limits.header_seconds, "headers")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timers("headers", "reader")  # uvicorn writes the next response, too
        elif "headers" not in self._timers:
            self._start_timer(self.limits.header_seconds, "headers")
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop_timers("body")
        elif "body" in self._timers:
            self._unread_bytes += len(data)
            if self._unread_bytes > self.limits.body_bytes:
                self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop_timers("reader")
        self._wait_for_reader(None)
        if self.conn.their_state is h11.SEND_BODY:
            self._unread_bytes = 0
            self._start_timer(self.limits.body_seconds, "body")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timers(*self._timers)

    def _wait_for_reader(self, earlier: int | None) -> None:
        """Abort if the client has received nothing since ``earlier`` bytes were left to send."""
        remaining = self.transport.get_write_buffer_size()
        if earlier is not None and remaining >= earlier:
            self.transport.abort()
        elif remaining:
            wait = self.limits.write_seconds
            self._timers["reader"] = self.loop.call_later(wait, self._wait_for_reader, remaining)


class _UvicornServer(uvicorn.Server):
    """A uvicorn server that lets running responses end for at most ``drain`` seconds; then the
    engine ends them with an error that clients receive."""

    def __init__(self, config: uvicorn.Config, server: Server, drain: float):
        super().__init__(config)
        self.server, self.drain = server, drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:  # clients may connect from now on
            log("ready", model=self.server.models.name)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server.stopping = True
        log("stopping", seconds=self.drain)
        has_drained = asyncio.Event()

        async def close() -> None:
            # close the engine late: accepted requests may still reach it
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(has_drained.wait(), self.drain)
            await asyncio.get_running_loop().run_in_executor(None, self.server.models.close)

        closing = asyncio.create_task(close())
        await super().shutdown(sockets)
        has_drained.set()
        await closing
        for store in (self.server.feedback, self.server.ranking):
            if store is not None:
                # here, since the signal ends the process before `run` returns
                await asyncio.get_running_loop().run_in_executor(None, store.close)


class _UvicornLogHandler(logging.Handler):
    """Writes uvicorn's warnings as lines of this server's log."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            error = record.exc_info[0] if record.exc_info else None
            # an exception's message may quote a request
            message = error.__name__ if error else record.getMessage()[:200]
            log("uvicorn", level=record.levelname.lower(), message=message)


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
