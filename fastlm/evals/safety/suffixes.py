"""Suffixes found by `fastlm.evals.safety.gcg`, as prompts: tokens of a chat and back to text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.evals.results import Record
from fastlm.evals.safety.bench import Bench
from fastlm.evals.safety.gcg import search
from fastlm.evals.scorer import Scorer
from fastlm.evals.task import Open

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer

TARGET = "Sure, here is"


class SuffixRecord(TypedDict):
    id: str
    suffix: str
    losses: list[float]


def suffix_prompts(bench: Bench, name: str, requests: Sequence[str]) -> list[str]:
    """Return each request with the suffix that was found for it."""
    o, chat = bench.options, bench.chats

    def probe(scorer: Scorer, some: Sequence[Open], seed: int) -> list[Record]:
        tokenizer = scorer.tokenizer
        target = tokenizer.encode(TARGET if chat else f" {TARGET}")
        usable = usable_tokens(tokenizer, scorer.model.config.vocab_size)
        records = []
        for q in some:
            before, start, after = around(tokenizer, q.prompt, o.suffix_tokens, chat)

            def valid(suffix: list[int], parts=(q.prompt, before, after)) -> bool:
                text = parts[0] + tokenizer.decode(suffix)
                return encoded(tokenizer, text, chat) == [*parts[1], *suffix, *parts[2]]

            found = search(
                scorer.model, before, after, target, start, steps=o.suffix_steps,
                candidates=o.suffix_candidates, seed=seed + int(q.id), allowed=usable, valid=valid,
            )  # fmt: skip
            suffix = tokenizer.decode(found.suffix)
            records.append({"id": q.id, "suffix": suffix, "losses": found.losses})
        return records

    options = {
        "tokens": o.suffix_tokens, "steps": o.suffix_steps, "candidates": o.suffix_candidates,
    }  # fmt: skip
    questions = [Open(str(i), request, options, chat=chat) for i, request in enumerate(requests)]
    records = bench.ask(
        f"suffixes.{name}", questions, probe=probe, record=SuffixRecord, part_size=1
    )
    return [
        request + record["suffix"] for request, record in zip(requests, records, strict=True)
    ]  # fmt: skip


def encoded(tokenizer: "Tokenizer", text: str, chat: bool) -> list[int]:
    if chat:
        return tokenizer.encode_chat([{"role": "user", "content": text}])
    return tokenizer.encode(text, special=True)


def around(
    tokenizer: "Tokenizer", request: str, length: int, chat: bool
) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens before a suffix of ``length`` tokens, a first suffix, and those after it.

    InputError: a tokenizer that does not keep a run of equal words apart from its surroundings.
    """
    for word in (" !", " x", "!", "x"):
        run = tokenizer.encode(request + word * (length + 8))
        token = run[-1]
        ids = encoded(tokenizer, request + tokenizer.decode([token] * length), chat)
        at = next(
            (i for i in range(len(ids)) if ids[i : i + length] == [token] * length), None
        )  # fmt: skip
        if at is not None:
            return ids[:at], ids[at : at + length], ids[at + length :]
    raise InputError("suffix: wanted a tokenizer in which a repeated word is a repeated token")


def usable_tokens(tokenizer: "Tokenizer", vocab_size: int) -> torch.Tensor:
    """Return (V,) bool: tokens of printable ASCII, so that a suffix survives being text."""
    usable = torch.zeros(vocab_size, dtype=torch.bool)
    for token in range(min(vocab_size, tokenizer.vocab_size)):
        text = tokenizer.decode([token])
        usable[token] = bool(text.strip()) and text.isascii() and text.isprintable()
    return usable
