"""Compare two checkouts, run in turns: every row of fastlm's, a training step, decoding.

    git clone . ../before && git -C ../before checkout COMMIT
    (cd ../before && ../main/.venv/bin/python setup.py build_ext --inplace)
    python bench/versions.py ../before               all rows: hours on two slow cores
    python bench/versions.py ../before glu train     only these
    python bench/versions.py ../before glu --below 1  rows of less than 1 ms: Python's overhead

Each checkout is a process that runs its bench/ on its fastlm. The two take turns, round after
round; a row's ratio is the median over rounds of before / after. A row that differs by more than
2 % is measured again in new pairs of processes, and the median of the pairs counts: the addresses
of a process's operands change times by a few percent. Processes keep the memory that they free, as
in training: fresh pages differ from process to process (docs/log.md). For the remaining noise, run
`python bench/versions.py COPY` on a copy of this checkout.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_DIFFERENCE = 0.02  # below it two rows count as equal
ATTEMPTS = 5  # pairs of processes for a row that differs
ROUNDS = 21
MIN_ROUND_SECONDS = 0.01
MAX_SECONDS = 1.5  # of a row, but at least 5 rounds
END_TO_END = {"train": "42m, 8 x 512", "decode": "SmolLM2-135M-Instruct, 1 user"}


class Checkout:
    """A process that measures the rows of one checkout."""

    def __init__(self, root: Path):
        command = [sys.executable, "-P", __file__, "--worker", str(root)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, *message):
        assert self.process.stdin and self.process.stdout
        print(json.dumps(message), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("> "):  # other lines are printed by the benchmark
                return json.loads(line[2:])
        sys.exit(f"versions: a worker ended with status {self.process.wait()}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate()  # closes the pipes too


def run_worker(root: str) -> None:
    """Answer messages ["list", op], ["prepare", op, row] and ["time", repeats] until stopped."""
    folders = ("bench", "bench/ops", "bench/train", "bench/peers")
    sys.path[:0] = [*(f"{root}/{folder}" for folder in folders), root]
    import importlib
    import time

    import torch

    torch.manual_seed(0)
    fastlm = importlib.import_module("fastlm")
    assert Path(fastlm.__file__).parent.parent == Path(root), fastlm.__file__
    importlib.import_module("fastlm.memory").keep_freed_memory()
    call = None

    def rows(op: str) -> list:
        cases = importlib.import_module(op).cases()
        return [case for case in cases if "fastlm" in case.variants]

    def prepare_call(op: str, row: int):
        if op == "train":
            train_step = importlib.import_module("train_step")
            return train_step.make_step("fastlm", train_step.SIZES["42m"], 8, 512)
        if op == "decode":
            generate = importlib.import_module("decode").fastlm_engine("model:smollm2")
            prompt = torch.randint(0, 40000, (1, 64), generator=torch.Generator().manual_seed(1))
            return lambda: generate(prompt, 65)
        case = rows(op)[row]
        variant = case.variants["fastlm"]
        return variant if case.data is None else variant(*case.data())

    def seconds(repeats: int) -> float:
        time.sleep(0.005)  # until the other process's threads have stopped spinning
        if repeats > 1:
            call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    for line in sys.stdin:
        command, *rest = json.loads(line)
        if command == "list":
            answer = [f"{case.name}, {case.shape}" for case in rows(*rest)]
        elif command == "prepare":
            call = prepare_call(*rest)
            call()
            call()
            answer = seconds(1)
        else:
            answer = seconds(*rest)
        print(f"\n> {json.dumps(answer)}", flush=True)


def interleave(
    before: Checkout, after: Checkout, op: str, rows: tuple[int, int], below: float
) -> list[float]:
    """Return before / after of every round, or nothing if a call takes `below` seconds or more."""
    once = max(before("prepare", op, rows[0]), after("prepare", op, rows[1]), 1e-7)
    if once >= below:
        return []
    repeats = max(1, int(MIN_ROUND_SECONDS / once))
    rounds = max(5, min(ROUNDS, int(MAX_SECONDS / once)))
    ratios = []
    for i in range(rounds):
        if i % 2:
            new = after("time", repeats)
            old = before("time", repeats)
        else:
            old = before("time", repeats)
            new = after("time", repeats)
        ratios.append(old / new)
    return ratios


def compare_op(
    roots: tuple[Path, Path], op: str, only: list[str], below: float
) -> Iterator[tuple[str, float, int]]:
    """Yield (row, before / after, attempts) for every row of an op that both checkouts have."""
    pair = [Checkout(root) for root in roots]
    labels = [["end to end"] if op in END_TO_END else checkout("list", op) for checkout in pair]
    for label in labels[1]:
        if label not in labels[0] or not all(word in label for word in only):
            continue
        rows = (labels[0].index(label), labels[1].index(label))
        ratios: list[float] = []
        for attempt in range(1, ATTEMPTS + 1):
            if attempt > 1:
                for checkout in pair:
                    checkout.stop()
                pair = [Checkout(root) for root in roots]
            turns = interleave(*pair, op, rows, below if attempt == 1 else 1e9)
            if not turns:
                break
            ratios.append(statistics.median(turns))
            if len(ratios) % 2 and abs(statistics.median(ratios) - 1) <= MIN_DIFFERENCE:
                break
        if ratios:
            yield label, statistics.median(ratios), len(ratios)
    for checkout in pair:
        checkout.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("other", type=Path, help="A checkout with its extension built in place.")
    parser.add_argument("only", nargs="*", help="Run only these ops, or train, or decode.")
    parser.add_argument(
        "--below", type=float, default=1e9, metavar="MS", help="Run only rows shorter than this."
    )
    parser.add_argument("--row", action="append", default=[], help="Run only rows with this word.")
    options = parser.parse_args()
    from run import OPS

    names = [*OPS, *END_TO_END]
    if unknown := set(options.only) - set(names):
        parser.error(f"only: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    roots = (options.other.resolve(), ROOT)
    all_ratios = {}
    for op in options.only or names:
        print(f"== {op}", flush=True)
        for label, ratio, attempts in compare_op(roots, op, options.row, options.below / 1e3):
            all_ratios[op, label] = ratio
            mark = "" if ratio >= 1 - MIN_DIFFERENCE else "  SLOWER"
            print(f"{ratio:6.3f}  {label}  ({attempts}){mark}", flush=True)
    if not all_ratios:
        sys.exit("versions: expected rows to compare, got none (--row, --below)")
    slower = sum(ratio < 1 - MIN_DIFFERENCE for ratio in all_ratios.values())
    faster = sum(ratio > 1 + MIN_DIFFERENCE for ratio in all_ratios.values())
    median = statistics.median(all_ratios.values())
    print(
        f"{len(all_ratios)} rows: median {median:.3f}, {faster} faster and {slower} slower by more"
        f" than {MIN_DIFFERENCE:.0%}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        run_worker(sys.argv[2])
    else:
        main()
