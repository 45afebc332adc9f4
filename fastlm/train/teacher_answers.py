"""Answers of a teacher to the prompts of the data, as conversations to fine-tune a student on:
sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947).

The files ``answers-00000.jsonl`` and so on of a folder hold `BATCH` prompts each, with the answers
that ended and are not empty. Each is written whole, so an interruption loses one batch. Beside the
folder, ``NAME.json`` says what the answers were made with.

The student may have another tokenizer than the teacher: what passes is text.
"""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.conversations import Conversation
from fastlm.data.forgotten import PROVENANCE
from fastlm.files import make_folder, read_json, write_json, write_text
from fastlm.progress import silent
from fastlm.train.objective import weights_digest
from fastlm.train.options import expect
from fastlm.train.rollouts import sample_answers
from fastlm.train.scorer import text_of

if TYPE_CHECKING:
    from fastlm.data.prompts import Prompt
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer

BATCH = 64  # prompts that are answered side by side


def write_answers(
    folder: Path,
    teacher: "CausalLM",
    tokenizer: "Tokenizer",
    questions: "Sequence[tuple[list[int], Prompt]]",
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    track: Callable[..., Any] = silent,
) -> int:
    """Write the teacher's answers to ``questions`` (the ids of a prompt, and the prompt) into
    ``folder``, but for the batches that it has already. Return the number of answers.

    Prompt i draws from ``seed + i``; temperature 0 is greedy. InputError: the folder's answers were
    made otherwise.
    """
    prompts = sha256(json.dumps([ids for ids, _ in questions]).encode()).hexdigest()[:16]
    made = {
        "teacher": weights_digest(teacher), "prompts": prompts, "temperature": temperature,
        "max_new_tokens": max_new_tokens, "seed": seed,
    }  # fmt: skip
    about = make_folder(folder).with_name(f"{folder.name}.json")
    if about.exists():
        known = read_json(about)
        for name, value in made.items():
            got = known.get(name)
            expect(got == value, "teacher_answers", f"{folder} made with {name} {value}", got)
    else:
        write_json(about, made)
    count = 0
    starts = range(0, len(questions), BATCH)
    for start in track(starts, "the teacher answers", unit="batches"):
        path = folder / f"answers-{start // BATCH:05d}.jsonl"
        if not path.exists():
            part = questions[start : start + BATCH]
            answers = sample_answers(
                teacher, [ids for ids, _ in part], max_new_tokens=max_new_tokens,
                temperature=temperature, seed=seed + start, rows=BATCH,
                stop_ids=tokenizer.stop_ids,
            )  # fmt: skip
            rows = []
            for (_, prompt), answer in zip(part, answers, strict=True):
                text = text_of(tokenizer, answer.token_ids[:-1])
                if answer.ended and text.strip():
                    rows.append(json.dumps(_row(prompt, text), ensure_ascii=False) + "\n")
            write_text(path, "".join(rows))
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
