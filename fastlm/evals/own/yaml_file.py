"""A YAML file of known keys, whose faults are told by key and line. Read with PyYAML (extra
``eval``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import read_text

MAX_BYTES = 2**20  # of a task's file
MAX_DEPTH = 50  # PyYAML takes time quadratic in the levels of [ and {, and recurses


@dataclass(frozen=True)
class Yaml:
    """The mapping of a file. ``places``: the file and line of each key. ``files``: this one and
    those that it includes."""

    path: Path
    values: Mapping[str, Any]
    places: Mapping[str, str]
    files: tuple[Path, ...]

    def place(self, key: str) -> str:
        return self.places.get(key, str(self.path))

    def refuse(self, key: str, message: str) -> InputError:
        """An error that names the file, the line and the key."""
        return InputError(f"{self.place(key)}: {key}: {message}")


def read_yaml(path: Path) -> Yaml:
    """Read a mapping with text keys. InputError: no such file, no mapping, a key twice, a tag such
    as ``!function``, an alias, deep nesting, no PyYAML."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise InputError(
            f"{path}: expected the package pyyaml, which is not installed"
            " (pip install 'fastlm[eval]')"
        ) from None
    text = read_text(path, MAX_BYTES)
    loader = _loader()
    try:
        for event in yaml.parse(text, Loader=loader):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):  # a few of them can stand for gigabytes
                raise InputError(f"{path}:{line}: expected no alias, got *{event.anchor:.40}")
            tag = getattr(event, "tag", None)
            if tag and not tag.startswith("tag:yaml.org"):
                got = f"{tag} {getattr(event, 'value', '')}".strip()
                raise InputError(
                    f"{path}:{line}: expected plain values, got {got!r:.80}: Python code of a task"
                    " is not run"
                )
        node = yaml.compose(text, Loader=loader)
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{path}: expected a mapping of keys")
        places: dict[str, str] = {}
        for key, _ in node.value:
            place = f"{path}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode) or not key.value.isprintable():
                raise InputError(f"{place}: expected a key of text, got {key.value!r:.60}")
            if key.value in places:
                raise InputError(f"{place}: {key.value!r:.60}: expected once, got it again")
            places[key.value] = place
        values = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        message = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{where}: expected YAML, got: {message:.200}") from None
    except InputError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # !!int x, 9 * "1:"
        raise InputError(f"{path}: expected YAML, got: {' '.join(str(error).split())}") from None
    values = {str(key): value for key, value in values.items()}
    return Yaml(path, values, places, (path,))


@cache
def _loader() -> Any:
    """PyYAML's safe loader with a bound on nesting; dates stay texts."""
    import yaml

    class Loader(yaml.SafeLoader):
        def check_depth(self) -> None:
            if self.flow_level + len(self.indents) > MAX_DEPTH:
                problem = f"more than {MAX_DEPTH} levels of nesting"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.get_mark())

        def fetch_flow_collection_start(self, token_class: Any) -> None:
            self.check_depth()
            super().fetch_flow_collection_start(token_class)

        def add_indent(self, column: int) -> bool:
            self.check_depth()
            return super().add_indent(column)

    date = "tag:yaml.org,2002:timestamp"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != date]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader
