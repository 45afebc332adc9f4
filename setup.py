"""The build: which folders are which packages, and the pybind11 extensions.

    fastlm._cpu    always
    fastlm._cuda   where nvcc is found: on PATH, in CUDA_HOME, or in pip's nvidia-cuda-nvcc
    fastlm._simt   the .cu files on the CPU emulator, for tests; where the CUDA headers are found

Metadata is in pyproject.toml. Environment:

    FASTLM_CUDA_ARCHS   default "80;90a;100a", the last one also as PTX
    FASTLM_CUDA=0       leaves _cuda out; FASTLM_CPU=0 likewise
    FASTLM_SIMT=1       builds _simt
    FASTLM_BUILD_JOBS   compilers at a time, default all cores
    FASTLM_SANITIZE     address,undefined for all; thread for the kernels of _simt
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

COMPILE = [
    "-O2",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
LINK = ["-fopenmp"]  # with torch imported first this resolves to torch's libgomp: one thread pool

TSAN: list[str] = []  # of the .cu files alone: the emulator tells ThreadSanitizer what it does
if (sanitizers := os.environ.get("FASTLM_SANITIZE")) == "thread":
    TSAN = ["-fsanitize=thread"]
    COMPILE += ["-DSIMT_TSAN"]
    LINK += TSAN
elif sanitizers:
    COMPILE += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    COMPILE += ["-fno-wrapv"]  # Python builds with -fwrapv, under which overflow is no finding
    COMPILE += ["-O1", "-g1"]  # half the compile time of -O2; line numbers in the reports
    LINK += [f"-fsanitize={sanitizers}"]


def needs_recompile(obj: str, src: str) -> bool:
    """True unless the object is newer than its source and every header that -MMD recorded."""
    depfile = Path(obj).with_suffix(".d")
    if not Path(obj).exists() or not depfile.exists():
        return True
    words = depfile.read_text().replace("\\\n", " ").split()[1:]
    newest = max(
        Path(w).stat().st_mtime if Path(w).exists() else float("inf")
        for w in [src, *words, __file__]
    )
    return newest >= Path(obj).stat().st_mtime


cpu = Pybind11Extension(
    "fastlm._cpu",
    sorted(str(p) for p in [Path("csrc/bindings.cpp"), *Path("csrc/cpu").glob("*.cpp")]),
    depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),  # a header alone starts a build
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=[*COMPILE, "-MMD"],
    extra_link_args=LINK,
)


# ---- CUDA ----------------------------------------------------------------------------------------


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


# The emulator's: lines for its faults, or all that gdb wants (three times the size)
DEBUG = "-g" if os.environ.get("FASTLM_DEBUG") == "1" else "-g1"


def kernel_command(name: str, home: Path) -> list[str]:
    """The compiler of .cu files for this extension, with its options."""
    if name == "fastlm._simt":
        return [
            *["g++", "-x", "c++", "-std=c++20", "-fPIC", "-DFASTLM_SIMT", DEBUG],
            *["-Wno-unknown-pragmas", "-fno-strict-aliasing", "-isystem", str(home / "include")],
            *COMPILE,
            *TSAN,
            "-ffp-contract=off",  # of __fmul_rn and what adds to it
            "-Wno-maybe-uninitialized",  # of lanes that a mask keeps out
            *os.environ.get("CFLAGS", "").split(),
        ]
    archs = os.environ.get("FASTLM_CUDA_ARCHS", "80;90a;100a").split(";")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    first = archs[0]
    if (
        first.isdigit()
    ):  # PTX for cards that are not listed; 90a's and 100a's would run nowhere else
        codes[0] = f"-gencode=arch=compute_{first},code=[sm_{first},compute_{first}]"
    return [
        *[str(home / "bin/nvcc"), "-std=c++20", "-O3", "-Xcompiler=-fPIC,-Wall"],
        "-Xfatbin=-compress-all",
        *["-Xcudafe=--display_error_number", "--threads=2", *codes],
    ]


class Build(build_ext):
    """pybind11's, which also compiles .cu files."""

    def build_extension(self, ext):
        # _cuda and _simt compile the same files with other options
        everything, self.build_temp = self.build_temp, str(Path(self.build_temp, ext.name))
        try:
            self.build_kernels(ext)
            super().build_extension(ext)
        finally:
            self.build_temp = everything

    def build_kernels(self, ext):
        kernels = [s for s in ext.sources if s.endswith(".cu")]
        if kernels:
            ext.sources = [s for s in ext.sources if not s.endswith(".cu")]
            command = [*kernel_command(ext.name, CUDA_HOME), "-MMD", "-Icsrc"]
            folder = Path(self.build_temp, "kernels")
            folder.mkdir(parents=True, exist_ok=True)

            def compiled(source: str) -> str:
                obj = str(folder / (Path(source).stem + ".o"))
                if self.force or needs_recompile(obj, source):
                    subprocess.run([*command, "-c", source, "-o", obj], check=True)
                return obj

            jobs = int(os.environ.get("FASTLM_BUILD_JOBS") or 0) or os.cpu_count()
            with ThreadPoolExecutor(jobs) as pool:
                ext.extra_objects = list(pool.map(compiled, kernels))
            ext.depends = [*ext.depends, *ext.extra_objects]  # else a .cu alone links nothing anew


def cuda_extension(name: str, sources: list[Path], options: list[str], link: list[str]):
    return Pybind11Extension(
        name,
        sorted(str(p) for p in [*Path("csrc/cuda").glob("*.cpp"), *sources]),
        depends=sorted(str(p) for p in Path("csrc").rglob("*.*h")),
        include_dirs=["csrc"],
        cxx_std=20,
        extra_compile_args=[*COMPILE, "-MMD", *options],
        extra_link_args=[*LINK, *link],
    )


CUDA_HOME = cuda_home()
KERNELS = sorted(Path("csrc/cuda").glob("*.cu"))
extensions = [] if os.environ.get("FASTLM_CPU") == "0" else [cpu]
if CUDA_HOME and (CUDA_HOME / "bin/nvcc").exists() and os.environ.get("FASTLM_CUDA") != "0":
    libraries = next(p for n in ("lib64", "lib") if (p := CUDA_HOME / n).exists())
    link = [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    extensions.append(cuda_extension("fastlm._cuda", KERNELS, [], link))
if CUDA_HOME and os.environ.get("FASTLM_SIMT") == "1":
    simt = ["-DFASTLM_SIMT", "-fno-strict-aliasing", DEBUG, f"-isystem{CUDA_HOME / 'include'}"]
    sources = [*KERNELS, *Path("csrc/simt").glob("*.cpp")]
    extensions.append(cuda_extension("fastlm._simt", sources, simt, []))

if __name__ == "__main__":  # tests/kernel_build.py asks for CUDA_HOME
    if sys.platform == "linux":
        ParallelCompile("FASTLM_BUILD_JOBS", needs_recompile=needs_recompile).install()

    setup(
        packages=[*find_packages(include=["fastlm", "fastlm.*"]), "fastlm.kernels"],
        package_dir={"fastlm.kernels": "kernels"},  # ./kernels installs as fastlm.kernels
        package_data={"fastlm": ["runs/report.html.jinja", "runs/parts/*.jinja"]},
        ext_modules=extensions,
        cmdclass={"build_ext": Build},
    )
