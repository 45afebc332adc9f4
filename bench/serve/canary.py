"""Measure what a canary and a promotion cost the clients of a running server.

    python bench/serve/canary.py                        SmolLM2 with a copy of itself, 8 clients
    python bench/serve/canary.py --clients 1 --rounds 5 --json canary.json

Each round runs the server without a canary and with one at --share, in turn, under the load of
bench/serve/serve.py, and counts tokens per second and per second of the server's processor time
(which other programs on the machine disturb less). Then it promotes the canary's file in a server
without a canary, repeatedly under load, and compares the pauses between tokens with those of the
same load without promotions. The copy has one byte changed, since a server refuses the same model
twice.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
import httpx
from harness import common_options, machine, positive, save
from servers import Server, running_server
from traffic import Load, closed_loop, percentile

from fastlm.sources.packages import model_path

SLOTS = 16
NUM_BLOCKS = 512  # of each engine


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def canary_server(model: Path, threads: int, *options: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        state = ("--state", f"{folder}/state.json", "--feedback", f"{folder}/feedback.sqlite")
        arguments = (
            "--num-blocks",
            str(NUM_BLOCKS),
            "--models-dir",
            str(model.parent),
            *state,
            *options,
        )
        with running_server("fastlm", str(model), threads, SLOTS, *arguments) as server:
            yield server


def measure_load(server: Server, clients: int, seconds: float, seed: int) -> tuple[Load, float]:
    """Return the load that clients measured, and the processor time of the server for it."""
    asyncio.run(closed_loop(server.url, server.model, clients, 2, seed=seed + 500))  # warm-up
    before = processor_seconds(server.pid)
    load = asyncio.run(closed_loop(server.url, server.model, clients, seconds, seed=seed))
    return load, processor_seconds(server.pid) - before


async def measure_promotions(
    server: Server, paths: list[Path], clients: int, seconds: float, seed: int
) -> tuple[Load, list[float]]:
    """Promote models in turn under load; return the load and the seconds of each promotion."""
    times: list[float] = []
    load_task = asyncio.create_task(
        closed_loop(server.url, server.model, clients, seconds, seed=seed)
    )
    until = time.perf_counter() + seconds
    async with httpx.AsyncClient(timeout=600, trust_env=False) as http:
        while time.perf_counter() < until:
            await asyncio.sleep(1)
            start = time.perf_counter()
            path = str(paths[len(times) % len(paths)])
            url = server.url.removesuffix("v1/") + "v1/admin/promote"
            response = await http.post(url, json={"model": path})
            response.raise_for_status()
            times.append(time.perf_counter() - start)
    return await load_task, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    common_options(parser)
    parser.add_argument(
        "--model", default="model:smollm2", help="serve this .gguf file, or model:smollm2"
    )
    parser.add_argument("--clients", type=positive, default=8)
    parser.add_argument("--seconds", type=positive, default=20, help="duration of each run")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--share", type=float, default=0.1)
    a = parser.parse_args()
    threads = a.threads
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder) / "old.gguf", Path(folder) / "new.gguf"
        data = bytearray(model_path(a.model).read_bytes())
        old.write_bytes(data)
        data[-1] ^= 1
        new.write_bytes(data)
        del data
        sides: dict[str, tuple[str, ...]] = {
            "alone": (),
            "canary": ("--canary", str(new), "--canary-share", str(a.share)),
        }
        rates: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        faults: list[str] = []
        for turn in range(a.rounds):
            for name, options in sides.items():
                with canary_server(old, threads, *options) as server:
                    load, used = measure_load(server, a.clients, a.seconds, 1000 * turn)
                faults += load.faults
                run = load.figures() | {"tokens_per_processor_second": load.tokens / used}
                rates[name].append(run)
                print(
                    f"{name:7} {run['tokens_per_second']:6.1f} tokens/s"
                    f" {run['tokens_per_processor_second']:6.1f} per processor second,"
                    f" between p50 {1e3 * run['between_tokens_p50']:.0f} ms"
                    f" p99 {1e3 * run['between_tokens_p99']:.0f} ms"
                )
        figures: dict[str, Any] = {"rates": rates}
        for key in ("tokens_per_second", "tokens_per_processor_second", "between_tokens_p99"):
            ratios = [b[key] / c[key] for b, c in zip(rates["canary"], rates["alone"])]
            figures[f"{key}_ratio"] = statistics.median(ratios)
            print(f"{key}: with a canary {statistics.median(ratios):.2f} of that without")
        with canary_server(old, threads) as server:
            quiet, _ = measure_load(server, a.clients, a.seconds, 50_000)
            busy, times = asyncio.run(
                measure_promotions(server, [new, old], a.clients, a.seconds, 60_000)
            )
        for name, load in (("without", quiet), ("promotions", busy)):
            faults += load.faults
            figures[f"pauses_{name}"] = pauses = {
                "p50": percentile(load.between, 50), "p99": percentile(load.between, 99),
                "longest": max(load.between), "answers": load.done,
            }  # fmt: skip
            print(
                f"{name:10} between tokens p50 {1e3 * pauses['p50']:.0f} ms, p99"
                f" {1e3 * pauses['p99']:.0f} ms, longest {1e3 * pauses['longest']:.0f} ms,"
                f" {load.done} answers"
            )
        figures["promotion_seconds"] = times
        print(f"{len(times)} promotions, {statistics.median(times):.2f} s each (median)")
        for fault in faults[:5]:
            print(f"fault: {fault}")
    host = {**machine(), "threads": threads}
    save(a.json, {"machine": host, "clients": a.clients, "share": a.share, **figures})
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
