"""Schemas of files that fastlm reads and that anybody may have written. Each kind of row or
document has one schema, a dataclass or a `TypedDict`, which pydantic checks.

    class Score(TypedDict):
        value: Finite
        n: Count

    read_document(path, Score)            # {"value": 0.5, "n": 3}
    for line, row in read_lines(path, Score): ...

Other content raises InputError, ``file:line: field: expected X, got Y``. The parser's limits come
before the schema: regular files only (a pipe would block), a maximum of bytes, 200 levels of
nesting, UTF-8 without lone surrogates, integers of at most 4,300 digits.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Interval, MinLen, Predicate

from fastlm.errors import InputError, show
from fastlm.files import MAX_JSON_BYTES, open_regular, read_text, reason

T = TypeVar("T")
Extra = Literal["forbid", "ignore", "allow"]
Field = Sequence[int | str]  # the path of a field: keys and indices

MAX_LINE_BYTES = 2**26  # of a row: a record of 100 answers of 4,096 tokens has 2 MB
MAX_TOML_BYTES = 2**18
MAX_DOTS = 1000  # in a line of TOML: tomllib takes time quadratic in the parts of a key
_HUGE = re.compile(r"0[box][\da-fA-F_]{65}")  # an integer beyond TOML's 64 bits


def is_inside(path: str) -> bool:
    """Return whether a relative path stays below its folder, and is valid for the system."""
    return "\0" not in path and not path.startswith("/") and ".." not in path.split("/")


Finite = Annotated[float, Predicate(math.isfinite)]
Name = Annotated[str, MinLen(1), Predicate(str.isprintable)]
RelativePath = Annotated[str, MinLen(1), Predicate(is_inside)]
Count = Annotated[int, Interval(ge=0, le=2**63 - 1)]


def read_document(
    path: str | Path, schema: type[T], *, extra: Extra = "ignore", max_bytes: int = MAX_JSON_BYTES
) -> T:
    """Read the JSON in ``path`` as ``schema``. ``extra``: how to treat keys that the schema lacks.
    InputError: unreadable, too large, not JSON, or a value that the schema refuses.
    """
    return parse(read_text(path, max_bytes), schema, str(path), extra=extra)


def read_lines(
    path: str | Path, schema: type[T], *, extra: Extra = "ignore", max_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, T]]:
    """Yield (line number, row) of JSON lines; empty lines are skipped. InputError as in
    `read_document`; ``max_bytes`` bounds a line.
    """
    try:
        with open_regular(path) as file:
            number = 0
            while line := file.readline(max_bytes + 1):
                number += 1
                if len(line) > max_bytes:
                    raise InputError(
                        f"{path}:{number}: expected at most {max_bytes:,} bytes, got more"
                    )
                if line.strip():
                    yield number, parse(line, schema, f"{path}:{number}", extra=extra)
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {reason(error)}") from error


def parse(data: str | bytes, schema: type[T], location: str, *, extra: Extra = "ignore") -> T:
    """Return the JSON ``data`` as ``schema``. ``location`` precedes the field in messages, without
    a colon where it ends with a dot.
    """
    from pydantic import ValidationError
    from pydantic_core import from_json

    try:
        return _adapter(schema).validate_json(data, strict=True, extra=extra)
    except ValidationError as error:
        first, *_ = error.errors(include_url=False, include_input=False)
        if first["type"] == "json_invalid":
            raise InputError(_not_json(location, first["msg"])) from None
        if first["type"] == "value_error":  # of the schema's own checks
            raise InputError(_join(location, str(first.get("ctx", {}).get("error")))) from None
        path, message, _ = first_error(error, from_json(data))
        text = f"{_join(location, field_name(path))}: {message}"
        raise InputError(" ".join(text.split()).removeprefix(": ")) from None


def validate(value: Any, schema: type[T], location: str, *, extra: Extra = "ignore") -> T:
    """Return ``value``, from a database, TOML or YAML, as ``schema``, by the rules of JSON."""
    try:
        data = json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        message = f"expected values of JSON, got: {reason(error)}"
        raise InputError(f"{location.removesuffix('.')}: {message}".removeprefix(": ")) from None
    return parse(data, schema, location, extra=extra)


def read_toml(path: str | Path, max_bytes: int = MAX_TOML_BYTES) -> tuple[dict[str, Any], str]:
    """Return the table of a TOML file, and its text. InputError: unreadable, too large, no TOML."""
    text = read_text(path, max_bytes)
    return parse_toml(text, str(path)), text


def parse_toml(text: str, location: str) -> dict[str, Any]:
    """Return the table of ``text``. InputError: no TOML, nested too deeply."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > MAX_DOTS:
            raise InputError(f"{location}:{number}: expected at most {MAX_DOTS:,} dots, got more")
        if huge := _HUGE.search(line):
            raise InputError(
                f"{location}:{number}: expected at most 64 bits, got {huge[0][:20]}..."
            )
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{location}: expected fewer levels of nesting, got more") from None
    except ValueError as error:
        message, _, position = str(error).rpartition(" (at ")
        line = position.removeprefix("line ").partition(",")[0]
        if not line.isdigit():
            line = str(max(1, len(text.splitlines()))) if position else ""
        position = f"{location}:{line}" if line else location
        raise InputError(f"{position}: expected TOML, got: {message or error}") from None


