"""Write text with a model and its tokenizer: one text, or a conversation. The command line is a
thin shell around this module.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.inference.answer_text import check_stop_strings
from fastlm.inference.block_manager import BLOCK_SIZE, default_num_blocks
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Completion, Piece, Request, batch_requests
from fastlm.inference.sampling import Sampling
from fastlm.model.load import load_model


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
        found = {"prompt_tokens": self.prompt_tokens, "seconds_to_first_token": prompt}
        found["new_tokens"] = self.new_tokens
        if prompt:
            found["prompt_tokens_per_second"] = self.prompt_tokens / prompt
        if decode and self.new_tokens > self.rows:
            found["decode_tokens_per_second"] = (self.new_tokens - self.rows) / decode
        return found

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
            ids, start = self.tokenizer.encode(prompt), self.tokenizer.bos_id
            if start is None and ids:
                return ids
            start = self.tokenizer.eos_id if start is None else start
            if start is None:
                raise InputError("prompt: expected text, this model has no token to start from")
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
    ) -> list[Completion]:
        """Continue each of ``prompts`` until a stop token or string, all in one batch. ``piece`` is
        called with (row, text) as text arrives; ``self.speed`` records the times.

        ``sampling``: as for `fastlm.inference.sampling.Sampling`.
        """
        limit = self.context_limit
        if (longest := max(map(len, prompts), default=0)) >= limit:
            raise InputError(
                f"prompt: expected fewer than the model's {limit} tokens of context, got {longest}"
            )
        self.speed = Speed(prompts)
        requests = batch_requests(
            prompts, max_new_tokens, Sampling(**sampling), seed=seed,
            stop=tuple(check_stop_strings(stop)),
        )  # fmt: skip

        def take(row: int, part: Piece) -> None:
            for token in part.tokens:
                self.speed.token(row, token)
            if part.text:
                piece(row, part.text)

        completions = self._engine_for(requests).generate(requests, on_piece=take)
        for i, one in enumerate(completions):
            if one.error:
                raise InputError(f"model: expected one that answers, got: {one.error}")
            if one.finish_reason == "length" and len(one.token_ids) < max_new_tokens:
                completions[i] = replace(one, finish_reason="context")
        return completions

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        """Return an engine with room for all requests: the last one, which may know their prompts,
        or another one. Where rotary frequencies depend on the length of the context, they are
        those of the longest request."""
        limit, model = self.context_limit, self.model
        lengths = [min(len(r.prompt) + r.max_new_tokens, limit) for r in requests]
        pages = sum(length // BLOCK_SIZE + 2 for length in lengths)
        longest = max(lengths, default=2) if model.model.depends_on_length else None
        last = self._engine
        if last is not None and last.block_manager.num_blocks >= pages:
            if longest in (None, last.context_limit):
                return last
        context = default_num_blocks(
            model.config, 1, dtype=model.dtype, device=model.device, max_model_len=longest
        )
        last = self._engine = None  # before there are two
        blocks = max(pages, context)
        self._engine = Engine(model, self.tokenizer, num_blocks=blocks, max_model_len=longest)
        return self._engine


class Conversation:
    """A conversation with a chat model. When the context is full, the oldest turns are forgotten,
    never the system message.
    """

    def __init__(self, writer: Writer, *, system: str | None = None, max_new_tokens: int = 512):
        if writer.tokenizer.chat_template is None:
            raise InputError(
                "model: expected a chat model, this one has no chat template"
                " (fastlm generate continues text)"
            )
        self.writer, self.max_new_tokens = writer, max_new_tokens
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.turns = []

    def say(self, text: str, piece: Callable[[str], Any], **options: Any) -> Completion:
        """Answer ``text``; ``piece`` is called with the answer as it arrives.

        KeyboardInterrupt: what was written until then becomes a turn of the conversation.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        limit, encode = self.writer.context_limit, self.writer.tokenizer.encode_chat
        budget = limit - min(self.max_new_tokens, limit // 2)
        while len(ids := encode(self.system + turns)) > budget and len(turns) > 1:
            turns = turns[2:]
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
