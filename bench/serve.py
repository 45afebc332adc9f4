"""A server under load: requests and tokens per second, time to the first token and between tokens.

    python bench/serve.py                                SmolLM2 at 1, 4, 16 and 64 clients
    python bench/serve.py --url http://host:8080/v1      another server of OpenAI's API as well
    python bench/serve.py --soak 1800 --clients 64       unkind clients for half an hour

Each client sends its next request as soon as its last one ends: a prompt of words drawn at random,
32 to 256 of them, and up to 16 to 128 tokens of an answer, streamed. Both sides get the same
requests, in turn.

The soak adds clients that cancel, disconnect in the middle, and send malformed bodies. Every prompt
carries a marker that its answer has to begin with (the server's grammar sees to it), so an answer
that reached another client would show. The server's cache of keys and values is small, so that its
memory is taken in the first half. The soak fails on an error that is not the client's, a crossed
answer, or memory that grows in the second half.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from harness import machine, positive, save

WORDS = "the river tree stone light water small old house road green bird night sun cold".split()
START_SECONDS = 120
GROWTH_MIB = 64  # of resident memory in the second half of a soak
SOAK_PAGES = 192  # 12,288 tokens, 30 of the longest requests: used up in a minute or two


@dataclass
class Load:
    """What the clients of one run saw; times in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    done: int = 0
    ended: Counter[str] = field(default_factory=Counter)  # by kind of unkindness, errors too
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        def part(values: list[float], p: int) -> float:
            return statistics.quantiles(values, n=100)[p - 1] if len(values) > 1 else float("nan")

        return {
            "requests_per_second": self.done / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "first_token_p50": part(self.first, 50),
            "first_token_p99": part(self.first, 99),
            "between_tokens_p50": part(self.between, 50),
            "between_tokens_p99": part(self.between, 99),
            "requests": self.done,
        }


def body_of(draw: random.Random, model: str, marker: str | None) -> dict[str, Any]:
    words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(32, 256)))
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"{marker or ''} {words}"}],
        "max_tokens": draw.randint(16, 128),
        "seed": draw.randrange(2**31),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if marker is not None:
        body["structured_outputs"] = {"regex": f"{marker} [a-z ]*"}
    return body


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


async def ask(http: httpx.AsyncClient, body: dict[str, Any], load: Load, quit_after: int) -> str:
    """Send a request; return the text of its answer. `quit_after`: pieces after which the client
    closes the connection; 0: never."""
    began, last, text, count = time.perf_counter(), 0.0, "", 0
    async with http.stream("POST", "chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise RuntimeError(f"{response.status_code}: {response.text:.200}")
        async for event in events(response):
            if "error" in event:
                raise RuntimeError(f"event: {event['error']}")
            if usage := event.get("usage"):
                load.tokens += usage["completion_tokens"]
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                if not piece:
                    continue
                now = time.perf_counter()
                if last:
                    load.between.append(now - last)
                else:
                    load.first.append(now - began)
                last, text, count = now, text + piece, count + 1
            if quit_after and count >= quit_after:
                return text
    return text


async def unkind(http: httpx.AsyncClient, draw: random.Random, load: Load) -> bool:
    """Be malformed, perhaps. Whether this was the whole turn."""
    if draw.random() > 0.1:
        return False
    content = draw.choice(
        (b"{", b'{"model": 1}', b"\xff" * 64, b"[" * 4000, b'{"messages": [], "model": "x"}')
    )
    response = await http.post(
        "chat/completions", content=content, headers={"content-type": "application/json"}
    )
    load.ended[f"malformed, {response.status_code}"] += 1
    if not 400 <= response.status_code < 500:
        load.faults.append(f"a malformed body got {response.status_code}: {response.text:.100}")
    return True


async def client(
    http: httpx.AsyncClient, seed: int, until: float, load: Load, model: str, soaks: bool
) -> None:
    draw = random.Random(seed)
    turn = 0
    while time.perf_counter() < until:
        turn += 1
        try:
            if soaks and await unkind(http, draw, load):
                continue
            marker = f"m{seed}t{turn}x" if soaks else None
            quits = draw.randint(1, 20) if soaks and draw.random() < 0.2 else 0
            text = await ask(http, body_of(draw, model, marker), load, quits)
        except (RuntimeError, httpx.HTTPError) as error:
            load.faults.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.5)
            continue
        if marker and not marker.startswith(text[: len(marker)]):
            load.faults.append(f"crossed: wanted {marker}, got {text:.40}")
        load.ended["left" if quits else "whole"] += 1
        load.done += 1


