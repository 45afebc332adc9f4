"""Ask a model the questions of a task, in parts whose records are kept."""

from collections.abc import Sequence
from typing import Any, NotRequired

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.evals.results import Record, Results
from fastlm.evals.scorer import Likelihood, Prompt, Scorer
from fastlm.evals.task import Choices, Open, Question, Task
from fastlm.inference.requests import request_seed
from fastlm.schema import Count, Finite

PART = 64  # questions whose records are kept at once


class ChoicesRecord(TypedDict):
    """Log-likelihoods in nats; of a model of NaN they are NaN."""

    id: str
    logprob: list[float]
    bare: NotRequired[list[float]]
    cut: NotRequired[Count]


class OpenRecord(TypedDict):
    id: str
    answers: list[str]
    scores: list[Finite]
    gold: float | None
    cut: NotRequired[Count]


def schema_of(task: Task) -> type:
    return OpenRecord if task.open else ChoicesRecord


def ask(
    task: Task,
    scorer: Scorer,
    results: Results,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Record]:
    """Return a record per question, asking those that ``results`` lacks.

    A record has the question's ``id``. Of `Choices`: ``logprob`` per answer in nats, ``bare``
    without the question, ``cut`` tokens that did not fit. Of `Open`: ``answers``, ``samples`` of
    them, their ``scores`` by the task's judge, the ``gold`` answer's logprob (None without one).

    Args:
        temperature: of answers; several samples want more than 0.
    """

    def records(at: int, part: Sequence[Any]) -> list[Record]:
        del at
        if task.open:
            return _ask_open(task, part, scorer, samples, temperature, seed)
        return _ask_choices(part, scorer)

    for number, (question, record) in enumerate(zip(task.questions, results.records), 2):
        check_record(question, record, samples, f"{results.path}:{number}")
    return results.fill(task.questions, records, part=PART)


def check_record(question: Question, record: Record, samples: int, where: str) -> None:
    """Raise InputError unless a record has what the measures of its question need."""
    expected: dict[str, Any] = {"id": question.id}
    got: dict[str, Any] = {"id": record["id"]}
    if isinstance(question, Open):
        counts = {"answers": samples, "scores": samples}
    else:
        counts = {"logprob": len(question.requests)}
        counts |= {"bare": len(question.bare)} if question.bare else {}
    expected |= counts
    got |= {key: len(record.get(key, ())) for key in counts}
    for key, value in expected.items():
        if got[key] != value:
            values = " values" if key in counts else ""
            raise InputError(
                f"{where}: {key}: expected {value!r:.80}{values}, got {got[key]!r:.80}; remove the"
                " file to begin again"
            )


def _ask_choices(questions: Sequence[Any], scorer: Scorer) -> list[Record]:
    pairs = [pair for q in questions for pair in (*q.requests, *q.bare)]
    found = iter(scorer.loglikelihoods(pairs))
    return [_choice_record(q, found) for q in questions]


def _choice_record(question: Choices, found: Any) -> Record:
    own = [next(found) for _ in question.requests]
    record: Record = {"id": question.id, "logprob": [one.logprob for one in own]}
    if question.bare:
        record["bare"] = [next(found).logprob for _ in question.bare]
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
    prompts = [
        Prompt(
            q.prompt, q.max_new_tokens, q.stop, q.chat and has_template,
            seed=request_seed(seed, q.id, i),
        )
        for q in questions
        for i in range(samples)
    ]  # fmt: skip
    written = scorer.generate(prompts, temperature=temperature)
    asked = [q for q in questions for _ in range(samples)]
    assert task.judge is not None
    scores = task.judge([(w.text, q.row) for w, q in zip(written, asked, strict=True)])
    golds = _golds(questions, scorer, has_template)
    records = []
    for i, (q, gold) in enumerate(zip(questions, golds, strict=True)):
        own = slice(i * samples, (i + 1) * samples)
        record: Record = {
            "id": q.id, "answers": [w.text for w in written[own]], "scores": scores[own],
            "gold": None if gold is None else gold.logprob,
        }  # fmt: skip
        if cut := max(w.truncated_prompt_tokens for w in written[own]):
            record["cut"] = cut
        records.append(record)
    return records


def _golds(
    questions: Sequence[Open], scorer: Scorer, has_template: bool
) -> list[Likelihood | None]:
    found: list[Likelihood | None] = [None] * len(questions)
    for chat in (False, True):
        chosen = [
            i for i, q in enumerate(questions) if q.gold and (q.chat and has_template) is chat
        ]
        pairs = [(questions[i].prompt, questions[i].gold) for i in chosen]
        scored = scorer.loglikelihoods(pairs, chat=chat)
        for i, one in zip(chosen, scored, strict=True):
            found[i] = one
    return found