@cache
def _adapter(schema: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _not_json(location: str, message: str) -> str:
    """Return pydantic's "Invalid JSON: REASON at line 1 column 5" with the line after the file."""
    if "recursion limit" in message:
        return f"{location}: expected at most 200 levels of nesting, got more"
    reason, _, position = message.removeprefix("Invalid JSON: ").rpartition(" at line ")
    line = position.partition(" ")[0]
    if line.isdigit() and not location.rpartition(":")[2].isdigit():
        location = f"{location}:{line}"
    return f"{location}: expected JSON, got: {reason or message}"


def _join(location: str, text: str) -> str:
    if not location or not text:
        return location.removesuffix(".") or text
    return f"{location}{text}" if location.endswith(".") else f"{location}: {text}"


def field_name(path: Field) -> str:
    """Return a field's path as text: ``messages[0].content``."""
    parts = (f"[{p}]" if isinstance(p, int) else f".{_key(p)}" for p in path)
    return "".join(parts).removeprefix(".")


def first_error(error: Any, value: Any) -> tuple[Field, str, BaseException | None]:
    """Return the path of the first field of ``value`` that pydantic's ``error`` refuses, "expected
    X, got Y", and the exception of a validator. Unknown fields come first, missing fields last. Of
    a union, the branch that matches furthest counts.
    """
    errors = error.errors(include_url=False)
    errors.sort(key=lambda e: {"extra_forbidden": 0, "missing": 2}.get(e["type"], 1))
    paths = [_path(e, value) for e in errors]
    start = paths[0]
    deepest = max((p for p in paths if p[: len(start)] == start), key=len)
    same = [e for e, path in zip(errors, paths) if path == deepest]
    expected = " or ".join(dict.fromkeys(_expected(e) for e in same))
    got, tag = same[0]["input"], _tag(same[0])
    missing = same[0]["type"] == "missing" or (tag and tag not in got)
    text = "nothing" if missing else show(got[tag] if tag else got)[:80]
    return deepest, f"expected {expected}, got {text}", same[0].get("ctx", {}).get("error")


def _tag(error: Any) -> str | None:
    """Return the field by which pydantic could not select a type of a union, or None."""
    name = error.get("ctx", {}).get("discriminator", "")
    return name.strip("'") if name.startswith("'") else None


def _path(error: Any, value: Any) -> list[int | str]:
    """Return the part of an error's location that is in the value. Pydantic adds the names of a
    union's types, and "[key]".
    """
    path: list[int | str] = []
    for part in error["loc"]:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        path.append(part)
    if tag := _tag(error):
        return [*path, tag]
    return [*path, error["loc"][-1]] if error["type"] == "missing" else path


def _key(part: str) -> str:
    return part if re.fullmatch(r"[\w-]{1,64}", part) else show(part)[:60]


def _expected(error: Any) -> str:
    phrases = {
        "missing": "this field", "extra_forbidden": "no such field",
        "unexpected_keyword_argument": "no such field", "int_type": "a whole number",
        "float_type": "a number", "bool_type": "true or false", "list_type": "an array",
        "tuple_type": "an array", "dict_type": "an object", "union_tag_not_found": "this field",
        "model_attributes_type": "an object",
        "Predicate 'isfinite' failed": "a finite number",
        "Predicate 'str.isprintable' failed": "one printable line",
        "Predicate 'str.isdigit' failed": "digits",
        "Predicate 'is_inside' failed": "a path below its folder",
    }  # fmt: skip
    if error["type"] == "union_tag_invalid":
        return f"one of {error['ctx']['expected_tags']}"
    message = error["msg"].partition(" after validation")[0]
    message = message.replace("String should match pattern", "a text that matches")
    phrase = re.sub(r"^\w+ should (be|have) ", "", message).replace("a valid ", "a ")
    return phrases.get(error["type"]) or phrases.get(message, phrase)
