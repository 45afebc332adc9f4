"""The form that a request wants its answer to have: JSON, a schema, a regular expression, one of
some texts, a grammar, calls of tools. `fastlm.inference.structured_output` compiles it.
"""

from collections.abc import Mapping
from typing import Any

from fastlm.inference.forms import Form
from fastlm.serve.fields import ApiError, Field, choice, flag, list_of, table, text, wrong


def _schema(value: Any, name: str) -> Any:
    if not isinstance(value, dict | bool):
        raise wrong(name, "a JSON schema", value)
    return value


SCHEMA = Field(_schema, {"type": ["object", "boolean"]})
RESPONSE_FORMAT = {
    "type": choice("text", "json_object", "json_schema", default="text"),
    "json_schema": table(
        {
            "name": text(64),
            "description": text(1024, empty=True),
            "schema": SCHEMA,
            "strict": flag(True),  # answers keep to the schema either way
        }
    ),
}
STRUCTURED = {
    "json": SCHEMA,
    "regex": text(2**16),
    "choice": list_of(text(2**12), 1, 1024),
    "grammar": text(2**16),
}
GUIDED = {f"guided_{kind}": field for kind, field in STRUCTURED.items()}  # vLLM's older names


def response_form(given: Mapping[str, Any] | None) -> Form | None:
    """The form of a ``response_format``, which was read by `RESPONSE_FORMAT`."""
    if given is None or given["type"] == "text":
        return None
    if given["type"] == "json_object":
        return Form("json_object", None, "response_format")
    schema = (given["json_schema"] or {}).get("schema")
    if schema is None:
        raise ApiError(
            "response_format.json_schema.schema: wanted a schema, got none",
            param="response_format.json_schema.schema",
        )
    return Form("json_schema", schema, "response_format")


def structured_form(given: Mapping[str, Any]) -> Form | None:
    """The form of ``structured_outputs``, or of its older names ``guided_...``."""
    forms = [
        (kind, given[name], name)
        for name, field in GUIDED.items()
        if given[name] not in (None, field.default)
        for kind in (name.removeprefix("guided_"),)
    ]
    if (structured := given["structured_outputs"]) is not None:
        found = [
            (kind, value, f"structured_outputs.{kind}")
            for kind, value in structured.items()
            if value not in (None, ())
        ]
        if len(found) != 1:
            raise ApiError(
                f"structured_outputs: wanted one of {', '.join(STRUCTURED)}, got {len(found)}",
                param="structured_outputs",
            )
        forms += found
    if len(forms) > 1:
        param = forms[0][2]
        raise ApiError(
            f"{param}: expected one form of the answer, got {' and '.join(f[2] for f in forms)}",
            param=param,
        )
    if not forms:
        return None
    ((kind, value, param),) = forms
    return Form("json_schema" if kind == "json" else kind, value, param)


def tools_form(chosen: Any, tools: list[Any] | None, parallel: bool) -> Form | None:
    """The form of an answer that has to be a call, or whose calls have to keep to something."""
    if tools is None:
        return None
    if chosen in (None, "auto"):
        strict = any(tool["function"].get("strict") for tool in tools)
        if parallel and not strict:
            return None
        param = "tools" if strict else "parallel_tool_calls"
        return Form("calls", (tools, parallel), param)
    name = chosen["name"] if isinstance(chosen, dict) else None
    named = [tool for tool in tools if name in (None, tool["function"]["name"])]
    if not named:
        raise ApiError(
            f"tool_choice.function.name: wanted one of the tools, got {name!r}",
            param="tool_choice.function.name",
        )
    return Form("call", named, "tool_choice")


def joined_form(
    wanted: Form | None, called: Form | None, tools: list[Any] | None, parallel: bool
) -> Form | None:
    """The form of an answer from the one that is ``wanted`` and the one that its calls need: where
    a call need not come, the answer is calls or has the form."""
    if wanted is None or tools is None:
        return wanted or called
    if called is not None and called.kind == "call":
        return called
    if wanted.kind not in ("json_object", "json_schema"):
        raise ApiError(
            f"{wanted.param}: expected without tools, or a JSON schema with them",
            param=wanted.param,
        )
    return Form("calls_or", (tools, parallel, wanted), wanted.param)
