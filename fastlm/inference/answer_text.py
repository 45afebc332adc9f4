"""The text of an answer, token by token, up to a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastlm.errors import InputError

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer


def checked_stops(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise InputError(f"stop: expected strings of at least one character, got {stop!r}")
    return stops


class AnswerText:
    """The text of a row, token by token; text that may become a stop string is held back."""

    def __init__(self, tokenizer: "Tokenizer", stops: list[str]):
        self.stream, self.stops = tokenizer.stream(), stops
        self.held, self.stopped = "", False

    def push(self, token: int) -> str:
        return self._ready(self.stream.push(token))

    def flush(self) -> str:
        ready = self._ready(self.stream.flush())
        return ready if self.stopped else ready + self.held

    def _ready(self, text: str) -> str:
        ready, self.held, self.stopped = split_at_stop(self.held + text, self.stops)
        return ready


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Return (text that is certain, text that may begin a stop string, whether a stop string is
    complete).
    """
    found = [place for s in stops if (place := text.find(s)) >= 0]
    if found:
        return text[: min(found)], "", True
    keep = 0
    for s in stops:
        for n in range(min(len(s) - 1, len(text)), keep, -1):
            if text.endswith(s[:n]):
                keep = n
                break
    return text[: len(text) - keep], text[len(text) - keep :], False
