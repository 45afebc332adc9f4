"""The servers that serve.py compares, each a process of its own, and their cold starts."""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
import httpx
from harness import llama_cpp
from traffic import CONTEXT, event_of

START_SECONDS = 120
QUESTION = "Why is the sky blue?"
# An installed package has its bytecode; a development shell may forbid to write it
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True)
class Server:
    """A server that is ready. `url` ends in /v1/."""

    url: str
    pid: int
    model: str = "model"  # what it calls its model


def command_of(
    name: str, model: str, port: int, threads: int, slots: int | None = None
) -> list[str]:
    """The command line of a server for `slots` answers at a time; all else is its default."""
    if name == "fastlm":
        program = [sys.executable, "-m", "fastlm", "serve", "--name", "model"]
        sizes = {"--threads": threads} | ({"--max-num-seqs": slots} if slots else {})
    else:
        program = [llama_cpp(name) or name, "--alias", "model", "--host", "127.0.0.1", "--no-webui"]
        sizes = {"-t": threads} | ({"-np": slots, "-c": slots * CONTEXT} if slots else {})
    words = [*program, "--model", model, "--port", str(port)]
    return words + [str(word) for pair in sizes.items() for word in pair]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def started(name: str, model: str, threads: int, slots: int, *options: str) -> Iterator[Server]:
    """A server, ready, until the block ends. `options`: more of its command line."""
    port = free_port()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*command_of(name, model, port, threads, slots), *options],
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=ENVIRONMENT,
        )
        try:
            if not _answers(process, f"http://127.0.0.1:{port}/health"):
                said.seek(0)
                last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
                sys.exit(
                    f"bench: {name}: expected it ready within {START_SECONDS} s, exit"
                    f" {process.poll()}: {last:.200}"
                )
            yield Server(f"http://127.0.0.1:{port}/v1/", process.pid)
        finally:
            _end(process)


def _answers(process: subprocess.Popen[bytes], url: str) -> bool:
    """Wait until the server is ready. Before, llama-server says 503 and fastlm does not listen."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return True
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cold_chat(name: str, model: str, threads: int) -> float:
    """Seconds from the start of the server's process to the first text of a streamed answer."""
    port = free_port()
    command = command_of(name, model, port, threads)
    body = {
        "model": "model", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8,
        "temperature": 0, "stream": True,
    }  # fmt: skip
    with httpx.Client(timeout=START_SECONDS, trust_env=False) as http:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        try:
            while process.poll() is None and time.perf_counter() - began < START_SECONDS:
                if _listens(port) and _first_text(http, port, body):
                    return time.perf_counter() - began
                time.sleep(0.002)
        finally:
            _end(process)
    sys.exit(f"bench: {name}: expected an answer within {START_SECONDS} s, exit {process.poll()}")


def _listens(port: int) -> bool:
    """A bare connection costs less of the starting server's cores than a request."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _first_text(http: httpx.Client, port: int, body: dict[str, Any]) -> bool:
    """Whether the server answers the request yet."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with http.stream("POST", url, json=body) as response:
        if response.status_code == 503:  # llama-server listens while it loads the model
            return False
        for event in map(event_of, response.iter_lines()):
            if event and any(choice["delta"].get("content") for choice in event["choices"]):
                return True
    sys.exit(f"bench: a cold server answered {response.status_code} without text")


def cold_command(name: str, model: str, threads: int) -> float:
    """Seconds from the start of a command to the first byte of the text that it writes."""
    if name == "fastlm":
        words = [sys.executable, "-m", "fastlm", "generate", "--raw", "--max-new-tokens", "8"]
        words += ["--threads", str(threads), "--temperature", "0"]
    else:
        words = [llama_cpp(name) or name, "-no-cnv", "--no-display-prompt", "--simple-io"]
        words += ["-n", "8", "-t", str(threads), "--temp", "0"]
    words += ["-m", model, "-p", QUESTION]
    began = time.perf_counter()
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        if process.stdout.read(1):
            return time.perf_counter() - began
    finally:
        process.stdout.close()
        _end(process)
    sys.exit(f"bench: {name}: expected a text, exit {process.poll()}")


def cold(names: dict[str, list[str]], model: str, threads: int, rounds: int) -> dict[str, Any]:
    """Median and all seconds by kind and name; the file is in the page cache. `names`: of servers
    ("chat") and of commands ("command"), which take turns."""
    call = {"chat": cold_chat, "command": cold_command}
    Path(model).read_bytes()
    found: dict[str, Any] = {}
    for kind, several in names.items():
        times: dict[str, list[float]] = {name: [] for name in several}
        for _ in range(rounds):
            for name in several:
                times[name].append(call[kind](name, model, threads))
        found[kind] = {
            name: {"seconds": statistics.median(taken), "all": taken}
            for name, taken in times.items()
        }
    return found
