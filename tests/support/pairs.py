"""Select fewer combinations of a test's parameters: enough for every two values to meet.

A fault that depends on one or two parameters (an option on an instruction set, a dtype at a ragged
shape) is still found. A fault that depends on three is left to all combinations.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import pytest


def all_pairs(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the tests that cover, for each test function, all pairs of values of its parameters.

    The choice depends on the parameters alone, so every process of a run makes the same choice.
    """
    functions = defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    selected = set()
    for function, of_function in functions.items():
        pairs = {item: _pairs(item) for item in of_function}
        uncovered = set().union(*pairs.values())
        if not uncovered:  # at most one parameter
            selected.update(of_function)
            continue
        order = sorted(of_function, key=lambda item: item.nodeid)
        random.Random(function).shuffle(order)
        # greedy: first the tests that cover most, down to tests that cover a single new pair
        for new in range(max(map(len, pairs.values())), 0, -1):
            for item in order:
                if item not in selected and len(pairs[item] & uncovered) >= new:
                    selected.add(item)
                    uncovered -= pairs[item]
    return [item for item in items if item in selected]


def _pairs(item: pytest.Item) -> set[tuple]:
    """Return the pairs of (parameter, value) of a test."""
    call = getattr(item, "callspec", None)
    values = [(name, repr(value)) for name, value in sorted(call.params.items())] if call else []
    return set(combinations(values, 2))
