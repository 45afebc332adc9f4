"""A server under load, against llama-server on the same file: throughput, latencies, cold starts.

    python bench/serve/serve.py                             SmolLM2 at 1, 4, 16 and 64 clients
    python bench/serve/serve.py --load --poisson --cold --json serve.json --plot serve.png
    python bench/serve/serve.py --url http://host:8080/v1   another server of OpenAI's API as well
    python bench/serve/serve.py --soak 1800 --clients 64    unkind clients for half an hour

--load: each client sends its next request as soon as its last one ends: a prompt of words drawn at
random, 32 to 256 of them, and 16 to 128 tokens of an answer, streamed. All servers get the same
requests. One server runs at a time, and a new one is started for each row. An answer of another
length, or a prompt that has another length on another server, is a fault. No prompt is sent twice,
so only the head of the chat template is in a cache.

--poisson: requests arrive at random, at 70 % of those per second that the server managed for 16
clients, beside one client's figures. --cold: from the start of a process to its first text.

The soak's clients (bench/serve/soaking.py) chat, complete, call a tool, embed and give feedback,
streamed and not; they leave in the middle and send malformed bodies. Half of their prompts begin
with the same text. Every prompt carries a marker that its answer has to begin with (the server's
grammar sees to it), so an answer that reached another client would show. The server's cache of keys
and values is small, so that its memory is taken in the first half. The soak fails on an error that
is not the client's, a crossed answer, or memory that grows in the second half.

`sh bench/peers/llama_cpp.sh` builds llama-server.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
import httpx
import serve_tables
import soaking
from ceilings import Others, wait_until_quiet
from harness import common_options, llama_cpp, machine, positive, save
from servers import Server, cold, resident_mib, started
from traffic import Load, closed_loop, open_loop
from turns import tell_if_busy

GROWTH_MIB = 64  # of resident memory in the second half of a soak
SOAK_PAGES = 192  # 12,288 tokens, 30 of the longest requests: used up in a minute or two
WARM_UP = 2  # seconds
PEER, COMMAND = "llama-server", "llama-completion"
CAPACITY_CLIENTS = 16
POISSON_SLOTS = 64  # a burst may have more requests than there were clients

Side = Callable[[int], AbstractContextManager[Server]]
"""Starts a server for so many clients."""


class Seeds:
    """Seeds for up to 1,000 clients that no other run has: a prompt sent again would be cached."""

    def __init__(self) -> None:
        self.next = count(0, 1000)

    def __call__(self) -> int:
        return next(self.next)


def faults_of(loads: dict[str, list[Load]]) -> list[str]:
    """What went wrong, and prompts of which the servers made another number of tokens."""
    found, lengths = [], {}
    for name, several in loads.items():
        for load in several:
            found += [f"{name}: {fault}" for fault in load.faults]
            for request, tokens in load.prompts.items():
                if lengths.setdefault(request, tokens) != tokens:
                    found.append(f"{name}: a prompt of {tokens} tokens, {lengths[request]} before")
    return found


def middle(loads: Sequence[Load]) -> dict[str, float]:
    figures = [load.figures() for load in loads]
    return {k: statistics.median(f[k] for f in figures) for k in figures[0]}


def tell(faults: list[str]) -> None:
    for fault in faults[:5]:
        print(f"  {fault}", flush=True)


def under_load(
    sides: dict[str, Side], clients: Sequence[int], seconds: float, turns: int, seeds: Seeds
) -> tuple[dict[str, Any], list[str]]:
    """Figures by server and number of clients, and what went wrong."""
    rows: dict[str, Any] = {name: {} for name in sides}
    faults = []
    for number in clients:
        loads: dict[str, list[Load]] = {name: [] for name in sides}
        for _ in range(turns):
            warm, seed = seeds(), seeds()
            for name, side in sides.items():
                with side(number) as server:
                    run = partial(closed_loop, server.url, server.model)
                    asyncio.run(run(1, WARM_UP, seed=warm))
                    loads[name].append(asyncio.run(run(number, seconds, seed=seed)))
        for name, several in loads.items():
            rows[name][str(number)] = middle(several)
            shown = ", ".join(f"{k} {v:.3g}" for k, v in rows[name][str(number)].items())
            print(f"{name}, {number} clients: {shown}", flush=True)
        faults += (new := faults_of(loads))
        tell(new)
    return rows, faults


def arriving(
    sides: dict[str, Side], share: float, seconds: float, seeds: Seeds
) -> tuple[dict[str, Any], list[str]]:
    """Each server at `share` of its own capacity, beside one client alone: figures by server, and
    what went wrong."""
    rows: dict[str, Any] = {}
    loads: dict[str, list[Load]] = {}
    warm, alone_seed, full_seed, seed = seeds(), seeds(), seeds(), seeds()
    for name, side in sides.items():
        with side(POISSON_SLOTS) as server:
            closed = partial(closed_loop, server.url, server.model)
            asyncio.run(closed(1, WARM_UP, seed=warm))
            alone = asyncio.run(closed(1, seconds, seed=alone_seed))
            full = asyncio.run(closed(CAPACITY_CLIENTS, seconds, seed=full_seed))
            rate = share * full.figures()["requests_per_second"]
            load = asyncio.run(open_loop(server.url, server.model, rate, 2 * seconds, seed=seed))
        loads[name] = [alone, full, load]
        unloaded, loaded = alone.figures(), load.figures()
        rows[name] = {
            "share": share, "capacity": full.figures(), "rate": rate, "unloaded": unloaded,
            "loaded": loaded,
            "p99_to_unloaded": loaded["between_tokens_p99"] / unloaded["between_tokens_p99"],
        }  # fmt: skip
        print(f"{name}: {len(load.first)} requests at {rate:.2f}/s", flush=True)
    faults = faults_of(loads)
    tell(faults)
    return rows, faults


def used_up(url: str) -> bool:
    """Whether every page of the server's cache has been used, so that its memory is taken: tokens
    of prompts that were computed differ, and most of them are on pages that are kept."""
    text = httpx.get(url.replace("/v1/", "/metrics"), trust_env=False).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    return float(lines["fastlm_prompt_tokens_total"]) > 2 * 64 * float(lines["fastlm_num_blocks"])


def soak(server: Server, clients: int, seconds: float, seeds: Seeds) -> dict[str, Any]:
    """Ten runs one after the other, with the memory after each."""
    whole, memory = Load(), []
    for i in range(10):
        whole.add(
            asyncio.run(
                closed_loop(
                    *(server.url, server.model, clients, seconds / 10),
                    seed=seeds(),
                    turn=soaking.take_turn,
                )
            )
        )
        memory.append(round(resident_mib(server.pid)))
        print(f"{whole.seconds:6.0f} s, {memory[-1]} MiB, {dict(whole.ended)}", flush=True)
        if i == 4 and not used_up(server.url):
            whole.faults.append("expected the server's cache full by half of the time: soak longer")
    if memory[-1] - memory[4] > GROWTH_MIB:
        whole.faults.append(f"memory grew from {memory[4]} to {memory[-1]} MiB")
    return {
        **whole.figures(), "ended": dict(whole.ended), "memory_mib": memory,
        "faults": len(whole.faults), "first_faults": whole.faults[:10],
    }  # fmt: skip


def file_of(model: str) -> str:
    if not model.startswith("model:"):
        return model
    from fastlm.sources.packages import default_cache, fetch_model

    return str(fetch_model(model, default_cache()))


def peers_of(expected: str | None, model: str) -> list[str]:
    """llama-server, unless it is not built or cannot read the model, which ends a run that asked
    for it."""
    if expected == "none":
        return []
    missing = ""
    if llama_cpp(PEER) is None:
        missing = "sh bench/peers/llama_cpp.sh builds it"
    elif not model.endswith(".gguf"):
        missing = f"it reads GGUF, not {model}"
    if missing and expected is not None:
        sys.exit(f"bench: --peer {expected}: {missing}")
    if missing:
        print(f"bench: {PEER} is left out: {missing}")
    return [] if missing else [PEER]


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and below 1, got {text}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="model:smollm2")
    parser.add_argument("--peer", choices=(PEER, "none"), help="default: llama-server if built")
    parser.add_argument("--url", help="of another server, with its /v1")
    parser.add_argument("--url-model", default="model", help="what the other server calls it")
    parser.add_argument("--load", action="store_true", help="closed loops; the default")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=30, help="of a run")
    parser.add_argument("--turns", type=positive, default=1)
    parser.add_argument(
        "--poisson", type=share, nargs="?", const=0.7, metavar="SHARE", help="of the capacity: 0.7"
    )
    parser.add_argument(
        "--cold", type=positive, nargs="?", const=5, metavar="ROUNDS", help="cold starts: 5"
    )
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--plot", metavar="FILE", type=Path, help="of --load")
    common_options(parser)
    a = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end too
    model = file_of(a.model)
    wait_until_quiet(a.busy)
    others, seeds, faults = Others(), Seeds(), []
    found: dict[str, Any] = {"machine": {**machine(), "threads": a.threads}}
    if a.soak:
        with (
            tempfile.TemporaryDirectory() as folder,
            started(
                *("fastlm", model, a.threads, a.clients[-1], "--num-blocks", str(SOAK_PAGES)),
                *("--feedback", f"{folder}/feedback.sqlite"),
            ) as server,
        ):
            found["soak"] = soak(server, a.clients[-1], a.soak, seeds)
        print(json.dumps(found["soak"], indent=1))
        save(a.json, found)
        sys.exit(1 if found["soak"]["faults"] else 0)
    names = ["fastlm", *peers_of(a.peer, model)]
    sides: dict[str, Side] = {n: partial(started, n, model, a.threads) for n in names}
    if a.url:
        sides["other"] = lambda slots: nullcontext(Server(a.url.rstrip("/") + "/", 0, a.url_model))
    if a.load or not (a.poisson or a.cold):
        found["serve"], new = under_load(sides, a.clients, a.seconds, a.turns, seeds)
        faults += new
    if a.poisson:
        found["poisson"], new = arriving(sides, a.poisson, a.seconds, seeds)
        faults += new
    if a.cold:
        commands = ["fastlm"]
        if PEER in names and llama_cpp(COMMAND) is None:
            print(f"bench: {COMMAND} is left out: sh bench/peers/llama_cpp.sh builds it")
        elif PEER in names:
            commands.append(COMMAND)
        found["cold"] = cold({"chat": names, "command": commands}, model, a.threads, a.cold)
    tell_if_busy(others)
    print(found["machine"])
    print(serve_tables.tables(found))
    found["faults"] = faults
    save(a.json, found)
    if a.plot and "serve" in found:
        serve_tables.plot(found["serve"], a.plot)
        print(f"written: {a.plot}")
    if faults:
        sys.exit(f"bench: {len(faults)} faults, the first: {faults[0]}")


if __name__ == "__main__":
    main()
