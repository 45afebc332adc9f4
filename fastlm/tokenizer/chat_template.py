"""Chat templates: Jinja text from a checkpoint, rendered as transformers renders it, in a process
with limits (`fastlm.tokenizer.template_worker`).

Beyond Jinja's own functions, a template may call those that published templates rely on:
``raise_exception``, ``tojson`` without HTML escapes, ``strftime_now``, and the ``{% generation %}``
block, which marks text for training and renders as is. Rejected: limits within this process by a
counting sandbox (every Jinja filter and every str method would need a counter), and a new process
for every rendering (0.1 s each).
"""

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlm.errors import InputError, check_unicode

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SECONDS = 5.0  # of processor time for one rendering; a long conversation takes 0.01 s
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')  # in JSON
Runs = list[tuple[int, int]]


def _json(value: Any, where: str) -> str:
    """Return ``value`` as JSON; what has other types than JSON's is refused."""

    def convert(item: Any) -> Any:
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(item, Sequence) and not isinstance(item, bytes | bytearray):
            return list(item)
        name = type(item).__name__
        raise InputError(f"{where}: expected text, numbers, lists and mappings, got {name}")

    try:
        text = json.dumps(value, ensure_ascii=False, default=convert)
    except InputError:
        raise
    except (RecursionError, TypeError, ValueError) as error:  # too deep, numbers too long
        raise InputError(f"{where}: expected what JSON can hold: {error}") from None
    if not text.isascii():
        for string in STRING.findall(text):
            check_unicode(json.loads(string), where)
    return text


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    tokens: Mapping[str, str],
    date: str | None = None,
) -> tuple[str, Runs]:
    """Render ``messages``, mappings with a text ``role`` (and ``content``), with ``template``.
    ``date`` (YYYY-MM-DD) is what the template takes for today; by default it is today.

    Return the prompt and the (start, end) ranges in it that the template wrote itself, including
    ``tokens`` (name -> text). Text outside those ranges came from messages and variables.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages: expected a list of mappings, got {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(
                f"messages[{index}]: expected a mapping with a text 'role', got {message!r:.80}"
            )
    request = {
        "template": template,
        "messages": messages,
        # as in transformers, these two are always defined
        "variables": {"tools": None, "documents": None, **variables},
        "tokens": tokens,
        "date": date,
        "seconds": SECONDS,
    }
    fields = ", ".join(f'"{name}": {_json(value, name)}' for name, value in request.items())
    reply = _process.ask(f"{{{fields}}}\n".encode())
    if "error" in reply:
        raise InputError(f"chat_template: cannot render these messages: {reply['error']}")
    return reply["text"], [(start, end) for start, end in reply["own"]]


def begin() -> None:
    """Start the process that renders, which takes 0.1 s, beside what else is to be done first."""
    _process.begin()


class _Process:
    """The process that renders. It is started on first use, and again after it has died."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Reset after a fork: the process belongs to the parent, which may hold the lock."""
        self.parents = getattr(self, "child", None)
        self.child: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def begin(self) -> None:
        with self.lock:
            self.child = self.child or self._start()

    def ask(self, line: bytes) -> dict[str, Any]:
        with self.lock:
            try:
                if self.child is None or self.child.poll() is not None:
                    self.close()
                    self.child = self._start()
                assert self.child.stdin is not None and self.child.stdout is not None
                self.child.stdin.write(line)
                self.child.stdin.flush()
                reply = self.child.stdout.readline()
            except BrokenPipeError:
                reply = b""
            except BaseException:
                self.close()  # an unread answer would be taken for the next one
                raise
            return json.loads(reply) if reply.endswith(b"\n") else {"error": self._why()}

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("template_worker.py"))]
        pipe, silent = subprocess.PIPE, subprocess.DEVNULL
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=silent)
        assert child.stdin is not None
        child.stdin.write(json.dumps([place for place in sys.path if place]).encode() + b"\n")
        return child

    def _why(self) -> str:
        if self.child is None:
            return "Python is ending"
        status = self.child.wait()
        self.close()
        if status == -signal.SIGPROF:
            return f"expected a template that ends within {SECONDS:g} s"
        return f"the process that renders ended with status {status}"

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None


_process = _Process()
atexit.register(_process.close)
os.register_at_fork(after_in_child=_process.forget)
