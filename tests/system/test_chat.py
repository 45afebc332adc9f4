"""``fastlm chat`` as a user sees it: in a terminal (a pty), and with a pipe."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

# A conversation that answers with the list of what it was told, word by word; endless for "long".
TALK = """
import itertools, os, sys, time
from types import SimpleNamespace
from fastlm.serve import chat_terminal

if sys.stdin.isatty():
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # the controlling terminal sends Ctrl-C

class Session:
    generator = SimpleNamespace(context_limit=99, timing="7 tokens/s")
    heard = []
    def reset(self): self.heard = []
    def reply(self, text, on_piece, **options):
        self.heard = [*self.heard, text]
        on_piece(f"heard {self.heard}, {options}")
        for _ in itertools.count() if text == "long" else ():
            on_piece(" more"); time.sleep(0.01)
        return SimpleNamespace(finish_reason="context" if text == "full" else "stop")

chat_terminal.run(Session(), stats=sys.argv[1] == "stats", seed=1)
print("the end")
"""
COMMAND = [sys.executable, "-P", "-c", TALK]


class Terminal:
    """A pty that runs the session."""

    def __init__(self):
        self.fd, inside = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, "stats"], stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup ignores them
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )  # fmt: skip
        os.close(inside)
        self.output = ""

    def type(self, text: str, *expected: str) -> None:
        """Type once everything before was read, and wait for each of `expected` in turn."""
        os.write(self.fd, text.encode())
        until = time.monotonic() + 60
        for part in expected:
            while part not in self.output:
                assert time.monotonic() < until, f"{part!r} not in {self.output!r}"
                if select.select([self.fd], [], [], 1)[0]:
                    self.output += os.read(self.fd, 4096).decode(errors="replace")
            self.output = self.output.partition(part)[2]


PROMPT = "\x1b[?2004h"  # from here on a paste arrives in brackets, and keys one by one


@pytest.fixture
def terminal():
    terminal = Terminal()
    try:
        terminal.type("", "/help lists the commands", PROMPT)
        yield terminal
        terminal.type("", "the end")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()  # needed after a failed test
        terminal.process.wait()
        os.close(terminal.fd)


def test_a_terminal_has_line_editing_history_and_multi_line_messages(terminal):
    terminal.type("abc\x1b[D\x1b[DX\x1b[HY\r", "heard ['YaXbc'], {'seed': 1}", "7 tokens/s", PROMPT)
    terminal.type("one\x1b\rtwo\r", r"'one\ntwo'", PROMPT)
    terminal.type("\x1b[200~three\nfour\x1b[201~\r", r"'three\nfour'", PROMPT)
    terminal.type("/reset\r", "forgotten", PROMPT)
    terminal.type("\x12YaX\r\r", "heard ['YaXbc']", PROMPT)  # Ctrl-R searches the history
    terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\r", r"'three\nfour']", PROMPT)
    terminal.type("full\r", "context of 99 tokens is full", PROMPT)
    terminal.type("\x04")


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(terminal):
    terminal.type("long\r", "more more")
    terminal.type("\x03", "stopped", PROMPT)
    terminal.type("then\r", "heard ['long', 'then']", PROMPT)
    terminal.type("half a line\x03", "Ctrl-C again or Ctrl-D ends", PROMPT)
    terminal.type("still here\r", "'still here']", PROMPT)
    terminal.type("\x03", "Ctrl-C again or Ctrl-D ends", PROMPT)
    terminal.type("\x03")


def test_commands(terminal):
    terminal.type("/help\r", "/reset", "Ctrl-C stops an answer; its text", PROMPT)
    terminal.type("/rest now\r", "fastlm: /rest: expected /help, /reset or /exit", PROMPT)
    terminal.type("//rest\r", "heard ['/rest']", PROMPT)
    terminal.type("\r", PROMPT)
    terminal.type("  \r", PROMPT)  # blanks are not a message
    terminal.type("more\r", "heard ['/rest', 'more']", PROMPT)
    terminal.type("/exit\r")


@pytest.mark.parametrize(
    "typed, status, out",
    [
        ("a\n\n b\n/reset\nc", 0, ["heard ['a']", "heard ['a', 'b']", "heard ['c']", "the end"]),
        ("a\n/exit\nb\n", 0, ["heard ['a']", "the end"]),
        ("a\n/b\nc\n", 1, ["heard ['a']"]),  # the command line prints its InputError as a line
    ],
)
def test_lines_of_a_pipe_are_messages(typed, status, out):
    done = subprocess.run([*COMMAND, "no"], input=typed, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert [line.partition(", {")[0] for line in done.stdout.splitlines()] == out
    assert "7 tokens/s" not in done.stderr and ("/b: expected /help" in done.stderr) == bool(status)


def test_invalid_bytes_are_refused_in_one_line(tmp_path):
    """Send invalid bytes to the commands that read stdin."""
    from fastlm.tokenizer.tokenizer import Tokenizer

    Tokenizer.train(["some text"], 262).save(tmp_path)
    command = "import sys; from fastlm.cli import main; sys.argv[0] = 'fastlm'; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", command, "tokenizer", "encode", "-t", str(tmp_path)],
        input=b"caf\xe9", capture_output=True, env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == b"fastlm: text: expected valid Unicode, got a lone surrogate at 3\n"
