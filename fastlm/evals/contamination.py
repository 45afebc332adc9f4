"""Contamination: find the questions of a set in a model's training data (`fastlm.data.ngrams`).

Letters and digits are compared, in lower case, so that different line breaks, cases, quotes or list
marks do not hide a copy (as in OpenAI 2023, arXiv:2303.08774, appendix C). Rejected: tokens, as in
GPT-3 and Llama 2. They find at most 11 % of copies that are wrapped into lines. The search is for
runs of `N` letters, about 13 tokens. For shorter questions it is for runs of `SHORT`; questions of
fewer letters are skipped. The few-shot examples are left out. A question is searched for with its
choices and its right answer, and again without these and the text that all questions of its part
share.

    share    of the question's letters in runs that the data contain; the larger of the two searches
    touched  at least one run is in the data (GPT-3's rule)
    dirty    the share is 0.8 or more (Llama 2's rule, and dolma's threshold)
"""

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlm.data.contamination import DIRTY, SHORT, N, letters
from fastlm.data.ngrams import build_indexes
from fastlm.evals.task import MultipleChoice, Question, Task
from fastlm.evals.task_metrics import QuestionMetrics, mean_metrics
from fastlm.files import atomic_file, write_error
from fastlm.progress import silent

if TYPE_CHECKING:
    from fastlm.data.shards import TokenDataset
    from fastlm.tokenizer.tokenizer import Tokenizer

BLOCK = 2**15  # tokens hashed at once: the arrays stay in the second-level cache
# The clean score is also that of questions with at most this share (0: GPT-3; 0.2: Llama 2)
CLEAN_SHARES = (0.0, 0.2, 0.5)
BREAK = b"\0"  # between documents


def question_texts(questions: Sequence[Question]) -> list[tuple[str, str, str]]:
    """Split each question into (prefix, body, rest), without the examples. Prefix and the beginning
    of the rest ("Question:", "Answer:") are shared by all questions of its part; the rest also has
    lettered choices and the right answer."""
    pairs = [
        q.requests[q.gold] if isinstance(q, MultipleChoice) else (q.prompt, q.gold)
        for q in questions
    ]
    stems = [prompt[: _choices_begin(q, prompt)] for q, (prompt, _) in zip(questions, pairs)]
    parts: dict[str, list[str]] = {}
    for q, stem in zip(questions, stems):
        parts.setdefault(q.part, []).append(stem)
    frames = {part: _frame(prompts) for part, prompts in parts.items()}
    texts = []
    for q, stem, (prompt, answer) in zip(questions, stems, pairs):
        examples, begin, end = frames[q.part]
        stop = len(stem) - end
        texts.append((prompt[examples:begin].lstrip(), prompt[begin:stop], prompt[stop:] + answer))
    return texts


def _choices_begin(question: Question, prompt: str) -> int:
    """Return where the choices of a question whose answers are their letters begin; without such
    choices the end."""
    if not isinstance(question, MultipleChoice):
        return len(prompt)
    letter = question.requests[0][1].strip()
    begin = max(prompt.rfind(f"\n{letter}. "), prompt.rfind(f"\n {letter}. "))
    return begin if len(letter) == 1 and begin >= 0 else len(prompt)


def write_questions(names: Sequence[str], path: Path, cache: Path) -> dict[str, int]:
    """Write the questions of sets (`fastlm.evals.registry`) as JSON lines {"set", "id", "text",
    "question"}, which `fastlm.data.contamination.read_questions` reads. ``text``: the question with
    its right answer; ``question``: its part without labels and answer.

    Returns:
        How many questions of each set.

    InputError: an unknown set, one that cannot be read, ``path`` not writable.
    """
    from fastlm.evals.registry import load_task, task_names

    counts = {}
    try:
        with atomic_file(path) as file:
            for name in task_names(names):
                task = load_task(name, cache)
                texts = question_texts(task.questions)
                for question, (prefix, body, rest) in zip(task.questions, texts):
                    row = {
                        "set": name, "id": question.id, "text": prefix + body + rest,
                        "question": body.strip(),
                    }  # fmt: skip
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                counts[name] = len(texts)
    except OSError as error:
        raise write_error(path, error) from None
    return counts


def _frame(prompts: Sequence[str]) -> tuple[int, int, int]:
    """Return where the examples of prompts end, where the question begins, and the length of the
    suffix that all prompts share (labels and full lines). With fewer than three different prompts
    nothing counts as shared: two may be alike by chance."""
    low, high = min(prompts), max(prompts)
    begin = common_prefix_length(low, high)
    # up to the last empty line: questions may share their first words
    examples = low.rfind("\n\n", 0, len(low) if low == high else begin) + 1
    if len({*prompts}) < 3:
        return examples, examples, 0
    begin = max(examples, low.rfind(": ", 0, begin) + 1, low.rfind("\n", 0, begin) + 1)
    ends = [prompt[begin:][::-1] for prompt in prompts]
    end = ends[0].rfind("\n", 0, common_prefix_length(min(ends), max(ends))) + 1
    return examples, begin, end


