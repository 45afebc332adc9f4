"""Where a model comes from, as a tree: the stages, back to the sources of its text."""

from collections.abc import Mapping
from typing import Any

from fastlm.pipeline.registry import SHORT, Known, Registry
from fastlm.pipeline.scores import headline
from fastlm.pipeline.text import seconds_text

NOT_RECORDED = "not recorded"


def tree(registry: Registry, record: Known) -> dict[str, Any]:
    """The lineage of a record, JSON-serialisable: each node has what is known of its stage,
    "inputs" (a node each, with "input") and "sources". A stage that appears a second time has
    neither.
    """
    return _node(registry, record, set())


def _node(registry: Registry, record: Known, seen: set[str]) -> dict[str, Any]:
    made = record.made
    node: dict[str, Any] = {
        "name": record.name, "kind": record.entry.kind, "record": record.id, "ids": record.ids,
        "state": record.state, "place": str(record.place), "finished": record.finished,
        "seconds": record.entry.seconds, "options": record.entry.options,
        "code": made.code, "headline": headline(record.entry),
    }  # fmt: skip
    if record.id in seen:
        return node | {"repeated": True}
    seen.add(record.id)
    inputs = []
    for key, read, maker in registry.parents(record):
        if maker is not None:
            inputs.append({"input": key, "id": read["id"], **_node(registry, maker, seen)})
        else:
            inputs.append({"input": key, "name": read["name"], "id": read["id"], "outside": True})
    return node | {"inputs": inputs, "sources": list(made.sources)}


def shown(node: Mapping[str, Any]) -> Any:
    """The tree as text for a terminal."""
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text(_line(node)))
    _grow(root, node)
    return root


def _grow(branch: Any, node: Mapping[str, Any]) -> None:
    from rich.text import Text

    for source in node.get("sources") or ():
        branch.add(Text(f"source {source_line(source)}"))
    for inner in node.get("inputs", ()):
        _grow(branch.add(Text(f"{inner['input']}: {_line(inner)}")), inner)


def source_line(source: Mapping[str, Any]) -> str:
    facts = [source["spec"]]
    if source.get("package"):
        facts.append(source["package"])
    if source.get("count"):
        facts.append(f"{source['count']:,} files")
    return ", ".join([*facts, f"licence: {source.get('licence') or NOT_RECORDED}"])


def _line(node: Mapping[str, Any]) -> str:
    if node.get("outside"):
        return f"{node['name']}, from outside, id {(node['id'] or NOT_RECORDED)[:SHORT]}"
    ids = node["ids"]
    id = node.get("id") or ids.get("model") or next(iter(ids.values()), NOT_RECORDED)
    facts = [f"{node['name']} ({node['kind']})", f"id {id[:SHORT]}"]
    if node.get("repeated"):
        return ", ".join([*facts, "see above"])
    facts.append(node["finished"][:16].replace("T", " "))
    if node["seconds"] is not None:
        facts.append(seconds_text(node["seconds"]))
    if node["headline"]:
        facts.append(node["headline"])
    if node["state"] != "here":
        facts.append(node["state"])
    return ", ".join(facts)
