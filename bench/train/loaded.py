"""Measure the cost of a busy machine: decoding and training alone, then next to busy processes.

A variant is a process that waits for its turn. Its argument is an interpreter, preceded by
arguments of `env`, so that one run can compare two trees or two settings. The default is this
interpreter with the bound on waiting threads that the `fastlm` commands set (fastlm/threads.py).
The turns are: each variant alone, then each next to the busy processes, then again from the start.

    python bench/train/loaded.py
    python bench/train/loaded.py "PYTHONPATH=../before python" "GOMP_SPINCOUNT=10000 python"
    python bench/train/loaded.py --busy 4 --turns 7 --work decode

decode: SmolLM2-135M-Instruct (model:smollm2, Q4_1), one user, 512 tokens of context. training:
steps of the demo's model (recipes/full.toml), 8 x 256 tokens. A turn lasts at least a second and
consists of complete steps. The tokens/s are medians over the turns.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from fastlm.threads import SPIN_ROUNDS

SECONDS = 1.5  # per turn: many time slices of the system (3 to 6 ms)
DEMO = (4096, 256, 5, 4, 704)  # vocabulary, width, layers, heads, FFN; the first demo


def decode_turn() -> Callable[[], float]:
    import torch

    import fastlm
    from fastlm.sources.packages import default_cache, fetch_model

    model = fastlm.CausalLM.from_pretrained(fetch_model("model:smollm2", default_cache()))
    ids = torch.randint(100, 20000, (1, 512), generator=torch.Generator().manual_seed(1))

    def turn():
        moments: list[float] = []

        def on_token(row, token):
            moments.append(time.perf_counter())
            return moments[-1] - moments[0] > SECONDS and len(moments) > 8

        model.generate(ids, max_new_tokens=1024, temperature=0, on_token=on_token)
        return (len(moments) - 1) / (moments[-1] - moments[0])

    return turn


def training_turn() -> Callable[[], float]:
    import torch
    from train_step import fastlm_step

    torch.manual_seed(0)
    step = fastlm_step(DEMO, 256)
    ids = torch.randint(0, DEMO[0], (8, 257))

    def turn():
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS or steps < 2:
            step(ids[:, :-1], ids[:, 1:].contiguous())
            steps += 1
        return steps * 8 * 256 / (time.perf_counter() - start)

    return turn


# ends when its parent process ends, for any reason
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
WORKS = {"decode": decode_turn, "training": training_turn}


def worker(work: str) -> None:
    """Answer each line of stdin with the tokens/s of a turn."""
    turn = WORKS[work]()
    turn()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(turn(), flush=True)


class Worker:
    def __init__(self, variant: str, work: str):
        self.command = ["env", *shlex.split(variant), __file__, "--worker", work]
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"loaded: {shlex.join(self.command)} ended early")
        return line

    def turn(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.answer())

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(work: str, variants: list[str], busy: int, turns: int) -> list[dict]:
    workers = [Worker(v, work) for v in variants]
    rates: list[dict[str, list[float]]] = [{"quiet": [], "loaded": []} for _ in variants]
    for _ in range(turns):
        for w, r in zip(workers, rates):
            r["quiet"].append(w.turn())
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            time.sleep(0.3)
            for w, r in zip(workers, rates):
                r["loaded"].append(w.turn())
        finally:
            for other in others:
                other.kill()
                other.wait()
    for w in workers:
        w.stop()
    return [{"work": work, "variant": v, **r} for v, r in zip(variants, rates)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("variants", nargs="*", help='such as "OMP_WAIT_POLICY=passive python"')
    parser.add_argument("--busy", type=int, default=2, help="number of busy processes")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--work", choices=WORKS, help="measure only this one")
    parser.add_argument("--worker", choices=WORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)
    variants = options.variants or [f"GOMP_SPINCOUNT={SPIN_ROUNDS} {sys.executable}"]
    works = [options.work] if options.work else list(WORKS)
    rows = [r for w in works for r in measure(w, variants, options.busy, options.turns)]
    print(f"| work | variant | quiet | with {options.busy} busy processes | cost |")
    print("|---|---|---|---|---|")
    for row in rows:
        quiet, loaded = (statistics.median(row[k]) for k in ("quiet", "loaded"))
        spread = [f"{min(row[k]):.0f}-{max(row[k]):.0f}" for k in ("quiet", "loaded")]
        print(
            f"| {row['work']} | {row['variant']} | {quiet:.0f} ({spread[0]}) "
            f"| {loaded:.0f} ({spread[1]}) | {quiet / loaded:.2f}x |"
        )
    print(json.dumps({"loaded": rows, "busy": options.busy}))


if __name__ == "__main__":
    main()
