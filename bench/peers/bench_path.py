"""Import this before a module of bench/, the folder above, which it puts on the module path."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
