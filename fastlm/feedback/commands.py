"""``fastlm data forget``."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from fastlm.errors import InputError
from fastlm.terminal import echo

INCOMPLETE = 5  # exit status: a model that saw forgotten data still exists


def forget_command(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Search run folders, prepared folders, files of rows; default: runs"),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t",
            help="Forget this: the id of a document, response or conversation, a URL, a path, a"
            " source, or the SHA-256 of a text; may be repeated",
        ),
    ] = None,
    targets_file: Annotated[
        Path | None, typer.Option("--list", help="Read targets from a file, one per line")
    ] = None,
    withdrawn: Annotated[
        bool, typer.Option("--withdrawn", help="Forget everything with withdrawn consent")
    ] = False,
    feedback: Annotated[
        str | None, typer.Option(help="Use this feedback database: SQLite file or postgresql://...")
    ] = None,
    near: Annotated[
        bool,
        typer.Option("--near", help="Also remove near copies of the documents, now and later"),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:  # fmt: skip
    """Remove documents or conversations from prepared text, rows to train on and the feedback
    database, delete the token shards that were made of them, and list the models that saw them.

    There is no confirmation. After a kill, the same command finishes the work. Sources do not
    change: when they are prepared again, the targets are left out. Exit status 5: a model that saw
    a target still exists, or a place could not be checked. docs/runs.md has more.
    """
    import json
    from dataclasses import asdict

    from fastlm.feedback.forget import forget, report_lines
    from fastlm.files import read_text

    names = list(target or [])
    if targets_file is not None:
        names += [line.strip() for line in read_text(targets_file).splitlines() if line.strip()]
    if any(not name.strip() for name in names):
        raise InputError("target: expected an id, a URL, a path or a hash, got an empty text")
    if withdrawn and feedback is None:
        raise InputError("withdrawn: expected --feedback with the database of consent, got none")
    if not names and not withdrawn:
        raise InputError("target: expected --target, --list or --withdrawn, got none")
    with ExitStack() as stack:
        store = None
        if feedback is not None:
            from fastlm.serve.commands import open_store

            store = stack.enter_context(open_store(feedback))
        keys = store.withdrawn_keys() if store is not None and withdrawn else frozenset()
        report = forget(
            paths or [Path("runs")], list(dict.fromkeys(names)), keys=keys, store=store,
            near=near, dry_run=dry_run,
        )  # fmt: skip
    if names and len(report.not_found) == len(set(names)) and not report.removed:
        raise InputError(
            f"target: expected something in the data here, found nothing of {names[0]!r:.200}"
        )
    if as_json:
        echo(json.dumps(asdict(report), indent=1))
    else:
        for line in report_lines(report, dry_run):
            echo(line)
    if report.is_incomplete:
        raise typer.Exit(INCOMPLETE)
