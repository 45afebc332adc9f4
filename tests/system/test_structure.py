"""The structure: no import cycles; stages are defined without heavy imports."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def modules() -> dict[str, Path]:
    """The paths of all modules of the package by name."""
    paths = {}
    for folder, prefix in ((ROOT / "fastlm", "fastlm"), (ROOT / "kernels", "fastlm.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            paths[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return paths


def imports(path: Path, paths: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, also in functions; not TYPE_CHECKING ones."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    names.add(full if full in paths else child.module)
            visit(child)

    visit(ast.parse(path.read_text("utf-8")))
    return names & paths.keys()


def test_no_import_cycle_not_even_inside_functions():
    paths = modules()
    graph = {name: imports(path, paths) - {name} for name, path in paths.items()}
    assert len(graph) > 100 and graph["fastlm.model.causal_lm"]
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert order.index("fastlm.errors") < order.index("fastlm.ops") < order.index("fastlm.cli")


def test_stages_are_defined_without_torch_and_numpy():
    code = (
        "import sys, fastlm.stages, fastlm.pipeline.commands;"
        " sys.exit(bool({'torch', 'numpy'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_all_that_is_printed_goes_through_one_module():
    """`fastlm.terminal`: a text from outside must not control a terminal."""
    allowed = {"terminal.py", "evals/harness.py", "sandbox/worker.py"}
    pattern = re.compile(
        r"typer\.echo\(|click\.echo\(|rich\.console import .*Console|^\s+print\(", re.M
    )
    files = [
        p
        for p in (ROOT / "fastlm").rglob("*.py")
        if str(p.relative_to(ROOT / "fastlm")) not in allowed
    ]
    assert not [str(path) for path in files if pattern.search(path.read_text())]
