"""The server as a process: a model, its engine, uvicorn, and an orderly end."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import h11
import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastlm.checkpoint.digest import digest_of
from fastlm.errors import InputError
from fastlm.files import read_text, reason
from fastlm.inference.fair_lock import Turns
from fastlm.serve.app import Server
from fastlm.serve.gate import Limits, log
from fastlm.serve.loading import Loader, name_of
from fastlm.serve.models import Models
from fastlm.serve.plan import Plan
from fastlm.serve.switch import Allowed, Switch, start_models

MOST_TEMPLATE = 2**20  # bytes; published ones have up to 20,000
LOCAL_NAMES = frozenset(("localhost", "127.0.0.1", "::1"))


def run(
    path: Path,
    *,
    host: str,
    port: int,
    name: str | None,
    feedback: str | None,
    metrics: Path | None,
    alerts: Path | None,
    measure_days: float,
    measure_rows: int,
    rank: str | None,
    keys: Sequence[str],
    allow_host: Sequence[str],
    origins: Sequence[str],
    chat_template: Path | None,
    adapters: Mapping[str, Path],
    max_new_tokens: int | None,
    max_body: int,
    max_waiting: int,
    max_rows: int,
    max_length: int | None,
    pages: int | None,
    kv_dtype: str | None,
    draft_model: Path | None,
    draft_tokens: int | None,
    max_connections: int,
    max_seconds: float,
    drain: float,
    act_bits: int | None,
    canary: str | None = None,
    plan: Plan | None = None,
    models_dir: Path | None = None,
    state: Path | None = None,
    admins: Sequence[str] = (),
) -> None:
    """Serve until SIGTERM or Ctrl-C; see `fastlm.serve.commands.serve` for the arguments.

    InputError: a model, draft model, database or store that cannot be used, metrics or alerts that
    are refused, a port that is taken, more pages than fit the memory.
    """
    logging.getLogger("uvicorn.error").addHandler(_Lines())
    logging.getLogger("uvicorn").propagate = False
    with ExitStack() as stack:
        listening = stack.enter_context(_listen(host, port))
        store = monitoring = None
        if feedback is not None:
            from fastlm.serve.feedback import FeedbackStore  # SQLAlchemy takes 0.2 s
            from fastlm.serve.monitor.monitor import read_settings

            monitoring = read_settings(metrics, alerts, measure_days, measure_rows)
            store = stack.enter_context(FeedbackStore(feedback))
        ranking = None
        if rank is not None:
            from fastlm.serve.ranking import RankingStore

            ranking = stack.enter_context(RankingStore(rank, create=False))
        options: dict[str, Any] = {
            "pages": pages, "max_rows": max_rows, "max_waiting": max_waiting,
            "max_length": max_length, "draft_tokens": draft_tokens,
            "kv_dtype": None if kv_dtype is None else getattr(torch, kv_dtype),
        }  # fmt: skip
        public = name or name_of(path)
        template = None if chat_template is None else read_text(chat_template, MOST_TEMPLATE)
        if public in adapters:
            raise InputError(f"adapter: expected another name than the model's, got {public!r:.80}")
        share = len(adapters) + 1
        if state is None:
            loader = Loader(
                public, act_bits, options, draft_model, Turns() if adapters else None,
                template=template, share=share,
            )  # fmt: skip
            switch, models = None, Models(loader.load(path, digest_of(path)))
        else:
            loader = Loader(
                public, act_bits, options, draft_model, Turns(), versions=True, template=template,
                share=share,
            )  # fmt: skip
            counts = None
            if store is not None:
                from fastlm.serve.canary_store import CanaryStore

                counts = CanaryStore(store, None if plan is None else plan.rating)
            models, known = start_models(
                loader, str(path), state, canary=canary, plan=plan, store=counts
            )
            named = [str(path), *([canary] if canary else [])]
            switch = Switch(
                models, loader, known, state, Allowed(named, models_dir), store=counts,
                metric=(plan or Plan()).metric,
            )  # fmt: skip
        for key, place in adapters.items():
            models.add(replace(loader, name=key, versions=False).load(place, digest_of(place)))
        local = host in LOCAL_NAMES
        server = Server(
            models,
            limits=Limits(
                body_bytes=max_body, answer_seconds=max_seconds, new_tokens=max_new_tokens
            ),
            keys=keys, origins=origins, feedback=store, ranking=ranking, switch=switch,
            admins=admins, monitoring=monitoring,
            hosts=LOCAL_NAMES | {h.lower() for h in allow_host} if local else None,
        )  # fmt: skip
        config = config_of(server, max_connections, drain)
        bound = listening.getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        cache = models.stats()
        log(
            "listening", url=f"http://{shown}:{bound[1]}", model=models.name, pages=cache.pages,
            page_bytes=cache.page_bytes, cache_mib=cache.pages * cache.page_bytes // 2**20,
        )  # fmt: skip
        _Process(config, server, drain).run(sockets=[listening])


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

    def __init__(self, limits: Limits, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.limits = limits
        self._no_headers: asyncio.TimerHandle | None = None
        self._no_reader: asyncio.TimerHandle | None = None
        self._no_body: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes of a body after the response to its request
        self.app_state = {**self.app_state, "abort": self._abort}

    def _abort(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait_for_headers()
        else:
            self._no_headers = _stopped(self._no_headers)
            self._no_reader = _stopped(self._no_reader)  # the next response is written, too
        if self.conn.their_state is not h11.SEND_BODY:
            self._no_body = _stopped(self._no_body)
        elif self._no_body is not None:
            self._unread += len(data)
            if self._unread > self.limits.body_bytes:
                self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._no_reader = _stopped(self._no_reader)
        self._wait_for_reader(None)
        if self.conn.their_state is h11.SEND_BODY:
            self._unread = 0
            self._no_body = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._no_headers, self._no_reader = _stopped(self._no_headers), _stopped(self._no_reader)
        self._no_body = _stopped(self._no_body)

    def _wait_for_headers(self) -> None:
        if self._no_headers is None:
            wait = self.limits.header_seconds
            self._no_headers = self.loop.call_later(wait, self.transport.abort)

    def _wait_for_reader(self, before: int | None) -> None:
        """Give up a client that took nothing since ``before`` bytes were left to send."""
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
        elif left:
            wait = self.limits.write_seconds
            self._no_reader = self.loop.call_later(wait, self._wait_for_reader, left)


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


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
        if (store := self.server.feedback) is not None:
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
            f"port: wanted a free one on {host}, got {port}: {reason(error)}"
        ) from None
    return listening
