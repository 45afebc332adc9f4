"""The build: the packages and their folders, and the pybind11 extensions, which ninja compiles.

    fastlm._cpu    always
    fastlm._cuda   where nvcc is found: on PATH, in CUDA_HOME, or in pip's nvidia-cuda-nvcc
    fastlm._simt   the .cu files on the CPU emulator, for tests; where the CUDA headers are found

`build_ext` writes build/<variant>/build.ninja and runs ninja, which compiles the changed files and
the files that include a changed header. The variants are release, debug and sanitize-<sanitizers>.

Metadata is in pyproject.toml. Environment:

    FASTLM_CUDA_ARCHS   default "80;90a;100a"; the first one is also compiled to PTX
    FASTLM_CUDA=0       does not build _cuda; FASTLM_CPU=0 does not build _cpu
    FASTLM_SIMT=1       builds _simt
    FASTLM_BUILD_JOBS   number of parallel compilers, default the number of cores
    FASTLM_SANITIZE     "address,undefined" for all code, "thread" for the kernels of _simt
    FASTLM_DEBUG=1      builds _simt with all debug information for gdb
"""

import filecmp
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

SANITIZE = os.environ.get("FASTLM_SANITIZE", "")
DEBUG = os.environ.get("FASTLM_DEBUG") == "1"
VARIANT = "sanitize-" + SANITIZE.replace(",", "-") if SANITIZE else "debug" if DEBUG else "release"
FOLDER = Path("build", VARIANT)
# In the folder of Python's scripts, where pip installs it, or on PATH
NINJA = shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")

COMPILE = "-O2 -fopenmp -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-psabi".split()
LINK = ["-fopenmp"]  # torch, imported first, has loaded its libgomp: there is one thread pool
LINK += [f"-fsanitize={SANITIZE}"] if SANITIZE else []
TSAN: list[str] = []  # only for the .cu files: the emulator itself informs ThreadSanitizer
if SANITIZE == "thread":
    TSAN = ["-fsanitize=thread"]
    COMPILE += ["-DSIMT_TSAN"]
elif SANITIZE:
    COMPILE += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    COMPILE += ["-fno-wrapv"]  # Python compiles with -fwrapv, which hides overflow from UBSan
    COMPILE += ["-O1", "-g1"]  # half the compile time of -O2; line numbers for the reports


