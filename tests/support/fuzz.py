"""`make fuzz`: random cases of every op until the time is up (fuzz_cases.py defines a case).

    python tests/support/fuzz.py [--minutes 60] [--seed 0] [--op attention ...] [--kernels simt]
    python tests/support/fuzz.py --case '{"op": "glu", ...}'

Minutes are processor time: an hour is an hour of fuzzing however busy the machine is. Cases run in
a separate process, so that a crash is reported as well. A failing case is printed on one line, in
the format that `--case` accepts, and added to fuzz_corpus.jsonl. From then on its line is a test
(test_fuzz.py).
"""

import argparse
import collections
import contextlib
import faulthandler
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "fuzz_corpus.jsonl"
MAX_CASES = 3  # recorded per op and message: more would repeat the same fault
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def work(ops: list[str], kernels: str, seed: int, seconds: float, current: Path) -> None:
    """Run cases from `seed` on, an equal time for each op, and print lines of JSON."""
    import torch
    from fuzz_ops import draw, run

    faulthandler.enable()
    torch.set_num_threads(2)
    spent = dict.fromkeys(ops, 0.0)
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        op = min(spent, key=lambda name: spent[name])
        case = draw(op, seed, kernels)
        current.write_text(json.dumps(case))
        start, error = time.process_time(), None
        try:
            run(case)
        except Exception as e:
            error = first_line(e)
        spent[op] += time.process_time() - start
        report = {"op": op, "isa": case["isa"], "seconds": time.process_time() - start}
        print(json.dumps(report | ({"case": case, "error": error} if error else {})), flush=True)
        seed += 1
    current.unlink()


def failed(case: dict, error: str, counts: collections.Counter) -> None:
    line = json.dumps(case)
    print(f"FAIL {error}\n  python tests/support/fuzz.py --case '{line}'", flush=True)
    kind = case["op"], re.sub("[0-9.e+-]+", "", error)
    counts[kind] += 1
    corpus = CORPUS.read_text().splitlines() if CORPUS.exists() else []
    if line not in corpus and counts[kind] <= MAX_CASES:
        with CORPUS.open("a") as f:
            f.write(line + "\n")


def fuzz(ops: list[str], minutes: float, seed: int, kernels: str = "cpu") -> int:
    spent, failures = 0.0, 0
    cases: collections.Counter = collections.Counter()
    counts: collections.Counter = collections.Counter()
    last_print = time.monotonic()
    # an interrupted run still reports what it did
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as folder:
        current = Path(folder) / "case"
        while spent < minutes * 60:
            command = [sys.executable, "-P", __file__, "--worker", str(current)]
            command += ["--seed", str(seed), "--minutes", str(minutes - spent / 60), "--op", *ops]
            command += ["--kernels", kernels]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
                assert worker.stdout
                for line in worker.stdout:
                    report = json.loads(line)
                    seed, spent = seed + 1, spent + report["seconds"]
                    cases[report["op"], report["isa"]] += 1
                    if "error" in report:
                        failures += 1
                        failed(report["case"], report["error"], counts)
                    if time.monotonic() - last_print > 60:
                        last_print = time.monotonic()
                        print(f"{spent / 60:.1f} min, {cases.total()} cases, {failures} failed")
                        sys.stdout.flush()
            if worker.returncode == 0:
                break
            if not current.exists():
                print(f"the worker ended with {worker.returncode} before its first case")
                return 1
            seed, failures = seed + 1, failures + 1
            failed(json.loads(current.read_text()), f"ended it: {worker.returncode}", counts)
    for op in ops:
        per_isa = {isa: n for (name, isa), n in sorted(cases.items()) if name == op}
        print(f"{op}: {sum(per_isa.values())} cases, {per_isa}")
    print(f"{spent / 60:.1f} min, {cases.total()} cases, {failures} failed; next seed {seed}")
    return min(failures, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="Minutes of processor time.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the first case.")
    parser.add_argument("--op", nargs="+", help="Run only these ops.")
    parser.add_argument(
        "--kernels",
        choices=["cpu", "simt"],
        default="cpu",
        help="Kernels to run; simt: CUDA on the emulator.",
    )
    parser.add_argument("--case", help="Run one case, as a failure prints it.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        from fuzz_ops import run

        run(json.loads(arguments.case))
        return 0
    if arguments.worker:
        current = Path(arguments.worker)
        with contextlib.suppress(KeyboardInterrupt):
            work(arguments.op, arguments.kernels, arguments.seed, arguments.minutes * 60, current)
        return 0
    if not arguments.op:
        from fuzz_ops import ops_of

        arguments.op = ops_of(arguments.kernels)
    return fuzz(arguments.op, arguments.minutes, arguments.seed, arguments.kernels)


if __name__ == "__main__":
    sys.exit(main())
