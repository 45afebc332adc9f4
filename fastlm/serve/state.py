"""The state of a server's models, in a small JSON file that is replaced atomically.

It is written before a decision takes effect, so a killed server starts with the last decision.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fastlm.files import save_atomic
from fastlm.schema import read_document

MAX_DECISIONS = 50


@dataclass(frozen=True)
class ModelRef:
    """Identifies a model by its ``path`` and the ``digest`` of its files."""

    path: str
    digest: str


@dataclass(frozen=True)
class CanaryState:
    """A canary trial of ``model`` by ``metric``. ``decision``: the action of its verdict; None
    while it runs. ``secret``: the key of the hashes of conversations in the database, which does
    not contain it."""

    model: ModelRef
    experiment: str
    metric: str
    decision: str | None = None
    secret: str = ""


@dataclass(frozen=True)
class ServerState:
    """The models of a server. ``base``: the model of the command line. ``previous``: the model to
    which `fastlm rollback` returns. ``decisions``: the latest ones with their numbers, newest
    last."""

    base: str
    current: ModelRef
    previous: ModelRef | None = None
    canary: CanaryState | None = None
    decisions: list[dict[str, Any]] = field(default_factory=list)
    version: Literal[1] = 1

    def with_decision(self, action: str, **fields: Any) -> "ServerState":
        """Return the state with one more decision."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        earlier = self.decisions[1 - MAX_DECISIONS :]
        return replace(self, decisions=[*earlier, {"at": at, "action": action, **fields}])

    def save(self, path: Path) -> None:
        """Write the file. InputError: it cannot be written; the old one stays."""
        save_atomic(path, lambda part: part.write_text(json.dumps(asdict(self), indent=1), "utf-8"))


def read_state(path: Path) -> ServerState | None:
    """Read the state from a file; None: there is no file. InputError: the file has another
    format."""
    return read_document(path, ServerState, max_bytes=2**20) if path.exists() else None
