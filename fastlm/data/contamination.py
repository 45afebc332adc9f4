"""Find questions of evaluation sets in documents (`fastlm.data.ngrams`).

The rule is that of `fastlm.evals.contamination`, for one document: letters and digits are compared,
in lower case, so that different line breaks, cases, quotes or list marks do not hide a copy. A
document contains a question if at least `DIRTY` of the question's letters are in runs of `N`
letters (`SHORT` for shorter questions) that the document has too. Questions of fewer letters are
skipped. No tokenizer is needed.

A question with one word replaced is found in half of the cases: short ones lose all their runs.

Rejected: the rule of `fastlm.feedback.overlap`, half of the runs of 8 words. It finds 59 instead of
51 % of such questions, at half the speed, and would remove other pages than those that `fastlm
eval` calls dirty. In languages without spaces a sentence is one word.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

from fastlm.data.ngrams import build_indexes, covered_mask, hashes
from fastlm.data.prompts import parse_prompt
from fastlm.errors import InputError
from fastlm.schema import parse
from fastlm.sources.source_files import leads_out, list_files, read_files
from fastlm.sources.streams import open_stream

N, SHORT = 40, 25  # letters of a run: about 13 tokens; of questions with fewer letters than N
DIRTY = 0.8  # share of a question's letters: the rule of Llama 2 and dolma
# Of a longer question, one n-gram of STEP is in the index. It finds every run of N + STEP - 1
# letters, so it misses only copies that are changed everywhere
STEP, LONG = 8, 3 * N
FIRST = 60  # characters of a question that describe it
ROWS = re.compile(r"\.jsonl(\.gz|\.zst)?$", re.IGNORECASE)
MAX_SYMBOLS = 32  # that are deleted from a text one after the other
_NO_LETTER = re.compile(r"[^\w\x00-\x7f]+")  # beyond ASCII, which is deleted from bytes
_DELETED = bytes(i for i in range(1, 128) if not chr(i).isalnum())


def letters(text: str) -> np.ndarray:
    """Return the letters and digits of ``text`` as UTF-8 bytes: in compatibility form (Unicode's
    NFKC), without accents, case-folded. NUL stays.

    Each character is mapped alone, so that it does not matter how a text is split. NFC joins the
    parts of Korean syllables again.
    """
    folded = text if text.isascii() else normalize("NFKD", text)
    folded = folded.casefold()
    if not folded.isascii():
        symbols = [c for c in set(folded) if not c.isascii() and not c.isalnum()]
        if len(symbols) > MAX_SYMBOLS:
            folded = _NO_LETTER.sub("", folded)
        else:  # such as quotes and dashes; 4 times as fast
            for symbol in symbols:
                folded = folded.replace(symbol, "")
        folded = normalize("NFC", folded)
    data = folded.encode("utf-8", "replace").translate(None, _DELETED)
    return np.frombuffer(data, np.uint8)


class EvaluationQuestion(NamedTuple):
    """A question of an evaluation set.

    Attributes:
        set: the name of the set.
        id: of the question in its set.
        text: the question, with its right answer if it has one.
        body: the part of ``text`` that is searched for alone, too: without the answer and without
            labels such as "Question:".
    """

    set: str
    id: str
    text: str
    body: str = ""


class QuestionMatch(NamedTuple):
    """A question that a document contains. ``share``: of its letters, `DIRTY` or more. ``first``:
    its first words.
    """

    set: str
    id: str
    first: str
    share: float


class _Entry(NamedTuple):
    set: str
    id: str
    first: str
    begin: int  # of the body in the letters
    end: int


class QuestionIndex:
    """An index of questions. ``short``: how many of them are too short to be searched for."""

    def __init__(self, questions: Iterable[EvaluationQuestion]) -> None:
        self._entries: list[_Entry] = []
        self._letters: list[np.ndarray] = []
        self.short = 0
        sizes: list[int] = []
        steps: list[int] = []
        seen: set[tuple[bytes, int, int]] = set()
        for question in questions:
            text, body = letters(question.text), letters(question.body or question.text)
            data = text.tobytes()
            begin = data.find(body.tobytes())
            size = N if len(body) >= N else SHORT if len(text) >= SHORT else 0
            key = data, begin, len(body)
            self.short += not size
            if size and key not in seen:
                seen.add(key)
                first = " ".join((question.body or question.text).split())[:FIRST]
                end = begin + len(body) if begin >= 0 and len(body) >= size else begin
                self._entries.append(_Entry(question.set, question.id, first, begin, end))
                self._letters.append(text)
                sizes.append(size)
                steps.append(STEP if len(body) >= LONG else 1)
        self._indexes = build_indexes(self._letters, sizes, steps=steps)

    @classmethod
    def load(cls, paths: Sequence[str]) -> "QuestionIndex":
        """Index the questions of files (`read_questions`). It is kept, so that the units of a build
        that one process does share it. InputError: as `read_questions`.
        """
        stats = [file.stat() for path in paths for file in question_files(path)]
        stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
        return _load(tuple(paths), stamps)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, text: str) -> QuestionMatch | None:
        """Return the question of which the text contains most, or None."""
        ids = letters(text)
        best: QuestionMatch | None = None
        for n, index in self._indexes.items():
            values = hashes(ids, n)
            for owner in np.unique(index.owners_of(index.lookup(values))).tolist():
                entry = self._entries[owner]
                covered = covered_mask(np.isin(hashes(self._letters[owner], n), values), n)
                share = float(covered.mean())
                if entry.end > entry.begin:
                    share = max(share, float(covered[entry.begin : entry.end].mean()))
                if share >= DIRTY and (best is None or share > best.share):
                    best = QuestionMatch(entry.set, entry.id, entry.first, share)
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
    the file) and ``id`` (default: the line) describe it. With a ``text``, the ``question`` is a
    part of it, or follows it, and is also searched for alone. Any other file is one question.

    InputError: not found, not readable, a line without text.
    """
    for file in question_files(path):
        name = file.name.partition(".")[0]
        if not ROWS.search(file.name):
            from fastlm.data.extract import extract

            files, _ = list_files(str(file), cache=Path())
            for document in read_files(files):
                yield EvaluationQuestion(name, document.id, extract(document))
            continue
        with open_stream(file) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _question(line, name, f"{file.name}:{number}", f"{file}:{number}")


def _question(line: bytes, name: str, id: str, location: str) -> EvaluationQuestion:
    row = parse(line, dict, location)
    text, body = row.get("text"), ""
    try:
        body = parse_prompt(row, location).messages[-1]["content"]
    except InputError as error:
        if not isinstance(text, str):
            raise InputError(f"{location}: {error}") from None
    if not isinstance(text, str):
        text, body = body, ""
    elif body not in text:
        text = f"{text}\n\n{body}"
    return EvaluationQuestion(str(row.get("set", name)), str(row.get("id", id)), text, body)


def question_files(path: str | Path) -> list[Path]:
    """Return the files of a path of `read_questions`, in order. InputError: there is none."""
    path = Path(path)
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [p for p in paths if p.is_file() and not (p != path and leads_out(p, path))]
    if not files or not files[0].is_file():
        raise InputError(f"decontaminate: expected a file of questions or a folder, got {path}")
    return files


def questions_sha256(path: str | Path) -> str:
    """Return a hash of the content of a path of `read_questions`."""
    digest = sha256()
    for file in question_files(path):
        digest.update(sha256(file.read_bytes()).digest())
    return digest.hexdigest()
