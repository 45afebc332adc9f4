"""``fastlm serve`` and ``fastlm feedback``."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlm.errors import InputError
from fastlm.files import read_text
from fastlm.pipeline.commands import options_command
from fastlm.serve.options import ADMIN_KEYS_VARIABLE, KEYS_VARIABLE, ServeOptions
from fastlm.startup import imports
from fastlm.tokenizer import chat_template as templates

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore

app = typer.Typer(
    help="What people said about answers of `fastlm serve`, as rows to train on.",
    no_args_is_help=True,
)
Database = Annotated[
    str, typer.Argument(help="SQLite file, or postgresql://USER@HOST/NAME", show_default=False)
]


def _serve(options: ServeOptions) -> None:
    """Serve a model over HTTP as OpenAI's API, with a page to chat at /.

    Requests share the model and its key/value cache. Ctrl-C or SIGTERM ends the server when the
    running answers have ended. docs/serving.md has the API and the limits.
    """
    keys = read_keys(options.api_key_file)
    admin_keys = read_keys(options.admin_key_file, "admin_key_file", ADMIN_KEYS_VARIABLE)
    options.check(keys, admin_keys)
    templates.begin()
    with needs_serve("serve"):
        with imports():
            from fastlm.serve import process
        if options.feedback is not None:
            import fastlm.serve.feedback_store  # noqa: F401  # names a missing package now
    process.run(options, keys, admin_keys)


serve = options_command(ServeOptions, _serve)


def read_keys(
    file: Path | None, option: str = "api_key_file", variable: str = KEYS_VARIABLE
) -> list[str]:
    """The keys of a file, else of the environment. InputError: one is short or repeated."""
    if file is None:
        given = os.environ.get(variable, "").split(",")
    else:
        given = read_text(file, 2**20).splitlines()
    keys = [key.strip() for key in given if key.strip() and not key.strip().startswith("#")]
    for number, key in enumerate(keys, 1):
        if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                f"{option}: expected keys of 16 or more printable characters, key {number} is not"
            )
    if file is not None and not keys:
        raise InputError(f"{option}: expected one key or more, got none in {file}")
    return keys


@app.command("show", short_help="How much feedback there is, and the newest comments.")
def show_command(
    database: Database,
    comments: Annotated[int, typer.Option(min=0, help="Comments at most")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON")] = False,
) -> None:
    """Show how many answers are kept, how many thumbs, comments, corrections and picks there are,
    and what the newest comments say.
    """
    with open_store(database) as store:
        counts, newest = store.counts(), store.comments(comments)
    if as_json:
        typer.echo(json.dumps({**counts, "comments": newest}))
        return
    typer.echo(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    for one in newest:
        about = one["response_id"] or f"conversation {one['conversation_id']}"
        rest = f", choice {one['choice']}" * (one["choice"] > 0)
        who = f", {one['rater']}" * bool(one["rater"])
        thumb = f", thumb {one['thumb']}" * bool(one["thumb"])
        line = f"{one['created_at']} {about}{rest}{who}{thumb}: {' '.join(one['comment'].split())}"
        # strangers' text must not steer a terminal
        typer.echo("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line))


@app.command("forget", short_help="Delete a response or a conversation.")
def forget_command(
    database: Database,
    id: Annotated[str, typer.Argument(help="A response's id or a conversation's")],
) -> None:
    """Delete a response or a conversation: its text and what was said about it."""
    with open_store(database) as store:
        gone = store.forget(id)
    if not gone:
        raise InputError(f"id: expected one of the database, got {id!r:.80}")
    typer.echo(f"{id}: {gone:,} rows deleted")


def open_store(database: str) -> "FeedbackStore":
    """The database, which must exist."""
    with needs_serve():
        from fastlm.serve.feedback_store import FeedbackStore
    return FeedbackStore(database, create=False)


@contextmanager
def needs_serve(command: str = "feedback") -> Iterator[None]:
    """Context: of imports. InputError: a package is missing."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{command}: expected the package {error.name}, not found: pip install 'fastlm[serve]'"
        ) from None
