"""What the registry knows about a question set before its data is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.task import Question, Task


@dataclass(frozen=True)
class TaskSpec:
    """A set of the registry.

    licence: of its data, as its authors state it; "not stated" where they do not.
    formats: templates and numbers of examples; the first is the default.
    read: (this, name, format, cache) -> the task.
    source: where the data comes from.
    free: a format that is not listed is passed to ``read``, which may refuse it.
    """

    ability: str
    licence: str
    formats: tuple[str, ...]
    read: Callable[["TaskSpec", str, str, Path], Task]
    source: str
    free: bool = False

    def load(self, name: str, format: str, cache: Path) -> Task:
        """Read the set. InputError: an unknown format, a package that cannot be fetched, damaged
        data."""
        if format and not self.free and format not in self.formats:
            raise InputError(
                f"format: expected one of {', '.join(self.formats)} for {name}, got {format!r:.80}"
            )
        return self.read(self, name, format or self.formats[0], cache)

    def task(self, name: str, format: str, questions: Sequence[Question], **options: Any) -> Task:
        return Task(name, self.ability, questions, self.source, self.licence, format, **options)
