"""Build programs and libraries of tests/support/simt/*.cu, by g++ with the emulator, or by nvcc."""

import importlib.util
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# this process may run under a sanitizer, which a compiler should not inherit
QUIET = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}


def setup_py():
    """Load setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastlm_setup", ROOT / "setup.py")
    assert spec and spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build


def cuda_home() -> Path:
    """Return the CUDA folder with which setup.py builds."""
    home = setup_py().CUDA_HOME
    assert home, "expected the CUDA headers (docs/simt.md)"
    return home


def by_gcc(source: Path, folder: Path, *options: str, core: tuple[str, ...] | None = None) -> Path:
    """Build with g++ and the emulator. `core`: the emulator's own options, if they differ."""
    common = ["g++", "-std=c++20", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-fopenmp"]
    common += ["-ffp-contract=off", "-Wno-unknown-pragmas"]
    common += [f"-I{ROOT / 'csrc'}", "-isystem", str(cuda_home() / "include")]
    objects = []
    for part in [*sorted((ROOT / "csrc/simt").glob("*.cpp")), source]:
        part_options = options if core is None or part == source else core
        objects.append(folder / f"{part.stem}.o")
        command = [*common, *part_options, "-x", "c++", "-c", part, "-o", objects[-1]]
        subprocess.run(command, check=True, env=QUIET)
    result = folder / source.stem
    kind = [] if "int main(" in source.read_text() else ["-shared"]
    subprocess.run([*common, *options, *kind, *objects, "-o", result], check=True, env=QUIET)
    return result


def by_nvcc(source: Path, folder: Path, arch: str = "native") -> Path:
    result = folder / source.stem
    command = [cuda_home() / "bin/nvcc", "-std=c++20", "-O3", f"-arch={arch}", "-shared"]
    command += ["-Xcompiler=-fPIC,-Wall", f"-I{ROOT / 'csrc'}", source, "-o", result]
    subprocess.run(command, check=True, env=QUIET)
    return result
