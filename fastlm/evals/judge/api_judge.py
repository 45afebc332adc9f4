"""A server with OpenAI's API as a judge: ``http://HOST:PORT/v1``.

Prompts and answers are sent to this address and nowhere else: redirects are refused, and the key
comes only from the environment.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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

KEY_VARIABLE = "FASTLM_JUDGE_API_KEY"
REQUESTS = 8  # at once
MAX_REPLY_BYTES = 2**20
MAX_TOKENS = 1024  # of a reply
WAIT = 0.5  # seconds before the first retry; twice as long before each further one
RETRY = (408, 409, 429, 500, 502, 503, 504)  # statuses that may pass


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


class _UnreadableReply(Exception):
    """A reply without a grade."""


def is_address(judge: str) -> bool:
    """Return whether a judge is the address of a server."""
    return judge.startswith(("http://", "https://"))


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
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if _is_local(host):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self.model = model if model is not None else self._first_model()

    def reply(self, prompts: Sequence[str], grades: Sequence[Grade]) -> list[JudgeReply]:
        """Return a reply to each prompt. InputError: the server refuses a request, or does not
        answer it."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            futures = [pool.submit(self._reply, prompt, grades) for prompt in prompts]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _reply(self, prompt: str, grades: Sequence[Grade]) -> JudgeReply:
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
            return self._send("chat/completions", body, read)
        except _UnreadableReply as error:
            return no_grade(str(error))

    def _first_model(self) -> str:
        def read(data: bytes) -> str:
            return parse(data, ModelNames, "models")["data"][0]["id"]

        try:
            return self._send("models", None, read)
        except _UnreadableReply as error:
            raise InputError(
                f"judge: expected a list of models from {self.address}, got: {error}"
            ) from None

    def _send(self, path: str, body: Any, read: Any) -> Any:
        """Send a request until ``read`` accepts the reply. _UnreadableReply: it never did."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.address}/{path}", data, headers)
        failure: Exception | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(WAIT * 2 ** (attempt - 1))
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    reply = response.read(MAX_REPLY_BYTES + 1)
                if len(reply) > MAX_REPLY_BYTES:
                    raise InputError(f"expected at most {MAX_REPLY_BYTES:,} bytes, got more")
                return read(reply)
            except InputError as error:  # of the reply
                failure = _UnreadableReply(str(error))
            except urllib.error.HTTPError as error:
                failure = InputError(f"judge: {self.address} refused: {_status(error)}")
                if error.code not in RETRY:
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                cause = reason(cause) if isinstance(cause, BaseException) else cause
                failure = InputError(f"judge: expected a server at {self.address}, got: {cause}")
        assert failure is not None
        raise failure from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _status(error: urllib.error.HTTPError) -> str:
    message = ""
    with error, suppress(ValueError, KeyError, TypeError, OSError):
        message = f", {' '.join(str(json.load(error)['error']['message']).split()):.200}"
    return f"status {error.code}{message}"


def _is_local(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"
