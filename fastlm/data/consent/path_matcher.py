"""Match paths with the patterns of robots.txt (RFC 9309, section 2.2.2), which TDMRep, AIPREF,
Content Signals, RSL and ai.txt use as well.

The matching is done by fast-robotstxt (Google's matcher, wheels for Python 3.11 to 3.13) or by
protego, where the former is not installed. Neither is asked to find the group of a crawler: they
differ there (182 of 10,000 generated decisions), and both parse the whole file for each question.
`fastlm.data.consent.robots` finds the group once; the library then gets only its rules, under
``User-agent: *``. That takes 2 microseconds instead of 20 in a file of 300 rules.

Both sides are brought to one spelling first: unreserved characters unescaped, all others escaped,
digits of escapes in capitals (RFC 9309, section 2.2.2). fast-robotstxt unescapes reserved
characters as well, so that ``/a%2Fb`` would match ``/a/b``; the percent sign of these is escaped
once more on both sides.
"""

import re
import string
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Protocol

# Characters compared of a path and of a pattern; a longer pattern becomes its beginning, which
# matches more. Google's matcher takes time proportional to the product of both for a wildcard.
MAX_PATH = 2048
# Characters of a file's patterns with wildcards: a page of its site then costs at most a tenth of a
# second. A file with more counts as "no" (`too_many_wildcards`).
MAX_WILDCARDS = 64 << 10

Rules = Sequence[tuple[bool, str]]  # (is it Allow?, pattern)

_UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")
_RESERVED = frozenset(":/?#[]@!&'()+,;=%")  # not * and $, which the libraries know escaped
_PLAIN = re.compile(r"[A-Za-z0-9\-._~/?:@!&'()+,;=$*]*").fullmatch
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}|[^A-Za-z0-9\-._~/?:@!&'()+,;=$*]")
_HOST = "https://host"  # the libraries take addresses and look at the path only


class PathMatcher(Protocol):
    """The rules of one group."""

    def __init__(self, rules: Rules): ...

    def match(self, path: str) -> int | None:
        """Return the index of the rule that disallows ``path`` (of `normal_path`), None if none
        does: the longest pattern that matches wins, Allow wins a tie.
        """
        ...


def normal_path(path: str) -> str:
    """Return a path with its query in the spelling that is compared."""
    return normal_pattern(path if path.startswith("/") else f"/{path}")


def normal_pattern(pattern: str) -> str:
    """Return a pattern in the spelling that is compared; ``*`` and a final ``$`` keep their
    meaning.
    """
    if len(pattern) > MAX_PATH:
        pattern = pattern[:MAX_PATH]
    return pattern if _PLAIN(pattern) else _ESCAPE.sub(_respell, pattern)


def too_many_wildcards(patterns: Iterable[str]) -> str:
    """Return what is wrong with the patterns of a file, "" if matching them takes little time."""
    size = sum(min(len(pattern), MAX_PATH) for pattern in patterns if "*" in pattern)
    if size <= MAX_WILDCARDS:
        return ""
    return f"{size:,} characters of patterns with *, more than {MAX_WILDCARDS:,}: counts as no"


def _respell(match: re.Match[str]) -> str:
    text = match[0]
    if len(text) == 3:
        character = chr(int(text[1:], 16))
        if character in _UNRESERVED:
            return character
        return f"%25{text[1:].upper()}" if character in _RESERVED else text.upper()
    escape = "%25" if text in _RESERVED else "%"
    return "".join(f"{escape}{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


class GoogleMatcher:
    """Rules for fast-robotstxt."""

    def __init__(self, rules: Rules):
        lines = [f"{'Allow' if allow else 'Disallow'}: {pattern}" for allow, pattern in rules]
        self._text = "\n".join(["User-agent: *", *lines])
        self._any = any(not allow for allow, _ in rules)

    def match(self, path: str) -> int | None:
        if not self._any:
            return None
        matcher = _thread_matcher()
        if matcher.is_allowed(self._text, "*", _HOST + path):
            return None
        return matcher.matching_line - 2


_local = threading.local()  # the matcher stores the line of its last answer


def _thread_matcher() -> Any:
    matcher = getattr(_local, "matcher", None)
    if matcher is None:
        from robotstxt import RobotsMatcher

        matcher = _local.matcher = RobotsMatcher()
    return matcher


class ProtegoMatcher:
    """Rules for protego, which does not say which rule decided: they are asked one by one."""

    def __init__(self, rules: Rules):
        self._rules = rules
        self._all = _protego(rules)
        self._each: list[tuple[int, Any]] | None = None

    def match(self, path: str) -> int | None:
        address = _HOST + path
        if self._all.can_fetch(address, "*"):
            return None
        if self._each is None:
            longest = sorted(
                (i for i, (allow, _) in enumerate(self._rules) if not allow),
                key=lambda i: -len(self._rules[i][1]),
            )
            self._each = [(i, _protego([self._rules[i]])) for i in longest]
        return next((i for i, one in self._each if not one.can_fetch(address, "*")), None)


def _protego(rules: Rules) -> Any:
    from protego import Protego

    lines = [f"{'Allow' if allow else 'Disallow'}: {pattern}" for allow, pattern in rules]
    return Protego.parse("\n".join(["User-agent: *", *lines]))


ENGINES: dict[str, tuple[str, Callable[[Rules], PathMatcher]]] = {
    "fast-robotstxt": ("robotstxt", GoogleMatcher),
    "protego": ("protego", ProtegoMatcher),
}


@cache
def engine() -> str:
    """Return the name of the library that matches paths here. InputError: neither is installed."""
    from importlib import import_module

    from fastlm.errors import InputError

    for name, (module, _) in ENGINES.items():
        try:
            import_module(module)
        except (ImportError, OSError):  # OSError: its shared library does not load
            continue
        return name
    raise InputError(
        "robots.txt: expected fast-robotstxt or protego, got neither: pip install protego"
    )


def path_matcher(rules: Rules) -> PathMatcher:
    """Return the rules for the library that is installed. Patterns: of `normal_pattern`."""
    return ENGINES[engine()][1](rules)
