"""Generate text with a model and its tokenizer, for `fastlm generate` and `fastlm chat`."""

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
from fastlm.model.load import load_for_inference


class GenerationTiming:
    """Measures the time of one batch; `add_token` is called for each new token."""

    def __init__(self, prompts: Sequence[Sequence[int]]):
        self.prompt_tokens, self.rows = sum(map(len, prompts)), len(prompts)
        self.new_tokens = 0
        self.start = self.first_token = self.last_token = time.perf_counter()

    def add_token(self) -> None:
        self.last_token = time.perf_counter()
        if self.new_tokens < self.rows:  # all rows get their first token in one step
            self.first_token = self.last_token
        self.new_tokens += 1

    def figures(self) -> dict[str, float | int]:
        """Return times and rates of all rows together. Decoding excludes each row's first token. A
        rate without a measurement is missing."""
        prompt, decode = self.first_token - self.start, self.last_token - self.first_token
        figures = {"prompt_tokens": self.prompt_tokens, "seconds_to_first_token": prompt}
        figures["new_tokens"] = self.new_tokens
        if prompt:
            figures["prompt_tokens_per_second"] = self.prompt_tokens / prompt
        if decode and self.new_tokens > self.rows:
            figures["decode_tokens_per_second"] = (self.new_tokens - self.rows) / decode
        return figures

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


class TextGenerator:
    """Generates text with the model and the tokenizer of ``path``, or of a package:
    ``model:smollm2``.

    It uses an engine, so its texts equal those of `fastlm serve`. With activations rounded to 8
    bits, another order of summation would soon lead to another text.
    """

    def __init__(self, path: str | Path, act_bits: int | None = None):
        self.model, self.tokenizer = load_for_inference(path, act_bits)
        self._engine: Engine | None = None

    def prompt_ids(self, prompt: str, *, raw: bool = False) -> list[int]:
        """Encode the prompt as a user's message with the chat template, or unchanged if ``raw`` is
        set or there is no template.
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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        on_piece: Callable[[int, str], Any] = lambda row, text: None,
        *,
        max_new_tokens: int,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> list[Completion]:
        """Continue each of ``prompts`` until a stop token or string, all in one batch. Call
        ``on_piece`` with (row, text) as text arrives; ``self.timing`` records the times.

        ``sampling``: as for `fastlm.inference.sampling.Sampling`.
        """
        limit = self.context_limit
        if (longest := max(map(len, prompts), default=0)) >= limit:
            raise InputError(
                f"prompt: expected fewer than the model's {limit} tokens of context, got {longest}"
            )
        self.timing = GenerationTiming(prompts)
        requests = batch_requests(
            prompts, max_new_tokens, Sampling(**sampling), seed=seed,
            stop=tuple(check_stop_strings(stop)),
        )  # fmt: skip

        def add_piece(row: int, piece: Piece) -> None:
            for _ in piece.tokens:
                self.timing.add_token()
            if piece.text:
                on_piece(row, piece.text)

        completions = self._engine_for(requests).generate(requests, on_piece=add_piece)
        for i, completion in enumerate(completions):
            if completion.error:
                raise InputError(f"model: expected one that answers, got: {completion.error}")
            if completion.finish_reason == "length" and len(completion.token_ids) < max_new_tokens:
                completions[i] = replace(completion, finish_reason="context")
        return completions

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        """Return an engine whose cache holds all requests: the last one, which may have cached
        their prompts, or a new one. If rotary frequencies depend on the length of the context, they
        are those of the longest request."""
        limit, model = self.context_limit, self.model
        lengths = [min(len(r.prompt) + r.max_new_tokens, limit) for r in requests]
        num_blocks = sum(length // BLOCK_SIZE + 2 for length in lengths)
        longest = max(lengths, default=2) if model.model.depends_on_length else None
        last = self._engine
        if last is not None and last.block_manager.num_blocks >= num_blocks:
            if longest in (None, last.context_limit):
                return last
        context = default_num_blocks(
            model.config, 1, dtype=model.dtype, device=model.device, max_model_len=longest
        )
        last = self._engine = None  # free the old engine first
        num_blocks = max(num_blocks, context)
        self._engine = Engine(model, self.tokenizer, num_blocks=num_blocks, max_model_len=longest)
        return self._engine
