"""Compiles every Triton kernel for GPUs that are not available, and reads the machine code.

    PYTHONPATH=tests/gates python -m triton_gate [--capability 80 90] [--op glu ...] [--sample N]

Each file here but __init__ lists one op's cases: calls of the op's host functions on tensors of the
meta device, in the configurations that ship. A kernel fails if it

- spills registers (stack bytes) or uses local memory,
- needs more shared or tensor memory than the architecture has,
- lacks an instruction that it should contain, or has almost none (one was empty once),
- has a worse figure than tables/<op>-<Triton's version>.json records. `--write` rewrites the table:
  a change that worsens a figure changes it in the same commit. No table admits a spill.

It does not check races, numerics or speed on a device.
"""

import argparse
import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CAPABILITIES = (80, 90, 100)
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes per block
TENSOR_MEMORY = 512  # columns, sm_100
LEAST = 24  # instructions
# for floats, for integers; small tiles use the older instructions everywhere
MATRIX = {80: ("HMMA", "IMMA"), 90: ("HGMMA", "IGMMA", "HMMA", "IMMA")}
MATRIX[100] = ("UTCHMMA", "UTCIMMA", "HMMA", "IMMA")
KEPT = ("config", "registers", "stack", "shared", "opcodes")  # entries of a kernel in the table
SHOWN = ("LDG.E.128", "STG.E.128", "LDGSTS", "UTMALDG")
SHOWN += ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "IGMMA", "UTCIMMA")


def ops() -> list[str]:
    return sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("__"))


def machine_code(cubin: bytes) -> dict:
    """Registers, stack bytes and instructions of a kernel, by the tools inside Triton's package."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()

        def tool(*words: str) -> str:
            command = [str(tools / words[0]), *words[1:], f.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = tool("cuobjdump", "--dump-resource-usage")
        code = tool("nvdisasm", "-c")
    found = dict(re.findall(r"(\w+):(\d+)", next(x for x in usage.splitlines() if "REG:" in x)))
    names = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code)
    counts: collections.Counter = collections.Counter(names)

    def starting(head: str) -> int:
        return sum(n for name, n in counts.items() if name.startswith(head))

    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "local": starting("STL") + starting("LDL"),
        "instructions": sum(counts.values()),
        "opcodes": {head: n for head in SHOWN if (n := starting(head))},
    }


def compile_op(op: str, capability: int, sample: int) -> list[dict]:
    """Compile every `sample`-th combination of case and dtype. Returns one row per kernel."""
    from fastlm.kernels.launch import compile_for

    rows, number = [], 0
    for case in importlib.import_module(f"triton_gate.{op}").CASES:
        for dtype in case.dtypes:
            number += 1
            if (number - 1) % sample:
                continue
            with compile_for(capability) as compiled:
                case.run(dtype)
            kind = str(dtype).removeprefix("torch.")
            for i, made in enumerate(compiled):
                expected = case.expected.get(made.name, ())
                rows.append(
                    {
                        "kernel": f"{op} {made.name}",
                        "case": f"{case.name}, {kind}, sm_{capability}, launch {i}",
                        "config": made.config.arguments(),
                        **machine_code(made.kernel.asm["cubin"]),
                        "shared": made.kernel.metadata.shared,
                        "tensor_memory": getattr(made.kernel.metadata, "tmem_size", None) or 0,
                        "expected": expected,
                    }
                )
    return rows


def faults(row: dict, capability: int, before: dict | None, compare: bool) -> list[str]:
    """The faults of one kernel as text. `before`: its entry in the table."""
    found = []
    for figure in ("stack", "local"):
        if row[figure]:
            found.append(f"spills: {figure} {row[figure]}")
    if row["shared"] > SHARED[capability]:
        found.append(f"shared memory {row['shared']} of {SHARED[capability]} bytes")
    if row["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"tensor memory {row['tensor_memory']} of {TENSOR_MEMORY} columns")
    if row["instructions"] < LEAST:
        found.append(f"{row['instructions']} instructions: is it empty?")
    for name in row["expected"]:
        names = MATRIX[capability] if name == "matrix" else (name,)
        if not any(row["opcodes"].get(n) for n in names):
            found.append(f"no {' or '.join(names)}")
    if compare and before is None:
        found.append("not in the table (--write)")
    for figure in ("registers", "shared"):
        if compare and before and row[figure] > before[figure]:
            found.append(f"{figure} {before[figure]} -> {row[figure]}")
    return found


class Table:
    """Figures of one op's kernels for one version of Triton, as checked in."""

    def __init__(self, op: str, version: str):
        self.path = HERE / "tables" / f"{op}-{version}.json"
        self.rows = json.loads(self.path.read_text()) if self.path.exists() else {}

    def write(self, fresh: dict[str, dict], capabilities: list[int]) -> None:
        """Replace all lines of these architectures by `fresh`; the lines of others stay."""
        done = [f", sm_{c}, " for c in capabilities]
        others = {k: v for k, v in self.rows.items() if not any(d in k for d in done)}
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted((others | fresh).items())]
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES, choices=SHARED)
    parser.add_argument("--op", nargs="*", default=ops(), choices=ops())
    parser.add_argument("--sample", type=int, default=1, help="every n-th case only")
    parser.add_argument("--write", action="store_true", help="write the table anew")
    parser.add_argument("--show", action="store_true", help="print every kernel's figures")
    options = parser.parse_args()
    if options.write and options.sample > 1:
        parser.error("--write: expected every case, got --sample: the others would leave the table")
    failed = made = 0
    jobs = [(op, c, options.sample) for op in options.op for c in options.capability]
    fresh: dict[str, dict] = {op: {} for op in options.op}
    tables = {op: Table(op, triton.__version__) for op in options.op}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (op, capability, _), rows in zip(jobs, pool.map(compile_op, *zip(*jobs))):
            for row in rows:
                made += 1
                key = f"{row['kernel']}: {row['case']}"
                before = tables[op].rows.get(key)
                fresh[op][key] = {k: row[k] for k in KEPT}
                if options.show:
                    print(key, {k: row[k] for k in (*KEPT, "local", "instructions")})
                found = faults(row, capability, before, compare=not options.write)
                for fault in found:
                    print(f"FAIL {key} {row['config']}: {fault}")
                failed += bool(found)
    if options.write:
        for op in options.op:
            tables[op].write(fresh[op], options.capability)
    print(f"triton {triton.__version__}: {made} kernels compiled, {failed} of them at fault")
    return bool(failed)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:  # a cache hides what no longer compiles
        os.environ["TRITON_CACHE_DIR"] = cache
        sys.exit(main())
