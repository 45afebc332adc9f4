"""Run the questions of a task in chunks and store the records."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict, Unpack

from fastlm.errors import InputError
from fastlm.evals.results import RESTART_HINT, Record, RecordFile
from fastlm.evals.scorer import EvalPrompt, Scorer
from fastlm.evals.task import MultipleChoice, OpenQuestion, Question, Task
from fastlm.evals.task_metrics import question_metrics
from fastlm.inference.requests import request_seed
from fastlm.progress import silent
from fastlm.schema import Count, Finite

CHUNK = 64  # questions whose records are written at once


class SamplingOptions(TypedDict, total=False):
    """Options for answers to an `OpenQuestion`. Several ``samples`` of each need a ``temperature``
    above 0."""

    samples: int
    temperature: float
    seed: int


DEFAULT_SAMPLING: SamplingOptions = {"samples": 1, "temperature": 0.0, "seed": 0}


class ChoicesRecord(TypedDict):
    """Log-likelihoods in nats; NaN if the model's weights are NaN."""

    id: str
    logprob: list[float]
    tokens: list[Count]
    greedy: NotRequired[list[bool]]
    unconditional: NotRequired[list[float]]
    truncated_tokens: NotRequired[Count]


class OpenRecord(TypedDict):
    id: str
    answers: list[str]
    scores: list[Finite]
    gold: float | None
    truncated_tokens: NotRequired[Count]


def schema_of(task: Task) -> type:
    return task.record or (OpenRecord if task.is_open else ChoicesRecord)


def run_tasks(
    tasks: Sequence[Task],
    scorer: Scorer,
    folder: Path,
    *,
    model: str,
    k: Sequence[int] = (),
    track: Callable = silent,
    **drawing: Unpack[SamplingOptions],
) -> list[dict[str, Any]]:
    """Run all tasks on one model; return per task what `fastlm.evals.suite.compare_models` needs.

    Args:
        folder: of the records; a task with all of its records is not run again.
        model: a hash of the model, so that records of another model are not used.
        k: of pass@k and majority@k (`question_metrics`).

    InputError: this machine cannot score the answers of a set. It is raised before any set is run.
    """
    for task in tasks:
        if task.check is not None and not (folder / _record_file_name(task)).exists():
            task.check()
    results = []
    for task in track(tasks, "question sets", unit="sets"):
        records = run_task(task, scorer, folder, model=model, **drawing)
        aggregate = task.aggregate(records) if task.aggregate is not None else {}
        results.append(
            {
                "values": question_metrics(task, records, k),
                "overall": aggregate,
                "truncated": truncated_count(records),
            }
        )
    return results


def run_task(
    task: Task,
    scorer: Scorer,
    folder: Path,
    *,
    model: str,
    track: Callable = iter,
    **drawing: Unpack[SamplingOptions],
) -> list[Record]:
    """Return a record per question, from the task's file in ``folder``; see `run_questions` and
    `run_tasks`."""
    metadata: dict[str, Any] = {"task": task.name, "hash": task.hash, "model": model}
    if task.is_open:
        metadata |= DEFAULT_SAMPLING | drawing
    if task.judge is not None:
        metadata["judge"] = f"{task.judge.__module__}.{task.judge.__qualname__}"
    with RecordFile(folder / _record_file_name(task), metadata, schema_of(task)) as results:
        return run_questions(task, scorer, results, track=track, **drawing)


def _record_file_name(task: Task) -> str:
    return f"{task.name.replace('/', '_')}-{task.hash}.jsonl"


def truncated_count(records: Sequence[Record]) -> int:
    """Return how many questions were truncated at their start to fit the context."""
    return sum(bool(record.get("truncated_tokens")) for record in records)


def run_questions(
    task: Task,
    scorer: Scorer,
    results: RecordFile,
    *,
    track: Callable = iter,
    **drawing: Unpack[SamplingOptions],
) -> list[Record]:
    """Run the questions that have no record in ``results`` and return all records.

    A record has the question's ``id``, and further keys by the kind of question:

    - `MultipleChoice`: ``logprob`` (nats) and ``tokens`` of each answer; ``greedy`` where the task
      needs it: is each answer the greedy one; ``unconditional``: the logprobs without the question;
      ``truncated_tokens``: tokens of the context that did not fit.
    - `OpenQuestion`: ``answers``, their ``scores`` by the task's judge, ``gold``: logprob of the
      right answer (None without one); ``truncated_tokens``.
    - a task with a ``probe``: what the probe returns.

    Args:
        track: shows progress over the chunks; not called if no record is missing.
    """
    options = DEFAULT_SAMPLING | drawing
    for number, (question, record) in enumerate(zip(task.questions, results.records), 2):
        location = f"{results.path}:{number}"
        check_record(task, question, record, options.get("samples", 1), location)
    size = task.chunk_size or CHUNK
    starts = results.remaining_chunks(len(task.questions), size)
    for start in track(starts) if starts else ():
        part: Sequence[Any] = task.questions[start : start + size]
        if task.probe is not None:
            results.add(task.probe(scorer, part, options.get("seed", 0)))
        else:
            ask_part = _ask_open if task.is_open else _ask_choices
            results.add(ask_part(task, part, scorer, **options))
    return results.records


