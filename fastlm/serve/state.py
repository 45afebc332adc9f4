"""What a server has decided about its models, in a small file that is replaced as a whole.

Written before a decision takes effect, so that a server that was killed starts with the last one.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import read_json, save_atomic

VERSION = 1
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

    def with_decision(self, action: str, **told: Any) -> "State":
        """Return the state with one more decision."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        kept = self.decisions[1 - MOST_DECISIONS :]
        return replace(self, decisions=[*kept, {"at": at, "action": action, **told}])

    def save(self, path: Path) -> None:
        """InputError: the file cannot be written; the old one stays."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1)
        save_atomic(path, lambda part: part.write_text(text, "utf-8"))


def read_state(path: Path) -> State | None:
    """The state in a file, None if there is no file. InputError: it is none of ours."""
    if not path.exists():
        return None
    given = read_json(path, 2**20)
    try:
        if given["version"] != VERSION:
            raise KeyError("version")
        previous, canary = given["previous"], given["canary"]
        return State(
            str(given["base"]),
            ModelRef(**given["current"]),
            None if previous is None else ModelRef(**previous),
            None
            if canary is None
            else CanaryState(**{**canary, "model": ModelRef(**canary["model"])}),
            list(given["decisions"]),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: wanted a state file of `fastlm serve`, got {error}") from None
