"""A server with OpenAI's API as a judge: ``http://HOST:PORT/v1``.

Prompts and answers are sent to this address and nowhere else: redirects are refused, proxies are
not used, and the key comes only from the environment.
"""

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import urlsplit

from annotated_types import MinLen
from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.evals.judge.reply import JudgeReply, no_grade
from fastlm.evals.judge.scale import Grade
from fastlm.files import reason
from fastlm.schema import parse
from fastlm.terminal import visible

KEY_VARIABLE = "FASTLM_JUDGE_API_KEY"
REQUESTS = 8  # at once
MAX_REPLY_BYTES = 2**20
MAX_TOKENS = 1024  # of a reply
WAIT = 0.5  # seconds before the first retry; twice as long before each further one
RETRY = (408, 409, 429, 500, 502, 503, 504)  # statuses that may pass
REFUSED = (400, 413, 422)  # statuses that are about one request: a prompt that is too long, ...


class ModelName(TypedDict):
    id: str


class ModelNames(TypedDict):
    data: Annotated[list[ModelName], MinLen(1)]


class ReplyMessage(TypedDict):
    content: str


class ReplyChoice(TypedDict):
    message: ReplyMessage


class ChatReply(TypedDict):
    choices: Annotated[list[ReplyChoice], MinLen(1)]


class GradeRow(TypedDict):
    reason: str
    grade: Grade


class ErrorMessage(TypedDict):
    message: str


class ErrorReply(TypedDict):
    error: ErrorMessage


class _NoReply(Exception):
    """The server answers a request without a grade, or refuses this request alone."""


class ApiJudge:
    """A server as a judge.

    Args:
        address: that of the API, with its ``/v1``.
        model: the name of the model there; None: the first that the server lists.
        timeout: seconds that a request may take.
        retries: how often a request is sent again after it failed, or after a reply without a
            readable grade.
    """

    def __init__(self, address: str, model: str | None, timeout: float, retries: int) -> None:
        self.address, self.timeout, self.retries = address.rstrip("/"), timeout, retries
        try:
            host = urlsplit(self.address).hostname
        except ValueError:
            host = None
        if not host:
            raise InputError(f"judge: expected http://HOST:PORT/v1, got {address!r:.200}")
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError(f"{KEY_VARIABLE}: expected printable ASCII characters, got others")
        self.exposes_key = (
            bool(self._key) and self.address.startswith("http://") and not _is_private(host)
        )
        self._opener = urllib.request.build_opener(_NoRedirect(), urllib.request.ProxyHandler({}))
        self.model = model if model is not None else self._first_model()

    def reply(
        self, prompts: Sequence[str], grades: Sequence[Grade]
    ) -> Iterator[tuple[int, JudgeReply]]:
        """Yield the replies as they arrive. One request that the server refuses has no grade.
        InputError, after the replies: the server refuses all requests, or does not answer one."""
        stop = threading.Event()
        pool = ThreadPoolExecutor(REQUESTS)
        futures = {
            pool.submit(self._reply, prompt, grades, stop): i for i, prompt in enumerate(prompts)
        }
        failure: BaseException | None = None
        try:
            for future in as_completed(futures):
                if (error := future.exception()) is None:
                    yield futures[future], future.result()
                elif failure is None:
                    failure = error
                    stop.set()
        finally:  # also after Ctrl-C: no further request
            stop.set()
            pool.shutdown(cancel_futures=True)
        if failure is not None:
            raise failure

    def _reply(self, prompt: str, grades: Sequence[Grade], stop: threading.Event) -> JudgeReply:
        kind = "integer" if isinstance(grades[0], int) else "string"
        schema = {
            "type": "object",
            "properties": {
                "reason": {"type": "string"}, "grade": {"type": kind, "enum": list(grades)},
            },
            "required": ["reason", "grade"], "additionalProperties": False,
        }  # fmt: skip
        body = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}],
            "temperature": 0, "max_tokens": MAX_TOKENS,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "grade", "strict": True, "schema": schema},
            },
        }  # fmt: skip

        def read(data: bytes) -> JudgeReply:
            text = parse(data, ChatReply, "reply")["choices"][0]["message"]["content"]
            start, end = text.find("{"), text.rfind("}") + 1  # without a fence around it
            row = parse(text[start:end], GradeRow, "reply")
            if row["grade"] not in grades:
                expected = ", ".join(map(json.dumps, grades))
                raise InputError(f"reply: expected a grade of {expected}, got {row['grade']!r:.80}")
            return {"grade": row["grade"], "reason": row["reason"], "probability": None}

        try:
            return self._send("chat/completions", body, read, stop)
        except _NoReply as error:
            return no_grade(str(error))

    def _first_model(self) -> str:
        def read(data: bytes) -> str:
            return parse(data, ModelNames, "models")["data"][0]["id"]

        try:
            return self._send("models", None, read, threading.Event())
        except _NoReply as error:
            raise InputError(
                f"judge: expected a list of models from {self.address}, got: {error}"
            ) from None

    def _send(self, path: str, body: Any, read: Any, stop: threading.Event) -> Any:
        """Send a request until ``read`` accepts the reply. _NoReply: it never did, or the server
        refuses this request. InputError: other failures, or ``stop`` is set."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.address}/{path}", data, headers)
        failure: Exception = InputError("judge: stopped")
        for attempt in range(self.retries + 1):
            if stop.wait(WAIT * 2 ** (attempt - 1) if attempt else 0):
                raise InputError("judge: stopped")
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    reply = response.read(MAX_REPLY_BYTES + 1)
                if len(reply) > MAX_REPLY_BYTES:
                    raise InputError(f"expected at most {MAX_REPLY_BYTES:,} bytes, got more")
                return read(reply)
            except InputError as error:  # of the reply
                failure = _NoReply(str(error))
            except urllib.error.HTTPError as error:
                text = f"{self.address} refused: {self._status(error)}"
                if error.code in REFUSED:
                    raise _NoReply(text) from None
                failure = InputError(f"judge: {text}")
                if error.code not in RETRY:
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                cause = reason(cause) if isinstance(cause, BaseException) else cause
                failure = InputError(
                    f"judge: expected a server at {self.address}, got: {visible(str(cause))}"
                )
        raise failure from None

    def _status(self, error: urllib.error.HTTPError) -> str:
        """Return the status with the server's message, which may repeat the key."""
        message = ""
        with error, suppress(InputError, OSError, http.client.HTTPException):
            reply = parse(error.read(MAX_REPLY_BYTES), ErrorReply, "error")
            message = " ".join(reply["error"]["message"].split())
        if self._key:
            message = message.replace(self._key, "...")
        return f"status {error.code}{', ' if message else ''}{visible(message):.200}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _is_private(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_private
    return host == "localhost"
