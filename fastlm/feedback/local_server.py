"""A `fastlm serve` process on this machine, and a client of it."""

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

NAME = "served"
START_SECONDS, END_SECONDS = 600, 60
ANSWER_SECONDS = 660  # the server itself ends an answer after 600
# The server ends when its starter is killed (PR_SET_PDEATHSIG, SIGTERM); that may already be so
_START = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit(1)
from fastlm.cli import main
main()
"""


@dataclass(frozen=True)
class Reply:
    """``status``: of HTTP, 0 where the connection broke. ``seconds``: until the last byte."""

    status: int
    body: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Served:
    """A running server. ``key``: what its clients send."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path
    key: str = field(repr=False)

    def post(self, path: str, body: Mapping[str, Any]) -> Reply:
        """Send a request. InputError: the server has ended."""
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
            connection.request("POST", path, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            status, told = response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            status, told = 0, {}
            self._check_alive()
        finally:
            connection.close()
        return Reply(status, told, time.perf_counter() - began)

    def _check_alive(self) -> None:
        try:
            self.process.wait(1)  # a connection may break before the process has ended
        except subprocess.TimeoutExpired:
            return
        raise _ended(self.process, self.log)


@contextmanager
def serving(
    model: Path,
    database: Path,
    log: Path,
    threads: int,
    *options: str,
    name: str = NAME,
    admin_key: str | None = None,
) -> Iterator[Served]:
    """Context: `fastlm serve` with ``model`` on a free port of this machine, which keeps feedback
    in ``database``. ``log``: the file of what it says. ``options``: more of its command line.
    ``name``: of the model, for its clients. It takes one key, made here, and ``admin_key``: the
    caller's are for other servers, and without any every user of this machine could give feedback.

    InputError: the server does not start; the last line that it said is the reason.
    """
    make_folder(log.parent)
    words = ["serve", "--model", str(model), "--port", "0", "--name", name]
    words += ["--feedback", str(database), "--threads", str(threads), *options]
    key = secrets.token_hex(16)
    environment = os.environ | {KEYS_VARIABLE: key, ADMIN_KEYS_VARIABLE: admin_key or ""}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(os.getpid()), *words],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env=environment,
        )  # fmt: skip
    try:
        yield Served(process, _port(process, log), log, key)
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """Wait until the server says that it is ready; return its port."""
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
    said = ["it said nothing", *_read(log)[1]][-1]
    return InputError(
        f"the server ended with status {process.returncode}:"
        f" {said.removeprefix('fastlm: ')[:300]} ({log})"
    )


def _read(log: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The events of a log, and its other lines."""
    events, others = [], []
    for line in filter(str.strip, log.read_text("utf-8", "replace").splitlines()):
        found = None
        with suppress(ValueError):
            found = json.loads(line)
        if isinstance(found, dict) and "event" in found:
            events.append(found)
        else:
            others.append(line)
    return events, others
