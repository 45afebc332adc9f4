"""``fastlm promote`` and ``fastlm rollback``: change the model of a running server."""

import json
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlm.errors import InputError

SECONDS = 1800  # until a large model is loaded
Server = Annotated[str, typer.Option(help="Where `fastlm serve` listens, on this machine")]
Key = Annotated[
    str | None,
    typer.Option(envvar="FASTLM_API_KEY", help="An admin key, where the server has API keys"),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON")]


def promote(
    model: Annotated[
        str | None, typer.Argument(help="As for serve; without it, the canary", show_default=False)
    ] = None,
    allow_other_tokenizer: Annotated[
        bool,
        typer.Option("--allow-other-tokenizer", help="Accept a model with another tokenizer"),
    ] = False,
    server: Server = "http://127.0.0.1:8000",
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let another model answer, without losing a request.

    The server loads it beside the one that answers, tries it, and gives it all new requests. Then
    the old one is freed, when its answers have ended. The server must run with --canary or
    --models-dir, and only loads what these allow.
    """
    path = model
    if model is not None and Path(model).exists():  # else it is one below --models-dir
        path = str(Path(model).resolve())
    body = {} if path is None else {"model": path, "allow_other_tokenizer": allow_other_tokenizer}
    _change(server, "promote", body, api_key, as_json)


def rollback(
    server: Server = "http://127.0.0.1:8000", api_key: Key = None, as_json: AsJson = False
) -> None:
    """End the canary, or go back to the model before the last promotion, without losing a request.

    The model is loaded again, and refused if its files have changed.
    """
    _change(server, "rollback", {}, api_key, as_json)


def _change(server: str, what: str, body: dict[str, Any], key: str | None, as_json: bool) -> None:
    """Ask the server and print what it serves. InputError: its refusal, or that it cannot be
    reached."""
    if not server.startswith(("http://", "https://")):
        raise InputError(f"server: expected http://HOST:PORT, got {server!r:.80}")
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    url = f"{server.rstrip('/')}/v1/admin/{what}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    # no proxy: the server only listens to this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=SECONDS) as response:
            told = json.load(response)
    except urllib.error.HTTPError as error:
        message = f"status {error.code}"
        with error, suppress(ValueError, KeyError, TypeError):
            message = json.load(error)["error"]["message"]
        if error.code == 404:
            message = "the server changes no models (fastlm serve --canary or --models-dir)"
        raise InputError(f"{what}: refused: {message}") from None
    except (OSError, ValueError) as error:
        text = getattr(error, "reason", error)
        raise InputError(f"server: expected `fastlm serve` at {server}, got: {text}") from None
    typer.echo(json.dumps(told) if as_json else f"{told['path']} answers as {told['model']}")
