"""``fastlm data get``, ``crawl`` and ``show``. `fastlm.stages` adds those of other packages."""

from pathlib import Path
from typing import Annotated

import typer

from fastlm.data.crawl_options import CrawlOptions
from fastlm.errors import InputError
from fastlm.pipeline.commands import Cache, options_command
from fastlm.pipeline.funnel import Funnel
from fastlm.sources.packages import SCHEMES, default_cache, fetch, fetch_model

app = typer.Typer(help="Gather, clean and inspect text.", no_args_is_help=True)


@app.command("get")
def get_command(
    spec: Annotated[
        str, typer.Argument(help="Fetch model:smollm2, pypi:NAME, sdist:NAME or deb:NAME")
    ],
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
            f"spec: expected model:NAME or {', '.join(f'{s}:NAME' for s in SCHEMES)}, got {spec!r}"
        )
    typer.echo(path)


@app.command("quality")
def quality_command(
    good: Annotated[
        list[str], typer.Option(help="Learn from the documents of this source as good ones")
    ],
    other: Annotated[
        list[str], typer.Option(help="Learn from the documents of this source as other ones")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the model to this file")],
    documents: Annotated[
        int, typer.Option(help="Use at most this many documents of a source")
    ] = 10_000,
    weights: Annotated[
        str | None,
        typer.Option(help="Sampling weights of the 20 buckets, the worst first, with commas"),
    ] = None,
    cache: Cache = None,
) -> None:
    """Train a model of the quality of documents. Repeat --good and --other for several sources; a
    source is what ``fastlm data prepare`` reads, or a folder that it wrote.

    The table shows how well the model separates each source from the other side: on documents that
    it was not trained on, and without any document of the source. If the second is much lower, the
    model has learned the source, not the quality.
    """
    from rich.console import Console

    from fastlm.data.quality import DEFAULT_WEIGHTS, source_table, train_quality
    from fastlm.pipeline.events import View

    numbers = DEFAULT_WEIGHTS
    if weights is not None:
        try:
            numbers = tuple(float(word) for word in weights.split(","))
        except ValueError:
            raise InputError(
                f"weights: expected numbers separated by commas, got {weights!r:.80}"
            ) from None
    view = View()
    model = train_quality(
        good, other, cache=cache, max_documents=documents, weights=numbers, track=view.track,
        on_skip=lambda message: view({"warning": f"skipped: {message}"}),
    )  # fmt: skip
    model.save(out)
    Console().print(source_table(model.sources), markup=False, highlight=False)
    typer.echo(out)


@app.command("show")
def show_command(
    path: Annotated[Path, typer.Argument(help="Read this prepared folder or its funnel.json")],
) -> None:
    """Show what each data step kept and removed, and what each source yielded."""
    from rich.console import Console

    from fastlm.data.stage import funnel_tables

    Console().print(funnel_tables(Funnel.load(path)), markup=False, highlight=False)


def _crawl(options: CrawlOptions) -> None:
    """Crawl web sites into WARC files, politely, or continue a crawl that was interrupted.

    robots.txt is obeyed. The files that say how a site may be used (robots.txt, tdmrep.json,
    ai.txt, licences) are stored with its pages. Ctrl-C ends the crawl after the downloads under
    way, the same command continues it.
    """
    from fastlm.data.crawl import crawl, summary_text
    from fastlm.pipeline.events import View

    summary = crawl(options, View().track)
    text = summary_text(summary)
    if summary["end"] == "finished" and not summary["pages"]:
        raise InputError(f"seeds: expected sites with pages to crawl, got {text}")
    typer.echo(f"{options.out}: {text}")
    if summary["end"] == "interrupted":
        raise typer.Exit(130)  # as after any Ctrl-C


app.command("crawl")(options_command(CrawlOptions, _crawl))
