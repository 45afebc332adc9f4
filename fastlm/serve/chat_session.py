"""A conversation with a chat model, for `fastlm chat`."""

from collections.abc import Callable
from typing import Any

from fastlm.errors import InputError
from fastlm.inference.requests import Completion
from fastlm.serve.text_generator import TextGenerator


class ChatSession:
    """Holds the messages of a conversation. When the context is full, the session drops the oldest
    turns, but never the system message.
    """

    def __init__(
        self, generator: TextGenerator, *, system: str | None = None, max_new_tokens: int = 512
    ):
        if generator.tokenizer.chat_template is None:
            raise InputError(
                "model: expected a chat model, this one has no chat template"
                " (fastlm generate continues text)"
            )
        self.generator, self.max_new_tokens = generator, max_new_tokens
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Drop all turns; the system message stays."""
        self.turns = []

    def reply(self, text: str, on_piece: Callable[[str], Any], **options: Any) -> Completion:
        """Answer ``text``; call ``on_piece`` with each piece of the answer as it arrives.

        KeyboardInterrupt: the text so far becomes a turn of the conversation.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        limit, encode = self.generator.context_limit, self.generator.tokenizer.encode_chat
        budget = limit - min(self.max_new_tokens, limit // 2)
        while len(ids := encode(self.system + turns)) > budget and len(turns) > 1:
            turns = turns[2:]
        pieces: list[str] = []

        def add_piece(_: int, piece: str) -> None:
            pieces.append(piece)
            on_piece(piece)

        try:
            (completion,) = self.generator.generate(
                [ids], add_piece, max_new_tokens=self.max_new_tokens, **options
            )
        except KeyboardInterrupt:
            if pieces:
                self.turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]
            raise
        self.turns = [*turns, {"role": "assistant", "content": completion.text}]
        return completion
