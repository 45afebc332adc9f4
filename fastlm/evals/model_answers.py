"""Answers of a model to prompts, for comparisons and judges."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from fastlm.data.conversations import prompt_key
from fastlm.data.prompts import Prompt
from fastlm.errors import InputError
from fastlm.evals.chat_questions import ChatQuestion
from fastlm.evals.results import RecordFile
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Completion, Request, request_seed
from fastlm.inference.sampling import Sampling
from fastlm.model.load import load_model
from fastlm.progress import silent

CHUNK = 64  # questions whose answers are stored at once


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
    questions = [ChatQuestion(prompt) for prompt in prompts]
    chunks = _generate_chunks(
        model, [questions], num_generations=num_generations, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, track=track,
    )  # fmt: skip
    return [completion for chunk in chunks for (completion,) in chunk]


def _generate_chunks(
    model: str | Path,
    chunks: Sequence[Sequence[ChatQuestion]],
    *,
    num_generations: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    track: Callable,
) -> Iterator[list[list[Completion]]]:
    """Yield the answers to each chunk of questions: a list per conversation, one answer per turn.
    The request of a later turn has the model's own earlier answers. It begins with the prompt of
    the turn before, which is in the engine's prefix cache.
    """
    loaded_model, tokenizer = load_model(model)
    engine = Engine(loaded_model, tokenizer)
    count = num_generations * sum(1 + len(q.turns) for chunk in chunks for q in chunk)
    bar = iter(track(range(count), "answering", unit="answers"))
    for questions in chunks:
        answers = [(q, i, []) for q in questions for i in range(num_generations)]
        for turn in range(1 + max(len(q.turns) for q in questions)):
            remaining = [entry for entry in answers if turn <= len(entry[0].turns)]
            requests = []
            for question, i, before in remaining:
                messages = question.messages([completion.text for completion in before])
                tools = question.prompt.tools
                options: dict[str, Any] = {} if tools is None else {"tools": tools}
                ids = tokenizer.encode_chat(messages, **options)
                if before and len(ids) >= engine.context_limit:
                    raise InputError(
                        "max_new_tokens: expected answers that leave the next turn within the"
                        f" {engine.context_limit:,} tokens of the context, got a conversation of"
                        f" {len(ids):,} before turn {turn + 1}"
                    )
                answer_seed = request_seed(seed, prompt_key(messages), i)
                requests.append(
                    Request(ids, max_new_tokens, Sampling(temperature), seed=answer_seed)
                )
            completions = engine.generate(requests, on_completion=lambda _: next(bar, None))
            if errors := [c.error for c in completions if c.error]:
                raise InputError(f"{model}: expected a model that answers, got: {errors[0]}")
            for (_, _, before), completion in zip(remaining, completions, strict=True):
                before.append(completion)
        yield [completions for _, _, completions in answers]
    next(bar, None)


class AnswerRecord(TypedDict):
    """The answers to a question: a list per conversation, one answer per turn."""

    question: str
    texts: list[list[str]]


def read_or_generate(
    path: Path,
    metadata: Mapping[str, Any],
    model: Path,
    questions: Mapping[str, ChatQuestion],
    *,
    num_generations: int,
    **options: Any,
) -> list[list[str]]:
    """Return ``num_generations`` conversations per question, those of one question together: the
    model's answer to each turn. They are stored in the file ``path`` in chunks, and those that it
    has are not generated again, whatever the other questions are.

    Args:
        metadata: what answers depend on, except the question.
        questions: by their hashes.
        options: those of `generate_answers`.
    """
    with RecordFile(path, metadata, AnswerRecord) as file:
        stored = {record["question"] for record in file.records}
        missing = [key for key in questions if key not in stored]
        if missing:
            keys = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
            chunks = [[questions[key] for key in chunk] for chunk in keys]
            answers = _generate_chunks(model, chunks, num_generations=num_generations, **options)
            for chunk, conversations in zip(keys, answers, strict=True):
                texts = iter([[answer.text for answer in turns] for turns in conversations])
                file.add([
                    {"question": key, "texts": [*islice(texts, num_generations)]} for key in chunk
                ])  # fmt: skip
        by_key = {record["question"]: record["texts"] for record in file.records}
    return [texts for key in questions for texts in by_key[key]]
