"""How far a run has come, and the learning rate and batch at that point.

Everything that depends on the moment in a run (learning rate, batch, validations, samples) is a
function of ``progress``, 0 to 1: the largest of steps done, tokens seen and seconds used, each over
its budget. A run with a budget of ten minutes therefore anneals to its end on any machine, and a
run with a budget of tokens ends at the same quality on every machine. Schedules in steps were the
alternative: they cannot end a run on time.
"""

import math
from collections.abc import Iterable

from fastlm.errors import InputError

SCHEDULES = ("cosine", "wsd")


def progress(
    steps: float,
    seconds: float,
    max_steps: int | None,
    max_seconds: float | None,
    tokens: float = 0,
    max_tokens: int | None = None,
) -> float:
    """Return 0 at the start, 1 when the first of the budgets is used up."""
    parts = [0.0]
    if max_steps is not None:
        parts.append(steps / max_steps)
    if max_seconds is not None:
        parts.append(seconds / max_seconds)
    if max_tokens is not None:
        parts.append(tokens / max_tokens)
    return min(max(parts), 1.0)


def learning_rate(
    done: float,
    *,
    lr: float,
    schedule: str = "cosine",
    warmup: float = 0.02,
    decay: float = 0.2,
    final_lr: float = 0.0,
) -> float:
    """Return the rate at ``done`` (0..1): linear from 0 to ``lr`` within ``warmup``,
    ``final_lr * lr`` at 1.

    cosine: falls from the end of the warm-up. wsd: stays constant, then falls linearly within the
    last ``decay``.
    """
    if done < warmup:
        return lr * done / warmup
    if schedule == "cosine":
        falling = (done - warmup) / max(1 - warmup, 1e-9)
        share = 0.5 * (1 + math.cos(math.pi * min(falling, 1.0)))
    elif schedule == "wsd":
        share = min(1.0, (1 - done) / decay) if decay > 0 else 1.0
    else:
        raise InputError(f"schedule: wanted one of {', '.join(SCHEDULES)}, got {schedule!r}")
    return lr * (final_lr + (1 - final_lr) * share)


def micro_batches(done: float, accumulate: int, warmup: float) -> int:
    """Return the micro-batches of the step that begins at ``done`` (0..1): 1 to ``accumulate - 1``
    in equal parts of ``warmup``, then ``accumulate``.

    Early in a run the gradient's noise is small beside the gradient, and a small batch learns as
    much per step (McCandlish et al. 2018, arXiv:1812.06162).
    """
    if done >= warmup:
        return accumulate
    return 1 + int((accumulate - 1) * done / warmup)


def due(moments: Iterable[float], before: float, now: float) -> bool:
    """Whether one of ``moments`` is in (before, now]."""
    return any(before < moment <= now for moment in moments)
