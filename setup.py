"""The build: which folders are which packages, and the pybind11 extensions, which ninja builds.

    fastlm._cpu    always
    fastlm._cuda   where nvcc is found: on PATH, in CUDA_HOME, or in pip's nvidia-cuda-nvcc
    fastlm._simt   the .cu files on the CPU emulator, for tests; where the CUDA headers are found

`build_ext` writes build/<variant>/build.ninja and runs ninja, which compiles what changed, headers
included. The variants are release, debug and sanitize-<sanitizers>.

Metadata is in pyproject.toml. Environment:

    FASTLM_CUDA_ARCHS   default "80;90a;100a", the first one also as PTX
    FASTLM_CUDA=0       leaves _cuda out; FASTLM_CPU=0 likewise
    FASTLM_SIMT=1       builds _simt
    FASTLM_BUILD_JOBS   compilers at a time, default all cores
    FASTLM_SANITIZE     address,undefined for all; thread for the kernels of _simt
    FASTLM_DEBUG=1      _simt with all that gdb wants
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
# Beside Python, where pip installs it, or on PATH
NINJA = shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")

COMPILE = "-O2 -fopenmp -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-psabi".split()
LINK = ["-fopenmp"]  # with torch imported first this resolves to torch's libgomp: one thread pool
LINK += [f"-fsanitize={SANITIZE}"] if SANITIZE else []
TSAN: list[str] = []  # of the .cu files alone: the emulator tells ThreadSanitizer what it does
if SANITIZE == "thread":
    TSAN = ["-fsanitize=thread"]
    COMPILE += ["-DSIMT_TSAN"]
elif SANITIZE:
    COMPILE += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    COMPILE += ["-fno-wrapv"]  # Python builds with -fwrapv, under which overflow is no finding
    COMPILE += ["-O1", "-g1"]  # half the compile time of -O2; line numbers in the reports


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


# What can be built here. build.ninja has all of it; the environment says what of it is wanted
EXTENSIONS = [extension("fastlm._cpu", "bindings.cpp cpu/*.cpp cpu/*/*.cpp", 17, [], [])]
KERNELS = {}  # the compiler of an extension's .cu files
CUDA_HOME = cuda_home()
if CUDA_HOME and (CUDA_HOME / "bin/nvcc").exists():
    libraries = next(p for n in ("lib64", "lib") if (p := CUDA_HOME / n).exists())
    static = [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    EXTENSIONS += [extension("fastlm._cuda", "cuda/*.cpp cuda/*.cu", 20, [], static)]
    first, *others = os.environ.get("FASTLM_CUDA_ARCHS", "80;90a;100a").split(";")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in [first, *others]]
    if first.isdigit():  # PTX for cards that are not listed; 90a's would run nowhere else
        codes[0] = f"-gencode=arch=compute_{first},code=[sm_{first},compute_{first}]"
    KERNELS["fastlm._cuda"] = [
        *[f"{CUDA_HOME}/bin/nvcc", "-std=c++20", "-O3", "-Xcompiler=-fPIC,-Wall", "-Icsrc"],
        *["-Xfatbin=-compress-all", "-Xcudafe=--display_error_number", "--threads=2", *codes],
    ]
if CUDA_HOME:
    emulator = ["-DFASTLM_SIMT", "-fno-strict-aliasing", f"-isystem{CUDA_HOME}/include"]
    emulator += ["-g" if DEBUG else "-g1"]  # all that gdb wants, three times the size; or lines
    files = "cuda/*.cpp simt/*.cpp cuda/*.cu"
    EXTENSIONS += [extension("fastlm._simt", files, 20, emulator, [])]
    KERNELS["fastlm._simt"] = [
        *["g++", "-x", "c++", "-std=c++20", "-fPIC", "-Icsrc", *emulator, *COMPILE, *TSAN],
        "-Wno-unknown-pragmas",
        "-ffp-contract=off",  # of __fmul_rn and what adds to it
        "-Wno-maybe-uninitialized",  # of lanes that a mask keeps out
        *os.environ.get("CFLAGS", "").split(),
    ]
DATA = ["fastlm.pipeline.parts", "fastlm.serve.page"]  # folders without Python
WANTED = {
    "fastlm._cpu": os.environ.get("FASTLM_CPU") != "0",
    "fastlm._cuda": os.environ.get("FASTLM_CUDA") != "0",
    "fastlm._simt": os.environ.get("FASTLM_SIMT") == "1",
}


def check_machine(compiler) -> None:
    """One line on what is missing, before the minutes of compiling or fetching."""
    if not shutil.which(cxx := compiler.compiler_cxx[0]):
        sys.exit(f"setup.py: expected a C++17 compiler (Debian: g++), got no {cxx}; or say CXX=...")
    if not (header := Path(sysconfig.get_path("include"), "Python.h")).exists():
        sys.exit(f"setup.py: expected the headers of Python (Debian: python3-dev), got no {header}")
    if not NINJA:
        sys.exit("setup.py: expected ninja (pip install ninja), got none")


def shell(words: list[str]) -> str:
    """A command as ninja wants it written."""
    return shlex.join(words).replace("$", "$$")


def build_ninja(compiler) -> str:
    """Each extension has rules and objects of its own: _cuda and _simt compile the same files.

    `compiler` is setuptools': Python's own options, CXX, CXXFLAGS, CPPFLAGS and LDFLAGS.
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
    """Lets ninja build what changed, and copies it to where setuptools wants it."""

    def finalize_options(self):
        super().finalize_options()
        if self.inplace:  # setuptools copies from there; from build/lib it would go into a wheel
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
            sys.exit(failed)  # ninja has said why
        for name, library in libraries.items():
            self.mkpath(os.path.dirname(self.get_ext_fullpath(name)))
            self.copy_file(library, self.get_ext_fullpath(name))

    def copy_file(self, infile, outfile, **options):
        """Leaves alone what is the same already: a test that runs beside this may load it."""
        if not (os.path.exists(outfile) and filecmp.cmp(infile, outfile)):
            super().copy_file(infile, outfile, **options)


if __name__ == "__main__":  # tests/support/kernel_build.py asks for CUDA_HOME
    setup(
        packages=[*find_packages(include=["fastlm*"]), "fastlm.kernels", *DATA],
        package_dir={"fastlm.kernels": "kernels"},  # ./kernels installs as fastlm.kernels
        package_data={
            "fastlm.evals.safety": ["*.toml"],
            "fastlm.pipeline": ["*.jinja"],
            "fastlm.pipeline.parts": ["*.jinja"],
            "fastlm.serve": ["*.json"],
            "fastlm.serve.page": ["*"],
        },
        ext_modules=[ext for ext in EXTENSIONS if WANTED[ext.name]],
        cmdclass={"build_ext": Build},
    )
