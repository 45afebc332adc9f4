"""The harness of all benchmarks: measures cases and prints and saves their rows.

A `Case` is one op at one shape with named variants that do the same work. `measure` runs them in
turns, round after round, so that a slow second of the machine affects all of them. It takes the
median and the spread (interquartile range over median). The speed of a variant is compared with the
ceilings of this machine (bench/ceilings.py), measured before and after the rows. A row is measured
again if its spread is large or other processes used the cores, and marked as unsteady if that did
not help. Nothing is timed while the op's tests fail.

    python bench/ops/attention.py                 all cases of the file; --list names them
    python bench/ops/attention.py causal          cases with "causal" in their name or shape
    python bench/ops/rope.py --shape 8x8x512x64   a custom shape
    python bench/ops/rope.py --json new.json      then python bench/compare.py old.json new.json
    python bench/run.py --isa avx2 attention  both sides limited to AVX2
"""

import argparse
import difflib
import inspect
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from ceilings import (
    BUSY,
    OtherProcesses,
    ceilings_before,
    confirm_ceilings,
    fastest_instruction,
    wait_until_quiet,
)

from fastlm import inventory

# each shape is compiled separately: past the default limit of 8 the peer would run eagerly
torch._dynamo.config.recompile_limit = 256

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 9  # medians of 9 interleaved rounds repeat within a few percent on a shared machine
MAX_SECONDS = 15  # per variant of a case: a peer that needs seconds per call runs in 3 rounds
MIN_ROUND_SECONDS = 0.01  # a round repeats a short call until the clock's noise is below 1 %
FAR_BEHIND = 3  # times the fastest: a variant slower than that runs in 3 rounds
MAX_LINE = 400  # of a file of results: longer facts are split
NOT_CODE = (":!bench/results", ":!*.md", ":!*.png")  # what benchmarks write, and documents
LARGE_SPREAD = 0.2  # relative to the median: a row above it is measured again


@dataclass
class Case:
    """One op at one shape.

    `data()` creates the operands. A variant accepts them and returns the call that is timed.
    Without `data` the variants are the calls. `flops` and `bytes` are the minimum that the work
    needs, for the share of the ceiling. A variant named "floor ..." does only a part of the work:
    it is shown but not compared. A variant's name has no comma, which separates names.
    """

    name: str
    shape: str
    variants: dict[str, Callable]
    flops: float | None = None
    bytes: float | None = None
    dtype: str = "bf16"  # `flops` is divided by the speed of its best instruction
    missing: dict[str, str] = field(default_factory=dict)  # unavailable peers, with the reason
    data: Callable[[], tuple] | None = None

    def __post_init__(self) -> None:
        for name in self.variants:
            if "," in name:
                raise ValueError(f"variants: expected names without a comma, got {name!r}")

    def calls(self) -> dict[str, Callable[[], object]]:
        if self.data is None:
            return self.variants
        operands = self.data()
        return {name: variant(*operands) for name, variant in self.variants.items()}


def forward(f: Callable, mode: Callable = torch.no_grad) -> Callable:
    """Return a variant that calls f on the operands without autograd."""

    def variant(*operands):
        def call():
            with mode():
                return f(*operands)

        return call

    return variant


def inference(f: Callable) -> Callable:
    """Return `forward` in inference mode, as in a decode step."""
    return forward(f, torch.inference_mode)


def gradients(f: Callable) -> Callable:
    """Return a variant that calls f on all operands but the last and computes their gradients.

    The last operand is the gradient of the output, or None for a loss.
    """

    def variant(*operands):
        *inputs, dout = operands
        expected = [t for t in inputs if torch.is_tensor(t) and t.requires_grad]
        return lambda: torch.autograd.grad(f(*inputs), expected, dout)

    return variant


def in_float32(variant: Callable) -> Callable:
    """Return the variant on the same values in float32."""

    def wide(t):
        if not torch.is_tensor(t) or not t.is_floating_point():
            return t
        return t.detach().float().requires_grad_(t.requires_grad)

    return lambda *operands: variant(*map(wide, operands))


def with_autocast(f: Callable) -> Callable:
    def run(*operands):
        with torch.autocast("cpu", torch.bfloat16):
            return f(*operands)

    return run


