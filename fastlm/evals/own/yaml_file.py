"""A YAML file of known keys, whose faults are told by key and line. Read with PyYAML (extra
``eval``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.errors import InputError

MOST_BYTES = 2**20  # of a task's file


@dataclass(frozen=True)
class Yaml:
    """The mapping of a file. ``places``: the file and line of each key."""

    path: Path
    values: Mapping[str, Any]
    places: Mapping[str, str]

    def refuse(self, key: str, told: str) -> InputError:
        """An error that names the file, the line and the key."""
        return InputError(f"{self.places.get(key, self.path)}: {key}: {told}")


def read_yaml(path: Path) -> Yaml:
    """Read a mapping with text keys. InputError: no such file, no mapping, a key twice, a tag such
    as ``!function``, an alias, no PyYAML."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise InputError(
            f"{path}: wanted the package pyyaml, which is not installed"
            " (pip install 'fastlm[eval]')"
        ) from None
    try:
        data = path.read_bytes()
        if len(data) > MOST_BYTES:
            raise InputError(f"{path}: wanted at most {MOST_BYTES:,} bytes, got {len(data):,}")
        text = data.decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: wanted UTF-8 text: {error}") from None
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):  # a few of them can stand for gigabytes
                raise InputError(f"{path}, line {line}: wanted no alias, got *{event.anchor:.40}")
            tag = getattr(event, "tag", None)
            if tag and not tag.startswith("tag:yaml.org"):
                got = f"{tag} {getattr(event, 'value', '')}".strip()
                raise InputError(
                    f"{path}, line {line}: wanted plain values, got {got:.80}: Python code of a"
                    " task is not run"
                )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{path}: wanted a mapping of keys")
        places: dict[str, str] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in places:
                raise InputError(f"{path}, line {line}: {key.value}: wanted once, got it again")
            places[key.value] = f"{path}, line {line}"
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        told = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{path}{where}: wanted YAML, got: {told:.200}") from None
    return Yaml(path, values, places)
