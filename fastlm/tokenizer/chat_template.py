"""Chat templates: Jinja text from a checkpoint, rendered as transformers renders it, in a process
with limits (`fastlm.tokenizer.template_worker`).

Besides Jinja's own functions, a template may use what published templates rely on:
``raise_exception``, ``tojson`` without HTML escapes, ``strftime_now``, and the ``{% generation %}``
block, which marks text for training and renders as is. Rejected: limits in this process by a
sandbox that counts (every Jinja filter and every str method would need a counter), and a new
process for every rendering (0.1 s each).
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
SECONDS = 5.0  # processor time of one rendering; a long conversation takes 0.01 s
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')  # in JSON
Ranges = list[tuple[int, int]]  # (start, end) in a text


def _json(value: Any, location: str) -> str:
    """Return ``value`` as JSON. InputError: it has values that JSON lacks."""

    def convert(item: Any) -> Any:
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(item, Sequence) and not isinstance(item, bytes | bytearray):
            return list(item)
        name = type(item).__name__
        raise InputError(f"{location}: expected text, numbers, lists and mappings, got {name}")

    try:
        text = json.dumps(value, ensure_ascii=False, default=convert)
    except InputError:
        raise
    except (RecursionError, TypeError, ValueError) as error:  # too deep, numbers too long
        raise InputError(f"{location}: expected what JSON can hold: {error}") from None
    if not text.isascii():
        for string in STRING.findall(text):
            check_unicode(json.loads(string), location)
    return text


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    tokens: Mapping[str, str],
    date: str | None = None,
) -> tuple[str, Ranges]:
    """Render ``messages``, mappings with a text ``role`` (and ``content``), with ``template``.
    ``date`` (YYYY-MM-DD): the template's current date; default: today.

    Return the prompt and the (start, end) ranges in it that the template itself wrote, including
    ``tokens`` (name -> text). The text outside of these ranges is from messages and variables.
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
    reply = _worker.request(f"{{{fields}}}\n".encode())
    if "error" in reply:
        raise InputError(f"chat_template: cannot render these messages: {reply['error']}")
    return reply["text"], [(start, end) for start, end in reply["template_ranges"]]


def start_worker() -> None:
    """Start the process that renders, so that its start (0.1 s) overlaps with other work."""
    _worker.start()


class _TemplateWorker:
    """The process that renders. It is started on first use, and again after it has died."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Reset after a fork: the process belongs to the parent, which may hold the lock."""
        self.process_of_parent = getattr(self, "child", None)
        self.child: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def start(self) -> None:
        """Start the process, unless it runs."""
        with self.lock:
            self.child = self.child or self._spawn()

    def request(self, line: bytes) -> dict[str, Any]:
        """Send a request, and return the reply or {"error": ...}."""
        with self.lock:
            try:
                if self.child is None or self.child.poll() is not None:
                    self.close()
                    self.child = self._spawn()
                assert self.child.stdin is not None and self.child.stdout is not None
                self.child.stdin.write(line)
                self.child.stdin.flush()
                reply = self.child.stdout.readline()
            except BrokenPipeError:
                reply = b""
            except BaseException:
                self.close()  # an unread reply would be read as the next one
                raise
            return json.loads(reply) if reply.endswith(b"\n") else {"error": self._exit_reason()}

    def _spawn(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("template_worker.py"))]
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        assert child.stdin is not None
        child.stdin.write(json.dumps([path for path in sys.path if path]).encode() + b"\n")
        return child

    def _exit_reason(self) -> str:
        """Return why the process has ended."""
        if self.child is None:
            return "Python is ending"
        status = self.child.wait()
        self.close()
        if status == -signal.SIGPROF:
            return f"expected a template that ends within {SECONDS:g} s"
        return f"the process that renders ended with status {status}"

    def close(self) -> None:
        """End the process."""
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None


_worker = _TemplateWorker()
atexit.register(_worker.close)
os.register_at_fork(after_in_child=_worker.reset)
