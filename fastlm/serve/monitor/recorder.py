"""Measures of answers: taken at the end of a request, written in a thread of their own, so that an
answer never waits for them.

What is measured waits in a queue of bounded size and is dropped and counted where that is full. A
database that is gone is tried again each second, and what was measured until then is kept.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from fastlm.errors import InputError
from fastlm.serve.middleware import log
from fastlm.serve.monitor import features
from fastlm.serve.monitor.judges import MOST_CHARACTERS as MOST_JUDGED
from fastlm.serve.monitor.judges import Judge
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest
from fastlm.serve.tables import MEASURES

if TYPE_CHECKING:
    from fastlm.serve.completion_response import ChatCompletionResponse
    from fastlm.serve.feedback_store import FeedbackStore

BATCH_SECONDS = 1.0
MOST_WAITING = 4096  # choices
MOST_CHARACTERS = 4 * 2**20  # of their prompts and answers
SWEEP_SECONDS = 600.0
MOST_NAME = 256  # characters of a model's name


@dataclass(frozen=True)
class Measure:
    """A choice of a finished answer: the columns of `MEASURES` that are known, and the texts that
    become numbers and are then forgotten. ``prompt``, ``answer``: None where nothing is measured.
    """

    values: dict[str, Any]
    prompt: str | None = None
    turns: int = 1
    answer: str | None = None

    def size(self) -> int:
        return len(self.prompt or "") + len(self.answer or "")


@dataclass(frozen=True)
class Keep:
    """How long measures are kept: ``days``, and at most the newest ``rows``; 0 rows: none is
    written. Those of the reference for drift stay, without the ids of their answers.
    """

    days: float = 90.0
    rows: int = 100_000


@dataclass
class Counts:
    """Choices since the server was started."""

    written: int = 0
    dropped: int = 0
    database_errors: int = 0
    judge_errors: int = 0


@dataclass
class Recorder:
    """``reference``: the condition on `MEASURES` of rows that stay (`Keep`). ``often``: called
    about each second, in the thread.
    """

    store: "FeedbackStore"
    judges: Sequence[Judge]
    keep: Keep
    reference: Callable[[sa.Connection], Any]
    often: Callable[[], None] = lambda: None
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._queue: deque[Measure] = deque()
        self._characters = 0
        self._changed = threading.Condition()
        self._rows: list[dict[str, Any]] = []  # measured, not yet written
        self._busy, self._ending = False, False
        self._swept = -SWEEP_SECONDS
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="fastlm-measures", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what waits, once, and end."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(10)

    def put(self, measured: Measure) -> None:
        """Take a choice; from any thread, at once."""
        with self._changed:
            full = len(self._queue) + len(self._rows) >= MOST_WAITING
            if full or self._characters + measured.size() > MOST_CHARACTERS or self.keep.rows == 0:
                self.counts.dropped += self.keep.rows > 0
                return
            self._queue.append(measured)
            self._characters += measured.size()

    def flush(self, seconds: float = 10.0) -> bool:
        """Wait until all that was put is written. False: it was not, in time."""
        with self._changed:
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: not (self._queue or self._rows or self._busy), seconds
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._ending:
                    self._changed.wait(BATCH_SECONDS)
                ending = self._ending
                taken = list(self._queue)
                self._queue.clear()
                self._characters = 0
                self._busy = True
            try:
                self._rows += [self._row(measured) for measured in taken]
                for work in (self._write,) if ending else (self._write, self._sweep, self.often):
                    try:
                        work()
                    except InputError:
                        if not self.counts.database_errors:
                            what = "measures: the database cannot be used"
                            log("failure", type="InputError", what=what)
                        self.counts.database_errors += 1
            except Exception as error:  # a fault of ours must not end all measures
                self.counts.dropped += max(len(self._rows), len(taken))
                self._rows = []
                log("failure", type=type(error).__name__, what="measures")
            with self._changed:
                self._busy = False
                self._changed.notify_all()
            if ending:
                return

    def _row(self, measured: Measure) -> dict[str, Any]:
        row: dict[str, Any] = {
            column.name: None for column in MEASURES.columns if column.name != "id"
        }
        row |= measured.values
        if measured.prompt is not None:
            tokens = row["prompt_tokens"] or 0
            row["features"] = features.features(measured.prompt, tokens, measured.turns)
        if measured.answer:
            for judge in self.judges:
                try:
                    row[judge.kind] = judge.score(measured.answer)
                    row[f"{judge.kind}_judge"] = judge.id
                except Exception as error:  # anybody's judge; the other measures stay
                    if not self.counts.judge_errors:
                        log("failure", type=type(error).__name__, what=f"judge {judge.id}")
                    self.counts.judge_errors += 1
        return row

    def _write(self) -> None:
        if self._rows:
            with self.store.write() as connection:
                connection.execute(MEASURES.insert(), self._rows)
            with self._changed:
                self.counts.written += len(self._rows)
                self._rows = []

    def _sweep(self) -> None:
        """Delete the measures that are too old or too many."""
        if time.monotonic() - self._swept >= SWEEP_SECONDS:
            self._swept = time.monotonic()
            self.sweep(time.time())

    def sweep(self, now: float) -> int:
        """Delete at ``now``; return how many rows went. InputError: the database cannot be used."""
        ids = sa.select(MEASURES.c.id).order_by(MEASURES.c.id.desc())
        with self.store.write() as connection:
            last = connection.execute(ids.limit(1).offset(self.keep.rows)).scalar()
            old = MEASURES.c.at < now - self.keep.days * 86400
            if last is not None:
                old = sa.or_(old, MEASURES.c.id <= last)
            stays = self.reference(connection)
            gone = connection.execute(MEASURES.delete().where(old, sa.not_(stays))).rowcount
            nameless = {"response_id": None, "conversation_id": None}
            named = MEASURES.c.response_id.is_not(None)
            connection.execute(MEASURES.update().where(old, stays, named).values(nameless))
        return gone


@dataclass
class RequestTrace:
    """A ``request`` to ``model``: prompts of so many ``lengths`` tokens, answered under
    ``id``. ``response``: once the engine has it.
    """

    recorder: Recorder
    request: GenerationRequest
    model: str
    id: str
    lengths: Sequence[int]
    response: "ChatCompletionResponse | None" = None

    def end(self, status: int) -> None:
        """Pass the measures on; at once. ``status``: of the response; 499: the client went away.

        A response of 200 has one measure per choice, another has one.
        """
        common: dict[str, Any] = {
            "response_id": self.id, "model": self.model[:MOST_NAME], "at": time.time(),
            "status": status, "choice": 0,
        }  # fmt: skip
        request = self.request
        chat = request if isinstance(request, ChatCompletionRequest) else None
        if chat is not None and chat.store:
            common["conversation_id"] = chat.conversation_id
        if status != 200 or self.response is None:
            self.recorder.put(Measure(common | {"prompt_tokens": sum(self.lengths)}))
            return
        turns = 1 if chat is None else len(chat.messages)
        for index, choice in enumerate(self.response.choices):
            timings, prompt = self.response.stream.timings[index], index // request.n
            values = common | {
                "choice": index, "finish_reason": choice.finish_reason,
                "queue_seconds": timings.queue_seconds,
                "first_token_seconds": timings.first_token_seconds,
                "seconds": timings.total_seconds, "prompt_tokens": self.lengths[prompt],
                "new_tokens": choice.tokens,
            }  # fmt: skip
            # of several choices, the first stands for the prompt
            text = self._prompt(prompt) if index % request.n == 0 else None
            answer = choice.text[:MOST_JUDGED]
            self.recorder.put(Measure(values, text, turns, answer))

    def _prompt(self, index: int) -> str | None:
        """The last message of the user, or the text; None where it is tokens."""
        found: Any = None
        if isinstance(self.request, ChatCompletionRequest):
            users = (m for m in reversed(self.request.messages) if m["role"] == "user")
            found = next(users, {}).get("content")
        elif isinstance(self.request, CompletionRequest):
            found = self.request.prompts[index]
        if isinstance(found, list):  # a message's parts
            parts = [part["text"] for part in found if isinstance(part, dict)]
            found = "".join(parts) if parts else None
        return found[: features.MOST_CHARACTERS] if isinstance(found, str) else None
