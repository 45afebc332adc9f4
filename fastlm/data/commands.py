"""The commands ``fastlm data ...``. `fastlm.cli` adds those of other packages."""

import json
import shutil
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlm.data.crawl_options import CrawlOptions
from fastlm.errors import InputError
from fastlm.pipeline.commands import Cache, options_command
from fastlm.pipeline.funnel import Funnel
from fastlm.sources.packages import SCHEMES, default_cache, fetch, fetch_model
from fastlm.terminal import console, echo

if TYPE_CHECKING:
    from fastlm.data.removals import RemovalQuery

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
    echo(path)


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
    console().print(source_table(model.sources), markup=False, highlight=False)
    echo(out)


@app.command("show")
def show_command(
    path: Annotated[Path, typer.Argument(help="Read this prepared folder or its funnel.json")],
    dropped: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Show the documents that this step or reason removed, or one that begins so: "
            "near duplicate, word_count, consent, ...",
        ),
    ] = None,
    id: Annotated[
        str | None,
        typer.Option(help="Show why the document with this id was removed, or its metadata"),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Show why the page with this address was removed, or its metadata"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: the funnel, or one record a line")
    ] = False,
) -> None:
    """Show what each data step kept and removed, and what each source yielded.

    With --dropped, --id or --url: show the records of removed documents, each with the reason and,
    for a sample, the beginning of its text. Of a document that remains, --id and --url show the
    metadata: consent, licence, scores, cluster.
    """

    from fastlm.data.removals import RemovalQuery
    from fastlm.data.stage import funnel_tables

    if (dropped, id, url) != (None, None, None):
        _show_removed(path, RemovalQuery(dropped, id, url), as_json)
    elif as_json:
        echo(json.dumps(asdict(Funnel.load(path)), indent=1))
    else:
        console().print(funnel_tables(Funnel.load(path)), markup=False, highlight=False)


def _show_removed(path: Path, query: "RemovalQuery", as_json: bool) -> None:
    """Print the records that match, through a pager on a terminal; complete if there is none."""
    import click

    from fastlm.data.removals import (
        corpus_folder,
        facts_text,
        find_document,
        find_removed,
        plain_text,
        styled_text,
    )

    records = find_removed(path, query)
    out = corpus_folder(path)
    first = next(records, None)
    if first is None and query.rule is None:
        location = find_document(out, query)
        name, value = ("id", query.id) if query.id is not None else ("url", query.url)
        if location is None:
            raise InputError(f"{name}: expected a document that {out} has or removed, got {value}")
        part, document = location
        echo(f"{value}: not removed, it is in {out / part}", err=as_json)
        echo(facts_text(document), end="", err=as_json)
    elif first is None:
        is_any = (query.id, query.url) == (None, None)
        echo(
            f"{query.rule}: no documents were removed" if is_any else "no record of this document",
            err=as_json,
        )  # fmt: skip
    else:
        matches = chain([first], records)
        if as_json:
            for record in matches:
                echo(json.dumps(record, ensure_ascii=False))
        elif sys.stdout.isatty():
            width = shutil.get_terminal_size().columns
            # color=None: click tells less to show colours, and removes them for other pagers
            click.echo_via_pager(styled_text(r, width) for r in matches)
        else:
            for record in matches:
                echo(plain_text(record), end="")


@app.command("card")
def card_command(
    path: Annotated[Path, typer.Argument(help="Describe this prepared folder")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write to this folder. Default: the prepared folder"),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="State this licence of the whole, as an id of Hugging Face"),
    ] = None,
) -> None:
    """Write a card of prepared text: card.md (for Hugging Face), card.html with plots, card.json.

    It says where the text is from, what each step removed and why, with examples, what the scores
    are, and how to make it again, from recorded facts alone.
    """
    from fastlm.data.data_card import write_card
    from fastlm.sources.remote import is_remote

    if out is None and is_remote(path):
        raise InputError(f"out: expected a local folder for the card of {path}, got none")
    for file in write_card(path, out, licence=licence):
        echo(file)


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
    echo(f"{options.out}: {text}")
    if summary["end"] == "interrupted":
        raise typer.Exit(130)  # as after any Ctrl-C


app.command("crawl")(options_command(CrawlOptions, _crawl))
