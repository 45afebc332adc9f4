"""The command ``fastlm data canaries``."""

from pathlib import Path
from typing import Annotated

import typer

from fastlm.errors import InputError


def canaries_command(
    corpus: Annotated[Path, typer.Argument(help="Copy this folder of fastlm data prepare")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write to this folder")],
    count: Annotated[
        int, typer.Option(help="Plant this many canaries for each number of copies")
    ] = 5,
    copies: Annotated[
        str, typer.Option(help="Plant canaries in these numbers of copies, separated by commas")
    ] = "1,4,16,64",
    seed: Annotated[int, typer.Option(help="Draw names and numbers with this seed")] = 0,
) -> None:
    """Copy prepared text and plant sentences with random numbers in its training part, some of them
    many times. Train on the copy and pass it to ``fastlm safety`` as --data and --canaries.
    """
    from fastlm.evals.safety.canaries import make_canaries, plant

    try:
        numbers = [int(word) for word in copies.split(",")]
    except ValueError:
        raise InputError(
            f"copies: expected numbers separated by commas, got {copies!r:.80}"
        ) from None
    plant(corpus, out, make_canaries(count, numbers, seed), seed)
    typer.echo(out)