def torch_variants(
    run: Callable, f: Callable, dtype: torch.dtype, compiled: Callable | None = None
) -> dict[str, Callable]:
    """Apply `run` (`forward`, `gradients`) to torch's function `f`, eager and, if given,
    `compiled`. Work in bfloat16 also runs in float32 on the same values and under autocast, which
    is faster on some machines.
    """
    variants = {}
    for name, call in (("torch", f), ("torch.compile", compiled)):
        if call is None:
            continue
        variants[name] = run(call)
        if dtype == torch.bfloat16:
            variants[f"{name} fp32"] = in_float32(run(call))
            variants[f"{name} autocast"] = in_float32(run(with_autocast(call)))
    return variants


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[dtype]


@dataclass
class Row:
    """The times of one case, as stored in bench/results."""

    name: str
    shape: str
    milliseconds: dict[str, float]
    spread: dict[str, float]
    ratio: float | None  # best peer's time / fastlm's
    best_peer: str | None
    of_ceiling: float | None
    ceiling: str
    missing: dict[str, str]
    unsteady: str = ""  # why the row is not reliable; empty if it is


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def calibrate_repeats(call: Callable[[], object]) -> tuple[int, float]:
    """Return how often a round repeats the call, and the seconds of one call, after a warm-up."""
    call()  # compile, fault pages in, fill caches
    once = max(_seconds(call, 1), 1e-7)
    return max(1, int(MIN_ROUND_SECONDS / once)), once


def measure(
    variants: dict[str, Callable[[], object]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Return the seconds per call, per variant and round. Variants take turns in each round."""
    repeats, seconds = {}, {}
    for name, call in variants.items():
        repeats[name], seconds[name] = calibrate_repeats(call)
    fastest = min(seconds.values())
    turns = {
        name: min(rounds, 3)
        if seconds_per_call > FAR_BEHIND * fastest and seconds_per_call > MIN_ROUND_SECONDS
        else max(min(rounds, 3), min(rounds, int(MAX_SECONDS / seconds_per_call)))
        for name, seconds_per_call in seconds.items()
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        for name, call in variants.items():
            if i < turns[name]:
                times[name].append(_seconds(call, repeats[name]))
    return times


def relative_spread(times: Sequence[float]) -> float:
    """Return (upper - lower quartile) / median, or 0 for a single round, where it is unknown."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle


def measure_until_steady(
    calls: dict[str, Callable[[], object]], rounds: int, timed: Callable
) -> tuple[dict[str, list[float]], str]:
    """Measure the calls, and once more if the times are not reliable. Return times and reasons."""
    attempts = []
    for _ in range(2):
        others = OtherProcesses()
        times = timed(calls, rounds)
        busy = others.share()
        compared = [n for n in times if not n.startswith("floor")]
        spread = max((relative_spread(times[n]) for n in compared), default=0.0)
        reasons = [f"others had {busy:.0%} of the cores"] if busy > BUSY else []
        reasons += [f"spread {spread:.0%}"] if spread > LARGE_SPREAD else []
        attempts.append((max(busy, spread), times, ", ".join(reasons)))
        if not reasons:
            break
    _, times, reasons = min(attempts, key=lambda attempt: attempt[0])
    return times, reasons


def run_case(
    case: Case, limits: dict[str, float], rounds: int = ROUNDS, timed: Callable = measure
) -> Row:
    times, unsteady = measure_until_steady(case.calls(), rounds, timed)
    median = {name: statistics.median(t) for name, t in times.items()}
    peers = {n: s for n, s in median.items() if not n.startswith(("fastlm", "floor"))}
    best_peer = min(peers, key=peers.__getitem__, default="")
    mine = median.get("fastlm")
    row = Row(
        case.name,
        case.shape,
        {n: s * 1e3 for n, s in median.items()},
        {n: relative_spread(t) for n, t in times.items()},
        peers[best_peer] / mine if best_peer and mine else None,
        best_peer or None,
        None,
        "",
        case.missing,
        unsteady,
    )
    share_of_ceiling(row, case, limits)
    return row


def share_of_ceiling(row: Row, case: Case, limits: dict[str, float]) -> None:
    """Set the row's share of the ceiling: that of products or of memory, whichever takes longer."""
    # some work is left to torch: the row shows torch's share then
    milliseconds = row.milliseconds.get("fastlm") or row.milliseconds.get(row.best_peer or "")
    if not limits or not milliseconds or not (case.flops or case.bytes):
        return
    instruction = fastest_instruction(limits, case.dtype)
    compute = (case.flops or 0) / limits[instruction]
    memory = (case.bytes or 0) / limits["read"]
    row.of_ceiling = max(compute, memory) / (milliseconds / 1e3)
    row.ceiling = instruction if compute >= memory else "memory read"


def gate(op: str) -> None:
    """Refuse to time an op whose quick tests fail."""
    test = ROOT / "tests/kernels" / f"test_{op}.py"
    if not test.exists():
        sys.exit(f"bench: no tests/kernels/test_{op}.py: an op without tests is not timed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", str(test)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-15:]), file=sys.stderr)
        sys.exit(
            f"bench: tests/kernels/test_{op}.py fails: no speedup is reported while tests fail "
            "(--no-gate to profile)"
        )


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine() -> dict[str, object]:
    """Return the context of a figure: machine, versions, commit."""
    info = inventory.info()
    try:
        commit = git("describe", "--always")
        if git("status", "--porcelain", "--", ".", *NOT_CODE):
            commit += "-dirty"
    except OSError:  # a machine without git; outside a checkout, git prints nothing
        commit = ""
    keys = ("cpu", "cpu_isa", "threads", "torch", "python", "fastlm")
    return {
        **{k: info[k] for k in keys},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "aten": os.environ.get("ATEN_CPU_CAPABILITY", "default"),
        "system": platform.system(),
    }


