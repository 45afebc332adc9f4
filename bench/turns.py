"""Time variants in turns, each in its own process, which is idle while another one runs.

Each variant has its own process, so that its threads and its peak memory are separate: two thread
pools in one process compete for the cores. The variants take one turn each on otherwise idle cores,
so that a slow second of the machine affects all.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence

import torch
from ceilings import BUSY, OtherProcesses
from harness import common_options, positive

WARM_UP = 2  # steps before the timed ones: compilation, pages, the optimizer's states


def add_step_options(
    parser: argparse.ArgumentParser, sizes: Collection[str], variants: Sequence[str]
) -> None:
    """Add the options of a benchmark of training steps."""
    parser.add_argument("--size", choices=sizes, default="42m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=positive, default=5, help="timed ones, after two more")
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    common_options(parser)


def _worker(pipe, make: Callable, arguments: tuple, threads: int) -> None:
    """Create the variant, then answer each tuple of arguments with the result of its call, and
    "memory" with the MiB in addition to what the process had before.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call = make(*arguments)
    pipe.send("ready")
    while (message := pipe.recv()) != "stop":
        if message == "memory":
            pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        else:
            pipe.send(call(*message))


class Worker:
    """A process that creates `make(*arguments)` and calls it for each message."""

    def __init__(self, name: str, make: Callable, arguments: tuple, threads: int):
        self.name = name
        spawn = multiprocessing.get_context("spawn")
        self.pipe, worker_pipe = spawn.Pipe()
        self.process = spawn.Process(
            target=_worker, args=(worker_pipe, make, arguments, threads), daemon=True
        )
        self.process.start()
        worker_pipe.close()  # so that recv fails when the process ends
        self._answer()

    def _answer(self):
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            sys.exit(f"bench: {self.name}: its process ended with {self.process.exitcode}")

    def __call__(self, *message):
        self.pipe.send(message)
        return self._answer()

    def memory(self) -> float:
        self.pipe.send("memory")
        return self._answer()

    def stop(self) -> None:
        self.pipe.send("stop")
        self.process.join()


def _step(make: Callable, variant: str, arguments: tuple) -> Callable[[], tuple[float, float]]:
    step = make(variant, *arguments)

    def timed():
        start = time.perf_counter()
        loss = step()
        return time.perf_counter() - start, loss.item()

    return timed


def measure(
    variants: Sequence[str],
    make: Callable,
    arguments: tuple,
    *,
    steps: int,
    tokens: int,
    threads: int,
) -> list[dict]:
    """Measure every variant and return one row each. `make(variant, *arguments)`, called in the
    variant's process, returns a function that runs one step of `tokens` tokens and returns its
    loss.
    """
    workers = [Worker(v, _step, (make, v, arguments), threads) for v in variants]
    seconds: dict[str, list[float]] = {v: [] for v in variants}
    others = OtherProcesses([w.process.pid for w in workers])
    for i in range(WARM_UP + steps):
        for worker in workers:
            elapsed, loss = worker()
            if i >= WARM_UP:
                seconds[worker.name].append(elapsed)
            if not loss == loss:
                raise SystemExit(f"bench: {worker.name}: loss is NaN at step {i}")
    warn_if_busy(others)
    rows = []
    for worker in workers:
        times = seconds[worker.name]
        median = statistics.median(times)
        rows.append(
            {
                "variant": worker.name,
                "tokens_per_second": tokens / median,
                "spread": (max(times) - min(times)) / median,
                "peak_mib": worker.memory(),
            }
        )
        worker.stop()
    return rows


def warn_if_busy(others: OtherProcesses) -> None:
    if (share := others.share()) > BUSY:
        print(f"unsteady: others had {share:.0%} of the cores meanwhile")


def table(rows: Sequence[dict], mine: str) -> str:
    """Return a Markdown table of all variants, the fastest peer in bold, compared with `mine`."""
    reference = next((r for r in rows if r["variant"] == mine), None)
    peers = [r for r in rows if r["variant"].startswith(("torch", "eager"))]
    best = max(peers, key=lambda r: r["tokens_per_second"], default=None)
    lines = [
        f"| variant | tokens/s | {mine} is | peak MiB | {mine} uses | spread |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        faster = memory = "-"
        if reference is not None:
            faster = f"{reference['tokens_per_second'] / r['tokens_per_second']:.2f}x"
            memory = f"{reference['peak_mib'] / r['peak_mib']:.2f}x"
        name = f"**{r['variant']}**" if r is best else r["variant"]
        rate, mib = f"{r['tokens_per_second']:.0f}", f"{r['peak_mib']:.0f}"
        cells = (name, rate, faster, mib, memory, f"{r['spread']:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
