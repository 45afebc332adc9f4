"""Whole training steps of several variants, each in a process of its own, taking turns.

A process of its own, so that its peak memory is its own; one step each in turn on otherwise idle
cores, so that a slow second of the machine hits all.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import torch

WARM_UP = 2  # steps before the timed ones: compilation, pages, the optimizer's states


def _worker(pipe, make: Callable, variant: str, arguments: tuple, threads: int) -> None:
    """Builds the variant, then answers each "step" with (seconds, loss), "memory" with MiB."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make(variant, *arguments)
    while (message := pipe.recv()) != "stop":
        if message == "memory":
            pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
            continue
        start = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - start, loss.item()))


def measure(
    variants: Sequence[str],
    make: Callable,
    arguments: tuple,
    *,
    steps: int,
    tokens: int,
    threads: int,
) -> list[dict]:
    """`make(variant, *arguments)`, called in the variant's process, returns a function that runs
    one step of `tokens` tokens and returns its loss. One row a variant.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for variant in variants:
        pipes[variant], theirs = spawn.Pipe()
        its = (theirs, make, variant, arguments, threads)
        processes.append(spawn.Process(target=_worker, args=its, daemon=True))
        processes[-1].start()
    seconds: dict[str, list[float]] = {v: [] for v in pipes}
    for i in range(WARM_UP + steps):
        for variant, pipe in pipes.items():
            pipe.send("step")
            elapsed, loss = pipe.recv()
            if i >= WARM_UP:
                seconds[variant].append(elapsed)
            if not loss == loss:
                raise SystemExit(f"bench: {variant}: loss is NaN at step {i}")
    rows = []
    for variant, pipe in pipes.items():
        pipe.send("memory")
        median = statistics.median(seconds[variant])
        rows.append(
            {
                "variant": variant,
                "tokens_per_second": tokens / median,
                "spread": (max(seconds[variant]) - min(seconds[variant])) / median,
                "peak_mib": pipe.recv(),
            }
        )
        pipe.send("stop")
    for process in processes:
        process.join()
    return rows


def table(rows: Sequence[dict], mine: str) -> str:
    """Markdown: every variant, and how `mine` compares with it."""
    own = next((r for r in rows if r["variant"] == mine), None)
    lines = [
        f"| variant | tokens/s | {mine} is | peak MiB | {mine} uses | spread |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        faster = memory = "-"
        if own is not None:
            faster = f"{own['tokens_per_second'] / r['tokens_per_second']:.2f}x"
            memory = f"{own['peak_mib'] / r['peak_mib']:.2f}x"
        rate, mib = f"{r['tokens_per_second']:.0f}", f"{r['peak_mib']:.0f}"
        cells = (r["variant"], rate, faster, mib, memory, f"{r['spread']:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
