"""Answers of a teacher to the prompts of the data, as conversations to fine-tune a student on:
sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947).

The files ``answers-00000.jsonl`` and so on of a folder hold `BATCH` prompts each, with the answers
that ended and are not empty. Each is written whole, so an interruption loses one batch. Beside the
folder, ``NAME.json`` says what the answers were made with.

The student may have another tokenizer than the teacher: what passes is text.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.conversations import Conversation
from fastlm.data.forgotten import PROVENANCE
from fastlm.errors import InputError
from fastlm.files import make_folder, write_json, write_text
from fastlm.progress import silent
from fastlm.schema import read_document
from fastlm.train.online_stage import text_of

if TYPE_CHECKING:
    from fastlm.data.prompts import Prompt
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer

BATCH = 64  # prompts that are answered side by side


@dataclass(frozen=True)
class Made:
    """What answers were made with. ``temperature`` 0 is greedy; ``prompts``: a digest."""

    teacher: str
    prompts: str
    temperature: float
    max_new_tokens: int
    seed: int


def prompts_digest(questions: "Sequence[tuple[list[int], Prompt]]") -> str:
    return sha256(json.dumps([ids for ids, _ in questions]).encode()).hexdigest()[:16]


def write_answers(
    folder: Path,
    teacher: "CausalLM",
    tokenizer: "Tokenizer",
    questions: "Sequence[tuple[list[int], Prompt]]",
    made: Made,
    *,
    track: Callable[..., Any] = silent,
) -> int:
    """Write the teacher's answers to ``questions`` (the ids of a prompt, and the prompt) into
    ``folder``, but for the batches that it has already. Return the number of answers.

    Prompt i draws from ``seed + i``. InputError: the folder's answers were made otherwise.
    """
    from fastlm.train.rollouts import sample_answers

    about = folder.with_name(f"{folder.name}.json")
    make_folder(folder)
    if about.exists():
        known = read_document(about, Made, extra="forbid")
        for name, wanted in asdict(made).items():
            if (got := getattr(known, name)) != wanted:
                raise InputError(
                    f"teacher_answers: {folder} was made with {name} {got}, not {wanted}"
                )
    else:
        write_json(about, asdict(made))
    count = 0
    starts = range(0, len(questions), BATCH)
    for start in track(starts, "the teacher answers", unit="batches"):
        path = folder / f"answers-{start // BATCH:05d}.jsonl"
        if not path.exists():
            part = questions[start : start + BATCH]
            answers = sample_answers(
                teacher, [ids for ids, _ in part], max_new_tokens=made.max_new_tokens,
                temperature=made.temperature, seed=made.seed + start, rows=BATCH,
                stop_ids=tokenizer.stop_ids,
            )  # fmt: skip
            rows = []
            for (_, prompt), answer in zip(part, answers, strict=True):
                text = text_of(tokenizer, answer.token_ids[:-1])
                if answer.ended and text.strip():
                    rows.append(_row(prompt, text))
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(path, lines)
        count += path.read_bytes().count(b"\n")
    return count


def _row(prompt: "Prompt", text: str) -> dict[str, Any]:
    """The conversation, of which the answer alone is learnt. By the provenance of its prompt
    `fastlm data forget` finds it.
    """
    messages = [*prompt.messages, {"role": "assistant", "content": text}]
    learnt = [False] * len(prompt.messages) + [True]
    row = Conversation(messages, learnt, prompt.place, prompt.tools).row()
    return row | {key: prompt.row[key] for key in (PROVENANCE,) if key in prompt.row}
