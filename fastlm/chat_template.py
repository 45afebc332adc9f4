"""Chat templates: Jinja text that came with a checkpoint, rendered as transformers renders it, in a
sandbox.

A template is code from a stranger, so it runs in jinja2's immutable sandbox and sees plain data
only. The functions it may call beyond Jinja's own are those that published templates rely on:
``raise_exception``, ``tojson`` without HTML escapes, ``strftime_now``, and the ``{% generation %}``
block, which marks text for training and renders as is.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastlm.errors import InputError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it off the class)

    def parse(self, parser):  # type: ignore[override]
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@lru_cache(maxsize=16)  # a server holds a handful of templates
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise, strftime_now=_now)
    return environment.from_string(template)


def plain(value: Any, text: Any = str) -> Any:
    """A copy of JSON-like ``value`` with ``text`` applied to each string; anything else is
    refused.
    """
    if isinstance(value, str):
        return text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        # keys are the template's vocabulary, not the user's text
        return {str(key): plain(item, text) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item, text) for item in value]
    raise InputError(
        f"messages: wanted text, numbers, lists and mappings, got {type(value).__name__}"
    )


def render(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """The prompt that ``template`` makes of ``messages``: mappings with a text ``role`` (and
    ``content``).
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages: wanted a list of mappings, got {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(
                f"messages[{index}]: wanted a mapping with a text 'role', got {message!r:.80}"
            )
    # as transformers: an entry of None is no entry, and these two are always defined
    given = [{k: v for k, v in plain(message).items() if v is not None} for message in messages]
    variables = {"tools": None, "documents": None, **variables}
    try:
        return _compile(template).render(messages=given, **variables)
    except RecursionError:
        raise InputError(
            "chat_template: wanted a template that ends, it recurses without end"
        ) from None
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"chat_template: cannot render these messages: {reason}") from error
