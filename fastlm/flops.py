"""FLOP formulas of the ops for ``torch.utils.flop_counter.FlopCounterMode``.

FLOPs are counted as torch counts them: 2 m n k for a product, nothing is subtracted for causality
or windows, recomputation in a backward counts, and element-wise ops count 0. The formula of an op
is in the file of that op.

torch.utils.flop_counter imports Triton's runtime, which takes 0.2 to 0.3 s. So the formulas are
registered only when other code imports it.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

from torch import Tensor

_COUNTER = "torch.utils.flop_counter"
_formulas: list[tuple[Any, Callable, bool]] = []


def register(packet: Any, formula: Callable, *, raw: bool = False) -> None:
    """Register `formula`. It receives the operator's arguments, with shapes in place of tensors;
    with `raw`, the tensors themselves.
    """
    _formulas.append((packet, formula, raw))
    if _COUNTER in sys.modules and _hook not in sys.meta_path:
        _register(sys.modules[_COUNTER])


def has_values(t: Tensor) -> bool:
    """Return whether the values of t can be read: it is no meta tensor, nor under
    FakeTensorMode."""
    from torch._subclasses import FakeTensor

    return not t.is_meta and not isinstance(t, FakeTensor)


def _register(counter: Any) -> None:
    for packet, formula, raw in _formulas:
        counter.register_flop_formula(packet, get_raw=raw)(formula)
    _formulas.clear()


class _RegisterOnImport(MetaPathFinder):
    """Finds torch.utils.flop_counter as usual, and registers the formulas when it is loaded."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec


_hook = _RegisterOnImport()
if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _hook)
