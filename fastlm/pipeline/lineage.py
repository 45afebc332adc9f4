"""Draw the lineage of a model as a tree: the stages, back to the sources of its text."""

from collections.abc import Mapping
from typing import Any

from fastlm.pipeline.record import headline
from fastlm.pipeline.registry import PRESENT, SHORT, Registry, RunRecord
from fastlm.pipeline.text import minute_text, seconds_text

NOT_RECORDED = "not recorded"


def tree(registry: Registry, record: RunRecord) -> dict[str, Any]:
    """Return the lineage of a record, JSON-serialisable. Each node has the facts of its stage,
    "inputs" (a node each, with "input") and "sources". A stage that appears a second time has
    neither.
    """
    return _node(registry, record, set())


def _node(registry: Registry, record: RunRecord, visited: set[str]) -> dict[str, Any]:
    node = record.table() | {
        "options": record.entry.options, "code": record.provenance.code,
        "headline": headline(record.entry),
    }  # fmt: skip
    if record.id in visited:
        return node | {"repeated": True}
    visited.add(record.id)
    inputs = []
    for key, input, maker in registry.parents(record):
        external = {"name": input["name"], "outside": True}
        inner = external if maker is None else _node(registry, maker, visited)
        inputs.append({"input": key, "id": input["id"], **inner})
    return node | {"inputs": inputs, "sources": list(record.provenance.sources)}


def render(node: Mapping[str, Any]) -> Any:
    """Return the tree as text for a terminal."""
    from rich.text import Text
    from rich.tree import Tree

    before = f"{node['input']}: " if "input" in node else ""
    branch = Tree(Text(before + _line(node)))
    for source in node.get("sources") or ():
        branch.add(Text(f"source {_source_line(source)}"))
    for inner in node.get("inputs", ()):
        branch.children.append(render(inner))
    return branch


def _source_line(source: Mapping[str, Any]) -> str:
    count = f"{source['count']:,} files" if source.get("count") else None
    licence = f"licence: {source.get('licence') or NOT_RECORDED}"
    return ", ".join(filter(None, (source["spec"], source.get("package"), count, licence)))


def _line(node: Mapping[str, Any]) -> str:
    if node.get("outside"):
        return f"{node['name']}, external, id {(node['id'] or NOT_RECORDED)[:SHORT]}"
    ids = node["ids"]
    id = node.get("id") or ids.get("model") or next(iter(ids.values()), NOT_RECORDED)
    facts = [f"{node['name']} ({node['kind']})", f"id {id[:SHORT]}"]
    if node.get("repeated"):
        return ", ".join([*facts, "see above"])
    duration = None if node["seconds"] is None else seconds_text(node["seconds"])
    state = None if node["state"] == PRESENT else node["state"]
    facts += filter(None, (minute_text(node["finished_at"]), duration, node["headline"], state))
    return ", ".join(facts)
