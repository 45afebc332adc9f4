"""Test whether the pairs of parameters of `make test` find the same faults as all combinations.

    python tests/support/mutants.py [--seed 0] [--each 3] [--kernels triton cuda cpu] [--op glu ...]

Change one operator of one line of a kernel at random, or of a part that it includes, and run the
tests of its op: first on pairs of parameters (pairs.py), and on all combinations if these pass.
A mutant that only all combinations find is LOST. A mutant that neither finds changes nothing that
the tests check: a bound that padding makes equal, an order of work. The file is restored after each
mutant.
"""

import argparse
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "+": "-", "-": "+", "*": "+", "&&": "||",
    "||": "&&", "&": "|", "==": "!=",
}  # fmt: skip
OPERATOR = re.compile(r" (<=?|>=?|\+|-|\*|&&?|\|\||==) ")
NOT_CODE = re.compile(r'^\s*(//|#|"""|\*|template|using|static_assert|assert|def |@|from |import )')
# ops whose kernels compile in seconds; Triton's need no compiler
OPS = {
    "triton": (
        "adamw", "cross_entropy", "glu", "linear_cross_entropy", "linear_distillation",
        "linear_logprobs", "paged_attention", "quantized_linear", "rms_norm", "rope",
    ),
    "cuda": ("adamw", "cross_entropy", "glu", "paged_append", "rms_norm", "rope"),
    "cpu": (
        "adamw", "cross_entropy", "glu", "layer_norm", "linear", "linear_cross_entropy",
        "rms_norm", "rope",
    ),
}  # fmt: skip
SOURCE = {"triton": "kernels/{}.py", "cuda": "csrc/cuda/{}.cu", "cpu": "csrc/cpu/{}.h"}
# a line that includes a part of a kernel (not a file that most kernels share), and its suffix
PARTS = {
    "triton": (r"^from fastlm\.kernels\.(?!launch)(\w+) import", ".py"),
    "cuda": (r'^#include "cuda/(?!quantized)(\w+)\.cuh"', ".cuh"),
    "cpu": (r'^#include "cpu/(\w+)\.h"', ".h"),
}


def sources(kernels: str, op: str) -> list[Path]:
    """Return the file of a kernel, and its parts in other files."""
    files = [ROOT / SOURCE[kernels].format(op)]
    include, end = PARTS[kernels]
    for file in files:  # the list grows
        names = re.findall(include, file.read_text(), re.MULTILINE)
        parts = [file.with_name(name + end) for name in names]
        files += [part for part in parts if part not in files]
    return files


def mutants(files: list[Path], count: int, draw: random.Random):
    """Yield (file, line number, change, new text) of random mutants of the files."""
    matches = []
    for file in files:
        lines, in_docstring = file.read_text().splitlines(keepends=True), False
        for number, line in enumerate(lines):
            quotes = line.count('"""')
            if not (in_docstring or quotes or NOT_CODE.match(line)):
                code = re.split(r"  #|//", line)[0]
                matches += [(file, lines, number, match) for match in OPERATOR.finditer(code)]
            in_docstring ^= quotes % 2 == 1
    for file, lines, number, match in draw.sample(matches, min(count, len(matches))):
        begin, end = match.span(1)
        line = lines[number]
        changed = line[:begin] + OPERATORS[match[1]] + line[end:]
        text = "".join([*lines[:number], changed, *lines[number + 1 :]])
        yield file, number + 1, f"{match[1]} -> {OPERATORS[match[1]]}", text


def build(kernels: str) -> bool:
    """Compile the changed files. Return whether they compile."""
    if kernels == "triton":
        return True
    expected = (
        {"FASTLM_CUDA": "0", "FASTLM_SIMT": "1"} if kernels == "cuda" else {"FASTLM_CUDA": "0"}
    )
    environment = [f"{name}={value}" for name, value in expected.items()]
    command = ["env", *environment, sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def is_found(kernels: str, op: str, *options: str) -> bool:
    """Return whether a test of the op fails, or the process that runs it."""
    file = f"tests/kernels/test_{op}.py"
    command = [sys.executable, "-m", "pytest", "-qx", "--kernels", kernels, file, *options]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=900).returncode != 0
    except subprocess.TimeoutExpired:  # a loop that does not end
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=3, help="mutants of each op")
    parser.add_argument("--kernels", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--op", nargs="+", default=None)
    arguments = parser.parse_args()
    total: Counter[str] = Counter()
    for kernels in arguments.kernels:
        for op in arguments.op or OPS[kernels]:
            draw = random.Random(f"{arguments.seed} {kernels} {op}")
            for file, line, change, text in mutants(sources(kernels, op), arguments.each, draw):
                original = file.read_text()
                begin = time.monotonic()
                try:
                    file.write_text(text)
                    if not build(kernels):
                        outcome = "does not compile"
                    elif is_found(kernels, op):
                        outcome = "found"
                    else:
                        outcome = "LOST" if is_found(kernels, op, "--all") else "changes nothing"
                finally:
                    file.write_text(original)
                total[outcome] += 1
                seconds = time.monotonic() - begin
                location = f"{kernels} {op}: {file.relative_to(ROOT)}:{line}"
                print(f"{location} {change}: {outcome}, {seconds:.0f} s", flush=True)
        build(kernels)
    print(dict(total))
    sys.exit(total["LOST"] > 0)


if __name__ == "__main__":
    main()
