"""Run ``fastlm chat`` in a terminal: read messages and commands, write answers, handle Ctrl-C.

On a terminal prompt_toolkit reads the input, with line editing and a history of this conversation
(which is not written to a file). Otherwise each line of stdin is a message, for scripts. GNU
readline was rejected: it has no multi-line messages and would send pasted text line by line.
"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastlm.errors import InputError
from fastlm.terminal import echo, write_answer

if TYPE_CHECKING:
    from fastlm.serve.chat_session import ChatSession

HINT = "/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends"
HELP = """\
/help    print this help
/reset   forget the conversation; the system message stays
/exit    end, as do Ctrl-D and Ctrl-C twice at the prompt
//TEXT   send /TEXT
Enter sends; Alt-Enter, or Esc and Enter, begins another line; up and down fetch earlier messages.
Ctrl-C stops an answer; its text so far stays in the conversation."""


def run(session: "ChatSession", *, stats: bool, **options: Any) -> None:
    """Read and answer messages to the end of the input; ``options``: as for `ChatSession.reply`.

    On a terminal a refused message prints a line; otherwise it raises InputError.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _note(HINT)
    for message in _terminal_messages() if is_terminal else sys.stdin:
        try:
            text = message.strip()
            if text.startswith("/") and not text.startswith("//"):
                if not _run_command(text, session):
                    return
            elif text:
                _reply(session, text.removeprefix("/"), stats, options)
        except InputError as error:
            if not is_terminal:
                raise
            _note(f"fastlm: {error}")


def _terminal_messages() -> Iterator[str]:
    """Yield messages from the terminal until Ctrl-D, or Ctrl-C twice."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    keys, has_input_focus = KeyBindings(), has_focus("DEFAULT_BUFFER")  # not Ctrl-R's search

    @keys.add("enter", filter=has_input_focus)
    def _(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_input_focus)
    def _(event: Any) -> None:
        event.current_buffer.newline()

    session: Any = PromptSession(
        "> ", multiline=True, prompt_continuation="  ", key_bindings=keys,
        output=create_output(always_prefer_tty=True),  # stderr if stdout is a file
    )  # fmt: skip
    has_warned = False
    while True:
        try:
            yield session.prompt()
            has_warned = False
        except EOFError:
            return
        except KeyboardInterrupt:
            if has_warned:
                return
            has_warned = True
            _note("Ctrl-C again or Ctrl-D ends")


def _run_command(command: str, session: "ChatSession") -> bool:
    """Run a command; return whether the session continues."""
    if command not in ("/help", "/reset", "/exit"):
        name = command.split()[0]
        raise InputError(f"{name}: expected /help, /reset or /exit (//TEXT sends /TEXT)")
    if command == "/reset":
        session.reset()
    if command != "/exit":
        _note(HELP if command == "/help" else "the conversation is forgotten")
    return command != "/exit"


def _reply(session: "ChatSession", text: str, stats: bool, options: dict[str, Any]) -> None:
    try:
        completion = session.reply(text, write_answer, **options)
    except KeyboardInterrupt:
        echo()
        if not sys.stdin.isatty():
            raise
        return _note("stopped")
    echo()
    if completion.finish_reason == "context":
        _note(f"the model's context of {session.generator.context_limit:,} tokens is full")
    if stats:
        _note(str(session.generator.timing))


def _note(text: str) -> None:
    echo(text, err=True)
