"""The build: the files of each extension, and what is recompiled after an edit, on a small tree."""

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_build
import pytest

ROOT = kernel_build.ROOT
# Without what `make` exports: compiled_targets reads ninja's own format
IGNORED = ("FASTLM_", "NINJA_STATUS")
ENV = {k: v for k, v in kernel_build.QUIET.items() if not k.startswith(IGNORED)}


def test_every_source_is_compiled_into_its_extension(monkeypatch):
    monkeypatch.chdir(ROOT)
    cpu_folders = {str(p) for p in Path("csrc/cpu").iterdir() if any(p.glob("*.cpp"))}
    folders = {"fastlm._cpu": {"csrc", "csrc/cpu", *cpu_folders}, "fastlm._cuda": {"csrc/cuda"}}
    folders["fastlm._simt"] = {"csrc/cuda", "csrc/simt"}
    sources = [str(p) for p in Path("csrc").rglob("*") if p.suffix in {".cpp", ".cu"}]
    assert {os.path.dirname(s) for s in sources} == set.union(*folders.values())
    for extension in kernel_build.setup_py().EXTENSIONS:
        expected = {s for s in sources if os.path.dirname(s) in folders[extension.name]}
        assert sorted(extension.sources) == sorted(expected)


def test_only_glu_includes_glu_h():
    command = [kernel_build.setup_py().NINJA, "-f", "build/release/build.ninja", "-t", "deps"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    if "build/release/fastlm._cpu/csrc/cpu/glu.cpp.o: #deps" not in output:
        pytest.skip("expected a build of fastlm._cpu in build/release, got none")
    including = [block.split(":")[0] for block in output.split("\n\n") if "csrc/cpu/glu.h" in block]
    assert including == ["build/release/fastlm._cpu/csrc/cpu/glu.cpp.o"]


@pytest.fixture
def tree(tmp_path):
    """A small source tree: two ops, a header of one of them and a header of both."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    files = {
        "fastlm/__init__.py": "",
        "kernels/__init__.py": "",
        "csrc/bindings.cpp": '#include "cpu/base/rows.h"\n',
        "csrc/cpu/base/rows.h": "#pragma once\n",
        "csrc/cpu/glu.h": '#pragma once\n#include "cpu/base/rows.h"\n',
        "csrc/cpu/glu.cpp": '#include "cpu/glu.h"\nint glu() { return 1; }\n',
        "csrc/cpu/rope.cpp": '#include "cpu/base/rows.h"\nint rope() { return 1; }\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def setup(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    env = ENV | {"FASTLM_CUDA": "0"} | environment
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def compiled_targets(tree: Path, **environment: str) -> set[str]:
    """Build, and return the targets that were compiled, including "link"."""
    done = setup(tree, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^\[\d+/\d+\] fastlm._cpu: (\S+)$", done.stdout, re.MULTILINE))


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "// edited\n")


def test_an_edit_recompiles_the_files_that_include_it(tree):
    sources = {"csrc/bindings.cpp", "csrc/cpu/glu.cpp", "csrc/cpu/rope.cpp"}
    assert compiled_targets(tree) == {*sources, "link"}
    assert {c["file"] for c in json.loads((tree / "compile_commands.json").read_text())} == sources

    assert not list(tree.glob("build/lib*"))  # the next wheel would contain everything in it

    (library,) = (tree / "fastlm").glob("_cpu*.so")
    times = [p.stat().st_mtime_ns for p in (tree / "build/release/build.ninja", library)]
    inode = library.stat().st_ino
    assert compiled_targets(tree) == set()
    assert times == [p.stat().st_mtime_ns for p in (tree / "build/release/build.ninja", library)]
    assert inode == library.stat().st_ino

    edit(tree / "csrc/cpu/glu.h")
    assert compiled_targets(tree) == {"csrc/cpu/glu.cpp", "link"}

    (tree / "csrc/cpu/rope.cpp").unlink()
    (tree / "csrc/cpu/rms_norm.cpp").write_text("")
    assert compiled_targets(tree) == {"csrc/cpu/rms_norm.cpp", "link"}


def test_variants_keep_their_objects(tree):
    assert len(compiled_targets(tree)) == len(compiled_targets(tree, FASTLM_DEBUG="1")) == 4
    assert compiled_targets(tree) == set()
    (library,) = (tree / "fastlm").glob("_cpu*.so")
    assert filecmp.cmp(library, tree / "build/release/fastlm._cpu.so", shallow=False)


def test_a_missing_compiler_or_a_compile_error_is_reported_without_a_traceback(tree):
    done = setup(tree, CXX="no-such-compiler")
    assert done.returncode and "Traceback" not in done.stderr
    assert "expected a C++17 compiler" in done.stderr and "no-such-compiler" in done.stderr

    (tree / "csrc/cpu/glu.cpp").write_text("int glu() { return }\n")
    done = setup(tree)
    assert done.returncode and "glu.cpp:1" in done.stdout and "Traceback" not in done.stderr


def test_make_installs_again_only_after_a_change_of_the_installation(tree):
    def commands(target: str) -> str:
        done = subprocess.run(
            ["make", "-n", target], cwd=tree, env=ENV, capture_output=True, text=True, check=True
        )
        return done.stdout

    (tree / ".venv").mkdir()
    (tree / ".venv/ready").touch()
    edit(tree / "csrc/cpu/glu.h")
    for target in ("setup", "quick", "test", "bench", "demo"):
        assert "build_ext" in commands(target) and "pip" not in commands(target)

    edit(tree / "pyproject.toml")
    assert "--editable" in commands("quick")
