"""Compiles every Triton kernel for GPUs that are not available, and checks the machine code.

    PYTHONPATH=tests/gates python -m triton_gate [--capability 80 90] [--op glu ...] [--sample N]

Each file of this folder except __init__ and __main__ lists one op's cases: calls of the op's host
functions on tensors of the meta device, in the configurations that fastlm uses. A kernel fails
if it

- spills registers (stack bytes) or uses local memory,
- needs more shared or tensor memory than the architecture has,
- lacks an instruction that it should contain, or has almost none (one was empty once),
- has a worse figure than tables/<op>-<Triton's version>.json. `--write` rewrites the table. A
  change that worsens a figure rewrites it in the same commit. A spill fails with any table.

The gate does not check races, numerics or speed on a device.
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
# bytes per block
MAX_SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
MAX_TENSOR_MEMORY = 512  # columns, sm_100
MIN_INSTRUCTIONS = 24
# of floats and of integers; small tiles use the older instructions on every architecture
MATRIX = {80: ("HMMA", "IMMA"), 90: ("HGMMA", "IGMMA", "HMMA", "IMMA")}
MATRIX[100] = ("UTCHMMA", "UTCIMMA", "HMMA", "IMMA")
TABLE_KEYS = ("config", "registers", "stack", "shared", "opcodes")  # of a kernel in the table
COUNTED_OPCODES = ("LDG.E.128", "STG.E.128", "LDGSTS", "UTMALDG")
COUNTED_OPCODES += ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "IGMMA", "UTCIMMA")


def ops() -> list[str]:
    return sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("__"))


def machine_code(cubin: bytes) -> dict:
    """Registers, stack bytes and instructions of a kernel, from the tools in Triton's package."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()

        def run_tool(name: str, option: str) -> str:
            command = [str(tools / name), option, f.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = run_tool("cuobjdump", "--dump-resource-usage")
        code = run_tool("nvdisasm", "-c")
    line = next(line for line in usage.splitlines() if "REG:" in line)
    figures = dict(re.findall(r"(\w+):(\d+)", line))
    names = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code)
    counts: collections.Counter = collections.Counter(names)

    def count(prefix: str) -> int:
        return sum(n for name, n in counts.items() if name.startswith(prefix))

    return {
        "registers": int(figures["REG"]),
        "stack": int(figures["STACK"]),
        "local": count("STL") + count("LDL"),
        "instructions": sum(counts.values()),
        "opcodes": {prefix: n for prefix in COUNTED_OPCODES if (n := count(prefix))},
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
            for i, launch in enumerate(compiled):
                expected = case.expected.get(launch.name, ())
                rows.append(
                    {
                        "kernel": f"{op} {launch.name}",
                        "case": f"{case.name}, {kind}, sm_{capability}, launch {i}",
                        "config": launch.config.arguments(),
                        **machine_code(launch.kernel.asm["cubin"]),
                        "shared": launch.kernel.metadata.shared,
                        "tensor_memory": getattr(launch.kernel.metadata, "tmem_size", None) or 0,
                        "expected": expected,
                    }
                )
    return rows


def find_faults(row: dict, capability: int, recorded: dict | None, compare: bool) -> list[str]:
    """The faults of one kernel as text. `recorded`: its entry in the table."""
    faults = []
    for figure in ("stack", "local"):
        if row[figure]:
            faults.append(f"spills: {figure} {row[figure]}")
    if row["shared"] > MAX_SHARED[capability]:
        faults.append(f"shared memory {row['shared']} of {MAX_SHARED[capability]} bytes")
    if row["tensor_memory"] > MAX_TENSOR_MEMORY:
        faults.append(f"tensor memory {row['tensor_memory']} of {MAX_TENSOR_MEMORY} columns")
    if row["instructions"] < MIN_INSTRUCTIONS:
        faults.append(f"{row['instructions']} instructions: is it empty?")
    for name in row["expected"]:
        names = MATRIX[capability] if name == "matrix" else (name,)
        if not any(row["opcodes"].get(n) for n in names):
            faults.append(f"no {' or '.join(names)}")
    if compare and recorded is None:
        faults.append("not in the table (--write)")
    for figure in ("registers", "shared"):
        if compare and recorded and row[figure] > recorded[figure]:
            faults.append(f"{figure} {recorded[figure]} -> {row[figure]}")
    return faults


class Table:
    """Recorded figures of one op's kernels for one version of Triton."""

    def __init__(self, op: str, version: str):
        self.path = HERE / "tables" / f"{op}-{version}.json"
        self.rows = json.loads(self.path.read_text()) if self.path.exists() else {}

    def write(self, new_rows: dict[str, dict], capabilities: list[int]) -> None:
        """Replace all lines of these architectures by `new_rows`. The lines of others stay."""
        archs = [f", sm_{c}, " for c in capabilities]
        others = {k: v for k, v in self.rows.items() if not any(arch in k for arch in archs)}
        rows = sorted((others | new_rows).items())
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rows]
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--capability", type=int, nargs="*", default=CAPABILITIES, choices=MAX_SHARED
    )
    parser.add_argument("--op", nargs="*", default=ops(), choices=ops())
    parser.add_argument("--sample", type=int, default=1, help="compile every n-th case only")
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument("--show", action="store_true", help="print the figures of every kernel")
    options = parser.parse_args()
    if options.write and options.sample > 1:
        parser.error("--write: expected all cases, got --sample: the table would lose the others")
    failed = count = 0
    jobs = [(op, c, options.sample) for op in options.op for c in options.capability]
    new_rows: dict[str, dict] = {op: {} for op in options.op}
    tables = {op: Table(op, triton.__version__) for op in options.op}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (op, capability, _), rows in zip(jobs, pool.map(compile_op, *zip(*jobs))):
            for row in rows:
                count += 1
                key = f"{row['kernel']}: {row['case']}"
                recorded = tables[op].rows.get(key)
                new_rows[op][key] = {k: row[k] for k in TABLE_KEYS}
                if options.show:
                    print(key, {k: row[k] for k in (*TABLE_KEYS, "local", "instructions")})
                faults = find_faults(row, capability, recorded, compare=not options.write)
                for fault in faults:
                    print(f"FAIL {key} {row['config']}: {fault}")
                failed += bool(faults)
    if options.write:
        for op in options.op:
            tables[op].write(new_rows[op], options.capability)
    print(f"triton {triton.__version__}: {count} kernels compiled, {failed} of them with faults")
    return bool(failed)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:  # an old cache would hide compile errors
        os.environ["TRITON_CACHE_DIR"] = cache
        sys.exit(main())
