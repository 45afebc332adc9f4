"""``fastlm serve`` and ``fastlm feedback``."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlm.errors import InputError
from fastlm.startup import imports
from fastlm.threads import Threads
from fastlm.tokenizer import chat_template as templates

if TYPE_CHECKING:
    from fastlm.serve.feedback import FeedbackStore

LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEYS_VARIABLE = "FASTLM_API_KEYS"
ADMIN_KEYS_VARIABLE = "FASTLM_ADMIN_KEYS"
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#]+")
KV_DTYPES = ("float32", "bfloat16", "float16", "int8")

app = typer.Typer(
    help="What people said about answers of `fastlm serve`, as rows to train on.",
    no_args_is_help=True,
)
Database = Annotated[
    str, typer.Argument(help="SQLite file, or postgresql://USER@HOST/NAME", show_default=False)
]


def serve(
    model: Annotated[
        Path,
        typer.Option(
            "--model", "-m", help="Hugging Face folder, .gguf, fastlm run or model:smollm2"
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than this machine's needs API keys")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(
            help="What clients call the model; default: the folder's name, of model:smollm2 smollm2"
        ),
    ] = None,
    feedback: Annotated[
        str | None,
        typer.Option(help="Keep feedback in this SQLite file, or in postgresql://USER@HOST/NAME"),
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(help="TOML: numbers that people may give with --feedback (docs/serving.md)"),
    ] = None,
    alerts: Annotated[
        Path | None,
        typer.Option(help="TOML: rules for alerts about what --feedback measures of answers"),
    ] = None,
    measure_days: Annotated[
        float, typer.Option(min=1.0, help="Days that measures of answers are kept")
    ] = 90.0,
    measure_rows: Annotated[
        int,
        typer.Option(min=0, max=10**7, help="Measures kept at most; 0: nothing is measured"),
    ] = 100_000,
    rank: Annotated[
        str | None,
        typer.Option(help="Feedback database whose answers people rank at /rank (`fastlm rank`)"),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"API keys, one a line; or in the variable {KEYS_VARIABLE}, with commas"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name by which clients call this machine; may be given again"),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A web page's origin that may call the server (CORS), as https://example.org; '*':"
            " any, with API keys. May be given again"
        ),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file; default: the model's own template")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH: another adapter or model, which clients choose by this name. May be"
            " given again; each takes the memory of a model"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; default: the model's context")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request")] = 4 * 2**20,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in the queue")] = 256,
    max_rows: Annotated[int, typer.Option(min=1, help="Answers at the same time")] = 64,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of a prompt with its answer, at most (default: what the model allows);"
            " dynamic and longrope models turn by it",
        ),
    ] = None,
    pages: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**31 - 1,
            help="Pages of 64 tokens in the key/value cache, at most what fits the memory; default:"
            " --max-rows answers of 512 tokens with their prompts, or one whole context if that is"
            " more, within a quarter of the memory (on a GPU: --max-rows contexts, within half of"
            " its free memory)",
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Of cached keys and values: {', '.join(KV_DTYPES)}; default: the model's, float16"
            " where its activations are rounded to 8 bits"
        ),
    ] = None,
    draft_model: Annotated[
        Path | None,
        typer.Option(
            help="A smaller model with the same tokenizer, which guesses the next tokens; the"
            " answers stay the same"
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens that a step guesses; without --draft-model from the prompt, for answers"
            " that repeat it. Default: 4 with --draft-model, else 0",
        ),
    ] = None,
    max_connections: Annotated[int, typer.Option(min=1)] = 1024,
    max_seconds: Annotated[
        float, typer.Option(min=1.0, help="An answer ends after so many seconds as it is")
    ] = 600.0,
    drain: Annotated[
        float, typer.Option(min=0.0, help="Seconds that answers may take to end after SIGTERM")
    ] = 30.0,
    act_bits: Annotated[int | None, typer.Option(help="As for generate")] = None,
    canary: Annotated[
        str | None,
        typer.Option(
            help="A model that may take over: it answers --share of the conversations until a test"
            " promotes it or rolls it back (with --feedback)"
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="Of the conversations, for --canary")] = 0.1,
    canary_metric: Annotated[
        str,
        typer.Option(
            help="What is a success: thumb (up), pick (preferred over the other model's answer),"
            " stop (the answer ended by itself), or a number of --metrics (in the better half)"
        ),
    ] = "thumb",
    canary_rule: Annotated[
        str,
        typer.Option(
            help="superiority: promote a canary that is better; non-inferiority: one that is worse"
            " by less than --canary-margin"
        ),
    ] = "superiority",
    canary_margin: Annotated[float, typer.Option(help="Of the success rate")] = 0.05,
    canary_alpha: Annotated[
        float, typer.Option(help="Chance of a promotion that the rule does not want")
    ] = 0.05,
    canary_most: Annotated[
        int, typer.Option(help="Outcomes after which the old model stays")
    ] = 5000,
    models_dir: Annotated[
        Path | None, typer.Option(help="`fastlm promote` may load models below this folder")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="What was decided, for the next start; default: next to the --feedback file"
        ),
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(help=f"Keys that may promote and roll back; or in {ADMIN_KEYS_VARIABLE}"),
    ] = None,
    threads: Threads = None,
) -> None:
    """Serve a model over HTTP as OpenAI's API, with a page to chat at /.

    Requests share the model and its key/value cache. Ctrl-C or SIGTERM ends the server when the
    running answers have ended. docs/serving.md has the API and the limits.
    """
    keys = read_keys(api_key_file)
    admins = read_keys(admin_key_file, "admin_key_file", ADMIN_KEYS_VARIABLE)
    if admins and not keys:
        raise InputError("admin_key_file: wanted API keys, too (--api-key-file), got none")
    if host not in LOOPBACK and not keys:
        raise InputError(f"host: wanted API keys (--api-key-file) to listen on {host}, got none")
    origins = allow_origin or []
    for origin in origins:
        if origin == "*" and not keys:
            raise InputError("allow_origin: expected API keys (--api-key-file) with '*', got none")
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise InputError(
                "allow_origin: expected '*' or a page's scheme, host and port, as"
                f" https://example.org, got {origin!r:.80}"
            )
    adapters = {}
    for given in adapter or []:
        key, _, path = given.partition("=")
        if not key or not path or not key.isprintable() or key in adapters:
            raise InputError(f"adapter: expected NAME=PATH, each name once, got {given!r:.200}")
        adapters[key] = Path(path)
    if kv_dtype not in (None, *KV_DTYPES):
        raise InputError(f"kv_dtype: wanted {', '.join(KV_DTYPES)}, got {kv_dtype!r:.80}")
    for option, file in (("metrics", metrics), ("alerts", alerts)):
        if file is not None and feedback is None:
            raise InputError(f"{option}: wanted with --feedback, which has none")
    plan = None
    if canary is not None:
        if feedback is None:
            raise InputError("canary: wanted --feedback, where its outcomes are kept, got none")
        from fastlm.serve.plan import Plan
        from fastlm.serve.ratings import read_ratings

        declared = [] if metrics is None else read_ratings(metrics)
        plan = Plan(
            share, canary_metric, canary_rule, canary_margin, canary_alpha, canary_most,
            next((one for one in declared if one.name == canary_metric), None),
        )  # fmt: skip
    changes = canary is not None or models_dir is not None
    if changes and state is None:
        if feedback is None or "://" in feedback:
            raise InputError("state: wanted a file for what is decided (--state), got none")
        state = Path(f"{feedback}.models.json")
    templates.begin()
    try:
        with imports():
            from fastlm.serve import process
        if feedback is not None:
            import fastlm.serve.feedback  # noqa: F401  # a missing package is named below
    except ImportError as error:
        raise InputError(
            f"serve: wanted the package {error.name}, not found: pip install 'fastlm[serve]'"
        ) from None
    process.run(
        model, host=host, port=port, name=name, feedback=feedback, metrics=metrics, alerts=alerts,
        measure_days=measure_days, measure_rows=measure_rows, rank=rank, keys=keys,
        allow_host=allow_host or [], origins=origins, chat_template=chat_template,
        adapters=adapters, max_new_tokens=max_new_tokens, max_body=max_body,
        max_waiting=max_waiting, max_rows=max_rows, max_length=max_length, pages=pages,
        kv_dtype=kv_dtype,
        draft_model=draft_model, draft_tokens=draft_tokens, max_connections=max_connections,
        max_seconds=max_seconds, drain=drain, act_bits=act_bits, canary=canary, plan=plan,
        models_dir=models_dir, state=state if changes else None, admins=admins,
    )  # fmt: skip


def read_keys(
    file: Path | None, option: str = "api_key_file", variable: str = KEYS_VARIABLE
) -> list[str]:
    """The keys of a file, else of the environment. InputError: one is short or repeated."""
    import os

    if file is None:
        keys = [key.strip() for key in os.environ.get(variable, "").split(",")]
    else:
        from fastlm.files import read_text

        keys = [line.strip() for line in read_text(file, 2**20).splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    for number, key in enumerate(keys, 1):
        if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                f"{option}: wanted keys of 16 or more printable characters, key {number} is not"
            )
    if file is not None and not keys:
        raise InputError(f"{option}: wanted one key or more, got none in {file}")
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
    import json

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
        raise InputError(f"id: wanted one of the database, got {id!r:.80}")
    typer.echo(f"{id}: {gone:,} rows deleted")


def open_store(database: str) -> "FeedbackStore":
    """The database, which must exist."""
    with needs_serve():
        from fastlm.serve.feedback import FeedbackStore
    return FeedbackStore(database, create=False)


@contextmanager
def needs_serve() -> Iterator[None]:
    """Context: of imports. InputError: a package is missing."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"feedback: wanted the package {error.name}, not found: pip install 'fastlm[serve]'"
        ) from None
