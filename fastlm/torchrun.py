"""Read from the environment which processes torchrun started. This module imports no torch."""

import os

from fastlm.errors import InputError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them


def rank_and_world_size() -> tuple[int, int]:
    """Return rank and number of processes from torchrun's environment, (0, 1) without torchrun."""
    if not all(os.environ.get(name) for name in VARIABLES):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def node_size() -> int:
    """Return the number of processes on this machine from torchrun's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process writes and reports: rank 0, or the only one."""
    return rank_and_world_size()[0] == 0


def check_single_process(name: str, reason: str) -> None:
    """Raise InputError if torchrun started several processes."""
    size = rank_and_world_size()[1]
    if size > 1:
        raise InputError(f"{name}: expected one process, got {size} from torchrun: {reason}")
