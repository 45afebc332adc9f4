"""Ask a model the questions of a task, in parts whose records are kept."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.evals.measures import values
from fastlm.evals.results import Record, Results
from fastlm.evals.scorer import Likelihood, Prompt, Scorer
from fastlm.evals.task import Choices, Open, Question, Task
from fastlm.inference.requests import request_seed
from fastlm.progress import silent
from fastlm.schema import Count, Finite

PART = 64  # questions whose records are kept at once


class ChoicesRecord(TypedDict):
    """Log-likelihoods in nats; of a model of NaN they are NaN."""

    id: str
    logprob: list[float]
    tokens: list[Count]
    greedy: NotRequired[list[bool]]
    bare: NotRequired[list[float]]
    cut: NotRequired[Count]


class OpenRecord(TypedDict):
    id: str
    answers: list[str]
    scores: list[Finite]
    gold: float | None
    cut: NotRequired[Count]


def schema_of(task: Task) -> type:
    return task.record or (OpenRecord if task.open else ChoicesRecord)


def ask_all(
    tasks: Sequence[Task],
    scorer: Scorer,
    folder: Path,
    *,
    model: str,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    track: Callable = silent,
) -> list[dict[str, Any]]:
    """Ask one model all tasks; return per task what `fastlm.evals.suite.measured` compares.

    Args:
        folder: of the records; a task that has all of its own is not asked again.
        model: a hash of the model, without which records of another one could be taken for its own.

    InputError: a set whose answers this machine cannot judge, before any set is asked.
    """
    for task in tasks:
        if task.check is not None and not (folder / _file_of(task)).exists():
            task.check()
    found = []
    for task in track(tasks, "question sets", unit="sets"):
        options = {"seed": seed, "samples": samples, "temperature": temperature}
        began = time.perf_counter()
        records, held = ask_task(task, scorer, folder, model=model, **options)
        took = time.perf_counter() - began
        found.append(
            {
                "values": values(task, records),
                "overall": task.overall(records) if task.overall is not None else {},
                "cut": cut_count(records),
                **({} if held else {"seconds": took}),
            }
        )
    return found


def ask_task(
    task: Task,
    scorer: Scorer,
    folder: Path,
    *,
    model: str,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    track: Callable = iter,
) -> tuple[list[Record], int]:
    """Return a record per question from the task's file in ``folder``, and how many of them were
    there before; see `ask` and `ask_all`."""
    about: dict[str, Any] = {"task": task.name, "hash": task.hash, "model": model}
    if task.open:
        about |= {"seed": seed, "samples": samples, "temperature": temperature}
    if task.judge is not None:
        about["judge"] = f"{task.judge.__module__}.{task.judge.__qualname__}"
    with Results(folder / _file_of(task), about, schema_of(task)) as results:
        held = len(results.records)
        records = ask(
            task, scorer, results, samples=samples, temperature=temperature, seed=seed, track=track
        )
    return records, held


def _file_of(task: Task) -> str:
    return f"{task.name.replace('/', '_')}-{task.hash}.jsonl"


def cut_count(records: Sequence[Record]) -> int:
    """Return how many questions were cut at their beginning to fit the context."""
    return sum(bool(record.get("cut")) for record in records)


def ask(
    task: Task,
    scorer: Scorer,
    results: Results,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    track: Callable = iter,
) -> list[Record]:
    """Return a record per question, asking those that ``results`` lacks.

    A record has the question's ``id``. Of `Choices`: ``logprob`` per answer in nats, its
    ``tokens``, whether it is the ``greedy`` one where the task asks, ``bare`` without the question,
    ``cut`` tokens that did not fit. Of `Open`: ``answers``, ``samples`` of them, their ``scores``
    by the task's judge, the ``gold`` answer's logprob (None without one). Of a task with a
    ``probe``: what that returns.

    Args:
        temperature: of answers; several samples want more than 0.
        track: shows progress over the parts.
    """

    def records(at: int, part: Sequence[Any]) -> list[Record]:
        del at
        if task.probe is not None:
            return task.probe(scorer, part, seed)
        if task.open:
            return _ask_open(task, part, scorer, samples, temperature, seed)
        return _ask_choices(task, part, scorer)

    for number, (question, record) in enumerate(zip(task.questions, results.records), 2):
        check_record(task, question, record, samples, f"{results.path}:{number}")
    size = task.part_size or PART
    return results.fill(task.questions, records, part=size, track=track)


def check_record(task: Task, question: Question, record: Record, samples: int, where: str) -> None:
    """Raise InputError unless a record has what the measures of its question need."""
    expected: dict[str, Any] = {"id": question.id}
    got: dict[str, Any] = {"id": record["id"]}
    if task.probe is not None:
        counts = {}
    elif isinstance(question, Open):
        counts = {"answers": samples, "scores": samples if task.judge is not None else 0}
    else:
        answers = len(question.requests)
        counts = {"logprob": answers, "tokens": answers}
        counts |= {"bare": len(question.bare)} if question.bare else {}
        counts |= {"greedy": answers} if task.greedy else {}
    expected |= counts
    got |= {key: len(record.get(key, ())) for key in counts}
    for key, value in expected.items():
        if got[key] != value:
            values = " values" if key in counts else ""
            raise InputError(
                f"{where}: {key}: expected {value!r:.80}{values}, got {got[key]!r:.80}; remove the"
                " file to begin again"
            )


def _ask_choices(task: Task, questions: Sequence[Any], scorer: Scorer) -> list[Record]:
    pairs = [pair for q in questions for pair in (*q.requests, *q.bare)]
    likelihoods = iter(scorer.loglikelihoods(pairs, greedy=task.greedy))
    return [_choice_record(task, q, likelihoods) for q in questions]


def _choice_record(task: Task, question: Choices, likelihoods: Any) -> Record:
    own = [next(likelihoods) for _ in question.requests]
    record: Record = {
        "id": question.id, "logprob": [one.logprob for one in own],
        "tokens": [one.tokens for one in own],
    }  # fmt: skip
    if task.greedy:
        record["greedy"] = [bool(one.greedy) for one in own]
    if question.bare:
        record["bare"] = [next(likelihoods).logprob for _ in question.bare]
    if cut := max(one.cut for one in own):
        record["cut"] = cut
    return record


def _ask_open(
    task: Task,
    questions: Sequence[Any],
    scorer: Scorer,
    samples: int,
    temperature: float,
    seed: int,
) -> list[Record]:
    has_template = scorer.tokenizer.chat_template is not None
    asked = [(q, request_seed(seed, q.id, i)) for q in questions for i in range(samples)]
    answers, cuts = _conversations(asked, scorer, temperature, has_template)
    scores: list[float] = []
    if task.judge is not None:
        scores = task.judge([(text, q.row) for text, (q, _) in zip(answers, asked, strict=True)])
    golds = _golds(questions, scorer, has_template)
    records = []
    for i, (q, gold) in enumerate(zip(questions, golds, strict=True)):
        own = slice(i * samples, (i + 1) * samples)
        record: Record = {
            "id": q.id, "answers": answers[own], "scores": scores[own],
            "gold": None if gold is None else gold.logprob,
        }  # fmt: skip
        if cut := max(cuts[own]):
            record["cut"] = cut
        records.append(record)
    return records


def _conversations(
    asked: Sequence[tuple[Open, int]], scorer: Scorer, temperature: float, has_template: bool
) -> tuple[list[str], list[int]]:
    """Return the answer to each question, after the model's own answers to the messages before it,
    and the most tokens that were cut off in one of its turns."""
    turns: list[tuple[tuple[str, str], ...]] = [()] * len(asked)
    answers, cuts = [""] * len(asked), [0] * len(asked)
    for turn in range(max(len(q.before) for q, _ in asked) + 1):
        rows = [i for i, (q, _) in enumerate(asked) if turn <= len(q.before)]
        messages = [(*asked[i][0].before, asked[i][0].prompt)[turn] for i in rows]
        prompts = []
        for i, message in zip(rows, messages, strict=True):
            q, seed = asked[i]
            chat = q.chat and has_template
            text = message if chat or not q.before else _as_text(turns[i], message)
            before = turns[i] if chat else ()
            prompts.append(
                Prompt(text, q.max_new_tokens, q.stop, chat=chat, seed=seed, before=before)
            )
        written = scorer.generate(prompts, temperature=temperature)
        for i, message, answer in zip(rows, messages, written, strict=True):
            answers[i], cuts[i] = answer.text, max(cuts[i], answer.truncated_prompt_tokens)
            turns[i] = (*turns[i], (message, answer.text))
    return answers, cuts


def _as_text(turns: Sequence[tuple[str, str]], prompt: str) -> str:
    """A conversation for a model without a chat template."""
    before = [f"User: {message}\nAssistant: {answer}" for message, answer in turns]
    return "\n".join([*before, f"User: {prompt}\nAssistant:"])


def _golds(
    questions: Sequence[Open], scorer: Scorer, has_template: bool
) -> list[Likelihood | None]:
    found: list[Likelihood | None] = [None] * len(questions)
    for chat in (False, True):
        chosen = [
            i for i, q in enumerate(questions) if q.gold and (q.chat and has_template) is chat
        ]
        if chosen:
            pairs = [(questions[i].prompt, questions[i].gold) for i in chosen]
            scored = scorer.loglikelihoods(pairs, chat=chat)
            for i, one in zip(chosen, scored, strict=True):
                found[i] = one
    return found
