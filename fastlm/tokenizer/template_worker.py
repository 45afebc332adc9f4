"""The process that renders chat templates, and the templates of a user's tasks.
`fastlm.tokenizer.chat_template` starts it and sends it requests over a pipe, one JSON object per
line.

A template is untrusted code. It runs in jinja2's immutable sandbox, so it cannot reach the machine.
It runs in a process of its own with limits on memory and processor time, so it cannot hang its
host: no list of the ways to loop, double or pad would be complete. Python runs this file by its
path, and it imports nothing of fastlm, so it starts in a tenth of a second.

The text that a template itself writes is marked (`MarkedText`). The tokenizer may read special
tokens there and nowhere else. Marks are on the template's text and not on that of the messages, so
an operation that loses marks (``%``, ``format``, ``upper``) leaves text that cannot be a special
token.
"""

import json
import re
import resource
import signal
import sys
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from typing import Any

MEMORY_BYTES = 2**30  # address space of this process; 16 M characters of output take half of it
MAX_CHARACTERS = 2**24  # of output: eight times the longest context that models have
# values of `role` with which templates may complete a token, as in Phi-3's "<|" + role + "|>"
ROLE_NAMES = frozenset(
    "system developer user assistant model tool function ipython observation environment".split()
)


def make_environment(path: list[str]) -> Any:
    """Return the environment that compiles templates. ``path``: the sys.path on which jinja2 is."""
    sys.path[:] = path
    import jinja2
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension, loopcontrols
    from jinja2.filters import make_attrgetter
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generator(CodeGenerator):
        """Wraps the template's own text in `mark`."""

        def visit_Const(self, node, frame):
            self.write(f"environment.mark({node.as_const(frame.eval_ctx)!r})")

        def visit_Concat(self, node, frame):  # the operator ~
            self.write("environment.concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

        def _output_const_repr(self, group):
            return f"environment.mark({super()._output_const_repr(group)})"

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}`` renders its body."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        code_generator_class = Generator
        concat = staticmethod(join)
        mark = staticmethod(mark)

    def join_filter(value, d="", attribute=None):
        if attribute is not None:
            value = map(make_attrgetter(environment, attribute), value)
        return join(value, d)

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters.update(join=join_filter, tojson=_tojson)
    environment.globals["raise_exception"] = refuse
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Dump JSON without the HTML escapes of jinja2's filter."""
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
    return json.dumps(value, **options, sort_keys=sort_keys)


class MarkedText(str):
    """Text with a mark per character: 1 if the template wrote it, 0 if it was passed in.

    The operations below keep the marks. Every other operation returns a plain str without marks, or
    (``format`` in jinja2's sandbox) a `MarkedText` in which all marks are 0.
    """

    _marks: bytes

    def __new__(cls, text: str, marks: bytes | None = None) -> "MarkedText":
        new = super().__new__(cls, text)
        new._marks = bytes(len(new)) if marks is None else marks
        return new

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> Any:
        # other subclasses of str (jinja2's Markup) define their own addition
        return join((self, other)) if type(other) in (str, MarkedText) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return join((other, self)) if type(other) is str else NotImplemented

    def __getitem__(self, key: Any) -> "MarkedText":
        marks = self._marks[key]
        return MarkedText(
            str.__getitem__(self, key), bytes([marks]) if isinstance(key, int) else marks
        )

    def lstrip(self, chars: str | None = None) -> "MarkedText":
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> "MarkedText":
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None) -> "MarkedText":
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> "MarkedText":
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> "MarkedText":
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: int = -1) -> Any:
        return self._located(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: int = -1) -> Any:
        return self._located(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> Any:
        return self._located(str.splitlines(self, keepends), 0)

    def _located(self, parts: list[str], separator: int) -> list["MarkedText"]:
        """Return ``parts`` of this text, from left to right, with their marks."""
        marked, start = [], 0
        for part in parts:
            start = start if separator else self.index(part, start)
            marked.append(self[start : start + len(part)])
            start += len(part) + separator
        return marked

    def replace(self, old: str, new: str, count: int = -1) -> str:
        return join(self.split(old, count), new) if old else str.replace(self, old, new, count)

    def join(self, parts: Iterable[Any]) -> str:
        return join(parts, self)


def join(parts: Iterable[Any], separator: str = "") -> MarkedText:
    """Join ``parts`` into one text, with the marks of those that have them."""
    texts: list[str] = []
    for part in parts:
        if texts and separator:
            texts.append(separator)
        texts.append(str(part))
    marks = [t._marks if type(t) is MarkedText else bytes(len(t)) for t in texts]
    return MarkedText("".join(texts), b"".join(marks))


def mark(value: Any) -> Any:
    """Return a constant of the template, marked."""
    if type(value) is str:
        return MarkedText(value, b"\1" * len(value))
    if isinstance(value, list | tuple):
        return type(value)(map(mark, value))
    if isinstance(value, dict):
        return {key: mark(item) for key, item in value.items()}
    return value


def render(compiled: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"text", "template_ranges": [[start, end], ...]}`` for a request, or
    ``{"error"}``."""
    try:
        # as in transformers, an entry of None is dropped
        messages = [{k: v for k, v in m.items() if v is not None} for m in request["messages"]]
        for message in messages:
            if message["role"] in ROLE_NAMES:
                message["role"] = mark(message["role"])
        date = request["date"]
        today = datetime.now() if date is None else datetime.fromisoformat(date)
        variables = {
            **mark(request["tokens"]), **request["variables"], "messages": messages,
            "strftime_now": lambda pattern: today.strftime(pattern),
        }  # fmt: skip
        text = join([compiled(request["template"]).render(variables)])
        if len(text) > MAX_CHARACTERS:
            return {"error": f"expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}"}
        ranges = [match.span() for match in re.finditer(b"\1+", text._marks)]
        return {"text": str.__str__(text), "template_ranges": ranges}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:
        reason = " ".join(str(error).split())
        return {"error": reason[:1000] or type(error).__name__}


def main() -> None:
    """Limit this process, then render the requests on stdin."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    max_bytes = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host
    lines, out = sys.stdin.buffer, sys.stdout.buffer
    environment = make_environment(json.loads(lines.readline()))

    @lru_cache(maxsize=16)
    def compiled(template: str) -> Any:
        return environment.from_string(template)

    for line in lines:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # SIGPROF ends the process
        reply = json.dumps(render(compiled, request)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write(reply + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
