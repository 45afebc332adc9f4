"""Run a `fastlm serve` process on this machine, and send requests to it."""

import http.client
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import make_folder
from fastlm.serve.options import ADMIN_KEYS_VARIABLE, KEYS_VARIABLE

MODEL_NAME = "served"
START_SECONDS, END_SECONDS = 600, 60
ANSWER_SECONDS = 660  # the server itself ends an answer after 600
# The server ends when its parent is killed (PR_SET_PDEATHSIG, SIGTERM), which may be so already
_START = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit(1)
from fastlm.cli import main
main()
"""


@dataclass(frozen=True)
class HttpReply:
    """A response. ``status``: of HTTP, 0 if the connection broke. ``seconds``: to its last byte."""

    status: int
    body: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class LocalServer:
    """A running server. ``key``: the API key of its clients."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path
    key: str = field(repr=False)

    def post(self, path: str, body: Mapping[str, Any]) -> HttpReply:
        """Send a request. InputError: the server has ended."""
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
            connection.request("POST", path, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            status, content = response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            status, content = 0, {}
            self._check_alive()
        finally:
            connection.close()
        return HttpReply(status, content, time.perf_counter() - began)

    def _check_alive(self) -> None:
        try:
            self.process.wait(1)  # a connection may break before the process has ended
        except subprocess.TimeoutExpired:
            return
        raise _ended(self.process, self.log)


@contextmanager
def run_local_server(
    model: Path,
    database: Path,
    log: Path,
    threads: int,
    *options: str,
    name: str = MODEL_NAME,
    admin_key: str | None = None,
) -> Iterator[LocalServer]:
    """Context: `fastlm serve` with ``model`` on a free port of this machine, which stores feedback
    in ``database``. ``log``: the file of its output. ``options``: more of its command line.
    ``name``: the model's name in requests. The server accepts one new key, and ``admin_key``. It
    does not accept the caller's keys, which are for other servers; without a key, every user of
    this machine could give feedback.

    InputError: the server does not start; the last line of its log is the reason.
    """
    make_folder(log.parent)
    arguments = ["serve", "--model", str(model), "--port", "0", "--name", name]
    arguments += ["--feedback", str(database), "--threads", str(threads), *options]
    key = secrets.token_hex(16)
    environment = os.environ | {KEYS_VARIABLE: key, ADMIN_KEYS_VARIABLE: admin_key or ""}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env=environment,
        )  # fmt: skip
    try:
        yield LocalServer(process, _port(process, log), log, key)
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """Wait until the log has the event "ready"; return the port of the server."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        ended = process.poll() is not None
        events = {event["event"]: event for event in _read(log)[0]}
        if "ready" in events:
            return int(events["listening"]["url"].rpartition(":")[2])
        if ended:
            raise _ended(process, log)
        time.sleep(0.05)
    raise InputError(f"the server was not ready after {START_SECONDS} s: {log}")


def _ended(process: "subprocess.Popen[bytes]", log: Path) -> InputError:
    message = ["its log is empty", *_read(log)[1]][-1]
    return InputError(
        f"the server ended with status {process.returncode}:"
        f" {message.removeprefix('fastlm: ')[:300]} ({log})"
    )


def _read(log: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the events of a log, and its other lines."""
    events, others = [], []
    for line in filter(str.strip, log.read_text("utf-8", "replace").splitlines()):
        event = None
        with suppress(ValueError):
            event = json.loads(line)
        if isinstance(event, dict) and "event" in event:
            events.append(event)
        else:
            others.append(line)
    return events, others
