"""Names and messages keep to docs/glossary.md, as far as a program can check it."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# participles and pronouns, which say what happened to a value or nothing at all
WORDS = {
    "asked", "found", "given", "gone", "held", "kept", "known", "listed", "made", "named", "own",
    "place", "said", "served", "shown", "taken", "told", "wanted", "whole",
}  # fmt: skip
# fields of public results whose names an issue prescribes
CONTRACT = {("fastlm/data/near_duplicates.py", "kept")}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """Yield the modules of the package with their syntax trees."""
    paths = [*(ROOT / "fastlm").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    assert len(paths) > 300
    for path in paths:
        yield path.relative_to(ROOT), ast.parse(path.read_text("utf-8"))


def bindings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every name that a module gives to a value, a function or a class, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno
            case ast.ClassDef(name=name):
                yield name, node.lineno


def strings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the texts of a module without its docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value, node.lineno


def test_a_public_class_has_one_home():
    homes = defaultdict(list)
    for path, tree in sources():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_no_module_is_named_by_a_participle_or_a_pronoun():
    names = {str(path) for path, _ in sources() if WORDS & set(re.split(r"[/_.]", str(path)))}
    assert names == set()


def test_no_value_is_named_by_a_participle_or_a_pronoun():
    lines = [
        f"{path}:{line}: {name}"
        for path, tree in sources()
        for name, line in bindings(tree)
        if name.strip("_").lower() in WORDS and (str(path), name) not in CONTRACT
    ]
    assert lines == []


def test_errors_say_expected():
    lines = [
        f"{path}:{line}: {text}"
        for path, tree in sources()
        for text, line in strings(tree)
        if re.search(r"\bwanted\b", text)
    ]
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if re.search(r'"[^"]*\bwanted\b[^"]*"', line):
                lines.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert lines == []
