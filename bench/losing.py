"""Why a peer is faster in some rows of `make bench`: a table for the end of a page."""

from collections.abc import Callable
from typing import NamedTuple

from harness import Row

SHORT_MS, CALL_MS = 0.2, 0.04  # a short call; its cost apart from the work differs by less


class Reason(NamedTuple):
    words: str
    applies: Callable[[Row], bool]


def is_lost(row: Row) -> bool:
    return row.ratio is not None and round(row.ratio, 2) < 1


def _lead(row: Row) -> float:
    """Return the milliseconds by which the best peer is faster."""
    return row.milliseconds["fastlm"] - row.milliseconds[row.best_peer or "fastlm"]


def _spread(row: Row) -> float:
    return max(row.spread.get(n, 0.0) for n in ("fastlm", row.best_peer or "fastlm"))


# The first that applies to a row counts.
REASONS = (
    Reason("Other processes disturbed the row", lambda r: bool(r.unsteady)),
    Reason(
        "The difference is within the spread of the two variants' rounds",
        lambda r: bool(r.ratio and 1 - r.ratio <= _spread(r) / 2),
    ),
    Reason(
        "`torch._int_mm` multiplies integers only; the same work, with the rounding of x and the"
        " scales, is the peer beside it",
        lambda r: r.best_peer == "torch._int_mm",
    ),
    Reason(
        "Few rows of a small quantized matrix: codes and scales of groups are unpacked for each"
        " product, where torch's int4 is packed for its kernel in advance and its int8 has one"
        " scale a row. Models decode with packed weights in one call instead"
        " (`fastlm/model/cpu_decode.py`)",
        lambda r: "int4pack" in (r.best_peer or "") or "int8pack" in (r.best_peer or ""),
    ),
    Reason(
        "Hundreds of rows share a weight, so that its size hardly counts, and torch's bf16 weight"
        " needs no unpacking",
        lambda r: r.name.startswith("quantized") and r.best_peer == "torch bf16 linear",
    ),
    Reason(
        "Short calls: checks of the arguments and autograd take some microseconds more than in"
        " torch's own op, which is C++ from end to end",
        lambda r: r.milliseconds["fastlm"] < SHORT_MS and _lead(r) < CALL_MS,
    ),
    Reason(
        "oneDNN reads some operands of a gradient in place. That is faster where rows lie"
        " favourably in memory, and slower elsewhere; fastlm packs them always"
        " (`fastlm/ops/linear.py`)",
        lambda r: r.name == "linear: fwd+bwd bf16",
    ),
    Reason(
        "One row: both sides call torch's products, whose time depends on the addresses of their"
        " operands, up to 1.6 times from one process to the next. fastlm's activation is called"
        " from Python and takes 4 µs more",
        lambda r: r.name.startswith("linear + ") and r.shape.startswith("1 x"),
    ),
    Reason(
        "Without an instruction for bfloat16 both sides widen it and multiply float32, at one rate;"
        " fastlm is faster in the gradient",
        lambda r: r.name == "linear: fwd bf16",
    ),
)


def losing_rows(rows: list[Row]) -> str:
    """Return Markdown: the reasons that apply, and a table of the rows under 1.00x."""
    lost = [r for r in rows if is_lost(r)]
    reasons, table = [], ["| op | shape | ratio | why |", "|---|---|---|---|"]
    for words, applies in (*REASONS, Reason("No reason is known", lambda r: True)):
        of_reason = [r for r in lost if applies(r)]
        lost = [r for r in lost if not applies(r)]
        if of_reason:
            reasons.append(f"{len(reasons) + 1}. {words}.")
            table += [
                f"| {r.name} | {r.shape} | {r.ratio:.2f}x | {len(reasons)} |" for r in of_reason
            ]
    return "\n".join([*reasons, "", *table])
