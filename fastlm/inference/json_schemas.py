"""Closed JSON schemas: an object has the properties that its schema lists, and no others.

JSON schema lets an object have any further properties, and a model that may write them does not
stop. Here `additionalProperties` is false where a schema lists properties and does not mention it,
as in llama.cpp and as OpenAI requires. `true` or a schema stays as it is.

Where several schemas list properties of one object (`allOf`, or `properties` together with `$ref`,
`anyOf` or `oneOf`), none of them is closed alone. One more schema with the names of all properties
closes them jointly.
"""

from typing import Any

from fastlm.errors import InputError

MAX_DEPTH = 64  # of nested schemas; those of published APIs have up to 20
LIST_KEYS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
SCHEMA_KEYS = ("items", "additionalProperties", "additionalItems", "contains", "unevaluatedItems")
TABLE_KEYS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
COMBINERS = ("allOf", "anyOf", "oneOf")
CLOSING_KEYS = ("additionalProperties", "unevaluatedProperties")
# keywords that constrain an object: together with one of them, a reference is not all that does
OBJECT_KEYS = (
    *CLOSING_KEYS,
    "properties",
    "patternProperties",
    "required",
    "minProperties",
    "maxProperties",
)


def close_objects(schema: Any) -> Any:
    """Return a copy of a schema in which objects are closed. InputError: the schema or its
    references are nested too deeply."""
    if isinstance(schema, dict):
        _check_depth(schema)
    try:
        return _Closer(schema).root()
    except RecursionError:
        raise InputError(
            "expected a shorter chain of references ($ref), got one that is too long"
        ) from None


def close_arguments(parameters: Any) -> dict[str, Any]:
    """Return the schema of a function's arguments; a function without parameters takes none."""
    parameters = dict(parameters or {})
    if not any(
        key in parameters for key in (*COMBINERS, *CLOSING_KEYS, "patternProperties", "$ref")
    ):
        parameters.setdefault("properties", {})
    return close_objects({"type": "object", **parameters})


class _Closer:
    """Closes the objects of one schema."""

    def __init__(self, schema: Any):
        self._schema = schema
        self._open: dict[str, str] = {}  # reference -> name of its copy that is not closed
        self._copies: dict[str, Any] = {}

    def root(self) -> Any:
        """Return the closed schema."""
        closed = self._close(self._schema)
        if self._copies:
            closed = {**closed, "$defs": {**closed.get("$defs", {}), **self._copies}}
        return closed

    def _close(self, schema: Any) -> Any:
        """Close a schema that alone describes a value."""
        if not isinstance(schema, dict):
            return schema
        combiners = [key for key in COMBINERS if isinstance(schema.get(key), list)]
        constrains_object = any(key in schema for key in OBJECT_KEYS)
        parts = len(combiners) + ("$ref" in schema)
        is_single = parts == 1 and not constrains_object and len(schema.get("allOf", ())) < 2
        if parts and not is_single:
            return self._close_jointly(schema)
        closed = self._close_subschemas(schema, self._close)
        if ("properties" in schema or "patternProperties" in schema) and not any(
            key in schema for key in CLOSING_KEYS
        ):
            closed["additionalProperties"] = False
            if isinstance(schema.get("properties"), dict):
                closed["properties"] = {**closed["properties"], **_unlisted_properties(schema)}
        return closed

    def _close_jointly(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Close several schemas that describe one object."""
        closed, parts = self._close_inner(schema), self._parts(schema, set())
        names: dict[str, Any] = {}
        for part in parts:
            if any(key in part for key in (*CLOSING_KEYS, "patternProperties")):
                return closed
            if isinstance(properties := part.get("properties"), dict):
                names |= dict.fromkeys(properties, True)
            names |= _unlisted_properties(part)
        if names:
            closing = {"properties": names, "additionalProperties": False}
            closed["allOf"] = [*closed.get("allOf", ()), closing]
        return closed

    def _close_inner(self, schema: Any) -> Any:
        """Close the subschemas of a schema that is one of several about the same value."""
        if not isinstance(schema, dict):
            return schema
        part = self._close_subschemas(schema, self._close_inner)
        if (target := self._target(schema)) is not None:
            reference = schema["$ref"]
            if reference not in self._open:
                name = f"open{len(self._open)}"
                while name in self._schema.get("$defs", {}):
                    name += "_"
                self._open[reference] = name
                copy = {k: v for k, v in target.items() if k not in ("$defs", "definitions")}
                self._copies[name] = self._close_inner(copy)
            part["$ref"] = f"#/$defs/{self._open[reference]}"
        return part

    def _close_subschemas(self, schema: dict[str, Any], close_part: Any) -> dict[str, Any]:
        """Close the subschemas of a schema; ``close_part`` closes those about the same value."""
        closed = dict(schema)
        for key, value in schema.items():
            close = close_part if key in COMBINERS else self._close
            if key in LIST_KEYS and isinstance(value, list):
                closed[key] = [close(item) for item in value]
            elif key in SCHEMA_KEYS and isinstance(value, dict):
                closed[key] = self._close(value)
            elif key in TABLE_KEYS and isinstance(value, dict):
                closed[key] = {name: self._close(item) for name, item in value.items()}
        return closed

    def _parts(self, schema: Any, references: set[str]) -> list[dict[str, Any]]:
        """Return all schemas about the value that ``schema`` describes. ``references``: those that
        were followed before. Each is followed once, or n of them could lead to 2^n schemas."""
        if not isinstance(schema, dict):
            return []
        parts = [schema]
        for key in COMBINERS:
            for item in schema[key] if isinstance(schema.get(key), list) else ():
                parts += self._parts(item, references)
        target = self._target(schema)
        if target is not None and schema["$ref"] not in references:
            references.add(schema["$ref"])
            parts += self._parts(target, references)
        return parts

    def _target(self, schema: dict[str, Any]) -> dict[str, Any] | None:
        """Return the schema of this document that a schema refers to, or None: none, or it has an
        id."""
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


def _unlisted_properties(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the properties that a schema requires and does not list. They may have any value."""
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
        nodes = [item for values in inner for item in values if isinstance(item, dict | list)]
