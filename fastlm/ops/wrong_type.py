"""Explain an error by the argument of the wrong type that caused it.

Types are checked only after something has failed: a check in every call would cost more than the
checks of shapes. A public function therefore needs only one ``try``, which costs nothing. Rejected:
a decorator, 40 to 100 ns per call.
"""

import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastlm.errors import InputError

# The errors that a wrong type raises at its first use: in Python, pybind11 or torch's dispatcher.
TYPE_FAILURES = (AttributeError, TypeError, RuntimeError)

_NAMES = {
    torch.Tensor: "a tensor",
    float: "a number",
    int: "an integer",
    bool: "True or False",
    str: "a string",
    types.NoneType: "None",
}
# Types that are accepted too: an integer as a number, numpy's and symbolic numbers.
_WIDER: dict[type, tuple[type, ...]] = {
    float: (numbers.Real, torch.SymInt, torch.SymFloat),
    int: (numbers.Integral, torch.SymInt),
    bool: (numbers.Integral, torch.SymBool),
}


def explain(error: Exception, op: Callable, arguments: Mapping[str, Any]) -> Exception:
    """Return an InputError for the first argument that does not have the type in `op`'s
    annotations, or `error` if all types fit."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace the code below
        return error
    for name, hint in typing.get_type_hints(op).items():
        if name == "return" or hint is typing.Never:
            continue
        hints = (hint,) if typing.get_origin(hint) is not types.UnionType else hint.__args__
        expected = [typing.get_origin(kind) or kind for kind in hints]
        value = arguments[name]
        if not any(isinstance(value, (t, *_WIDER.get(t, ()))) for t in expected):
            names = " or ".join(_NAMES.get(t, f"a {t.__name__}") for t in expected)
            short = isinstance(value, int | float | str | tuple | None) and len(repr(value)) < 40
            actual = repr(value) if short else type(value).__name__
            return InputError(f"{name}: expected {names}, got {actual}")
    return error
