"""Checks the machine code of every CUDA kernel in fastlm._cuda, for GPUs that are not available.

    python tests/gates/cuda_gate.py [--show NAME] [--write]

A kernel fails if it

- spills registers or uses local memory (stack, LDL, STL),
- needs more static shared memory than a block may have,
- lacks an instruction that it should contain (EXPECTED_INSTRUCTIONS),
- has a worse figure than tests/gates/cuda_gate.json, which is valid for one version of nvcc.
  `--write` rewrites the table. A change that worsens a figure rewrites it in the same commit.

The gate does not check races and numerics (csrc/simt does) or speed on a device.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_suffix(".json")
MAX_STATIC_SHARED = 48 * 1024  # bytes per block, on every architecture
REGISTERS, WARPS = 65536, 64  # per multiprocessor: 8.0, 9.0, 10.0
SHARED_OF_SM = {80: 164, 90: 228, 100: 228}  # KiB

# Pattern of the kernel's name -> instructions that its machine code needs, on every architecture.
VECTORS = ("LDG.E.128", "STG.E.128")
EXPECTED_INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    r"adamw_kernel": (*VECTORS, "LDG.E.64", "STG.E.64"),
    r"adamw_squares_kernel": ("LDG.E.128", "LDG.E.64"),
    r"cross_entropy_kernel": ("LDG.E.128", "MUFU.EX2"),
    r"cross_entropy_backward_kernel": (*VECTORS, "MUFU.EX2"),
    r"glu_kernel<(4|8)": VECTORS,
    r"rope_kernel<(8|4, \w+, float)": VECTORS,
    r"rope_kernel<4, \w+, (__half|__nv_bfloat16)": ("LDG.E.128", "LDG.E.64", "STG.E.64"),
    r"matrix_kernel<\(Form\)\d, \d, (__half|__nv_bfloat16)": ("HMMA.16816", "LDGSTS"),
    r"matrix_kernel<\(Form\)\d, \d, signed char": ("IMMA.16832", "LDGSTS"),
    r"vector_kernel": ("LDG.E.128",),
    r"vector_kernel<\d, signed char": ("IDP.4A",),
    r"(glu_)?round_kernel": ("LDG.E.128",),
    r"rms_norm_round_kernel<(8|4)": ("LDG.E.128", "LDS.128"),
    r"paged_append_kernel<(8, \w+, (?!signed)|4, float, float)": VECTORS,
    r"rope_append_kernel<4": ("LDG.E.128",),  # for cos and sin
    r"dequantize_kernel<\d, \w+, true>": ("STG.E.128",),
    r"paged::paged_mma_kernel": ("HMMA.16816", "LDGSTS"),
    r"paged::paged_dot_kernel": ("LDG.E.128",),
    r"rms_norm_(wide_)?kernel<(8, (\d, )?(__half|__nv_bfloat16)|4, (\d, )?float)": VECTORS,
}


class Kernel(NamedTuple):
    registers: int
    stack: int
    shared: int  # static bytes
    threads: int  # of the largest block
    opcodes: dict[str, int] | None  # None: not read

    def warps(self, arch: int) -> int:
        """The resident warps per multiprocessor, which registers, static shared memory and threads
        limit (bench/cuda_model.py computes them from the shared memory of a launch).
        """
        warps_per_block = -(-self.threads // 32)
        registers = -(-self.registers // 8) * 8 * 32 * warps_per_block
        blocks = min(REGISTERS // registers, WARPS // warps_per_block, 32)
        # the system's 1 KiB per block, which the figures of newer architectures include
        shared = self.shared + (1024 if arch < 90 else 0)
        return warps_per_block * min(blocks, SHARED_OF_SM[arch] * 1024 // max(shared, 1))

    def figures(self, arch: int) -> dict[str, int]:
        return {
            "registers": self.registers,
            "stack": self.stack,
            "shared": self.shared,
            "threads": self.threads,
            "warps": self.warps(arch),
        }


def tool_path(name: str) -> Path:
    """The path of a CUDA binary utility in Triton's package."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def run_tool(name: str, *arguments: str) -> str:
    command = [tool_path(name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangle(names: list[str]) -> dict[str, str]:
    """`void fastlm::(..)::rms_norm_kernel<8, 1, float>(..)` -> `rms_norm_kernel<8, 1, float>`."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = {}
    for name, full in zip(names, done.stdout.splitlines(), strict=True):
        full = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", full)
        full = re.sub(r"\b(fastlm|void)(::| )", "", full)
        depth, end = 0, len(full)
        for i, c in enumerate(full):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        short[name] = full[:end]
    return short


def by_arch(text: str) -> dict[int, str]:
    """The output of cuobjdump, split by architecture."""
    parts = re.split(r"^arch = sm_(\d+)\w*$", text, flags=re.M)
    result: dict[int, str] = defaultdict(str)
    for arch, part in zip(parts[1::2], parts[2::2]):
        result[int(arch)] += part
    return result


def opcodes_of(arch: str, library: Path) -> dict[str, dict[str, int]]:
    """Function -> instruction -> count. The text has 100 MB and is therefore read by lines."""
    instruction = re.compile(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
    functions: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    command = [tool_path("cuobjdump"), "-sass", "-arch", arch, str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if match := instruction.search(line):
                counts[match[1]] += 1
            elif "Function : " in line:
                counts = functions[line.split()[-1]] = defaultdict(int)
    assert process.returncode == 0, command
    return functions


def read(
    library: Path, opcode_archs: Sequence[int] = (80, 90, 100)
) -> dict[int, dict[str, Kernel]]:
    """The kernels by architecture and name. PTX is skipped because it is no machine code.

    Only the instructions of `opcode_archs` are read: this takes 15 s per architecture.
    """
    usage = by_arch(run_tool("cuobjdump", "--dump-resource-usage", str(library)))
    elf_files = run_tool("cuobjdump", "-lelf", str(library))
    cubins = re.findall(r"\.(sm_(\d+)\w*)\.cubin$", elf_files, re.M)
    opcodes: dict[tuple[int, str], dict[str, int]] = {}
    for name, arch in dict(cubins).items():
        if int(arch) in opcode_archs:
            opcodes |= {(int(arch), k): v for k, v in opcodes_of(name, library).items()}
    elf = by_arch(run_tool("cuobjdump", "-elf", str(library)))
    kernels: dict[int, dict[str, Kernel]] = {}
    for arch, text in usage.items():
        functions = re.findall(r"Function (\S+):\s+(.*)", text)
        names = demangle([name for name, _ in functions])
        threads = {}
        for section in re.split(r"^\.nv\.info\.", elf[arch], flags=re.M)[1:]:
            limit = re.search(r"EIATTR_MAX_THREADS\s.*\s.*Value:\s*(\w+) (\w+) (\w+)", section)
            if limit:
                x, y, z = (int(v, 16) for v in limit.groups())
                threads[section.split()[0]] = x * y * z
        kernels[arch] = {}
        for name, figures in functions:
            value = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", figures)}
            kernels[arch][names[name]] = Kernel(
                registers=value["REG"],
                stack=value["STACK"] + value["LOCAL"],
                shared=value["SHARED"],
                threads=threads.get(name, 1024),
                opcodes=opcodes.get((arch, name), {}) if arch in opcode_archs else None,
            )
    return kernels


def find_faults(kernels: dict[int, dict[str, Kernel]], table: dict | None) -> list[str]:
    """The faults of all kernels. `table`: the figures recorded for this nvcc, or None."""
    faults = []
    for arch, kernels_of_arch in kernels.items():
        for name, kernel in kernels_of_arch.items():
            label = f"sm_{arch} {name}"
            opcodes = kernel.opcodes or {}
            if kernel.stack or any(opcode.startswith(("LDL", "STL")) for opcode in opcodes):
                faults.append(f"{label}: {kernel.stack} bytes of stack")
            if kernel.shared > MAX_STATIC_SHARED:
                faults.append(f"{label}: {kernel.shared} bytes of static shared memory")
            for pattern, expected in EXPECTED_INSTRUCTIONS.items():
                if kernel.opcodes is not None and re.match(pattern, name):
                    missing = [
                        prefix
                        for prefix in expected
                        if not any(opcode.startswith(prefix) for opcode in opcodes)
                    ]
                    if missing:
                        faults.append(f"{label}: no {', '.join(missing)}")
            if table is None:
                continue
            recorded = table["kernels"].get(f"sm_{arch}", {}).get(name)
            if recorded is None:
                faults.append(f"{label}: not in {TABLE.name} (--write)")
                continue
            for figure, value in kernel.figures(arch).items():
                worse = value < recorded[figure] if figure == "warps" else value > recorded[figure]
                if worse:
                    faults.append(f"{label}: {figure} {value}, on record {recorded[figure]}")
    return faults


def unmatched_patterns(kernels: dict[int, dict[str, Kernel]]) -> list[str]:
    """The patterns of EXPECTED_INSTRUCTIONS that match no kernel, as faults."""
    names = {name for kernels_of_arch in kernels.values() for name in kernels_of_arch}
    return [
        f"no kernel has a name like {pattern}"
        for pattern in EXPECTED_INSTRUCTIONS
        if not any(re.match(pattern, name) for name in names)
    ]


def nvcc_version(library: Path) -> str:
    """The version of ptxas that compiled the library."""
    version = re.search(
        r"Cuda compilation tools, release ([\d.]+)", run_tool("cuobjdump", "-elf", str(library))
    )
    return version[1] if version else "unknown"


def library_path() -> Path | None:
    """The path of fastlm._cuda, or None where it is not built."""
    spec = importlib.util.find_spec("fastlm._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--show", help="print figures and instructions of the kernels whose name contains SHOW"
    )
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    arguments = parser.parse_args()
    path = library_path()
    if path is None:
        sys.exit("cuda_gate: expected fastlm._cuda, which needs nvcc (docs/simt.md), got none")
    kernels, version = read(path), nvcc_version(path)
    for arch, kernels_of_arch in kernels.items():
        for name, kernel in kernels_of_arch.items():
            if arguments.show and arguments.show in name:
                frequent = sorted(kernel.opcodes.items(), key=lambda item: -item[1])[:12]
                print(f"sm_{arch} {name}: {kernel.figures(arch)} {dict(frequent)}")
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": None}
    if arguments.write:
        figures = {
            f"sm_{arch}": {name: k.figures(arch) for name, k in sorted(kernels_of_arch.items())}
            for arch, kernels_of_arch in kernels.items()
        }
        lines = json.dumps({"nvcc": version, "kernels": figures}, indent=1)
        TABLE.write_text(re.sub(r"\{\n\s+(\"reg[^{}]*?)\n\s+\}", _one_line, lines) + "\n")
        table = json.loads(TABLE.read_text())
    faults = find_faults(kernels, table if table["nvcc"] == version else None)
    faults += unmatched_patterns(kernels)
    print("\n".join(faults))
    count = sum(map(len, kernels.values()))
    print(f"nvcc {version}: {count} kernels, {len(faults)} faults, {path.stat().st_size >> 10} KiB")
    sys.exit(bool(faults))


def _one_line(match: re.Match) -> str:
    return "{" + re.sub(r"\s*\n\s*", " ", match[1]) + "}"


if __name__ == "__main__":
    main()
