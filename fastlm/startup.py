"""Imports of torch and what builds on it, as fast as they can be made."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Import without the garbage collector, and keep it off what was imported from then on.

    Modules make half a million objects that stay. The collector looks at them again and again: a
    seventh of the time of ``import torch``, and as much in each full collection later.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
