"""``fastlm runs``: what was made, from what, what differs, and a card of a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlm.pipeline.commands import print_result
from fastlm.pipeline.recipe import Kinds

app = typer.Typer(
    help="What was made, and from what.", no_args_is_help=False, invoke_without_command=True
)
Roots = Annotated[
    list[Path] | None,
    typer.Option("--in", help="A folder of runs; may be given again. Default: runs"),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON")]
WHAT = "A name as `fastlm runs` shows it, a path, or the first characters of an id"


@app.callback()
def list_command(context: typer.Context, roots: Roots = None, as_json: AsJson = False) -> None:
    """List the stages that have run below runs/, with the id and the figures of what they made.

    An id is a hash of the content: a model keeps it wherever it is copied. docs/runs.md has the
    rest.
    """
    if context.invoked_subcommand is not None:
        return
    from rich.table import Column, Table
    from rich.text import Text

    from fastlm.pipeline.record import headline, scores
    from fastlm.pipeline.text import minute_text, seconds_text

    records = _opened(roots).records
    if as_json:
        rows = [{**r.table(), "copies": r.copies, "scores": scores(r.entry)} for r in records]
        return print_result(json.dumps(rows, indent=1))
    whole = (Column(heading, no_wrap=True) for heading in ("name", "kind", "id"))
    table = Table(*whole, "finished", "took", "result", "", box=None)
    for r in records:
        took = "" if r.entry.seconds is None else seconds_text(r.entry.seconds)
        state, when = "" if r.state == "here" else r.state, minute_text(r.finished)
        cells = (r.name, r.entry.kind, r.shown_id, when, took, headline(r.entry), state)
        table.add_row(*map(Text, cells))
    print_result(table if records else "no stage has run here")


@app.command("show")
def show_command(
    what: Annotated[str, typer.Argument(help=WHAT)], roots: Roots = None, as_json: AsJson = False
) -> None:
    """Show where a model comes from: a tree back to the sources of its text and their licences."""
    from fastlm.pipeline.lineage import shown, tree

    registry = _opened(roots, what)
    found = tree(registry, registry.find_one(what))
    print_result(json.dumps(found, indent=1) if as_json else shown(found))


def diff_command(kinds: Kinds) -> Callable[..., None]:
    """Return the command ``fastlm runs diff``, of stages of these kinds."""

    def run(
        a: Annotated[str, typer.Argument(help=WHAT)],
        b: Annotated[str, typer.Argument(help="The other one")],
        roots: Roots = None,
        as_json: AsJson = False,
    ) -> None:
        """Show what differs between two runs or models: options, inputs, code, data, figures."""
        from fastlm.pipeline.diff import diff, shown

        rows = diff(_opened(roots, a, b), a, b, kinds=kinds)
        print_result(json.dumps(rows, indent=1, default=str) if as_json else shown(rows, a, b))

    return run


def card_command(kinds: Kinds) -> Callable[..., None]:
    """Return the command ``fastlm runs card``, of models that stages of these kinds made."""

    def run(
        model: Annotated[str, typer.Argument(help=WHAT)],
        out: Annotated[
            Path | None,
            typer.Option("--out", "-o", help="A file; default: README.md in its folder"),
        ] = None,
        licence: Annotated[
            str | None,
            typer.Option("--license", help="The licence you give it, as Hugging Face's id"),
        ] = None,
        language: Annotated[str | None, typer.Option(help="Its language, as en")] = None,
        roots: Roots = None,
    ) -> None:
        """Write a model card in Hugging Face's form from what is recorded; nothing else is
        claimed.
        """
        from fastlm.errors import InputError
        from fastlm.files import write_text
        from fastlm.pipeline.card import CARD, card, place_of
        from fastlm.pipeline.registry import GONE

        registry = _opened(roots, model)
        record = registry.find_one(model)
        text = card(registry, record, kinds=kinds, licence=licence, language=language)
        if out is None and record.state == GONE:
            raise InputError(f"{record.name}: expected --out, since its folder is gone")
        out = out or place_of(record) / CARD
        write_text(out, text)
        typer.echo(out)

    return run


def _opened(roots: list[Path] | None, *names: str) -> Any:
    """The registry of ``roots`` and of those ``names`` that are paths elsewhere."""
    from fastlm.pipeline.registry import open_registry

    paths = [name for name in names if Path(name).exists()]
    default = [] if paths and not Path("runs").is_dir() else [Path("runs")]
    registry = open_registry(roots or default, paths=paths)
    for warning in registry.warnings:
        typer.echo(f"left out: {warning}", err=True)
    return registry
