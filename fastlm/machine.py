"""The hardware and the code version of a process, without importing torch."""

import contextlib
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
    """Return the name of the CPU with its family and model numbers, since virtual machines report
    "AMD EPYC" for every generation."""
    try:
        with open("/proc/cpuinfo") as f:
            first_cpu = f.read().split("\n\n", 1)[0]
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", first_cpu, re.M))
    numbers = [
        f"{k.removeprefix('cpu ')} {fields[k]}" for k in ("cpu family", "model") if k in fields
    ]
    name = fields.get("model name", platform.machine()).strip()
    return f"{name} ({', '.join(numbers)})" if numbers else name


def hardware() -> dict[str, Any]:
    """Return CPU, cores, threads, device and versions. Without torch loaded, threads and device are
    left out.
    """
    facts = {
        "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "python":
        platform.python_version(), "torch": importlib.metadata.version("torch"),
        "system": platform.platform(),
    }  # fmt: skip
    if (torch := sys.modules.get("torch")) is not None:
        has_gpu = torch.cuda.is_available()
        facts["threads"] = torch.get_num_threads()
        facts["device"] = torch.cuda.get_device_name() if has_gpu else "cpu"
    return facts


@lru_cache
def code_version() -> dict[str, str]:
    """Return the ``"version"`` of fastlm and the ``"commit"`` of its clone ("-dirty": with
    uncommitted changes). Without a clean commit, ``"files"`` is a hash of the code.
    """
    from fastlm import __version__

    version = {"version": __version__}
    if commit := git_commit():
        version["commit"] = commit
    if not commit or commit.endswith("-dirty"):
        version["files"] = _hash_files()
    return version


def git_commit() -> str:
    """Return the commit of the clone that this package runs from, or "" without clone or git."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _hash_files() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".so") and path.is_file():
            digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def total_memory() -> int:
    """Return the bytes of memory of this machine, or the limit of its container."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdigit() else memory


def available_memory() -> int | None:
    """Return the bytes that this process may still allocate on the machine or in its container.
    None: unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        meminfo = {line.split(":")[0]: line.split()[1] for line in lines}
        free = int(meminfo["MemAvailable"]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        free = min(free, limit - used + files)
    return free
