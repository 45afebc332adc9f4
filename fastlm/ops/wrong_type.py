"""A one-line error for an argument of the wrong type.

Types are checked only after something has failed: a check in every call would cost more than the
checks of shapes. So a public function is its contract and one ``try``, which costs nothing.
Rejected: a decorator, 40 to 100 ns per call.
"""

import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastlm.errors import InputError

# What a wrong type raises at its first use: in Python, in pybind11 or in torch's dispatcher.
FAILURES = (AttributeError, TypeError, RuntimeError)

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


def explained(error: Exception, op: Callable, arguments: Mapping[str, Any]) -> Exception:
    """An InputError for the first of `arguments` whose type is not the one in `op`'s annotations,
    or `error` if all types fit.
    """
    if torch.compiler.is_compiling():  # Dynamo cannot trace the code below
        return error
    for name, hint in typing.get_type_hints(op).items():
        if name == "return" or hint is typing.Never:
            continue
        kinds = (hint,) if typing.get_origin(hint) is not types.UnionType else hint.__args__
        wanted = [typing.get_origin(kind) or kind for kind in kinds]
        value = arguments[name]
        if not any(isinstance(value, (t, *_WIDER.get(t, ()))) for t in wanted):
            names = " or ".join(_NAMES.get(t, f"a {t.__name__}") for t in wanted)
            short = isinstance(value, int | float | str | tuple | None) and len(repr(value)) < 40
            came = repr(value) if short else type(value).__name__
            return InputError(f"{name}: expected {names}, got {came}")
    return error
