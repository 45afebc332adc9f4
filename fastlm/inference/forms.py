"""The form that an answer must have: JSON, a schema, a regular expression, one of some texts, a
grammar, calls of tools. `fastlm.inference.structured_output` compiles it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"  # around a call in text


@dataclass(frozen=True)
class GenericTools:
    """``tools`` that may be called; ``several`` in one answer; ``required``: the answer has to be
    calls; ``response``: the JSON schema of what else it may be."""

    tools: Sequence[Any]
    several: bool
    required: bool
    response: Any


@dataclass(frozen=True)
class Form:
    """The form that an answer must have. ``param``: the field that asks for it. ``kind`` and
    ``value``:

    - "json_object"; "json_schema", "regex", "choice", "grammar" (Lark, as llguidance reads it);
    - "call": a call of one of some tools, the value;
    - "calls": text with calls in it; the tools, and whether there may be several;
    - "calls_or": calls, or else a form; the tools, whether there may be several, and the `Form`;
    - "generic": the JSON of `fastlm.serve.generic_tools`; a `GenericTools`.
    """

    kind: str
    value: Any
    param: str
