"""``fastlm data forget``."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from fastlm.errors import InputError

REMAINS = 5  # exit status: a model that saw what was forgotten is still there


def forget_command(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of runs, prepared folders, files of rows. Default: runs"),
    ] = None,
    what: Annotated[
        list[str] | None,
        typer.Option(
            "--what", "-w",
            help="Id of a document, response or conversation, URL, path, source, or SHA-256 of a"
            " text; may be given again",
        ),
    ] = None,
    listed: Annotated[
        Path | None, typer.Option("--list", help="A file of such, one a line")
    ] = None,
    withdrawn: Annotated[
        bool, typer.Option("--withdrawn", help="Everything whose consent was withdrawn")
    ] = False,
    feedback: Annotated[
        str | None, typer.Option(help="Feedback database: SQLite file or postgresql://...")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would go")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON")] = False,
) -> None:  # fmt: skip
    """Remove documents or conversations from prepared text, rows to train on and the feedback
    database, delete the token shards that were made of them, and name the models that saw them.

    Nothing is asked. A command that was killed is ended by the same command. Sources are not
    changed: prepared again, they are read without what was forgotten. Exit status 5: a model that
    saw it is still there, or a place could not be checked. docs/runs.md has the rest.
    """
    import json
    from dataclasses import asdict

    from fastlm.feedback.forget import forget, lines
    from fastlm.files import read_text

    names = list(what or [])
    if listed is not None:
        names += [line.strip() for line in read_text(listed).splitlines() if line.strip()]
    if any(not name.strip() for name in names):
        raise InputError("what: expected an id, a URL, a path or a hash, got an empty text")
    if withdrawn and feedback is None:
        raise InputError("withdrawn: expected --feedback with the database that knows it, got none")
    if not names and not withdrawn:
        raise InputError("what: expected --what, --list or --withdrawn, got none")
    with ExitStack() as stack:
        store = None
        if feedback is not None:
            from fastlm.serve.commands import open_store

            store = stack.enter_context(open_store(feedback))
        keys = store.withdrawn() if store is not None and withdrawn else frozenset()
        report = forget(
            paths or [Path("runs")], list(dict.fromkeys(names)), keys=keys, store=store,
            dry_run=dry_run,
        )  # fmt: skip
    if names and len(report.not_found) == len(set(names)) and not report.removed:
        raise InputError(
            f"what: expected something that is here, found nothing of {names[0]!r:.200}"
        )
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1))
    else:
        for line in lines(report, dry_run):
            typer.echo(line)
    if report.remains:
        raise typer.Exit(REMAINS)
