"""Writes to disk beside the training, in one thread."""

import threading
from collections.abc import Callable


class CheckpointWriter:
    """Runs jobs one at a time: in the caller's thread, or with ``beside`` in a thread of its own,
    and then the caller does not wait. The caller must not change what a job reads.

    An error of a job is raised by the next `submit` or `wait`. The thread is no daemon: a process
    that ends waits for it.
    """

    def __init__(self, beside: bool):
        self.beside = beside
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Run the job after the one before it is done."""
        self.wait()
        if not self.beside:
            job()
            return
        self._thread = threading.Thread(target=self._run, args=(job,), name="fastlm-writer")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a job that is over; do not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait. An error that already ends the training is not hidden by one of a job."""
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error
