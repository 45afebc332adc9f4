"""Clients of a server with OpenAI's API, and their measurements: the load of serve.py.

Clients measure the times of pieces of text in a stream; the server's usage counts tokens.
"""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx

WORDS = "the river tree stone light water small old house road green bird night sun cold".split()
PROMPT_WORDS = (32, 256)
NEW_TOKENS = (16, 128)
CONTEXT = 512  # tokens of the longest request: one for a word, 40 for the chat template
# llama-server's defaults. Requests have them, since fastlm's defaults filter nothing
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


@dataclass
class Load:
    """The measurements of the clients of one run; times are in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)  # to an answer's last piece
    tokens: int = 0
    done: int = 0
    prompts: dict[int, int] = field(default_factory=dict)  # tokens, by the seed of the request
    cached: int = 0  # tokens of prompts from the server's cache
    outcomes: Counter[str] = field(default_factory=Counter)  # by kind, including errors
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0  # from the first request to the end of the last answer

    def add(self, other: "Load") -> None:
        for name in ("first", "between", "latency", "faults"):
            getattr(self, name).extend(getattr(other, name))
        self.prompts |= other.prompts
        self.outcomes += other.outcomes
        for name in ("tokens", "done", "cached", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict[str, float]:
        return {
            "requests_per_second": self.done / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "first_token_p50": percentile(self.first, 50),
            "first_token_p99": percentile(self.first, 99),
            "between_tokens_p50": percentile(self.between, 50),
            "between_tokens_p99": percentile(self.between, 99),
            "latency_p50": percentile(self.latency, 50),
            "latency_p99": percentile(self.latency, 99),
            "tokens_per_piece": self.tokens / max(1, len(self.between) + len(self.first)),
            "cached_share": self.cached / max(1, sum(self.prompts.values())),
            "requests": self.done,
        }


def percentile(values: Sequence[float], p: int) -> float:
    """Interpolate between the two nearest values; NaN without values."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[p - 1]


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the times in [0, seconds) of a Poisson process with `rate` arrivals per second."""
    draw, times, now = random.Random(seed), [], 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        times.append(now)
    return times


def random_body(draw: random.Random, model: str) -> dict[str, Any]:
    """Return a request of random length whose answer has exactly `max_tokens` tokens."""
    words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(*PROMPT_WORDS)))
    return {
        "model": model,
        "messages": [{"role": "user", "content": words}],
        "max_tokens": draw.randint(*NEW_TOKENS),
        "seed": draw.randrange(2**31),
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **SAMPLING,
    }


def parse_event(line: str) -> dict[str, Any] | None:
    """Return the event in a line of a stream, or None."""
    return json.loads(line[6:]) if line.startswith("data: ") and line != "data: [DONE]" else None


async def ask(
    http: httpx.AsyncClient,
    body: dict[str, Any],
    load: Load,
    *,
    path: str = "chat/completions",
    max_pieces: int = 0,
    start: float | None = None,
) -> tuple[str, dict[int, str]]:
    """Send a streamed request; return its id and the texts of its answers, or the arguments of
    their calls. `max_pieces`: pieces after which the client closes the connection; 0: never.
    `start`: the time at which the request was due, if not now."""
    start = time.perf_counter() if start is None else start
    last, texts, pieces, usage, id = 0.0, dict[int, str](), 0, None, ""
    async with http.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise RuntimeError(f"{response.status_code}: {response.text:.200}")
        async for line in response.aiter_lines():
            if (event := parse_event(line)) is None:
                continue
            if "error" in event:
                raise RuntimeError(f"event: {event['error']}")
            usage, id = event.get("usage") or usage, event.get("id", "")
            for choice in event["choices"]:
                if not (piece := choice_text(choice)):
                    continue
                now = time.perf_counter()
                if last:
                    load.between.append(now - last)
                else:
                    load.first.append(now - start)
                index = choice.get("index", 0)
                last, pieces = now, pieces + 1
                texts[index] = texts.get(index, "") + piece
            if max_pieces and pieces >= max_pieces:
                return id, texts
    if usage is None:
        raise RuntimeError("the stream had no usage")
    load.latency.append(time.perf_counter() - start)
    count_usage(load, body, usage)
    if body.get("ignore_eos") and usage["completion_tokens"] != body["max_tokens"]:
        expected, got = body["max_tokens"], usage["completion_tokens"]
        load.faults.append(f"an answer of {got} tokens, expected {expected}")
    return id, texts


def choice_text(choice: dict[str, Any]) -> str:
    """Return the text, or the arguments of calls, that a choice of an event adds."""
    delta = choice.get("delta") or {"content": choice.get("text")}
    calls = delta.get("tool_calls") or ()
    return (delta.get("content") or "") + "".join(c["function"]["arguments"] for c in calls)


def count_usage(load: Load, body: dict[str, Any], usage: dict[str, Any]) -> None:
    """Add the usage of a response to a load."""
    load.tokens += usage["completion_tokens"]
    load.prompts[body["seed"]] = usage["prompt_tokens"]
    load.cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


# One turn of a client: its connection, random numbers, load, model, and a marker of the turn
Turn = Callable[[httpx.AsyncClient, random.Random, Load, str, str], Awaitable[None]]


async def ask_once(
    http: httpx.AsyncClient, draw: random.Random, load: Load, model: str, marker: str
) -> None:
    """Send one request of random length."""
    del marker
    await ask(http, random_body(draw, model), load)
    load.outcomes["complete"] += 1
    load.done += 1


async def client(
    http: httpx.AsyncClient, seed: int, until: float, load: Load, model: str, turn: Turn
) -> None:
    """Take turns until the time `until`, but at least one. Errors are faults of the load."""
    draw = random.Random(seed)
    for number in count(1):
        if number > 1 and time.perf_counter() >= until:
            return
        try:
            await turn(http, draw, load, model, f"m{seed}t{number}x")
        except (RuntimeError, ValueError, httpx.HTTPError) as error:
            load.faults.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.5)


def connect(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False)


async def closed_loop(
    url: str, model: str, clients: int, seconds: float, *, seed: int, turn: Turn = ask_once
) -> Load:
    """Run clients that send their next request as soon as the last one ends, for `seconds`, but at
    least one each. Wait for running answers. Client i uses the seed `seed` + i."""
    load = Load()
    async with connect(url) as http:
        start = time.perf_counter()
        until = start + seconds
        await asyncio.gather(
            *(client(http, seed + i, until, load, model, turn) for i in range(clients))
        )
    load.seconds = time.perf_counter() - start
    return load


async def open_loop(url: str, model: str, rate: float, seconds: float, *, seed: int) -> Load:
    """Send requests as a Poisson process, whether or not others have ended. Times count from the
    scheduled arrival, so a late client does not improve them."""
    load, draw = Load(), random.Random(seed + 1)

    async def request(http: httpx.AsyncClient, due: float, body: dict[str, Any]) -> None:
        await asyncio.sleep(due - time.perf_counter())
        try:
            await ask(http, body, load, start=due)
        except (RuntimeError, httpx.HTTPError) as error:
            load.faults.append(f"{type(error).__name__}: {error}")
            return
        load.done += 1

    async with connect(url) as http:
        start = time.perf_counter()
        await asyncio.gather(
            *(
                request(http, start + offset, random_body(draw, model))
                for offset in arrivals(rate, seconds, seed)
            )
        )
    load.seconds = time.perf_counter() - start
    return load
