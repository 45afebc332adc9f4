"""Find questions of evaluation sets in documents (`fastlm.data.ngrams`).

The rule is that of `fastlm.evals.contamination`, for one document: letters and digits are compared,
in lower case, so that different line breaks, cases, quotes or list marks do not hide a copy. A
document contains a question if at least `DIRTY` of the question's letters are in runs of `N`
letters (`SHORT` for shorter questions) that the document has too. Questions of fewer letters are
skipped. No tokenizer is needed.

Rejected: the rule of `fastlm.feedback.overlap`, half of the runs of 8 words. It is meant for rows
of a few sentences. Labels such as "Question:" and lists of answers share words with any page.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlm.data.ngrams import build_indexes, covered_mask, hashes
from fastlm.data.prompts import parse_prompt
from fastlm.errors import InputError
from fastlm.schema import parse
from fastlm.sources.source_files import list_files, read_files
from fastlm.sources.streams import open_stream

N, SHORT = 40, 25  # letters of a run: about 13 tokens; of questions with fewer letters than N
DIRTY = 0.8  # share of a question's letters: the rule of Llama 2 and dolma
STEP = 8  # one n-gram of so many is in the index: it finds every run of N + STEP - 1 letters
FIRST = 60  # characters of a question that describe it
ROWS = re.compile(r"\.jsonl(\.gz|\.zst)?$", re.IGNORECASE)
_NO_LETTER = re.compile(r"[^\w\0]+|_+")
_ASCII = "".join(chr(i) if i == 0 or chr(i).isalnum() else "" for i in range(128))
_DELETED = bytes(i for i in range(128) if chr(i) not in _ASCII)


def letters(text: str) -> np.ndarray:
    """Return the letters and digits of ``text``, case-folded, as UTF-8 bytes; NUL stays."""
    folded = text.casefold()
    if folded.isascii():  # 10 times as fast as the pattern
        return np.frombuffer(folded.encode().translate(None, _DELETED), np.uint8)
    return np.frombuffer(_NO_LETTER.sub("", folded).encode("utf-8", "replace"), np.uint8)


def run_length(count: int) -> int:
    """Return the length of the runs by which a text of ``count`` letters is searched for; 0: it is
    too short.
    """
    return N if count >= N else SHORT if count >= SHORT else 0


class EvaluationQuestion(NamedTuple):
    """A question of an evaluation set.

    Attributes:
        set: the name of the set.
        id: of the question in its set.
        texts: how it may occur, such as with its right answer and without.
    """

    set: str
    id: str
    texts: tuple[str, ...]


class Overlap(NamedTuple):
    """A question that a text contains. ``share``: of its letters, `DIRTY` or more."""

    question: EvaluationQuestion
    share: float

    def __str__(self) -> str:
        first = " ".join(self.question.texts[-1].split())[:FIRST]
        return f"{self.share:.2f} of {self.question.id}: {first}"


class QuestionIndex:
    """An index of questions. ``short``: how many of them are too short to be searched for."""

    def __init__(self, questions: Sequence[EvaluationQuestion]) -> None:
        self._questions: list[EvaluationQuestion] = []  # of each text
        self._texts: list[np.ndarray] = []
        self.short = 0
        seen: set[bytes] = set()
        for question in questions:
            texts = [letters(text) for text in dict.fromkeys(question.texts)]
            self.short += not any(run_length(len(text)) for text in texts)
            for text in texts:
                if run_length(len(text)) and (key := text.tobytes()) not in seen:
                    seen.add(key)
                    self._questions.append(question)
                    self._texts.append(text)
        sizes = [run_length(len(text)) for text in self._texts]
        self._indexes = build_indexes(self._texts, sizes, step=STEP)

    @classmethod
    def load(cls, paths: Sequence[str]) -> "QuestionIndex":
        """Index the questions of files (`read_questions`). It is kept, so that the units of a build
        that one process does share it. InputError: as `read_questions`.
        """
        stats = [file.stat() for path in paths for file in question_files(path)]
        stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
        return _load(tuple(paths), stamps)

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, text: str) -> Overlap | None:
        """Return the question of which the text contains most, or None."""
        ids = letters(text)
        best: Overlap | None = None
        for n, index in self._indexes.items():
            values = hashes(ids, n)
            for owner in np.unique(index.owners_of(index.lookup(values))).tolist():
                question = self._texts[owner]
                hit = np.isin(hashes(question, n), values)
                share = float(covered_mask(hit, n).mean())
                if share >= DIRTY and (best is None or share > best.share):
                    best = Overlap(self._questions[owner], share)
        return best


@lru_cache(maxsize=1)
def _load(paths: tuple[str, ...], stamps: tuple[tuple[int, int], ...]) -> QuestionIndex:
    del stamps  # part of the key: a file that has changed is read again
    index = QuestionIndex([question for path in paths for question in read_questions(path)])
    if not len(index):
        raise InputError(
            f"decontaminate: expected questions of {SHORT} letters or more, got none in "
            + ", ".join(paths)
        )
    return index


def read_questions(path: str | Path) -> Iterator[EvaluationQuestion]:
    """Yield the questions of a file, or of the files of a folder.

    A line of .jsonl (also .gz, .zst) is an object with a ``text``, a ``question`` or ``prompt``, or
    messages (`fastlm.data.prompts`), of which the last one counts. ``set`` (default: the name of
    the file) and ``id`` (default: the line) describe it. If it has a ``text`` and a ``question``,
    both are searched for. Any other file is one question: its text.

    InputError: not found, not readable, a line without text.
    """
    for file in question_files(path):
        name = file.name.partition(".")[0]
        if not ROWS.search(file.name):
            from fastlm.data.extract import extract

            files, _ = list_files(str(file), cache=Path())
            for document in read_files(files):
                yield EvaluationQuestion(name, document.id, (extract(document),))
            continue
        with open_stream(file) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _question(line, name, f"{file.name}:{number}", f"{file}:{number}")


def _question(line: bytes, name: str, id: str, location: str) -> EvaluationQuestion:
    row = parse(line, dict, location)
    texts = []
    if isinstance(text := row.get("text"), str):
        texts.append(text)
    try:
        texts.append(parse_prompt(row, location).messages[-1]["content"])
    except InputError as error:
        if not texts:
            raise InputError(f"{location}: {error}") from None
    return EvaluationQuestion(str(row.get("set", name)), str(row.get("id", id)), tuple(texts))


def question_files(path: str | Path) -> list[Path]:
    """Return the files of a path of `read_questions`, in order. InputError: there is none."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(f"decontaminate: expected a file of questions or a folder, got {path}")
    return files


def questions_sha256(path: str | Path) -> str:
    """Return a hash of the content of a path of `read_questions`."""
    digest = sha256()
    for file in question_files(path):
        digest.update(sha256(file.read_bytes()).digest())
    return digest.hexdigest()