def llama_cpp(program: str) -> str | None:
    """Return the path of a llama.cpp program: from PATH, or built by bench/peers/llama_cpp.sh."""
    local_build = ROOT / "bench" / ".venv" / "llama.cpp" / "bin" / program
    return shutil.which(program) or (str(local_build) if local_build.exists() else None)


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table: a line per case, the times of all peers, the ratio to the best."""
    lines = [
        "| op | shape | fastlm ms | peers, ms | ratio to the best | share of ceiling | spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        mine = r.milliseconds.get("fastlm")
        peers = sorted((ms, n) for n, ms in r.milliseconds.items() if n != "fastlm")
        cells = [f"{n} {ms:.3g}" for ms, n in peers] + [
            f"({n}: {reason})" for n, reason in r.missing.items()
        ]
        ratio = "-" if r.ratio is None else f"{r.ratio:.2f}x"
        share = "-" if r.of_ceiling is None else f"{r.of_ceiling:.0%} {r.ceiling}"
        mine_text = "-" if mine is None else f"{mine:.3g}"
        spread = f"{max(r.spread.values(), default=0):.0%}"
        if r.unsteady:
            spread += f" (unsteady: {r.unsteady})"
        columns = (r.name, r.shape, mine_text, ", ".join(cells) or "-", ratio, share, spread)
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark accepts."""
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="Write the results to this file too."
    )
    parser.add_argument(
        "--busy",
        action="store_true",
        help="Run while other processes run, then without ceilings (not for claims).",
    )


def save(path: Path | None, results: dict) -> None:
    if path is not None:
        path.write_text(row_per_line(results) + "\n")


def row_per_line(value: object, indent: str = "") -> str:
    """Return JSON with a line for each object or text of a list.

    An object with rows, or a long one with other objects, has a line for each of its values.
    """
    line = json.dumps(value, default=str)
    inner = indent + " "
    if isinstance(value, list) and value and isinstance(value[0], (dict, str)):
        parts = [json.dumps(row, default=str) for row in value]
    elif isinstance(value, dict) and (
        not indent or "[{" in line or (len(line) > MAX_LINE and ("{" in line[1:] or "[" in line))
    ):
        parts = [f"{json.dumps(str(k))}: {row_per_line(v, inner)}" for k, v in value.items()]
    else:
        return line
    return f"{line[0]}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{line[-1]}"


