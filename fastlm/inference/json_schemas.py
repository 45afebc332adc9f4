"""JSON schemas as they are meant: an object has the properties that its schema lists, no others.

JSON schema lets an object have any further properties, and a model that may write them does not
stop. Here `additionalProperties` is false where a schema lists properties and does not mention it,
as in llama.cpp and as OpenAI demands it; `true` or a schema stays what it is.

Where properties stand in several schemas about one object (`allOf`, or `$ref`, `anyOf`, `oneOf`
beside `properties`), none of them is closed, but all of them together: by one more schema, which
knows the names of all.
"""

from typing import Any

from fastlm.errors import InputError

MAX_DEPTH = 64  # of nested schemas; those of published APIs have up to 20
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
ONE = ("items", "additionalProperties", "additionalItems", "contains", "unevaluatedItems")
TABLES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SEVERAL = ("allOf", "anyOf", "oneOf")
DECIDES = ("additionalProperties", "unevaluatedProperties")
# keywords about an object: beside one of them a reference does not describe the object alone
ABOUT = (*DECIDES, "properties", "patternProperties", "required", "minProperties", "maxProperties")


def close_objects(schema: Any) -> Any:
    """Return a copy of a schema whose objects are closed. InputError: it is nested too deeply, or
    its references are."""
    if isinstance(schema, dict):
        _check_depth(schema)
    try:
        return _Closer(schema).root()
    except RecursionError:
        raise InputError(
            "expected a shorter chain of references ($ref), got too long a one"
        ) from None


def close_arguments(parameters: Any) -> dict[str, Any]:
    """Return the schema of a function's arguments; a function without parameters takes none."""
    parameters = dict(parameters or {})
    if not any(key in parameters for key in (*SEVERAL, *DECIDES, "patternProperties", "$ref")):
        parameters.setdefault("properties", {})
    return close_objects({"type": "object", **parameters})


class _Closer:
    def __init__(self, schema: Any):
        self._schema = schema
        self._open: dict[str, str] = {}  # reference -> name of its copy that is not closed
        self._copies: dict[str, Any] = {}

    def root(self) -> Any:
        closed = self._whole(self._schema)
        if self._copies:
            closed = {**closed, "$defs": {**closed.get("$defs", {}), **self._copies}}
        return closed

    def _whole(self, schema: Any) -> Any:
        """Close a schema that says all there is to say of a value."""
        if not isinstance(schema, dict):
            return schema
        several = [key for key in SEVERAL if isinstance(schema.get(key), list)]
        about = any(key in schema for key in ABOUT)
        parts = len(several) + ("$ref" in schema)
        alone = parts == 1 and not about and len(schema.get("allOf", ())) < 2
        if parts and not alone:
            return self._together(schema)
        closed = self._inside(schema, self._whole)
        if ("properties" in schema or "patternProperties" in schema) and not any(
            key in schema for key in DECIDES
        ):
            closed["additionalProperties"] = False
            if isinstance(schema.get("properties"), dict):
                closed["properties"] = {**closed["properties"], **_missing(schema)}
        return closed

    def _together(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Close several schemas about one object."""
        closed, parts = self._part(schema), self._parts(schema, set())
        names: dict[str, Any] = {}
        for part in parts:
            if any(key in part for key in (*DECIDES, "patternProperties")):
                return closed
            if isinstance(properties := part.get("properties"), dict):
                names |= dict.fromkeys(properties, True)
            names |= _missing(part)
        if names:
            only = {"properties": names, "additionalProperties": False}
            closed["allOf"] = [*closed.get("allOf", ()), only]
        return closed

    def _part(self, schema: Any) -> Any:
        """Close what is inside a schema, which is one of several about the same value."""
        if not isinstance(schema, dict):
            return schema
        part = self._inside(schema, self._part)
        if (target := self._target(schema)) is not None:
            reference = schema["$ref"]
            if reference not in self._open:
                name = f"open{len(self._open)}"
                while name in self._schema.get("$defs", {}):
                    name += "_"
                self._open[reference] = name
                without = {k: v for k, v in target.items() if k not in ("$defs", "definitions")}
                self._copies[name] = self._part(without)
            part["$ref"] = f"#/$defs/{self._open[reference]}"
        return part

    def _inside(self, schema: dict[str, Any], part: Any) -> dict[str, Any]:
        """Close the schemas within a schema; ``part`` closes those about the same value."""
        closed = dict(schema)
        for key, value in schema.items():
            close = part if key in SEVERAL else self._whole
            if key in LISTS and isinstance(value, list):
                closed[key] = [close(one) for one in value]
            elif key in ONE and isinstance(value, dict):
                closed[key] = self._whole(value)
            elif key in TABLES and isinstance(value, dict):
                closed[key] = {name: self._whole(one) for name, one in value.items()}
        return closed

    def _parts(self, schema: Any, references: set[str]) -> list[dict[str, Any]]:
        """All schemas about the value that ``schema`` is about. ``references``: those that were
        followed before; each is followed once, or n of them could lead to 2^n schemas."""
        if not isinstance(schema, dict):
            return []
        parts = [schema]
        for key in SEVERAL:
            for one in schema[key] if isinstance(schema.get(key), list) else ():
                parts += self._parts(one, references)
        target = self._target(schema)
        if target is not None and schema["$ref"] not in references:
            references.add(schema["$ref"])
            parts += self._parts(target, references)
        return parts

    def _target(self, schema: dict[str, Any]) -> dict[str, Any] | None:
        """The schema of this file that a schema refers to, if there is one without an id."""
        reference, node = schema.get("$ref"), self._schema
        if not isinstance(reference, str) or not (reference == "#" or reference[:2] == "#/"):
            return None
        for key in reference.split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and key.isascii() and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            elif isinstance(node, dict) and key in node:
                node = node[key]
            else:
                return None
        return node if isinstance(node, dict) and "$id" not in node else None


def _missing(schema: dict[str, Any]) -> dict[str, Any]:
    """The properties that a schema requires and does not list: they may be anything."""
    required, properties = schema.get("required"), schema.get("properties", {})
    names = required if isinstance(required, list) else []
    return {n: True for n in names if isinstance(n, str) and n not in properties}


def _check_depth(schema: Any) -> None:
    nodes, depth = [schema], 0
    while nodes:
        depth += 1
        if depth > 2 * MAX_DEPTH:  # a schema, and the table or list that holds it
            raise InputError(f"expected at most {MAX_DEPTH} schemas within each other, got more")
        inner = [node.values() if isinstance(node, dict) else node for node in nodes]
        nodes = [one for values in inner for one in values if isinstance(one, dict | list)]
