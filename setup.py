"""The build: which folders are which packages, and the pybind11 extension.

Metadata is in pyproject.toml. Environment: FASTLM_SANITIZE=address,undefined builds the extension
with those sanitizers (`make sanitize`).
"""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
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

if sanitizers := os.environ.get("FASTLM_SANITIZE"):
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

if sys.platform == "linux":
    ParallelCompile("FASTLM_BUILD_JOBS", needs_recompile=needs_recompile).install()

setup(
    packages=[*find_packages(include=["fastlm", "fastlm.*"]), "fastlm.kernels"],
    package_dir={"fastlm.kernels": "kernels"},  # ./kernels installs as fastlm.kernels
    package_data={"fastlm": ["report.html.jinja"]},
    ext_modules=[cpu],
)
