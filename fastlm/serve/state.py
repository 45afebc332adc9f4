"""What a server has decided about its models, in a small file that is replaced as a whole.

Written before a decision takes effect, so that a server that was killed starts with the last one.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fastlm.files import save_atomic
from fastlm.schema import read_document

MOST_DECISIONS = 50


@dataclass(frozen=True)
class ModelRef:
    """A model by where it is and what it is: ``path`` as it was given, ``digest`` of its files."""

    path: str
    digest: str


@dataclass(frozen=True)
class CanaryState:
    """A trial of ``model`` by ``metric``. ``decided``: its verdict's action, None while it runs.
    ``secret``: what keys the hashes of conversations in the database, which does not have it."""

    model: ModelRef
    experiment: str
    metric: str
    decided: str | None = None
    secret: str = ""


@dataclass(frozen=True)
class State:
    """``base``: the model that the server was started with. ``previous``: what `fastlm rollback`
    goes back to. ``decisions``: the last ones, newest last, each with its numbers."""

    base: str
    current: ModelRef
    previous: ModelRef | None = None
    canary: CanaryState | None = None
    decisions: list[dict[str, Any]] = field(default_factory=list)
    version: Literal[1] = 1

    def with_decision(self, action: str, **told: Any) -> "State":
        """Return the state with one more decision."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        kept = self.decisions[1 - MOST_DECISIONS :]
        return replace(self, decisions=[*kept, {"at": at, "action": action, **told}])

    def save(self, path: Path) -> None:
        """InputError: the file cannot be written; the old one stays."""
        save_atomic(path, lambda part: part.write_text(json.dumps(asdict(self), indent=1), "utf-8"))


def read_state(path: Path) -> State | None:
    """The state in a file, None if there is no file. InputError: it is none of ours."""
    return read_document(path, State, max_bytes=2**20) if path.exists() else None