def common_prefix_length(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    size = min(len(first), len(second))
    return next((i for i in range(size) if first[i] != second[i]), size)


class LetterDecoder:
    """Decode blocks of tokens to `letters`, with `BREAK` between documents."""

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int) -> None:
        ends = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} | tokenizer.stop_ids
        self.pieces = [
            BREAK if i in ends else _piece(tokenizer.token_bytes(i))
            for i in range(tokenizer.vocab_size)
        ]
        self.pieces += [b""] * (vocab_size - len(self.pieces))
        # a character may be split between two blocks
        self.decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        data = b"".join(map(self.pieces.__getitem__, tokens.tolist()))
        return letters(self.decoder.decode(data))


def _piece(data: bytes) -> bytes:
    """Return the letters of a token; a token within a character keeps its bytes."""
    try:
        return letters(data.decode()).tobytes()
    except UnicodeDecodeError:
        return data


def overlap(
    questions: Sequence[tuple[str, str, str]],
    data: "TokenDataset",
    decoder: LetterDecoder,
    *,
    track: Any = silent,
) -> np.ndarray:
    """Return the share of each of the `question_texts` that the data contain, (questions,); NaN for
    questions that are too short."""
    letters_of = [[letters(part) for part in parts] for parts in questions]
    full_texts = [np.concatenate(parts) for parts in letters_of]
    sizes = [
        N if len(body) >= N else SHORT if len(w) >= SHORT else 0
        for w, (_, body, _) in zip(full_texts, letters_of)
    ]
    index_by_n = build_indexes(full_texts, sizes)
    text = np.empty(0, np.uint8)
    for start in track(range(0, data.tokens, BLOCK), "searching the data", unit="blocks"):
        block = decoder.decode(data.read(start, min(BLOCK, data.tokens - start)))
        text = np.concatenate([text[-(N - 1) :], block])  # overlap, so that no run is split
        for index in index_by_n.values():
            index.mark(text)
    share = np.full(len(questions), np.nan)
    for i, (n, (prefix, body, _)) in enumerate(zip(sizes, letters_of)):
        if n:
            covered = index_by_n[n].covered_mask(full_texts[i])
            without_frame = covered[len(prefix) : len(prefix) + len(body)]
            share[i] = max(covered.mean(), without_frame.mean() if len(body) >= n else 0.0)
    return share


def task_overlaps(
    tasks: Sequence[Task],
    tokenizer: "Tokenizer",
    data: "TokenDataset",
    vocab_size: int,
    *,
    track: Any = silent,
) -> list[np.ndarray]:
    """Return `overlap` for several tasks, from one pass over the data."""
    texts = [question_texts(task.questions) for task in tasks]
    decoder = LetterDecoder(tokenizer, vocab_size)
    share = overlap([q for task_texts in texts for q in task_texts], data, decoder, track=track)
    return np.split(share, np.cumsum([len(task_texts) for task_texts in texts])[:-1])


def contamination_report(
    task: Task, share: np.ndarray, models: Mapping[str, QuestionMetrics]
) -> dict[str, Any]:
    """Return a task's entry in the result: counts, the dirtiest questions, and each model's metrics
    on the clean and the dirty part, and on the questions with at most each of `CLEAN_SHARES`."""
    touched, dirty = share > 0, share >= DIRTY  # both False where it is NaN
    order = np.argsort(-np.nan_to_num(share), kind="stable")
    touched_questions = [
        {"id": task.questions[i].id, "share": round(float(share[i]), 4)}
        for i in order[:100]
        if touched[i]
    ]
    parts = {"dirty": np.flatnonzero(dirty), "clean": np.flatnonzero(~dirty)}
    rows_of_share = {limit: np.flatnonzero(~(share > limit)) for limit in CLEAN_SHARES}
    return {
        "n": N, "threshold": DIRTY, "questions": len(share), "short": int(np.isnan(share).sum()),
        "touched": int(touched.sum()), "dirty": int(dirty.sum()),
        "touched_questions": touched_questions,
        "models": {
            name: {
                part: mean_metrics(task, metrics, rows) for part, rows in parts.items() if len(rows)
            }
            | {
                "at_most": [
                    {
                        "share": limit, "questions": len(rows),
                        "metrics": mean_metrics(task, metrics, rows) if len(rows) else {},
                    }
                    for limit, rows in rows_of_share.items()
                ]
            }
            for name, metrics in models.items()
        },
    }  # fmt: skip
