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
from fastlm.startup import fast_imports
from fastlm.terminal import echo
from fastlm.tokenizer import chat_template as templates

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore

app = typer.Typer(
    help="Inspect and delete feedback on answers of `fastlm serve`; build training rows from it.",
    no_args_is_help=True,
)
Database = Annotated[
    str,
    typer.Argument(
        help="Read this SQLite file, or postgresql://USER@HOST/NAME", show_default=False
    ),
]


def _serve(options: ServeOptions) -> None:
    """Serve a model over HTTP with OpenAI's API, and a chat page at /.

    Requests share the model and its key/value cache. Ctrl-C or SIGTERM stops the server after the
    running answers. docs/serving.md describes formats, clients and limits,
    docs/serving-api.md the API.
    """
    keys = read_keys(options.api_key_file)
    admin_keys = read_keys(options.admin_key_file, "admin_key_file", ADMIN_KEYS_VARIABLE)
    options.check(keys, admin_keys)
    templates.start_worker()
    with needs_serve("serve"):
        with fast_imports():
            from fastlm.serve import process
        if options.feedback is not None:
            import fastlm.serve.feedback_store  # noqa: F401  # fails early if a package is missing
    process.run(options, keys, admin_keys)


serve = options_command(ServeOptions, _serve)


def read_keys(
    file: Path | None, option: str = "api_key_file", variable: str = KEYS_VARIABLE
) -> list[str]:
    """Read keys from a file, or else from the environment. InputError: a key is too short or has
    other characters."""
    if file is None:
        lines = os.environ.get(variable, "").split(",")
    else:
        lines = read_text(file, 2**20).splitlines()
    keys = [key.strip() for key in lines if key.strip() and not key.strip().startswith("#")]
    for number, key in enumerate(keys, 1):
        if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                f"{option}: expected keys of 16 or more printable characters, key {number} is not"
            )
    if file is not None and not keys:
        raise InputError(f"{option}: expected one key or more, got none in {file}")
    return keys


@app.command("show", short_help="Show counts of feedback and the newest comments.")
def show_command(
    database: Database,
    comments: Annotated[int, typer.Option(min=0, help="Show at most this many comments")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Show the numbers of stored answers, thumbs, comments, corrections and picks, and the newest
    comments.
    """
    with open_store(database) as store:
        counts, newest = store.counts(), store.comments(comments)
    if as_json:
        echo(json.dumps({**counts, "comments": newest}))
        return
    echo(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    for row in newest:
        target = row["response_id"] or f"conversation {row['conversation_id']}"
        choice = f", choice {row['choice']}" * (row["choice"] > 0)
        rater = f", {row['rater']}" * bool(row["rater"])
        thumb = f", thumb {row['thumb']}" * bool(row["thumb"])
        comment = " ".join(row["comment"].split())
        line = f"{row['created_at']} {target}{choice}{rater}{thumb}: {comment}"
        echo(line)


@app.command("forget", short_help="Delete a response or a conversation.")
def forget_command(
    database: Database,
    id: Annotated[str, typer.Argument(help="Delete the response or conversation with this id")],
) -> None:
    """Delete a response or a conversation: its text and its feedback."""
    with open_store(database) as store:
        count = store.forget(id)
    if not count:
        raise InputError(f"id: expected one of the database, got {id!r:.80}")
    echo(f"{id}: {count:,} rows deleted")


def open_store(database: str) -> "FeedbackStore":
    """Open an existing database."""
    with needs_serve():
        from fastlm.serve.feedback_store import FeedbackStore
    return FeedbackStore(database, create=False)


@contextmanager
def needs_serve(command: str = "feedback") -> Iterator[None]:
    """Convert an ImportError of the context into an InputError that names the missing package."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{command}: expected the package {error.name}, not found: pip install 'fastlm[serve]'"
        ) from None
