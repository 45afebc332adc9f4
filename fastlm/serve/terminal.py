"""The loop of ``fastlm chat``: input, commands, answers, Ctrl-C.

On a terminal prompt_toolkit reads the input, with line editing and the history of this conversation
(which is not written to a file). Elsewhere each line of stdin is a message, for scripts. The
alternative was GNU readline: it has no multi-line messages and would send a pasted one by lines.
"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from fastlm.errors import InputError

if TYPE_CHECKING:
    from fastlm.serve.chat import Conversation

HINT = "/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends"
HELP = """\
/help    these lines
/reset   forget the conversation; the system message stays
/exit    end, as Ctrl-D or Ctrl-C twice at the prompt
//TEXT   send /TEXT
Enter sends; Alt-Enter, or Esc and Enter, begins another line; up and down fetch earlier messages.
Ctrl-C stops an answer; what was written of it stays in the conversation."""


def run(conversation: "Conversation", *, stats: bool, **options: Any) -> None:
    """Read and answer messages to the end of the input; ``options``: as for `Conversation.say`.

    On a terminal a refused message prints a line; elsewhere it raises InputError.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        _note(HINT)
    for message in _typed() if terminal else sys.stdin:
        try:
            text = message.strip()
            if text.startswith("/") and not text.startswith("//"):
                if not _obey(text, conversation):
                    return
            elif text:
                _answer(conversation, text.removeprefix("/"), stats, options)
        except InputError as error:
            if not terminal:
                raise
            _note(f"fastlm: {error}")


def _typed() -> Iterator[str]:
    """Yield messages from the terminal until Ctrl-D, or Ctrl-C twice."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    keys, typing = KeyBindings(), has_focus("DEFAULT_BUFFER")  # not in Ctrl-R's search

    @keys.add("enter", filter=typing)
    def _(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: Any) -> None:
        event.current_buffer.newline()

    session: Any = PromptSession(
        "> ", multiline=True, prompt_continuation="  ", key_bindings=keys,
        output=create_output(always_prefer_tty=True),  # stderr where answers go to a file
    )  # fmt: skip
    warned = False
    while True:
        try:
            yield session.prompt()
            warned = False
        except EOFError:
            return
        except KeyboardInterrupt:
            if warned:
                return
            warned = True
            _note("Ctrl-C again or Ctrl-D ends")


def _obey(command: str, conversation: "Conversation") -> bool:
    """Run a command; return whether the conversation continues."""
    if command not in ("/help", "/reset", "/exit"):
        name = command.split()[0]
        raise InputError(f"{name}: expected /help, /reset or /exit (//TEXT sends /TEXT)")
    if command == "/reset":
        conversation.reset()
    if command != "/exit":
        _note(HELP if command == "/help" else "the conversation is forgotten")
    return command != "/exit"


def _answer(conversation: "Conversation", text: str, stats: bool, options: dict[str, Any]) -> None:
    try:
        answer = conversation.say(text, echo, **options)
    except KeyboardInterrupt:
        typer.echo()
        if not sys.stdin.isatty():
            raise
        return _note("stopped")
    typer.echo()
    if answer.finish_reason == "context":
        _note(f"the model's context of {conversation.writer.context_limit:,} tokens is full")
    if stats:
        _note(str(conversation.writer.speed))


def echo(text: str) -> None:
    """Write a piece of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    typer.echo(text, err=True)
