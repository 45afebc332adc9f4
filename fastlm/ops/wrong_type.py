"""One line for an argument of the wrong type.

Types are looked at only once something has failed: looking in every call would cost more than the
checks of shapes. So a public function is its contract and one ``try``, which costs nothing.
Rejected: a decorator, 40 to 100 ns a call.
"""

import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastlm.errors import InputError

# What a wrong type raises where it is first used: in Python, in pybind11, in torch's dispatcher.
FAILURES = (AttributeError, TypeError, RuntimeError)

_NAMES = {
    torch.Tensor: "a tensor",
    float: "a number",
    int: "an integer",
    bool: "True or False",
    str: "a string",
    types.NoneType: "None",
}
# What serves as well: an integer as a number, numpy's and symbolic ones.
_WIDER: dict[type, tuple[type, ...]] = {
    float: (numbers.Real, torch.SymInt, torch.SymFloat),
    int: (numbers.Integral, torch.SymInt),
    bool: (numbers.Integral, torch.SymBool),
}


def explained(error: Exception, op: Callable, arguments: Mapping[str, Any]) -> Exception:
    """InputError for the first of `arguments` that is not of the type `op` is annotated with;
    `error` where all are.
    """
    if torch.compiler.is_compiling():  # Dynamo cannot follow what stands below
        return error
    for name, hint in typing.get_type_hints(op).items():
        if name == "return":
            continue
        wanted = typing.get_args(hint) or (hint,)
        value = arguments[name]
        if not any(isinstance(value, (t, *_WIDER.get(t, ()))) for t in wanted):
            names = " or ".join(_NAMES.get(t, f"a {t.__name__}") for t in wanted)
            short = isinstance(value, int | float | str | tuple | None) and len(repr(value)) < 40
            came = repr(value) if short else type(value).__name__
            return InputError(f"{name}: wanted {names}, got {came}")
    return error
