"""Values of a TOML or JSON file as a dataclass, whose fields are the schema. The error for an
unknown key names the nearest known one; the error for a wrong type names both types.
"""

import contextlib
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fastlm.errors import InputError, show

T = TypeVar("T")


def check_unicode(text: str, where: str) -> None:
    """Raise InputError if UTF-8 cannot encode ``text``, which has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: wanted valid Unicode, got a lone surrogate at {error.start}"
        ) from None


def build(cls: type[T], table: Any, where: str = "") -> T:
    """Build ``cls``, a dataclass, from a mapping of its fields. ``where`` precedes their names in
    messages."""
    if not isinstance(table, Mapping):
        raise InputError(f"{where.removesuffix('.')}: wanted a table, got {_name(type(table))}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        if key not in known:
            raise InputError(unknown(where + key, key, known))
        values[key] = convert(value, hints[key], where + key)
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{where}{name}: wanted, is missing")
    return cls(**values)


def check(table: Any, hints: Mapping[str, Any], where: str) -> None:
    """Raise InputError unless ``table`` is a mapping with all keys of ``hints``, of their types.
    Floats need not be finite here: a result may be NaN, an option may not."""
    if not isinstance(table, Mapping):
        raise InputError(f"{where}: wanted a table, got {_name(type(table))}")
    for key, hint in hints.items():
        if key not in table:
            raise InputError(f"{where}.{key}: wanted, is missing")
        if hint is not float or not isinstance(table[key], float):
            convert(table[key], hint, f"{where}.{key}")


def unknown(full: str, key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key[:80], known, n=1, cutoff=0.0)  # quadratic in its length
    return f"{full}: unknown key; the nearest known one is {near[0]!r}"


def convert(value: Any, hint: Any, where: str) -> Any:
    """Convert ``value`` to ``hint``. Integers also serve as floats, arrays become tuples."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        (inner,) = (a for a in args if a is not NoneType)  # only X | None is used
        return None if value is None else convert(value, inner, where)
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(hint, value, where + ".")  # type: ignore[arg-type]
    elif origin is tuple:
        if isinstance(value, list):
            if args[-1] is not Ellipsis and len(value) != len(args):
                raise InputError(f"{where}: wanted {len(args)} values, got {len(value)}")
            kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
            return tuple(
                convert(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds))
            )
    elif origin is list:
        if isinstance(value, list):
            return [convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
    elif origin is dict:
        if isinstance(value, Mapping):
            return {key: convert(item, args[1], f"{where}.{key}") for key, item in value.items()}
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                if math.isfinite(value):
                    return float(value)
    elif type(value) is hint:
        return value
    raise InputError(f"{where}: wanted {_name(hint)}, got {_name(type(value))} {show(value)}")


def _name(hint: Any) -> str:
    if is_dataclass(hint) or hint is dict or get_origin(hint) is dict:
        return "a table"
    if get_origin(hint) in (tuple, list) or hint is list:
        return "an array"
    names = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        NoneType: "nothing",
    }
    return names.get(hint, str(hint))
