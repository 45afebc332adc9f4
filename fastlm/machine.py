"""What a process runs on and which code it runs, told without importing torch."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent


def cpu_name() -> str:
    """The model's name, and its numbers: virtual machines report "AMD EPYC" for any generation."""
    try:
        with open("/proc/cpuinfo") as f:
            first = f.read().split("\n\n", 1)[0]
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", first, re.M))
    numbers = [
        f"{k.removeprefix('cpu ')} {fields[k]}" for k in ("cpu family", "model") if k in fields
    ]
    name = fields.get("model name", platform.machine()).strip()
    return f"{name} ({', '.join(numbers)})" if numbers else name


def hardware() -> dict[str, Any]:
    """CPU, cores, threads, device and versions. What only torch knows is left out where it is not
    loaded.
    """
    facts = {
        "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "python":
        platform.python_version(), "torch": importlib.metadata.version("torch"),
        "system": platform.platform(),
    }  # fmt: skip
    if (torch := sys.modules.get("torch")) is not None:
        on_gpu = torch.cuda.is_available()
        facts["threads"] = torch.get_num_threads()
        facts["device"] = torch.cuda.get_device_name() if on_gpu else "cpu"
    return facts


@lru_cache
def code() -> dict[str, str]:
    """``{"version"}`` of fastlm, and ``"commit"`` of the clone it runs from ("-dirty": with changes
    that are not committed); ``"files"``, a hash of its code, where no clean commit says it all.
    """
    from fastlm import __version__

    found = {"version": __version__}
    if here := commit():
        found["commit"] = here
    if not here or here.endswith("-dirty"):
        found["files"] = _hash_of_files()
    return found


def commit() -> str:
    """The commit of the clone this package runs from, "" if there is none or no git."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _hash_of_files() -> str:
    total = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".so") and path.is_file():
            total.update(str(path.relative_to(PACKAGE)).encode() + b"\0")
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
