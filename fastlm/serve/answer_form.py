"""The form that a request wants its answer to have: JSON, a schema, a regular expression, one of
some texts, a grammar, calls of tools. `fastlm.inference.structured_output` compiles it.
"""

from collections.abc import Mapping
from typing import Any

from fastlm.inference.forms import Form
from fastlm.serve.api_error import ApiError


def response_form(response_format: Mapping[str, Any] | None) -> Form | None:
    kind = (response_format or {}).get("type") or "text"
    if kind == "text":
        return None
    if kind == "json_object":
        return Form("json_object", None, "response_format")
    schema = ((response_format or {}).get("json_schema") or {}).get("schema")
    if schema is None:
        at = "response_format.json_schema.schema"
        raise ApiError(f"{at}: expected a schema, got nothing", param=at)
    return Form("json_schema", schema, "response_format")


def structured_form(guided: Mapping[str, Any], structured: Mapping[str, Any] | None) -> Form | None:
    """Return the form of ``structured_outputs``, or of its older names, ``guided_KIND``."""
    forms = [(kind, value, f"guided_{kind}") for kind, value in guided.items() if value is not None]
    if structured is not None:
        kinds = [(k, v, f"structured_outputs.{k}") for k, v in structured.items() if v is not None]
        if len(kinds) != 1:
            raise ApiError(
                f"structured_outputs: expected one of {', '.join(guided)}, got {len(kinds)}",
                param="structured_outputs",
            )
        forms += kinds
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


def tools_form(choice: Any, tools: list[Any] | None, parallel: bool) -> Form | None:
    """Return the form of an answer that has to be a call, or whose calls have to keep to
    something. ``choice``: a mode, or the name of a function as {"name"}."""
    if tools is None:
        return None
    if choice in (None, "auto"):
        strict = any(tool["function"].get("strict") for tool in tools)
        if parallel and not strict:
            return None
        param = "tools" if strict else "parallel_tool_calls"
        return Form("calls", (tools, parallel), param)
    name = choice["name"] if isinstance(choice, dict) else None
    named = [tool for tool in tools if name in (None, tool["function"]["name"])]
    if not named:
        at = "tool_choice.function.name"
        raise ApiError(f"{at}: expected one of the tools, got {name!r}", param=at)
    return Form("call", named, "tool_choice")


def joined_form(
    form: Form | None, calls: Form | None, tools: list[Any] | None, parallel: bool
) -> Form | None:
    """Return the form of an answer that is to have ``form``, and whose calls need ``calls``. Where
    a call need not come, the answer is calls or has the form."""
    if form is None or tools is None:
        return form or calls
    if calls is not None and calls.kind == "call":
        return calls
    if form.kind not in ("json_object", "json_schema"):
        raise ApiError(
            f"{form.param}: expected without tools, or a JSON schema with them", param=form.param
        )
    return Form("calls_or", (tools, parallel, form), form.param)
