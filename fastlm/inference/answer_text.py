"""The text of an answer, token by token, up to a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastlm.errors import InputError

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer


def check_stop_strings(stop: str | Sequence[str]) -> list[str]:
    """Return ``stop`` as a list. InputError: an empty string, or no string."""
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise InputError(f"stop: expected strings of at least one character, got {stop!r}")
    return stops


class AnswerText:
    """The text of an answer, token by token; text that may become a stop string is buffered."""

    def __init__(self, tokenizer: "Tokenizer", stops: list[str]):
        self.stream, self.stops = tokenizer.stream(), stops
        self.buffer, self.stopped = "", False

    def push(self, token: int) -> str:
        """Add a token. Return the text that is certain now."""
        return self._take_ready(self.stream.push(token))

    def flush(self) -> str:
        """Return the rest of the text, at the end of the answer."""
        ready = self._take_ready(self.stream.flush())
        return ready if self.stopped else ready + self.buffer

    def _take_ready(self, text: str) -> str:
        ready, self.buffer, self.stopped = split_at_stop(self.buffer + text, self.stops)
        return ready


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Return the text that is certain, the text that may begin a stop string, and whether a stop
    string is complete.
    """
    positions = [position for s in stops if (position := text.find(s)) >= 0]
    if positions:
        return text[: min(positions)], "", True
    buffered = 0
    for s in stops:
        for n in range(min(len(s) - 1, len(text)), buffered, -1):
            if text.endswith(s[:n]):
                buffered = n
                break
    return text[: len(text) - buffered], text[len(text) - buffered :], False