def check_record(
    task: Task, question: Question, record: Record, samples: int, location: str
) -> None:
    """Raise InputError unless a record has what the metrics of its question need."""
    if task.probe is not None:
        counts = {}
    elif isinstance(question, OpenQuestion):
        counts = {"answers": samples, "scores": samples if task.judge is not None else 0}
    else:
        answers = len(question.requests)
        counts = {"logprob": answers, "tokens": answers}
        counts |= {"unconditional": len(question.unconditional)} if question.unconditional else {}
        counts |= {"greedy": answers} if task.greedy else {}
    if record["id"] != question.id:
        message = f"id: expected {question.id!r:.80}, got {record['id']!r:.80}"
        raise InputError(f"{location}: {message}; {RESTART_HINT}")
    for key, count in counts.items():
        if (got := len(record.get(key, ()))) != count:
            raise InputError(
                f"{location}: {key}: expected {count} values, got {got}; {RESTART_HINT}"
            )


def _ask_choices(
    task: Task, questions: Sequence[MultipleChoice], scorer: Scorer, **_: Unpack[SamplingOptions]
) -> list[Record]:
    pairs = [pair for q in questions for pair in (*q.requests, *q.unconditional)]
    likelihoods = iter(scorer.loglikelihoods(pairs, greedy=task.greedy))
    records = []
    for q in questions:
        answer_likelihoods = [next(likelihoods) for _ in q.requests]
        record: Record = {
            "id": q.id, "logprob": [likelihood.logprob for likelihood in answer_likelihoods],
            "tokens": [likelihood.tokens for likelihood in answer_likelihoods],
        }  # fmt: skip
        if task.greedy:
            record["greedy"] = [bool(likelihood.greedy) for likelihood in answer_likelihoods]
        if q.unconditional:
            record["unconditional"] = [next(likelihoods).logprob for _ in q.unconditional]
        if cut := max(likelihood.truncated_tokens for likelihood in answer_likelihoods):
            record["truncated_tokens"] = cut
        records.append(record)
    return records


def _ask_open(
    task: Task,
    questions: Sequence[OpenQuestion],
    scorer: Scorer,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Record]:
    seeded_questions = [(q, request_seed(seed, q.id, i)) for q in questions for i in range(samples)]
    answers, truncated = _conversations(seeded_questions, scorer, temperature)
    scores: list[float] = []
    if task.judge is not None:
        scores = task.judge(
            [(text, q.row) for text, (q, _) in zip(answers, seeded_questions, strict=True)]
        )
    golds = _golds(questions, scorer)
    records = []
    for i, q in enumerate(questions):
        question_slice = slice(i * samples, (i + 1) * samples)
        record: Record = {
            "id": q.id, "answers": answers[question_slice], "scores": scores[question_slice],
            "gold": golds.get(i),
        }  # fmt: skip
        if cut := max(truncated[question_slice]):
            record["truncated_tokens"] = cut
        records.append(record)
    return records


def _is_chat(question: OpenQuestion, scorer: Scorer) -> bool:
    return question.chat and scorer.tokenizer.chat_template is not None


def _conversations(
    seeded_questions: Sequence[tuple[OpenQuestion, int]], scorer: Scorer, temperature: float
) -> tuple[list[str], list[int]]:
    """Return the answer to each question, sampled with its seed, after the model's own answers to
    its earlier messages; and the largest number of tokens truncated in one of its turns."""
    turns: list[tuple[tuple[str, str], ...]] = [()] * len(seeded_questions)
    truncated = [0] * len(seeded_questions)
    for turn in range(max(len(q.earlier_messages) for q, _ in seeded_questions) + 1):
        rows, prompts = [], []
        for i, (q, seed) in enumerate(seeded_questions):
            if turn <= len(q.earlier_messages):
                chat = _is_chat(q, scorer)
                text = (*q.earlier_messages, q.prompt)[turn]
                if q.earlier_messages and not chat:  # the model has no chat template
                    lines = [
                        f"User: {message}\nAssistant: {answer}" for message, answer in turns[i]
                    ]
                    text = "\n".join([*lines, f"User: {text}\nAssistant:"])
                history = turns[i] if chat else ()
                rows.append(i)
                prompts.append(
                    EvalPrompt(
                        text, q.max_new_tokens, q.stop, chat=chat, seed=seed, history=history
                    )
                )
        completions = scorer.generate(prompts, temperature=temperature)
        for i, answer in zip(rows, completions, strict=True):
            truncated[i] = max(truncated[i], answer.truncated_prompt_tokens)
            q, _ = seeded_questions[i]
            turns[i] = (*turns[i], ((*q.earlier_messages, q.prompt)[turn], answer.text))
    return [question_turns[-1][1] for question_turns in turns], truncated


def _golds(questions: Sequence[OpenQuestion], scorer: Scorer) -> dict[int, float]:
    """Return the logprob of the right answer, by index, of each question that has one."""
    golds: dict[int, float] = {}
    for chat in (False, True):
        indices = [i for i, q in enumerate(questions) if q.gold and _is_chat(q, scorer) is chat]
        if indices:
            pairs = [(questions[i].prompt, questions[i].gold) for i in indices]
            scored = scorer.loglikelihoods(pairs, chat=chat)
            golds |= {i: likelihood.logprob for i, likelihood in zip(indices, scored, strict=True)}
    return golds
