"""The process that renders chat templates, and those of a user's own tasks.
`fastlm.tokenizer.chat_template` starts it and sends it requests over a pipe, one JSON object per
line.

A template is untrusted code. It runs in jinja2's immutable sandbox, which keeps it from the
machine. It runs in a process of its own with limits on memory and processor time, which keeps it
from hanging its host: no list of the ways to loop, double or pad would be complete. This file is
run by its path and imports nothing of fastlm, so that it starts in a tenth of a second.

The text that a template writes itself is marked (`Own`); the tokenizer may read special tokens
there and nowhere else. The template's text is marked rather than that of the messages, so that an
operation that does not keep marks (``%``, ``format``, ``upper``) leaves text that cannot be a
special token.
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

MEMORY_BYTES = 2**30  # address space of this process; 16 M characters of output need half of it
MAX_CHARACTERS = 2**24  # of output: eight times the longest context that models have
# values of `role` with which templates may complete a token, as in Phi-3's "<|" + role + "|>"
ROLE_NAMES = frozenset(
    "system developer user assistant model tool function ipython observation environment".split()
)


def start(path: list[str]) -> Any:
    """Return the environment that compiles templates; ``path`` is the sys.path to find jinja2."""
    sys.path[:] = path
    import jinja2
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension, loopcontrols
    from jinja2.filters import make_attrgetter
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generator(CodeGenerator):
        """Wrap the template's own text in `own`."""

        def visit_Const(self, node, frame):
            self.write(f"environment.own({node.as_const(frame.eval_ctx)!r})")

        def visit_Concat(self, node, frame):  # the operator ~
            self.write("environment.concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

        def _output_const_repr(self, group):
            return f"environment.own({super()._output_const_repr(group)})"

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}`` renders its body."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        code_generator_class = Generator
        concat = staticmethod(join)
        own = staticmethod(own)

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
    form = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
    return json.dumps(value, **form, sort_keys=sort_keys)


class Own(str):
    """Text with a mark per character: 1 if the template wrote it, 0 if it was passed in.

    The operations below keep the marks. Every other operation returns a plain str, which has none,
    or (``format`` in jinja2's sandbox) an `Own` whose marks are all 0.
    """

    _marks: bytes

    def __new__(cls, text: str, marks: bytes | None = None) -> "Own":
        new = super().__new__(cls, text)
        new._marks = bytes(len(new)) if marks is None else marks
        return new

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> Any:
        # other subclasses of str (jinja2's Markup) define their own addition
        return join((self, other)) if type(other) in (str, Own) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return join((other, self)) if type(other) is str else NotImplemented

    def __getitem__(self, key: Any) -> "Own":
        marks = self._marks[key]
        return Own(str.__getitem__(self, key), bytes([marks]) if isinstance(key, int) else marks)

    def lstrip(self, chars: str | None = None) -> "Own":
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> "Own":
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None) -> "Own":
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> "Own":
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> "Own":
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: int = -1) -> Any:
        return self._located(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: int = -1) -> Any:
        return self._located(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> Any:
        return self._located(str.splitlines(self, keepends), 0)

    def _located(self, parts: list[str], separator: int) -> list["Own"]:
        """Return ``parts`` of this text, from left to right, with their marks."""
        found, at = [], 0
        for part in parts:
            at = at if separator else self.index(part, at)
            found.append(self[at : at + len(part)])
            at += len(part) + separator
        return found

    def replace(self, old: str, new: str, count: int = -1) -> str:
        return join(self.split(old, count), new) if old else str.replace(self, old, new, count)

    def join(self, parts: Iterable[Any]) -> str:
        return join(parts, self)


def join(parts: Iterable[Any], separator: str = "") -> Own:
    """Join ``parts`` into one text, with the marks of those that have them."""
    texts: list[str] = []
    for part in parts:
        if texts and separator:
            texts.append(separator)
        texts.append(str(part))
    marks = [t._marks if type(t) is Own else bytes(len(t)) for t in texts]
    return Own("".join(texts), b"".join(marks))


def own(value: Any) -> Any:
    """Return a constant of the template, marked."""
    if type(value) is str:
        return Own(value, b"\1" * len(value))
    if isinstance(value, list | tuple):
        return type(value)(map(own, value))
    if isinstance(value, dict):
        return {key: own(item) for key, item in value.items()}
    return value


def answer(compiled: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"text", "own": [[start, end], ...]}`` for a request, or ``{"error"}``."""
    try:
        # as in transformers, an entry of None is dropped
        messages = [{k: v for k, v in m.items() if v is not None} for m in request["messages"]]
        for message in messages:
            if message["role"] in ROLE_NAMES:
                message["role"] = own(message["role"])
        date = request["date"]
        today = datetime.now() if date is None else datetime.fromisoformat(date)
        variables = {
            **own(request["tokens"]), **request["variables"], "messages": messages,
            "strftime_now": lambda pattern: today.strftime(pattern),
        }  # fmt: skip
        text = join([compiled(request["template"]).render(variables)])
        if len(text) > MAX_CHARACTERS:
            return {"error": f"expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}"}
        runs = [run.span() for run in re.finditer(b"\1+", text._marks)]
        return {"text": str.__str__(text), "own": runs}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:
        reason = " ".join(str(error).split())
        return {"error": reason[:1000] or type(error).__name__}


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host
    lines, out = sys.stdin.buffer, sys.stdout.buffer
    environment = start(json.loads(lines.readline()))

    @lru_cache(maxsize=16)
    def compiled(template: str) -> Any:
        return environment.from_string(template)

    for line in lines:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # SIGPROF ends the process
        reply = json.dumps(answer(compiled, request)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write(reply + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
