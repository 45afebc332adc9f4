"""What the tests and the program say to each other: plain data as JSON, other objects by number."""

import os
from collections.abc import Callable
from typing import Any

DETAIL = 500  # characters of a reason


class Remote:
    """A function or object in the program's process. It equals itself only."""

    def __init__(self, ask: Callable[..., Any], key: str | int) -> None:
        self.__dict__.update(_ask=ask, _key=key)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._ask("call", self, args, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", self, key)

    def __iter__(self) -> Any:
        return iter(self._ask("list", self))

    def __len__(self) -> int:
        return self._ask("length", self)

    def __bool__(self) -> bool:
        return self._ask("truth", self) is True


def pack(value: Any, keep: Callable[[Any], int] | None = None) -> Any:
    """Return ``value`` as JSON: text, numbers and None as they are, the rest as [kind, ...].

    Subclasses become their plain type. Other objects are kept and named by number; without
    ``keep``, in the tests' process, they are a TypeError.
    """
    if value is None or value is True or value is False:
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return value if type(value) is plain else plain(value)
    if isinstance(value, Remote):
        return ["object", value._key]
    if isinstance(value, dict):
        pairs = [[pack(k, keep), pack(v, keep)] for k, v in value.items()]
        return ["dict", pairs]
    for plain in (list, tuple, set, frozenset):
        if isinstance(value, plain):
            return [plain.__name__, [pack(item, keep) for item in value]]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, value.decode("latin-1")]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if keep is None:
        raise TypeError(f"tests: expected an argument of plain data, got {type(value).__name__}")
    return ["object", keep(value)]


def unpack(value: Any, find: Callable[[Any], Any]) -> Any:
    """The inverse of `pack`. ValueError, TypeError, KeyError: what `pack` never writes."""
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise ValueError("an object of JSON")
        return value
    kind, content = value
    if kind == "object":
        if type(content) not in (str, int):
            raise TypeError("expected a name or a number")
        return find(content)
    if kind == "dict":
        return {unpack(k, find): unpack(v, find) for k, v in content}
    if kind == "complex":
        return complex(*map(float, content))
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind](content, "latin-1")
    types = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return types[kind](unpack(item, find) for item in content)


def described(error: BaseException, file: str, *, name: bool = True) -> str:
    """One line: the last line of ``file`` that the error went through, its type and text."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    text = " ".join(str(error).split())
    if name:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        text = f"line {line}: {text}" if line else text
    return text[:DETAIL]


def read_all(fd: int, size: int, *, or_end: bool = False) -> bytes:
    parts, left = [], size
    while left:
        part = os.read(fd, min(left, 2**20))
        if not part:
            if or_end and left == size:
                return b""
            raise EOFError
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
