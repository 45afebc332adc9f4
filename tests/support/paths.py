"""Paths of the repository and of its tests."""

import os
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
GATES = TESTS / "gates"
ROOT = TESTS.parent
# for a child process that imports what the tests share, as pytest's `pythonpath` does
PYTHONPATH = os.pathsep.join(str(TESTS / tier) for tier in ("support", "unit", "kernels", "system"))