def cases_of_shape(shape_cases: Callable, text: str, parser: argparse.ArgumentParser) -> list[Case]:
    """Return the cases of `shape_cases(*numbers)` for "8x8x512x64", "8,8,512,64" or, as a table
    prints it, "4096 x 512 -> 1408"."""
    names = inspect.signature(shape_cases).parameters
    required = sum(p.default is p.empty for p in names.values())
    numbers = re.split("x|,|->", text.replace(" ", ""))
    are_numbers = all(n.isdecimal() and int(n) for n in numbers)
    if not are_numbers or not required <= len(numbers) <= len(names):
        expected = "x".join(n if i < required else f"[{n}]" for i, n in enumerate(names))
        parser.error(f"--shape: expected {expected}, whole numbers from 1, got {text!r}")
    try:
        cases = shape_cases(*map(int, numbers))
        for case in cases:  # fail before waiting for a quiet machine
            case.calls().get("fastlm", lambda: None)()
    except (ValueError, RuntimeError) as error:
        parser.error(f"--shape: {text}: {str(error).splitlines()[0]}")
    return cases


def select_cases(
    cases: Sequence[Case], filters: Sequence[str], parser: argparse.ArgumentParser
) -> list[Case]:
    """Return the cases with one of the words in their name or shape, all without a word. A complete
    name and shape selects its case alone; an unknown word is an error with similar names."""
    labels = [f"{c.name} {c.shape}".lower() for c in cases]
    for word in filters:
        if not any(word.lower() in label for label in labels):
            words = list(dict.fromkeys([*(c.name for c in cases), *" ".join(labels).split()]))
            near = difflib.get_close_matches(word, words, n=4, cutoff=0.4) or words[:4]
            parser.error(
                f"filter: no case has {word!r}; near: {', '.join(near)} (--list names all)"
            )

    def is_selected(label: str) -> bool:
        return any(label == w if w in labels else w in label for w in map(str.lower, filters))

    return [case for case, label in zip(cases, labels) if not filters or is_selected(label)]


def main(op: str, cases: Callable[[], list[Case]], shape_cases: Callable | None = None) -> None:
    """Run the command line of one op's file. `shape_cases` creates the cases for --shape."""
    parser = argparse.ArgumentParser(description=f"Time fastlm's {op} against its peers.")
    parser.add_argument(
        "filter", nargs="*", help="Run only cases with one of these in their name or shape."
    )
    parser.add_argument("--list", action="store_true", help="List the cases and exit.")
    if shape_cases is not None:
        names = "x".join(inspect.signature(shape_cases).parameters)
        parser.add_argument("--shape", action="append", help=f"Run a custom shape: {names}.")
    parser.add_argument(
        "--rounds",
        type=positive,
        default=ROUNDS,
        help="Take the median of this number of rounds (default: %(default)s).",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=torch.get_num_threads(),
        help="Threads of all variants (default: %(default)s).",
    )
    parser.add_argument(
        "--no-gate",
        action="store_true",
        help="Skip the op's tests (for profiling, not for claims).",
    )
    common_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = options.shape or [] if shape_cases is not None else []
    selected = (
        [c for s in shapes for c in cases_of_shape(shape_cases, s, parser)]
        if shape_cases and shapes
        else cases()
    )
    selected = select_cases(selected, options.filter, parser)
    if options.list:
        print("\n".join(f"{c.name}: {c.shape}: {', '.join(c.variants)}" for c in selected))
        return
    wait_until_quiet(options.busy)  # before the tests, which take minutes
    if not options.no_gate:
        gate(op)
    before = ceilings_before(options.busy)
    rows = [run_case(c, before, options.rounds) for c in selected]
    limits = confirm_ceilings(before)
    for row, case in zip(rows, selected):
        row.of_ceiling, row.ceiling = None, ""
        share_of_ceiling(row, case, limits)
    print(machine())
    print(describe_ceilings(limits))
    print(table(rows))
    summary = {"op": op, "machine": machine(), "ceilings": limits}
    save(options.json, summary | {"rows": [vars(r) for r in rows]})


def describe_ceilings(limits: dict[str, float]) -> str:
    if not limits:
        return "ceilings: not steady, left out"
    parts = [f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in limits.items() if k != "read"]
    return f"ceilings: {', '.join(parts)}, read {limits['read'] / 1e9:.1f} GB/s"
