"""Answers of a model to prompts, for comparisons and judges."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from fastlm.data.prompts import Prompt
from fastlm.errors import InputError
from fastlm.evals.results import RecordFile
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Completion, Request, request_seed
from fastlm.inference.sampling import Sampling
from fastlm.model.load import load_model
from fastlm.progress import silent

CHUNK = 64  # prompts whose answers are stored at once


def generate_answers(
    model: str | Path,
    prompts: Sequence[Prompt],
    *,
    num_generations: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    track: Callable = silent,
) -> list[Completion]:
    """Return ``num_generations`` answers to each prompt, those to one prompt together. An answer
    depends only on model, prompt and seed.
    """
    chunks = _generate_chunks(
        model, [prompts], num_generations=num_generations, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, track=track,
    )  # fmt: skip
    return [completion for chunk in chunks for completion in chunk]


def _generate_chunks(
    model: str | Path,
    chunks: Sequence[Sequence[Prompt]],
    *,
    num_generations: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    track: Callable,
) -> Iterator[list[Completion]]:
    """Yield the answers to each chunk of prompts."""
    loaded_model, tokenizer = load_model(model)
    engine = Engine(loaded_model, tokenizer)
    count = num_generations * sum(map(len, chunks))
    bar = iter(track(range(count), "answering", unit="answers"))
    for prompts in chunks:
        requests = []
        for prompt in prompts:
            tools: dict[str, Any] = {} if prompt.tools is None else {"tools": prompt.tools}
            ids = tokenizer.encode_chat(prompt.messages, **tools)
            for i in range(num_generations):
                answer_seed = request_seed(seed, prompt.key(), i)
                requests.append(
                    Request(ids, max_new_tokens, Sampling(temperature), seed=answer_seed)
                )
        completions = engine.generate(requests, on_completion=lambda _: next(bar, None))
        if errors := [c.error for c in completions if c.error]:
            raise InputError(f"{model}: expected a model that answers, got: {errors[0]}")
        yield completions
    next(bar, None)


class AnswerRecord(TypedDict):
    text: str


def read_or_generate(
    path: Path,
    metadata: Mapping[str, Any],
    model: Path,
    prompts: Sequence[Prompt],
    *,
    num_generations: int,
    **options: Any,
) -> list[str]:
    """Return the texts of `generate_answers`. They are stored in the file ``path`` in chunks, and
    those that it has are not generated again. ``metadata``: what they depend on. ``options``: those
    of `generate_answers`."""
    count, size = len(prompts) * num_generations, CHUNK * num_generations
    with RecordFile(path, metadata, AnswerRecord) as file:
        if starts := file.remaining_chunks(count, size):
            firsts = [start // num_generations for start in starts]
            chunks = [prompts[first : first + CHUNK] for first in firsts]
            for answers in _generate_chunks(
                model, chunks, num_generations=num_generations, **options
            ):
                file.add([{"text": answer.text} for answer in answers])
        return [record["text"] for record in file.records]
