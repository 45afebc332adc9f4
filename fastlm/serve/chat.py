"""Write text with a model and its tokenizer: one text, or a conversation. The command line is a
thin shell around this module.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.errors import InputError
from fastlm.inference.answer_text import checked_stops
from fastlm.inference.block_manager import PAGE, page_count
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Piece, Request, Result
from fastlm.inference.sampling import Sampling, check_seed
from fastlm.model.generation import Generated, generate_texts
from fastlm.model.load import load_model

if TYPE_CHECKING:
    pass


class Speed:
    """How long one generation took; ``token`` is called at each new token."""

    def __init__(self, prompts: Sequence[Sequence[int]]):
        self.prompt_tokens, self.rows = sum(map(len, prompts)), len(prompts)
        self.new_tokens = 0
        self.began = self.first = self.last = time.perf_counter()

    def token(self, row: int, token: int) -> None:
        self.last = time.perf_counter()
        if self.new_tokens < self.rows:  # all rows get their first token in one step
            self.first = self.last
        self.new_tokens += 1

    def figures(self) -> dict[str, float | int]:
        """Return times and rates. Rates are of all rows together; decoding is all but each row's
        first token. A rate is missing where nothing was measured."""
        prompt, decode = self.first - self.began, self.last - self.first
        decoded = self.new_tokens - self.rows
        return {
            "prompt_tokens": self.prompt_tokens,
            "seconds_to_first_token": prompt,
            **({"prompt_tokens_per_second": self.prompt_tokens / prompt} if prompt else {}),
            "new_tokens": self.new_tokens,
            **({"decode_tokens_per_second": decoded / decode} if decode and decoded > 0 else {}),
        }

    def __str__(self) -> str:
        f = self.figures()
        prompt = f"prompt {f['prompt_tokens']:,} tokens"
        if not self.new_tokens:
            return f"{prompt}, no token written"
        decode = f.get("decode_tokens_per_second")
        return (
            f"{prompt}, {f['seconds_to_first_token']:.2f} s to the first token"
            f" ({f['prompt_tokens_per_second']:,.0f} tokens/s);"
            f" {f['new_tokens']:,} new" + (f", {decode:,.0f} tokens/s" if decode else "")
        )


class Writer:
    """A model and its tokenizer from ``path``, or from a package: ``model:smollm2``.

    It writes through an engine, so that its texts are those of `fastlm serve`. Where activations
    are rounded to 8 bits, another order of sums soon ends in another text.
    """

    def __init__(self, path: str | Path, act_bits: int | None = None):
        self.model, self.tokenizer = load_model(path, act_bits)
        self._engine: Engine | None = None

    def prompt_ids(self, prompt: str, *, raw: bool = False) -> list[int]:
        """Encode the prompt: through the chat template as a user's message, or unchanged if ``raw``
        or without a template.
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
        prompts: Sequence[Sequence[int]],
        piece: Callable[[int, str], Any] = lambda row, text: None,
        *,
        max_new_tokens: int,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> list[Generated]:
        """Continue each of ``prompts`` until a stop token or string, all in one batch. ``piece`` is
        called with (row, text) as text arrives; ``self.speed`` records the times.

        ``sampling``: as for `fastlm.inference.sampling.Sampling`.
        """
        for ids in prompts:
            if len(ids) >= self.context_limit:
                raise InputError(
                    f"prompt: wanted fewer than the model's {self.context_limit} tokens of context,"
                    f" got {len(ids)}"
                )
        check_seed(seed)
        self.speed = Speed(prompts)
        if self.model.model.by_length:  # an engine has the frequencies of one length for all
            return generate_texts(
                self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens,
                sampling=Sampling(**sampling), seed=seed, stop=stop, on_text=piece,
                on_token=self.speed.token,
            )  # fmt: skip
        stops = tuple(checked_stops(stop))
        requests = [
            Request(
                ids, max_new_tokens, Sampling(**sampling),
                seed=None if seed is None else (seed + row) % 2**63, stop=stops,
            )
            for row, ids in enumerate(prompts)
        ]  # fmt: skip

        def take(row: int, part: Piece) -> None:
            for token in part.tokens:
                self.speed.token(row, token)
            if part.text:
                piece(row, part.text)

        results = self._engine_for(requests).generate(requests, on_piece=take)
        if failed := [result.error for result in results if result.error]:
            raise InputError(f"model: expected one that answers, got: {failed[0]}")
        return [
            Generated(result.text, result.tokens, _reason(result, max_new_tokens))
            for result in results
        ]

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        """Return an engine with room for all requests: the last one, which may know their prompts,
        or a larger one."""
        limit = self.context_limit
        lengths = [min(len(r.prompt) + r.max_new_tokens, limit) for r in requests]
        pages = sum(length // PAGE + 2 for length in lengths)
        if self._engine is None or self._engine.pages.count < pages:
            context = page_count(
                self.model.config, 1, dtype=self.model.dtype, device=self.model.device
            )
            self._engine = None  # before there are two
            self._engine = Engine(self.model, self.tokenizer, pages=max(pages, context))
        return self._engine


def _reason(result: Result, max_new_tokens: int) -> str:
    """Return why a text ends, as `generate_texts` calls it."""
    full = result.finish_reason == "length" and len(result.tokens) < max_new_tokens
    return "context" if full else result.finish_reason


class Conversation:
    """A conversation with a chat model. When the context is full, the oldest turns are forgotten,
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

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.turns = []

    def say(self, text: str, piece: Callable[[str], Any], **options: Any) -> Generated:
        """Answer ``text``; ``piece`` is called with the answer as it arrives.

        KeyboardInterrupt: what was written until then becomes a turn of the conversation.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        reserve = min(self.max_new_tokens, self.writer.context_limit // 2)
        encode = self.writer.tokenizer.encode_chat
        while (
            len(turns) > 1
            and len(encode(self.system + turns)) + reserve > self.writer.context_limit
        ):
            turns = turns[2:]
        ids = encode(self.system + turns)
        written: list[str] = []

        def take(_: int, more: str) -> None:
            written.append(more)
            piece(more)

        try:
            (answer,) = self.writer.write(
                [ids], take, max_new_tokens=self.max_new_tokens, **options
            )
        except KeyboardInterrupt:
            if written:
                self.turns = [*turns, {"role": "assistant", "content": "".join(written)}]
            raise
        self.turns = [*turns, {"role": "assistant", "content": answer.text}]
        return answer
