"""Damage JSON values and bytes at random, and report the outcome of reading them."""

import copy
import math
import random

from fastlm.errors import InputError

LONG = "y" * 9000
VALUES = [
    None, True, False, 0, -1, 7, 2**31, 10**30, 0.5, math.inf, -0.0, "", "x", LONG, [], [1], ["a"],
    [[]], {}, {"a": 1}, {"content": []}, [None] * 2000,
]  # fmt: skip


def change_json(value, draw: random.Random):
    """Copy the JSON ``value``, with one item replaced, removed or added."""
    root = node = copy.deepcopy(value)
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = draw.choice(keys)
        if not isinstance(node[key], dict | list) or not node[key] or draw.random() < 0.3:
            break
        node = node[key]
    choice = draw.random()
    if choice < 0.2:
        del node[key]
    elif choice < 0.25 and isinstance(node, dict):
        node["surplus"] = draw.choice(VALUES)
    else:
        node[key] = draw.choice(VALUES)
    return root


def outcome(call) -> str:
    """Return "fine", or "refused" for an InputError of one short line. Raise any other error."""
    try:
        call()
        return "fine"
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) <= 1000, str(error)
        return "refused"


TEXTS = [b"\xff", b"\0", b"\xed\xa0\x80", b"[" * 20_000, b"{" * 20_000, b"- " * 20_000, b"9" * 5000,
         b"NaN", b"-1e999", b'"', b"'", b"\\", b"\n", b"\r\n", b": ", b"#", b"a." * 20_000, b"= 1",
         b"!!python/name:os.system ", b"&a [*a, *a]", b"? [a, b] : c\n", b"{{", b"%", b"\xc2\x85",
         b"2024-13-01", b"<<: ", b"0x" + b"f" * 5000, b"[[a]]\n", b"\t"]  # fmt: skip


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    """Copy ``data`` with a text inserted, a piece removed, or the end cut off, in any format."""
    at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    choice = draw.random()
    if choice < 0.5:
        return data[:at] + draw.choice(TEXTS) + data[at:]
    if choice < 0.7:
        return data[:at] + draw.choice(TEXTS) + data[min(end, at + 20) :]
    if choice < 0.9:
        return data[:at] + data[min(end, at + 20) :]
    return data[:at] if choice < 0.95 else data[at:]
