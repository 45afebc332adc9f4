"""Which questions of a set stand in a model's training data (`fastlm.evals.ngrams`).

A question's tokens are compared with the data by n-grams of 13 tokens, as in GPT-3 (Brown et al.
2020, appendix C) and Llama 2; a question of 8 to 12 tokens by n-grams of 8; shorter ones are not
judged. What is compared is the question with its right answer, without the few-shot examples.

    share    of its tokens that lie in an n-gram that the data holds
    touched  one n-gram is in the data (GPT-3's rule)
    dirty    a share of 0.8 or more (Llama 2's rule, and dolma's threshold)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlm.evals.measures import Values, mean_as_json, passages
from fastlm.evals.ngrams import indexes
from fastlm.evals.task import Choices, Question, Task
from fastlm.progress import silent

if TYPE_CHECKING:
    from fastlm.data.shards import TokenDataset
    from fastlm.tokenizer.tokenizer import Tokenizer

N, SHORT = 13, 8
DIRTY = 0.8
BLOCK = 2**17  # tokens hashed at once: the arrays stay in the second-level cache


@dataclass(frozen=True)
class Overlap:
    """What was found of each question: ``share`` (questions,), NaN where it is too short;
    ``touched``."""

    share: np.ndarray
    touched: np.ndarray


def question_texts(questions: Sequence[Question]) -> list[str]:
    """Each question with its right answer, without the examples that all of its part begin with."""
    prompts = [_parts(q) for q in questions]
    begins: dict[str, str] = {}
    for q, (prompt, _) in zip(questions, prompts):
        begins[q.part] = _common(begins[q.part], prompt) if q.part in begins else prompt
    texts = []
    for q, (prompt, gold) in zip(questions, prompts):
        begin = begins[q.part]
        # up to the last empty line: questions may begin alike
        kept = begin.rfind("\n\n") + 2 if "\n\n" in begin else 0
        own = prompt[kept:] if begin != prompt else prompt.rpartition("\n\n")[2]
        texts.append(own.strip() + gold)
    return texts


def _parts(q: Question) -> tuple[str, str]:
    return q.requests[q.gold] if isinstance(q, Choices) else (q.prompt, q.gold)


def _common(one: str, other: str) -> str:
    if other.startswith(one):
        return one
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return one[:low]


def overlap(
    questions: Sequence[np.ndarray], data: "TokenDataset", *, track: Any = silent
) -> Overlap:
    """Compare questions, token ids each, with all of the data."""
    # 8 for all that are shorter: each size is a pass of hashes over the data
    size = [N if len(q) >= N else SHORT if len(q) >= SHORT else 0 for q in questions]
    found = indexes(questions, size)
    for piece in track(list(_pieces(data.tokens)), "searching the data", unit="blocks"):
        tokens = data.read(*piece)
        for index in found.values():
            index.mark(tokens)
    share = np.full(len(questions), np.nan)
    for i, (q, n) in enumerate(zip(questions, size)):
        if n:
            share[i] = found[n].covered(q).mean()
    return Overlap(share, share > 0)


def _pieces(tokens: int) -> Iterator[tuple[int, int]]:
    """(start, count) of blocks that overlap, so that no n-gram is cut."""
    for start in range(0, tokens, BLOCK):
        yield start, min(BLOCK + N - 1, tokens - start)


def encoded(texts: Sequence[str], tokenizer: "Tokenizer") -> list[np.ndarray]:
    return [np.asarray(ids, np.int64) for ids in tokenizer.encode_batch(list(texts))]


def task_overlaps(
    tasks: Sequence[Task], tokenizer: "Tokenizer", data: "TokenDataset", *, track: Any = silent
) -> list[Overlap]:
    """`overlap` of several tasks, in one pass over the data."""
    each = [encoded(question_texts(task.questions), tokenizer) for task in tasks]
    whole = overlap([q for questions in each for q in questions], data, track=track)
    ends = np.cumsum([len(questions) for questions in each])[:-1]
    return [
        Overlap(*both)
        for both in zip(np.split(whole.share, ends), np.split(whole.touched, ends), strict=True)
    ]


def told(task: Task, found: Overlap, models: dict[str, Values]) -> dict[str, Any]:
    """What a result says of a task: counts, the dirtiest questions, and each model's measures on
    the clean and the dirty part."""
    judged = np.isfinite(found.share)
    dirty = judged & (np.nan_to_num(found.share) >= DIRTY)
    order = np.argsort(-np.nan_to_num(found.share), kind="stable")
    named = [
        {"id": task.questions[i].id, "share": round(float(found.share[i]), 4)}
        for i in order[:100]
        if found.touched[i]
    ]
    parts = {
        part: (rows, passages(task, rows.tolist()))
        for part, rows in (("dirty", np.flatnonzero(dirty)), ("clean", np.flatnonzero(~dirty)))
    }
    return {
        "n": N, "threshold": DIRTY, "questions": len(judged), "short": int((~judged).sum()),
        "touched": int(found.touched.sum()), "dirty": int(dirty.sum()), "named": named,
        "models": {
            name: {
                part: {key: mean_as_json(each[rows], clusters) for key, each in values.items()}
                for part, (rows, clusters) in parts.items()
                if len(rows)
            }
            for name, values in models.items()
        },
    }  # fmt: skip
