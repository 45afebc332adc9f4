"""Print the rows of a benchmark: a line each, then command, versions and processor, then JSON."""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def print_rows(rows: Sequence[Mapping[str, Any]], packages: Sequence[str] = ()) -> None:
    """Print what ``rows()`` of a module here returned. ``packages``: whose versions matter."""
    for row in rows:
        target = "" if row["target"] is None else f"(bar {row['target']}) "
        print(f"{row['bar']}: {row['value']} {row['unit']} {target}{row['note']}")
    versions = installed_versions(("fastlm", *packages))
    print(f"command: {' '.join(sys.argv)}; {versions}; {cpu_model()}")
    print(json.dumps(rows, ensure_ascii=False))


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    """Return the processor's name as the system gives it, "unknown" if it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(": ")[2] for line in lines if "model name" in line), "unknown")
