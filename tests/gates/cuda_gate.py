"""Reads the machine code of every CUDA kernel in fastlm._cuda, for GPUs that are not available.

    python tests/gates/cuda_gate.py [--show NAME] [--write]

A kernel fails if it

- spills registers or uses local memory (stack, LDL, STL),
- needs more static shared memory than a block may have,
- lacks an instruction that it should contain (WANTED),
- has a worse figure than tests/gates/cuda_gate.json records, which holds for one version of nvcc.
  `--write` rewrites the table: a change that worsens a figure changes it in the same commit.

It does not check races, numerics (csrc/simt does) or speed on a device.
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
SHARED = 48 * 1024  # static bytes per block, on every architecture
REGISTERS, WARPS = 65536, 64  # per multiprocessor: 8.0, 9.0, 10.0
SHARED_OF_SM = {80: 164, 90: 228, 100: 228}  # KiB

# Pattern of the kernel's name -> instructions that its machine code needs, on every architecture.
VECTORS = ("LDG.E.128", "STG.E.128")
WANTED: dict[str, tuple[str, ...]] = {
    r"adamw_kernel": (*VECTORS, "LDG.E.64", "STG.E.64"),  # AdamW's
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
    r"rope_append_kernel<4": ("LDG.E.128",),  # for the tables
    r"dequantize_kernel<\d, \w+, true>": ("STG.E.128",),
    r"paged::paged_mma_kernel": ("HMMA.16816", "LDGSTS"),
    r"paged::paged_dot_kernel": ("LDG.E.128",),
    r"rms_norm_(wide_)?kernel<(8, (\d, )?(__half|__nv_bfloat16)|4, (\d, )?float)": VECTORS,
}


class Kernel(NamedTuple):
    registers: int
    stack: int
    shared: int  # static bytes
    threads: int  # largest block
    opcodes: dict[str, int] | None  # None: not read

    def warps(self, arch: int) -> int:
        """The resident warps per multiprocessor, by registers, static shared memory and threads
        (bench/cuda_model.py counts them by what a launch uses).
        """
        of_block = -(-self.threads // 32)
        registers = -(-self.registers // 8) * 8 * 32 * of_block
        blocks = min(REGISTERS // registers, WARPS // of_block, 32)
        shared = self.shared + (1024 if arch < 90 else 0)  # the system's, later included
        return of_block * min(blocks, SHARED_OF_SM[arch] * 1024 // max(shared, 1))

    def figures(self, arch: int) -> dict[str, int]:
        return {
            "registers": self.registers,
            "stack": self.stack,
            "shared": self.shared,
            "threads": self.threads,
            "warps": self.warps(arch),
        }


def tool_path(name: str) -> Path:
    """A CUDA binary utility in Triton's package."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def tool(name: str, *arguments: str) -> str:
    command = [tool_path(name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> dict[str, str]:
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
    """Function -> instruction -> how often. The text is 100 MB: it is read by lines."""
    instruction = re.compile(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
    functions: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    command = [tool_path("cuobjdump"), "-sass", "-arch", arch, str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if found := instruction.search(line):
                counts[found[1]] += 1
            elif "Function : " in line:
                counts = functions[line.split()[-1]] = defaultdict(int)
    assert process.returncode == 0, command
    return functions


def read(library: Path, code_of: Sequence[int] = (80, 90, 100)) -> dict[int, dict[str, Kernel]]:
    """The kernels by architecture and name. PTX is left out because it has no machine code.

    Instructions are read of the architectures ``code_of`` alone: 15 s each.
    """
    usage = by_arch(tool("cuobjdump", "--dump-resource-usage", str(library)))
    cubins = re.findall(r"\.(sm_(\d+)\w*)\.cubin$", tool("cuobjdump", "-lelf", str(library)), re.M)
    opcodes: dict[tuple[int, str], dict[str, int]] = {}
    for name, arch in dict(cubins).items():
        if int(arch) in code_of:
            opcodes |= {(int(arch), k): v for k, v in opcodes_of(name, library).items()}
    elf = by_arch(tool("cuobjdump", "-elf", str(library)))
    kernels: dict[int, dict[str, Kernel]] = {}
    for arch, text in usage.items():
        found = re.findall(r"Function (\S+):\s+(.*)", text)
        names = demangled([name for name, _ in found])
        threads = {}
        for section in re.split(r"^\.nv\.info\.", elf[arch], flags=re.M)[1:]:
            if most := re.search(r"EIATTR_MAX_THREADS\s.*\s.*Value:\s*(\w+) (\w+) (\w+)", section):
                x, y, z = (int(v, 16) for v in most.groups())
                threads[section.split()[0]] = x * y * z
        kernels[arch] = {}
        for name, figures in found:
            value = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", figures)}
            kernels[arch][names[name]] = Kernel(
                value["REG"], value["STACK"] + value["LOCAL"], value["SHARED"],
                threads.get(name, 1024), opcodes.get((arch, name), {}) if arch in code_of else None,
            )  # fmt: skip
    return kernels


def faults(kernels: dict[int, dict[str, Kernel]], table: dict | None) -> list[str]:
    """The faults of all kernels. `table`: the record for this nvcc, or None."""
    found = []
    for arch, of_arch in kernels.items():
        for name, kernel in of_arch.items():
            where = f"sm_{arch} {name}"
            ops = kernel.opcodes or {}
            if kernel.stack or any(op.startswith(("LDL", "STL")) for op in ops):
                found.append(f"{where}: {kernel.stack} bytes of stack")
            if kernel.shared > SHARED:
                found.append(f"{where}: {kernel.shared} bytes of static shared memory")
            for pattern, expected in WANTED.items():
                if kernel.opcodes is not None and re.match(pattern, name):
                    missing = [w for w in expected if not any(op.startswith(w) for op in ops)]
                    if missing:
                        found.append(f"{where}: no {', '.join(missing)}")
            if table is None:
                continue
            recorded = table["kernels"].get(f"sm_{arch}", {}).get(name)
            if recorded is None:
                found.append(f"{where}: not in {TABLE.name} (--write)")
                continue
            for figure, value in kernel.figures(arch).items():
                worse = value < recorded[figure] if figure == "warps" else value > recorded[figure]
                if worse:
                    found.append(f"{where}: {figure} {value}, on record {recorded[figure]}")
    return found


def unmatched(kernels: dict[int, dict[str, Kernel]]) -> list[str]:
    """The patterns of WANTED that match no kernel."""
    names = {name for of_arch in kernels.values() for name in of_arch}
    return [f"no kernel is called {p}" for p in WANTED if not any(re.match(p, n) for n in names)]


def nvcc_version(library: Path) -> str:
    """The version of ptxas that compiled the library."""
    version = re.search(
        r"Cuda compilation tools, release ([\d.]+)", tool("cuobjdump", "-elf", str(library))
    )
    return version[1] if version else "unknown"


def library() -> Path | None:
    spec = importlib.util.find_spec("fastlm._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--show", help="figures and instructions of kernels whose name has this")
    parser.add_argument("--write", action="store_true", help="write the table anew")
    arguments = parser.parse_args()
    path = library()
    if path is None:
        sys.exit("cuda_gate: fastlm._cuda is not built (it needs nvcc; docs/simt.md)")
    kernels, version = read(path), nvcc_version(path)
    for arch, of_arch in kernels.items():
        for name, kernel in of_arch.items():
            if arguments.show and arguments.show in name:
                most = sorted(kernel.opcodes.items(), key=lambda item: -item[1])[:12]
                print(f"sm_{arch} {name}: {kernel.figures(arch)} {dict(most)}")
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": None}
    if arguments.write:
        figures = {
            f"sm_{arch}": {name: k.figures(arch) for name, k in sorted(of_arch.items())}
            for arch, of_arch in kernels.items()
        }
        lines = json.dumps({"nvcc": version, "kernels": figures}, indent=1)
        TABLE.write_text(re.sub(r"\{\n\s+(\"reg[^{}]*?)\n\s+\}", _one_line, lines) + "\n")
        table = json.loads(TABLE.read_text())
    found = faults(kernels, table if table["nvcc"] == version else None) + unmatched(kernels)
    print("\n".join(found))
    count = sum(map(len, kernels.values()))
    print(f"nvcc {version}: {count} kernels, {len(found)} faults, {path.stat().st_size >> 10} KiB")
    sys.exit(bool(found))


def _one_line(match: re.Match) -> str:
    return "{" + re.sub(r"\s*\n\s*", " ", match[1]) + "}"


if __name__ == "__main__":
    main()
