"""Fast imports of torch and of the packages that build on it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_imports() -> Iterator[None]:
    """Return a context for imports in which the garbage collector is off. Afterwards it ignores
    the imported objects.

    Modules create half a million objects that stay. The collector would visit them again and again:
    that takes a seventh of the time of ``import torch``, and as much in each later full collection.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
