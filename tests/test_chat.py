"""``fastlm chat`` as a user types into it: a terminal of its own (a pty), and a pipe."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest

# A conversation whose answers are what it was told, word by word, without end for "long"
TALK = """
import itertools, sys, time
from types import SimpleNamespace
from fastlm import chat_terminal

class Talk:
    writer = SimpleNamespace(context_limit=99, speed="7 tokens/s")
    heard = []
    def reset(self): self.heard = []
    def say(self, text, piece, **options):
        self.heard = [*self.heard, text]
        piece(f"heard {self.heard}, {options}")
        for _ in itertools.count() if text == "long" else ():
            piece(" more"); time.sleep(0.01)
        return SimpleNamespace(finish_reason="context" if text == "full" else "stop")

chat_terminal.run(Talk(), stats=sys.argv[1] == "stats", seed=1)
print("the end")
"""
COMMAND = [sys.executable, "-P", "-c", TALK]


class Terminal:
    """A pty with the conversation in it."""

    def __init__(self):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.execv(sys.executable, [*COMMAND, "stats"])
        self.seen = ""

    def type(self, text: str, wanted: str) -> str:
        """-> what came until `wanted` was seen."""
        os.write(self.fd, text.encode())
        self.seen, until = "", time.monotonic() + 60
        while wanted not in self.seen:
            assert time.monotonic() < until, self.seen
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:  # Linux: the other side is closed
                    raise AssertionError(self.seen) from None
        return self.seen

    def end(self) -> int:
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal():
    terminal = Terminal()
    terminal.type("", "/help lists the commands")
    yield terminal
    assert terminal.end() == 0


def test_a_terminal_has_line_editing_history_and_several_lines(terminal):
    terminal.type("abc\x1b[D\x1b[DX\x1b[HY\r", "heard ['YaXbc'], {'seed': 1}")
    terminal.type("", "7 tokens/s")
    terminal.type("one\x1b\rtwo\r", r"'one\ntwo'")
    terminal.type("\x1b[200~three\nfour\x1b[201~\r", r"'three\nfour'")
    terminal.type("/reset\r", "forgotten")
    terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\r", r"heard ['one\ntwo']")
    terminal.type("full\r", "context of 99 tokens is full")
    terminal.type("\x04", "the end")


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(terminal):
    terminal.type("long\r", "more more")
    terminal.type("\x03", "stopped")
    terminal.type("then\r", "heard ['long', 'then']")
    terminal.type("half a line\x03", "Ctrl-C again or Ctrl-D ends")
    terminal.type("still here\r", "'still here']")
    terminal.type("\x03", "Ctrl-C again or Ctrl-D ends")
    terminal.type("\x03", "the end")


def test_commands(terminal):
    assert "/reset" in terminal.type("/help\r", "stops an answer; what was")
    terminal.type("/rest now\r", "fastlm: /rest: wanted /help, /reset or /exit")
    terminal.type("//rest\r", "heard ['/rest']")
    terminal.type("\r\r  \rmore\r", "heard ['/rest', 'more']")  # nothing is no message
    terminal.type("/exit\r", "the end")


@pytest.mark.parametrize(
    "typed, status, out",
    [
        ("a\n\n b\n/reset\nc", 0, ["heard ['a']", "heard ['a', 'b']", "heard ['c']", "the end"]),
        ("a\n/exit\nb\n", 0, ["heard ['a']", "the end"]),
        ("a\n/b\nc\n", 1, ["heard ['a']"]),  # the command line makes a line of its InputError
    ],
)
def test_lines_of_a_pipe_are_messages(typed, status, out):
    done = subprocess.run([*COMMAND, "no"], input=typed, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert [line.partition(", {")[0] for line in done.stdout.splitlines()] == out
    assert "7 tokens/s" not in done.stderr and ("/b: wanted /help" in done.stderr) == bool(status)
