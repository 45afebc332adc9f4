"""A bound on how much longer a tokenizer.json can make a text before it is split into tokens."""

import json
from typing import Any

from fastlm.errors import InputError

# The product over all replacements of a text that is encoded or decoded. Published files write a
# space as U+2581 or remove a few characters; 40 rules `a -> aa` would write 2**40 characters for
# one.
MAX_GROWTH = 64


def check_growth(text: str) -> None:
    """Raise InputError if the replacements of a tokenizer.json can multiply the length of a text by
    more than `MAX_GROWTH`. A file that is not JSON is left to the library."""
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        return
    if not isinstance(state, dict):
        return
    growth = 1.0
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if part == "decoder":  # of another text
            growth = 1.0
        nodes = [state.get(part)]
        while nodes:
            node = nodes.pop()
            if isinstance(node, list):
                nodes += node
            elif isinstance(node, dict):
                growth *= _growth(node) if node.get("type") == "Replace" else 1.0
                nodes += node.values()
        if growth > MAX_GROWTH:
            raise InputError(
                f"{part}: expected replacements that make a text at most {MAX_GROWTH} times as"
                " long, got more"
            )


def _growth(rule: dict[str, Any]) -> float:
    """Return how many characters one character of a text can become."""
    content, pattern = rule.get("content"), rule.get("pattern")
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0  # refused by the library
    string = pattern.get("String")
    if isinstance(string, str) and string:
        return max(1.0, len(content) / len(string))
    return 1.0 + len(content)  # an expression may match nothing, before each character
