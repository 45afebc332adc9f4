"""Start the servers that serve.py compares, each in its own process, and measure cold starts."""

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
from traffic import CONTEXT, parse_event

START_SECONDS = 120
QUESTION = "Why is the sky blue?"
# An installed package has bytecode files; a development shell may forbid to write them
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True)
class Server:
    """A server that accepts requests. `url` ends in /v1/."""

    url: str
    pid: int
    model: str = "model"  # the name of its model


def server_command(
    name: str, model: str, port: int, threads: int, slots: int | None = None
) -> list[str]:
    """Return the command line of a server for `slots` concurrent answers; other options have their
    defaults."""
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
def running_server(
    name: str, model: str, threads: int, slots: int, *options: str
) -> Iterator[Server]:
    """Run a server until the block ends. `options`: more of its command line."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*server_command(name, model, port, threads, slots), *options],
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=ENVIRONMENT,
        )
        try:
            if not _wait_until_ready(process, f"http://127.0.0.1:{port}/health"):
                log.seek(0)
                last_line = log.read().decode(errors="replace").strip().rpartition("\n")[2]
                sys.exit(
                    f"bench: {name}: expected it ready within {START_SECONDS} s, exit"
                    f" {process.poll()}: {last_line:.200}"
                )
            yield Server(f"http://127.0.0.1:{port}/v1/", process.pid)
        finally:
            _terminate(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    """Wait until the server is ready; return False if it does not start. While they load,
    llama-server answers 503 and fastlm does not listen."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return True
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    return False


def _terminate(process: subprocess.Popen[bytes]) -> None:
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
    """Return the seconds from the start of the server's process to the first streamed text."""
    port = free_port()
    command = server_command(name, model, port, threads)
    body = {
        "model": "model", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8,
        "temperature": 0, "stream": True,
    }  # fmt: skip
    with httpx.Client(timeout=START_SECONDS, trust_env=False) as http:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        try:
            while process.poll() is None and time.perf_counter() - start < START_SECONDS:
                if _listens(port) and _first_text(http, port, body):
                    return time.perf_counter() - start
                time.sleep(0.002)
        finally:
            _terminate(process)
    sys.exit(f"bench: {name}: expected an answer within {START_SECONDS} s, exit {process.poll()}")


def _listens(port: int) -> bool:
    """Return whether the port accepts connections; a request would take more of the cores."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _first_text(http: httpx.Client, port: int, body: dict[str, Any]) -> bool:
    """Return whether the server answers the request."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with http.stream("POST", url, json=body) as response:
        if response.status_code == 503:  # llama-server listens while it loads the model
            return False
        for event in map(parse_event, response.iter_lines()):
            if event and any(choice["delta"].get("content") for choice in event["choices"]):
                return True
    sys.exit(f"bench: a cold server answered {response.status_code} without text")


def cold_command(name: str, model: str, threads: int) -> float:
    """Return the seconds from the start of a command to the first byte of its text."""
    if name == "fastlm":
        words = [sys.executable, "-m", "fastlm", "generate", "--raw", "--max-new-tokens", "8"]
        words += ["--threads", str(threads), "--temperature", "0"]
    else:
        words = [llama_cpp(name) or name, "-no-cnv", "--no-display-prompt", "--simple-io"]
        words += ["-n", "8", "-t", str(threads), "--temp", "0"]
    words += ["-m", model, "-p", QUESTION]
    start = time.perf_counter()
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        if process.stdout.read(1):
            return time.perf_counter() - start
    finally:
        process.stdout.close()
        _terminate(process)
    sys.exit(f"bench: {name}: expected a text, exit {process.poll()}")


def measure_cold_starts(
    names: dict[str, list[str]], model: str, threads: int, rounds: int
) -> dict[str, Any]:
    """Return the median and all seconds by kind and name. The file is in the page cache. `names`:
    servers ("chat") and commands ("command"), which take turns."""
    measure = {"chat": cold_chat, "command": cold_command}
    Path(model).read_bytes()
    results: dict[str, Any] = {}
    for kind, programs in names.items():
        times: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(rounds):
            for name in programs:
                times[name].append(measure[kind](name, model, threads))
        results[kind] = {
            name: {"seconds": statistics.median(seconds), "all": seconds}
            for name, seconds in times.items()
        }
    return results
