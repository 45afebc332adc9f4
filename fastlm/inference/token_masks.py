"""Token masks of an answer with a grammar, computed in other threads while the model computes.

Most grammars take 0.1 to 2 ms for a mask, but a grammar can be written to take seconds. Other
answers continue meanwhile, and an answer with masks that take too long ends.
"""

import time
from concurrent.futures import Executor, Future, TimeoutError

from torch import Tensor

from fastlm.inference.requests import Constraint, ConstraintError

# The processor time that the masks of an answer may take: FIRST_SECONDS once (a long text may have
# to be split into tokens), and MASK_SECONDS on average for each token. A step of a small model
# takes 5 to 10 ms.
FIRST_SECONDS, MASK_SECONDS = 1.0, 0.02


class TokenMasks:
    """Computes the masks of a `Constraint` in ``threads``, in the order of the tokens."""

    def __init__(self, constraint: Constraint, threads: Executor):
        self._constraint, self._threads = constraint, threads
        self._seconds, self._count = 0.0, 0
        self.next: Future[Tensor] = Future()

    def start(self) -> None:
        """Start to compute the first mask."""
        self.next = self._threads.submit(self._compute, None)

    def accept(self, token: int) -> None:
        """Start to compute the mask after ``token``."""
        self.next = self._threads.submit(self._compute, token)

    def is_ready(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for the mask. Return whether it, or its error, is available."""
        try:
            self.next.exception(seconds)
        except TimeoutError:
            return False
        return True

    def mask(self) -> Tensor:
        """Return which tokens may come next, (V,) bool. Raises ConstraintError where none may, or
        where masks take too long; and what the constraint raises."""
        return self.next.result()

    def _compute(self, token: int | None) -> Tensor:
        start = time.thread_time()
        if token is not None:
            self._constraint.accept(token)
        mask = self._constraint.mask()
        if not bool(mask.any()):
            raise ConstraintError("grammar: expected a token that may come next, got none")
        self._seconds += time.thread_time() - start
        self._count += 1
        if self._seconds > FIRST_SECONDS + MASK_SECONDS * self._count:
            raise ConstraintError(
                f"grammar: expected masks of at most {MASK_SECONDS:g} s of processor time a token,"
                f" got {self._seconds:.1f} s for {self._count}"
            )
        return mask