def cuda_home() -> Path | None:
    """The folder with bin/nvcc and include/cuda_runtime.h."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parent.parent)
    candidates.append("/usr/local/cuda")
    site = Path(sysconfig.get_path("purelib"))
    candidates += sorted(site.glob("nvidia/cu*"), reverse=True)  # pip's packages
    for home in filter(None, candidates):
        if Path(home, "include/cuda_runtime.h").exists():
            return Path(home)
    return None


def extension(name: str, patterns: str, cxx_std: int, options: list[str], link: list[str]):
    return Pybind11Extension(
        name,
        [str(source) for p in patterns.split() for source in sorted(Path("csrc").glob(p))],
        include_dirs=["csrc"],
        cxx_std=cxx_std,
        extra_compile_args=[*COMPILE, *options],
        extra_link_args=[*LINK, *link],
    )


# What can be built on this machine. build.ninja has all of it; ENABLED selects what is built
EXTENSIONS = [extension("fastlm._cpu", "bindings.cpp cpu/*.cpp cpu/*/*.cpp", 17, [], [])]
KERNELS = {}  # the compiler of an extension's .cu files
CUDA_HOME = cuda_home()
if CUDA_HOME and (CUDA_HOME / "bin/nvcc").exists():
    libraries = next(p for n in ("lib64", "lib") if (p := CUDA_HOME / n).exists())
    static = [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    EXTENSIONS += [extension("fastlm._cuda", "cuda/*.cpp cuda/*.cu", 20, [], static)]
    first, *others = os.environ.get("FASTLM_CUDA_ARCHS", "80;90a;100a").split(";")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in [first, *others]]
    if first.isdigit():  # PTX for other cards; PTX of 90a would run on no other card
        codes[0] = f"-gencode=arch=compute_{first},code=[sm_{first},compute_{first}]"
    KERNELS["fastlm._cuda"] = [
        *[f"{CUDA_HOME}/bin/nvcc", "-std=c++20", "-O3", "-Xcompiler=-fPIC,-Wall", "-Icsrc"],
        *["-Xfatbin=-compress-all", "-Xcudafe=--display_error_number", "--threads=2", *codes],
    ]
if CUDA_HOME:
    emulator = ["-DFASTLM_SIMT", "-fno-strict-aliasing", f"-isystem{CUDA_HOME}/include"]
    # all debug information (three times the size), or only line numbers
    emulator += ["-g" if DEBUG else "-g1"]
    files = "cuda/*.cpp simt/*.cpp cuda/*.cu"
    EXTENSIONS += [extension("fastlm._simt", files, 20, emulator, [])]
    KERNELS["fastlm._simt"] = [
        *["g++", "-x", "c++", "-std=c++20", "-fPIC", "-Icsrc", *emulator, *COMPILE, *TSAN],
        "-Wno-unknown-pragmas",
        "-ffp-contract=off",  # __fmul_rn must not be contracted with a sum
        "-Wno-maybe-uninitialized",  # values of lanes that a mask excludes
        *os.environ.get("CFLAGS", "").split(),
    ]
DATA = ["fastlm.pipeline.parts", "fastlm.serve.page"]  # folders without Python files
ENABLED = {
    "fastlm._cpu": os.environ.get("FASTLM_CPU") != "0",
    "fastlm._cuda": os.environ.get("FASTLM_CUDA") != "0",
    "fastlm._simt": os.environ.get("FASTLM_SIMT") == "1",
}


def check_machine(compiler) -> None:
    """Exits with one line if a tool is missing, before minutes of compilation or download."""
    if not shutil.which(cxx := compiler.compiler_cxx[0]):
        sys.exit(f"setup.py: expected a C++17 compiler (Debian: g++, or set CXX), got no {cxx}")
    if not (header := Path(sysconfig.get_path("include"), "Python.h")).exists():
        sys.exit(f"setup.py: expected the headers of Python (Debian: python3-dev), got no {header}")
    if not NINJA:
        sys.exit("setup.py: expected ninja (pip install ninja), got none")


def shell(words: list[str]) -> str:
    """A command, quoted for the shell and for ninja."""
    return shlex.join(words).replace("$", "$$")


def build_ninja(compiler) -> str:
    """The text of build.ninja. Each extension has its own rules and objects, because _cuda and
    _simt compile the same files.

    `compiler`: setuptools' object, with Python's options, CXX, CXXFLAGS, CPPFLAGS and LDFLAGS.
    """
    lines = ["# written by setup.py", f"builddir = {FOLDER}"]
    for ext in EXTENSIONS:
        include = [f"-I{folder}" for folder in [*ext.include_dirs, *compiler.include_dirs]]
        commands = {".cpp": [*compiler.compiler_so_cxx, *include, *ext.extra_compile_args]}
        if ext.name in KERNELS:
            commands[".cu"] = KERNELS[ext.name]
        for suffix, command in commands.items():
            lines += [f"rule {ext.name}{suffix}"]
            lines += [f"  command = {shell(command)} -MMD -MF $out.d -c $in -o $out"]
            lines += ["  depfile = $out.d", "  deps = gcc", f"  description = {ext.name}: $in"]
        linker = [*compiler.compiler_cxx, *compiler.linker_so_cxx[1:]]  # [0] is not CXX
        libraries = [*(f"-L{p}" for p in compiler.library_dirs), *ext.extra_link_args]
        lines += [f"rule {ext.name}.so", f"  description = {ext.name}: link"]
        lines += [f"  command = {shell(linker)} $in -o $out {shell(libraries)}"]
        objects = {source: f"{FOLDER}/{ext.name}/{source}.o" for source in ext.sources}
        for source, obj in objects.items():
            lines += [f"build {obj}: {ext.name}{Path(source).suffix} {source}"]
        lines += [f"build {FOLDER}/{ext.name}.so: {ext.name}.so {' '.join(objects.values())}"]
    return "\n".join(lines) + "\n"


class Build(build_ext):
    """Runs ninja and copies the libraries to the paths that setuptools expects."""

    def finalize_options(self):
        super().finalize_options()
        if self.inplace:  # setuptools copies from here; the next wheel would contain build/lib
            self.build_lib = str(FOLDER / "lib")

    def build_extensions(self):
        check_machine(self.compiler)
        file, text = FOLDER / "build.ninja", build_ninja(self.compiler)
        ninja = [NINJA, "-f", file]
        if not file.exists() or file.read_text() != text:
            FOLDER.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            rules = [f"{ext.name}{suffix}" for ext in EXTENSIONS for suffix in (".cpp", ".cu")]
            with open("compile_commands.json", "w") as commands:  # for editors
                subprocess.run([*ninja, "-t", "compdb", *rules], stdout=commands, check=True)
        jobs = str(int(os.environ.get("FASTLM_BUILD_JOBS") or 0) or os.cpu_count())
        libraries = {ext.name: f"{FOLDER}/{ext.name}.so" for ext in self.extensions}
        if failed := subprocess.run([*ninja, "-j", jobs, *libraries.values()]).returncode:
            sys.exit(failed)  # ninja has printed the error
        for name, library in libraries.items():
            self.mkpath(os.path.dirname(self.get_ext_fullpath(name)))
            self.copy_file(library, self.get_ext_fullpath(name))

    def copy_file(self, infile, outfile, **options):
        """Does not touch an equal file: a test that runs at the same time may load it."""
        if not (os.path.exists(outfile) and filecmp.cmp(infile, outfile)):
            super().copy_file(infile, outfile, **options)


if __name__ == "__main__":  # tests/support/kernel_build.py imports this file
    setup(
        packages=[*find_packages(include=["fastlm*"]), "fastlm.kernels", *DATA],
        package_dir={"fastlm.kernels": "kernels"},  # ./kernels installs as fastlm.kernels
        package_data={
            "fastlm.data": ["*.toml"],
            "fastlm.data.consent": ["*.toml"],
            "fastlm.evals": ["*.jsonl"],
            "fastlm.evals.safety": ["*.toml"],
            "fastlm.pipeline": ["*.jinja"],
            "fastlm.pipeline.parts": ["*.jinja"],
            "fastlm.serve": ["*.json"],
            "fastlm.serve.page": ["*"],
        },
        ext_modules=[ext for ext in EXTENSIONS if ENABLED[ext.name]],
        cmdclass={"build_ext": Build},
    )
