"""The build: which extension compiles which file, and what an edit recompiles, on a small tree."""

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
ENV = {k: v for k, v in kernel_build.QUIET.items() if not k.startswith("FASTLM_")}


def test_every_source_is_compiled_where_it_belongs(monkeypatch):
    monkeypatch.chdir(ROOT)
    rooms = {str(p) for p in Path("csrc/cpu").iterdir() if any(p.glob("*.cpp"))}
    folders = {"fastlm._cpu": {"csrc", "csrc/cpu", *rooms}, "fastlm._cuda": {"csrc/cuda"}}
    folders["fastlm._simt"] = {"csrc/cuda", "csrc/simt"}
    sources = [str(p) for p in Path("csrc").rglob("*") if p.suffix in {".cpp", ".cu"}]
    assert {os.path.dirname(s) for s in sources} == set.union(*folders.values())
    for extension in kernel_build.setup_py().EXTENSIONS:
        expected = {s for s in sources if os.path.dirname(s) in folders[extension.name]}
        assert sorted(extension.sources) == sorted(expected)


def test_glu_alone_includes_glu_h():
    command = [kernel_build.setup_py().NINJA, "-f", "build/release/build.ninja", "-t", "deps"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    if "build/release/fastlm._cpu/csrc/cpu/glu.cpp.o: #deps" not in known:
        pytest.skip("not built here")
    including = [block.split(":")[0] for block in known.split("\n\n") if "csrc/cpu/glu.h" in block]
    assert including == ["build/release/fastlm._cpu/csrc/cpu/glu.cpp.o"]


@pytest.fixture
def tree(tmp_path):
    """Two ops, one header for each, one for both."""
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


def built(tree: Path, **environment: str) -> set[str]:
    """The targets that a build compiled, including "link"."""
    done = setup(tree, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^\[\d+/\d+\] fastlm._cpu: (\S+)$", done.stdout, re.MULTILINE))


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "// edited\n")


def test_an_edit_compiles_what_includes_it(tree):
    sources = {"csrc/bindings.cpp", "csrc/cpu/glu.cpp", "csrc/cpu/rope.cpp"}
    assert built(tree) == {*sources, "link"}
    assert {c["file"] for c in json.loads((tree / "compile_commands.json").read_text())} == sources

    assert not list(tree.glob("build/lib*"))  # everything in it would be in the next wheel

    (library,) = (tree / "fastlm").glob("_cpu*.so")
    times = [p.stat().st_mtime_ns for p in (tree / "build/release/build.ninja", library)]
    inode = library.stat().st_ino
    assert built(tree) == set()
    assert times == [p.stat().st_mtime_ns for p in (tree / "build/release/build.ninja", library)]
    assert inode == library.stat().st_ino

    edit(tree / "csrc/cpu/glu.h")
    assert built(tree) == {"csrc/cpu/glu.cpp", "link"}

    (tree / "csrc/cpu/rope.cpp").unlink()
    (tree / "csrc/cpu/rms_norm.cpp").write_text("")
    assert built(tree) == {"csrc/cpu/rms_norm.cpp", "link"}


def test_variants_keep_their_objects(tree):
    assert len(built(tree)) == len(built(tree, FASTLM_DEBUG="1")) == 4
    assert built(tree) == set()
    (library,) = (tree / "fastlm").glob("_cpu*.so")
    assert filecmp.cmp(library, tree / "build/release/fastlm._cpu.so", shallow=False)


def test_what_is_missing_or_does_not_compile_is_said_without_a_traceback(tree):
    done = setup(tree, CXX="no-such-compiler")
    assert done.returncode and "Traceback" not in done.stderr
    assert "expected a C++17 compiler" in done.stderr and "no-such-compiler" in done.stderr

    (tree / "csrc/cpu/glu.cpp").write_text("int glu() { return }\n")
    done = setup(tree)
    assert done.returncode and "glu.cpp:1" in done.stdout and "Traceback" not in done.stderr


def test_make_installs_anew_only_what_changes_what_is_installed(tree):
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
