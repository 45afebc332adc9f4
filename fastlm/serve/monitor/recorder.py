"""Measure answers: at the end of a request, and written by another thread, so that an answer never
waits for it.

Measurements wait in a bounded queue. If the queue is full, they are dropped and counted. If the
database cannot be used, it is tried again each second, and the measurements stay in the queue.
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
from fastlm.serve.monitor.answer_judges import MAX_CHARACTERS as MAX_JUDGED_CHARACTERS
from fastlm.serve.monitor.answer_judges import Judge
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest
from fastlm.serve.tables import MEASUREMENTS

if TYPE_CHECKING:
    from fastlm.serve.completion_response import ChatCompletionResponse
    from fastlm.serve.feedback_store import FeedbackStore

BATCH_SECONDS = 1.0
MAX_QUEUE_SIZE = 4096  # choices
MAX_CHARACTERS = 4 * 2**20  # of their prompts and answers
SWEEP_SECONDS = 600.0
MAX_NAME_LENGTH = 256  # characters of a model's name


@dataclass(frozen=True)
class Measurement:
    """The measurement of one choice of a finished answer: ``values`` of columns of `MEASUREMENTS`,
    and the texts, which become numbers and are then discarded. ``prompt``, ``answer``: None if
    nothing of them is measured.
    """

    values: dict[str, Any]
    prompt: str | None = None
    turns: int = 1
    answer: str | None = None

    def size(self) -> int:
        """Return the number of characters."""
        return len(self.prompt or "") + len(self.answer or "")


@dataclass(frozen=True)
class Retention:
    """How long measurements are stored: ``days``, and at most the newest ``rows``; with 0 rows,
    none are written. Those of the reference for drift stay, without the ids of their answers.
    """

    days: float = 90.0
    rows: int = 100_000


@dataclass
class RecorderCounts:
    """Numbers of choices since the start of the server."""

    written: int = 0
    dropped: int = 0
    database_errors: int = 0
    judge_errors: int = 0


@dataclass
class Recorder:
    """A queue of measurements, and the thread that writes them. ``reference``: the SQL condition on
    `MEASUREMENTS` of the rows that stay (`Retention`). ``on_tick``: called about each second, in
    the thread.
    """

    store: "FeedbackStore"
    judges: Sequence[Judge]
    retention: Retention
    reference: Callable[[sa.Connection], Any]
    on_tick: Callable[[], None] = lambda: None
    counts: RecorderCounts = field(default_factory=RecorderCounts)

    def __post_init__(self) -> None:
        self._queue: deque[Measurement] = deque()
        self._characters = 0
        self._changed = threading.Condition()
        self._rows: list[dict[str, Any]] = []  # measured, not yet written
        self._busy, self._ending = False, False
        self._last_sweep = -SWEEP_SECONDS
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="fastlm-measures", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Try once to write the queue, and end the thread."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(10)

    def put(self, measurement: Measurement) -> None:
        """Add a measurement to the queue, from any thread, without waiting."""
        with self._changed:
            full = len(self._queue) + len(self._rows) >= MAX_QUEUE_SIZE
            if (
                full
                or self._characters + measurement.size() > MAX_CHARACTERS
                or self.retention.rows == 0
            ):
                self.counts.dropped += self.retention.rows > 0
                return
            self._queue.append(measurement)
            self._characters += measurement.size()

    def flush(self, seconds: float = 10.0) -> bool:
        """Wait until the queue is written. Return False if it was not in time."""
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
                batch = list(self._queue)
                self._queue.clear()
                self._characters = 0
                self._busy = True
            try:
                self._rows += [self._row(measurement) for measurement in batch]
                for work in (self._write,) if ending else (self._write, self._sweep, self.on_tick):
                    try:
                        work()
                    except InputError:
                        if not self.counts.database_errors:
                            message = "measures: the database cannot be used"
                            log("failure", type="InputError", what=message)
                        self.counts.database_errors += 1
            except Exception as error:  # a bug here must not end all measurements
                self.counts.dropped += max(len(self._rows), len(batch))
                self._rows = []
                log("failure", type=type(error).__name__, what="measures")
            with self._changed:
                self._busy = False
                self._changed.notify_all()
            if ending:
                return

    def _row(self, measurement: Measurement) -> dict[str, Any]:
        row: dict[str, Any] = {
            column.name: None for column in MEASUREMENTS.columns if column.name != "id"
        }
        row |= measurement.values
        if measurement.prompt is not None:
            tokens = row["prompt_tokens"] or 0
            row["features"] = features.features(measurement.prompt, tokens, measurement.turns)
        if measurement.answer:
            for judge in self.judges:
                try:
                    row[judge.kind] = judge.score(measurement.answer)
                    row[f"{judge.kind}_judge"] = judge.id
                except Exception as error:  # a custom judge; the other values stay
                    if not self.counts.judge_errors:
                        log("failure", type=type(error).__name__, what=f"judge {judge.id}")
                    self.counts.judge_errors += 1
        return row

    def _write(self) -> None:
        if self._rows:
            with self.store.write() as connection:
                connection.execute(MEASUREMENTS.insert(), self._rows)
            with self._changed:
                self.counts.written += len(self._rows)
                self._rows = []

    def _sweep(self) -> None:
        """Delete the measurements that are too old or too many, from time to time."""
        if time.monotonic() - self._last_sweep >= SWEEP_SECONDS:
            self._last_sweep = time.monotonic()
            self.sweep(time.time())

    def sweep(self, now: float) -> int:
        """Delete the measurements that are too old at ``now``, or too many. Return the number of
        deleted rows. InputError: the database cannot be used."""
        ids = sa.select(MEASUREMENTS.c.id).order_by(MEASUREMENTS.c.id.desc())
        with self.store.write() as connection:
            last = connection.execute(ids.limit(1).offset(self.retention.rows)).scalar()
            old = MEASUREMENTS.c.at < now - self.retention.days * 86400
            if last is not None:
                old = sa.or_(old, MEASUREMENTS.c.id <= last)
            reference = self.reference(connection)
            query = MEASUREMENTS.delete().where(old, sa.not_(reference))
            deleted = connection.execute(query).rowcount
            without_ids = {"response_id": None, "conversation_id": None}
            has_id = MEASUREMENTS.c.response_id.is_not(None)
            connection.execute(
                MEASUREMENTS.update().where(old, reference, has_id).values(without_ids)
            )
        return deleted


@dataclass
class RequestTrace:
    """A ``request`` to ``model``, and the ``id`` of its response. ``lengths``: the tokens of its
    prompts. ``response``: set when the engine has it.
    """

    recorder: Recorder
    request: GenerationRequest
    model: str
    id: str
    lengths: Sequence[int]
    response: "ChatCompletionResponse | None" = None

    def end(self, status: int) -> None:
        """Add the measurements to the queue, without waiting. ``status``: of the response; 499 if
        the client disconnected.

        A response of status 200 has one measurement per choice, another response has one.
        """
        common: dict[str, Any] = {
            "response_id": self.id, "model": self.model[:MAX_NAME_LENGTH], "at": time.time(),
            "status": status, "choice": 0,
        }  # fmt: skip
        request = self.request
        chat = request if isinstance(request, ChatCompletionRequest) else None
        if chat is not None and chat.store:
            common["conversation_id"] = chat.conversation_id
        if status != 200 or self.response is None:
            self.recorder.put(Measurement(common | {"prompt_tokens": sum(self.lengths)}))
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
            # the features of the prompt are stored with the first choice
            text = self._prompt(prompt) if index % request.n == 0 else None
            answer = choice.text[:MAX_JUDGED_CHARACTERS]
            self.recorder.put(Measurement(values, text, turns, answer))

    def _prompt(self, index: int) -> str | None:
        """Return the last message of the user, or the text; None if the prompt is token ids."""
        text: Any = None
        if isinstance(self.request, ChatCompletionRequest):
            users = (m for m in reversed(self.request.messages) if m["role"] == "user")
            text = next(users, {}).get("content")
        elif isinstance(self.request, CompletionRequest):
            text = self.request.prompts[index]
        if isinstance(text, list):  # a message's parts
            parts = [part["text"] for part in text if isinstance(part, dict)]
            text = "".join(parts) if parts else None
        return text[: features.MAX_CHARACTERS] if isinstance(text, str) else None
