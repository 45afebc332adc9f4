"""Read prompts to answer: of a row, what `fastlm.data.preferences.prompt_of` takes for the prompt.

Whatever else a row holds ("answer", ...) is handed to the reward function.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.data.conversations import Message, Rows, read_examples, said
from fastlm.data.preferences import prompt_of
from fastlm.sources.rows import ignore


@dataclass(frozen=True, slots=True)
class Prompt:
    """``messages``: the last one is a user's or a tool's. ``row``: as it was read. ``place``: file
    and line, for error messages.
    """

    messages: list[Message]
    row: Mapping[str, Any]
    tools: list[Any] | None = None
    place: str = ""

    def key(self) -> str:
        """The prompt as text: equal for equal prompts."""
        return json.dumps(said(self.messages), ensure_ascii=False, sort_keys=True)


def read_prompts(
    sources: Sequence[str],
    *,
    cache: Path,
    skip_bad: bool = False,
    rows: Rows | None = None,
    tell: Callable[[str], None] = ignore,
) -> Iterator[Prompt]:
    """Yield the prompts of all sources, in order (`fastlm.data.conversations.read_examples`)."""

    def read(row: Any, place: str) -> Prompt:
        asked = prompt_of(row, place)
        return Prompt(asked.prompt, row, asked.tools, place)

    return read_examples(sources, read, cache=cache, skip_bad=skip_bad, rows=rows, tell=tell)