async def run(
    url: str, clients: int, seconds: float, model: str, *, seed: int = 0, soaks: bool = False
) -> Load:
    load, began = Load(), time.perf_counter()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as http:
        until = began + seconds
        await asyncio.gather(
            *(client(http, seed + i, until, load, model, soaks) for i in range(clients))
        )
    load.seconds = time.perf_counter() - began
    return load


def start(model: str, threads: int, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    """`fastlm serve` on a port of its own, and its URL once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "fastlm", "serve", "--model", model, "--port", str(port)),
            *("--name", "model", *options),
        ],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                return process, f"{url}/v1/"
        except httpx.HTTPError:
            time.sleep(0.1)
    process.kill()
    sys.exit(f"fastlm serve: wanted it ready within {START_SECONDS} s, exit {process.poll()}")


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def used_up(url: str) -> bool:
    """Whether every page of the server's cache has been used, so that its memory is taken: prompts
    differ within their first page, and most of their tokens are on pages that are kept."""
    text = httpx.get(url.replace("/v1/", "/metrics"), trust_env=False).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    return float(lines["fastlm_prompt_tokens_total"]) > 2 * 64 * float(lines["fastlm_pages"])


def soak(
    process: subprocess.Popen[bytes], url: str, clients: int, seconds: float
) -> dict[str, Any]:
    """Ten runs one after the other, with the memory after each."""
    whole, memory = Load(), []
    for i in range(10):
        load = asyncio.run(
            run(url, clients, seconds / 10, "model", seed=(i + 1) * clients, soaks=True)
        )
        memory.append(round(resident_mib(process.pid)))
        for name in ("first", "between", "faults"):
            getattr(whole, name).extend(getattr(load, name))
        whole.tokens, whole.done = whole.tokens + load.tokens, whole.done + load.done
        whole.ended, whole.seconds = whole.ended + load.ended, whole.seconds + load.seconds
        print(f"{whole.seconds:6.0f} s, {memory[-1]} MiB, {dict(whole.ended)}", flush=True)
        if i == 4 and not used_up(url):
            whole.faults.append("wanted the server's cache full by half of the time: soak longer")
    if memory[-1] - memory[4] > GROWTH_MIB:
        whole.faults.append(f"memory grew from {memory[4]} to {memory[-1]} MiB")
    if process.poll() is not None:
        whole.faults.append(f"the server ended with {process.poll()}")
    return {
        **whole.figures(), "ended": dict(whole.ended), "memory_mib": memory,
        "faults": len(whole.faults), "first_faults": whole.faults[:10],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="model:smollm2")
    parser.add_argument("--url", help="of another server, with its /v1")
    parser.add_argument("--url-model", default="model", help="what the other server calls it")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=30, help="of a run")
    parser.add_argument("--turns", type=positive, default=1)
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    a = parser.parse_args()
    options = ("--pages", str(SOAK_PAGES)) if a.soak else ()
    process, url = start(a.model, a.threads, *options)
    found: dict[str, Any] = {"machine": {**machine(), "threads": a.threads}}
    try:
        if a.soak:
            found["soak"] = soak(process, url, a.clients[-1], a.soak)
            print(json.dumps(found["soak"], indent=1))
        else:
            sides = {"fastlm": (url, "model")}
            if a.url:
                sides["other"] = (a.url.rstrip("/") + "/", a.url_model)
            rows: dict[str, Any] = {}
            for name, (where, model) in sides.items():
                asyncio.run(run(where, 1, 2, model))  # warm-up
                rows[name] = {}
            for count in a.clients:
                loads: dict[str, list[Load]] = {name: [] for name in sides}
                for _ in range(a.turns):
                    for name, (where, model) in sides.items():
                        loads[name].append(asyncio.run(run(where, count, a.seconds, model)))
                for name, several in loads.items():
                    figures = [load.figures() for load in several]
                    middle = {k: statistics.median(f[k] for f in figures) for k in figures[0]}
                    rows[name][count] = middle
                    faults = [fault for load in several for fault in load.faults]
                    shown = ", ".join(f"{k} {v:.3g}" for k, v in middle.items())
                    print(f"{name}, {count} clients: {shown}, {len(faults)} faults", flush=True)
                    for fault in faults[:3]:
                        print(f"  {fault}")
            found["serve"] = rows
    finally:
        process.terminate()
        process.wait(60)
    save(a.json, found)
    if found.get("soak", {}).get("faults"):
        sys.exit(1)


if __name__ == "__main__":
    main()
