"""Tests of schemas: an error names file, line and field."""

import os
from dataclasses import dataclass, field
from typing import NotRequired

import pytest
from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.schema import (
    Count,
    Finite,
    parse,
    parse_toml,
    read_document,
    read_lines,
    read_toml,
    validate,
)


class Row(TypedDict):
    value: Finite
    n: Count
    names: NotRequired[str | list[str]]


@dataclass
class Table:
    title: str
    rows: list[Row] = field(default_factory=list)
    pair: tuple[str, int] | None = None


def row(text):
    return f'{{"title": "", "rows": [{text}]}}'


def test_what_fits_is_read():
    table = parse(
        '{"title": "a", "rows": [{"value": 1, "n": 2, "other": 3}], "pair": ["x", 1]}', Table, "f"
    )
    assert table == Table("a", [{"value": 1.0, "n": 2}], ("x", 1))
    assert validate({"title": "a", "pair": ("x", 1)}, Table, "f").pair == ("x", 1)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("[]", "f: expected an object, got []"),
        ("{}", "f: title: expected this field, got nothing"),
        ('{"title": 1}', "f: title: expected a string, got 1"),
        ('{"title": "", "rows": {}}', "f: rows: expected an array, got {}"),
        (row('{"value": 1}'), "f: rows[0].n: expected this field, got nothing"),
        (row('{"value": NaN, "n": 1}'), "f: rows[0].value: expected a finite number, got nan"),
        (row('{"value": 1, "n": true}'), "f: rows[0].n: expected a whole number, got True"),
        (row('{"value": 1, "n": 1, "names": 5}'),
         "f: rows[0].names: expected a string or an array, got 5"),
        (row('{"value": 1, "n": 1, "names": [5]}'),
         "f: rows[0].names[0]: expected a string, got 5"),
        ('{"title": "", "pair": ["x"]}', "f: pair[1]: expected this field, got nothing"),
        ('{"title": "",\n "rows": }', "f:2: expected JSON, got: expected value"),
        ('{"title": "\\ud800"}', "f:1: expected JSON, got: unexpected end of hex escape"),
        ("9" * 5000, "f:1: expected JSON, got: number out of range"),
        ("[" * 100_000, "f: expected at most 200 levels of nesting, got more"),
        ("", "f:1: expected JSON, got: EOF while parsing a value"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(text, refusal):
    with pytest.raises(InputError) as refused:
        parse(text, Table, "f")
    assert str(refused.value) == refusal


def test_unknown_fields_are_refused_where_people_write_the_file():
    with pytest.raises(InputError, match=r"f: titel: expected no such field, got 'b'"):
        parse('{"title": "a", "titel": "b"}', Table, "f", extra="forbid")


@pytest.mark.parametrize("value", [{1: object()}, {"title": "\ud800"}, {("a",): 1}])
def test_values_that_json_lacks(value):
    with pytest.raises(InputError, match=r"^f: |^f:1: "):
        validate(value, Table, "f")
    deep = value = {}
    for _ in range(5000):
        deep["a"] = deep = {}
    with pytest.raises(InputError, match=r"^f: expected values of JSON"):
        validate(value, Table, "f")


def test_lines_are_numbered_and_bounded(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"value": 1, "n": 1}\n\n{"value": 2, "n": "x"}\n')
    rows = read_lines(path, Row)
    assert next(rows) == (1, {"value": 1.0, "n": 1})
    with pytest.raises(InputError, match=r"rows.jsonl:3: n: expected a whole number, got 'x'"):
        next(rows)
    path.write_bytes(b'{"value": 1, "n": 1}\n\xff')
    with pytest.raises(InputError, match=r"rows.jsonl:2: expected JSON"):
        list(read_lines(path, Row))
    with pytest.raises(InputError, match=r"rows.jsonl:1: expected at most 5 bytes"):
        list(read_lines(path, Row, max_bytes=5))
    with pytest.raises(InputError, match="expected at most 5 bytes"):
        read_document(path, Row, max_bytes=5)


def test_pipes_devices_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none", "/dev/zero"):
        for read in (read_document, lambda *a: list(read_lines(*a)), lambda p, _: read_toml(p)):
            with pytest.raises(InputError):
                read(path, Row)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("a = 1\nb = [1", "f:2: expected TOML, got: Unclosed array"),
        ("a = 1\n\nb = ?", "f:3: expected TOML, got: Invalid value"),
        ("a = " + "[" * 20_000, "f: expected fewer levels of nesting"),
        ("a.\n" + "a." * 100_000 + "a = 1", "f:2: expected at most 1,000 dots, got more"),
        ("a = " + "9" * 5000, "f:1: expected TOML, got: Exceeds the limit"),
        ("a = 0x" + "f" * 5000, "f:1: expected at most 64 bits"),
    ],
)  # fmt: skip
def test_toml_is_bounded_before_it_is_read(text, refusal):
    with pytest.raises(InputError) as refused:
        parse_toml(text, "f")
    assert str(refused.value).startswith(refusal)
