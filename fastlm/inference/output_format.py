"""The format that an answer must have: JSON, a JSON schema, a regular expression, one of several
texts, a grammar, tool calls. `fastlm.inference.structured_output` compiles it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"  # around a call in text


@dataclass(frozen=True)
class GenericTools:
    """Tools that an answer in the format of `fastlm.serve.generic_tools` may call.

    parallel: one answer may have several calls.
    required: the answer must be calls.
    response: the JSON schema of an answer without calls.
    """

    tools: Sequence[Any]
    parallel: bool
    required: bool
    response: Any


@dataclass(frozen=True)
class OutputFormat:
    """The format that an answer must have. ``param``: the field of the request that sets it.
    ``kind`` and ``value``:

    - "json_object"; "json_schema", "regex", "choice", "grammar" (Lark in the dialect of
      llguidance): the schema, expression, texts or grammar;
    - "call": a call of one of some tools, which are the value;
    - "calls": text that may contain calls; the tools, and whether there may be several calls;
    - "calls_or": calls, or another format; the tools, whether there may be several calls, and that
      `OutputFormat`;
    - "generic": the JSON of `fastlm.serve.generic_tools`; a `GenericTools`.
    """

    kind: str
    value: Any
    param: str
