"""A model on this machine as a judge.

It writes the reason first, then the grade (Zheng et al. 2023, arXiv:2306.05685). The engine
continues ``{"reason": "`` up to the quote or the limit of tokens. Then a grammar of the grades
continues ``"grade":``, so that each reply has a readable grade, whatever the model wrote. The
second request finds the prompt and the reason in the prefix cache.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from fastlm.errors import InputError
from fastlm.evals.judge.reply import JudgeReply, no_grade
from fastlm.evals.judge.scale import Grade
from fastlm.inference.engine import Engine
from fastlm.inference.output_format import OutputFormat
from fastlm.inference.requests import Completion, Request
from fastlm.inference.sampling import Sampling
from fastlm.inference.structured_output import GrammarCompiler
from fastlm.model.load import load_for_inference

QUOTE = '"'
OPENING, CLOSING = '{"reason": "', '", "grade":'


class ModelJudge:
    """A model as a judge. Its grades are greedy.

    Args:
        path: a model as for `fastlm.model.load.load_model`.
        max_reason_tokens: the most tokens of a reason.
    """

    def __init__(self, path: str | Path, max_reason_tokens: int) -> None:
        self.path, self.max_reason_tokens = path, max_reason_tokens
        model, self.tokenizer = load_for_inference(path)
        self.engine = Engine(model, self.tokenizer)
        self.compiler = GrammarCompiler(self.tokenizer, model.config)

    def reply(
        self, prompts: Sequence[str], grades: Sequence[Grade]
    ) -> list[tuple[int, JudgeReply]]:
        """Return a reply to each prompt. A prompt that exceeds the context has no grade."""
        # a grammar permits a token per byte, and then the end
        grade_tokens = max(len(json.dumps(grade)) for grade in grades) + 2
        starts = [self._encode(prompt) for prompt in prompts]
        opening, closing = map(self.tokenizer.encode, (OPENING, CLOSING))
        limit = self.engine.context_limit - self.max_reason_tokens - grade_tokens
        limit -= len(opening) + len(closing)
        fits = [i for i, start in enumerate(starts) if len(start) <= limit]
        reasons = self._generate(
            [
                Request(
                    [*starts[i], *opening], self.max_reason_tokens, Sampling(0.0), stop=(QUOTE,)
                )
                for i in fits
            ]
        )
        texts = [" ".join(completion.text.split()) for completion in reasons]
        choices = [f" {json.dumps(grade)}" for grade in grades]
        constraint = self.compiler.constraint(OutputFormat("choice", choices, "grade"))
        completions = self._generate(
            [
                Request(
                    [*starts[i], *opening, *self._encode_reason(text), *closing], grade_tokens,
                    Sampling(0.0), constraint=constraint, logprobs=0,
                )
                for i, text in zip(fits, texts, strict=True)
            ]
        )  # fmt: skip
        replies = [
            no_grade(f"the prompt has {len(start):,} tokens, the judge reads {max(limit, 0):,}")
            for start in starts
        ]
        for i, text, completion in zip(fits, texts, completions, strict=True):
            logprob = math.fsum(
                t.logprob for t in completion.logprobs if t.token not in self.compiler.stop_ids
            )
            replies[i] = {
                "grade": json.loads(completion.text), "reason": text,
                "probability": min(1.0, math.exp(logprob)),
            }  # fmt: skip
        return [*enumerate(replies)]

    def _encode(self, prompt: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode(f"{prompt}\n\n")
        return self.tokenizer.encode_chat([{"role": "user", "content": prompt}])

    def _encode_reason(self, text: str) -> list[int]:
        """Return the tokens of a reason within its quotes, at most as many as it may have."""
        quoted = json.dumps(text, ensure_ascii=False)
        return self.tokenizer.encode(quoted[1:-1])[: self.max_reason_tokens]

    def _generate(self, requests: Sequence[Request]) -> list[Completion]:
        completions = self.engine.generate(requests) if requests else []
        if errors := [c.error for c in completions if c.error]:
            raise InputError(f"judge {self.path}: expected a model that answers, got: {errors[0]}")
        return completions
