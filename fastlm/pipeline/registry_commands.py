"""The commands ``fastlm runs``: list runs, show the lineage, compare, write a model card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlm.pipeline.commands import print_result
from fastlm.pipeline.recipe import Kinds
from fastlm.terminal import echo

app = typer.Typer(
    help="List runs and show where their models come from.",
    no_args_is_help=False,
    invoke_without_command=True,
)
Roots = Annotated[
    list[Path] | None,
    typer.Option("--in", help="Read this folder of runs. Repeat it for more. Default: runs"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]
WHAT = "Find it by a name as `fastlm runs` shows it, a path, or the first characters of an id"


@app.callback()
def list_command(context: typer.Context, roots: Roots = None, as_json: AsJson = False) -> None:
    """List the stages that have run below runs/, with the id and the figures of their outputs.

    An id is a hash of the content: a copy of a model has the same id. docs/runs.md describes the
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
    columns = (Column(heading, no_wrap=True) for heading in ("name", "kind", "id"))
    table = Table(*columns, "finished", "took", "result", "", box=None)
    for r in records:
        duration = "" if r.entry.seconds is None else seconds_text(r.entry.seconds)
        state, when = "" if r.state == "present" else r.state, minute_text(r.finished_at)
        cells = (r.name, r.entry.kind, r.short_id, when, duration, headline(r.entry), state)
        table.add_row(*map(Text, cells))
    print_result(table if records else "no stage has run here")


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help=WHAT)], roots: Roots = None, as_json: AsJson = False
) -> None:
    """Show where a model comes from: a tree back to the sources of its text and their licences."""
    from fastlm.pipeline.lineage import render, tree

    registry = _opened(roots, name)
    lineage = tree(registry, registry.find_one(name))
    print_result(json.dumps(lineage, indent=1) if as_json else render(lineage))


def diff_command(kinds: Kinds) -> Callable[..., None]:
    """Return the command ``fastlm runs diff``, of stages of these kinds."""

    def run(
        a: Annotated[str, typer.Argument(help=WHAT)],
        b: Annotated[str, typer.Argument(help="Compare with this run, stage or model")],
        roots: Roots = None,
        as_json: AsJson = False,
    ) -> None:
        """Show what differs between two runs or models: options, inputs, code, data, figures."""
        from fastlm.pipeline.diff import diff, render

        rows = diff(_opened(roots, a, b), a, b, kinds=kinds)
        print_result(json.dumps(rows, indent=1, default=str) if as_json else render(rows, a, b))

    return run


def card_command(kinds: Kinds) -> Callable[..., None]:
    """Return the command ``fastlm runs card``, of models that stages of these kinds made."""

    def run(
        model: Annotated[str, typer.Argument(help=WHAT)],
        out: Annotated[
            Path | None,
            typer.Option(
                "--out", "-o", help="Write this file. Default: README.md in the folder of the model"
            ),
        ] = None,
        licence: Annotated[
            str | None,
            typer.Option(
                "--license", help="State this licence of the model, as an id of Hugging Face"
            ),
        ] = None,
        language: Annotated[
            str | None, typer.Option(help="State this language of the model, as en")
        ] = None,
        roots: Roots = None,
    ) -> None:
        """Write a model card in Hugging Face's form, from recorded facts alone."""
        from fastlm.errors import InputError
        from fastlm.files import write_text
        from fastlm.pipeline.card import CARD, card, model_folder
        from fastlm.pipeline.registry import DELETED

        registry = _opened(roots, model)
        record = registry.find_one(model)
        text = card(registry, record, kinds=kinds, licence=licence, language=language)
        if out is None and record.state == DELETED:
            raise InputError(f"{record.name}: expected --out, since its folder was deleted")
        out = out or model_folder(record) / CARD
        write_text(out, text)
        echo(out)

    return run


def _opened(roots: list[Path] | None, *names: str) -> Any:
    """The registry of ``roots`` and of those ``names`` that are paths elsewhere."""
    from fastlm.pipeline.registry import open_registry

    paths = [name for name in names if Path(name).exists()]
    default = [] if paths and not Path("runs").is_dir() else [Path("runs")]
    registry = open_registry(roots or default, paths=paths)
    for warning in registry.warnings:
        echo(f"left out: {warning}", err=True)
    return registry
