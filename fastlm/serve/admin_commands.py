"""``fastlm promote`` and ``fastlm rollback``: change the model of a running server."""

import json
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlm.errors import InputError
from fastlm.terminal import echo

TIMEOUT = 1800  # seconds; a large model takes long to load
Server = Annotated[str, typer.Option(help="Call `fastlm serve` at this address, on this machine")]
Key = Annotated[
    str | None,
    typer.Option(
        envvar="FASTLM_API_KEY", help="Send this admin key (servers with API keys need one)"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]


def promote(
    model: Annotated[
        str | None,
        typer.Argument(help="Promote this model (default: the canary)", show_default=False),
    ] = None,
    allow_other_tokenizer: Annotated[
        bool,
        typer.Option("--allow-other-tokenizer", help="Accept a model with another tokenizer"),
    ] = False,
    server: Server = "http://127.0.0.1:8000",
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Replace the model of a running server without losing a request.

    The server loads the new model while the old one answers, tests it, and sends it all new
    requests. It frees the old model after its last answer. The server must run with --canary or
    --models-dir, which define the models that it may load.
    """
    path = model
    if model is not None and Path(model).exists():  # else it is a path below --models-dir
        path = str(Path(model).resolve())
    body = {} if path is None else {"model": path, "allow_other_tokenizer": allow_other_tokenizer}
    _change(server, "promote", body, api_key, as_json)


def rollback(
    server: Server = "http://127.0.0.1:8000", api_key: Key = None, as_json: AsJson = False
) -> None:
    """End the canary, or return to the model before the last promotion, without losing a request.

    The server loads that model again, and refuses it if its files have changed.
    """
    _change(server, "rollback", {}, api_key, as_json)


def _change(server: str, action: str, body: dict[str, Any], key: str | None, as_json: bool) -> None:
    """Send a change to the server and print the model that it serves. InputError: the server
    refuses, or cannot be reached."""
    if not server.startswith(("http://", "https://")):
        raise InputError(f"server: expected http://HOST:PORT, got {server!r:.80}")
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    url = f"{server.rstrip('/')}/v1/admin/{action}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    # no proxy: the server accepts changes from this machine only
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT) as response:
            status = json.load(response)
    except urllib.error.HTTPError as error:
        message = f"status {error.code}"
        with error, suppress(ValueError, KeyError, TypeError):
            message = json.load(error)["error"]["message"]
        if error.code == 404:
            message = "the server changes no models (fastlm serve --canary or --models-dir)"
        raise InputError(f"{action}: refused: {message}") from None
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        raise InputError(f"server: expected `fastlm serve` at {server}, got: {cause}") from None
    echo(json.dumps(status) if as_json else f"{status['path']} answers as {status['model']}")
