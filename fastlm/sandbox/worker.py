"""The process that runs generated programs. `fastlm.sandbox` starts it by its path and sends it
cases through a pipe.

    worker          waits for a case and forks; reads nothing itself
      keeper        new process namespace and /tmp; reads the program; watches time and output
        tests       process 1 of the namespace: when it dies, all processes there die
          program   runs the program and answers calls; forked before any of its ancestors read the
                    tests

A case is two numbers (the sizes of the two parts), the program with its limits, and the tests. When
the program's process exists, the keeper reads the tests and passes them to the process of the
tests. There the program's functions are `Remote`: a call sends the arguments as JSON and receives
plain data, never objects with an ``__eq__`` of the program. The verdict goes to the keeper through
a pipe that the program does not have.
"""

import ast
import builtins
import fcntl
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Collection
from functools import partial
from itertools import islice
from typing import Any

sys.path.append(
    os.path.dirname(os.path.abspath(__file__))
)  # last, so that the library's modules take precedence
import jail

sys.path.pop()

SIZES = struct.Struct("<QQ")
ITEMS = 10**6  # maximum items of an iterator that the tests read
REPLY = 2**24  # maximum bytes of one answer
DETAIL = 500  # maximum characters of a detail
SEQUENCES = (list, tuple, set, frozenset)
ENDED_EARLY = "the program ended before its tests did"


class ProgramEnded(BaseException):
    """Raised if the program's process ended, or raised SystemExit. Not an Exception, so that the
    tests cannot catch it."""


class ProgramError(Exception):
    """Raised for an exception of a type that the program defines."""


def main(library: str, isolated: bool) -> None:
    """Prepare the process, report that it is ready, and serve cases until standard input ends."""
    preload()
    try:
        if isolated:
            jail.enter(library)
        probe(isolated)
    except (jail.MissingFeature, OSError) as error:
        os.write(1, json.dumps({"missing": str(error)}).encode() + b"\n")
        return
    jail.die_with_parent()
    os.write(1, b"{}\n")
    gc.freeze()  # garbage collection in a child would copy every page
    while select.select([0], [], []):
        if os.waitpid(fork_child(run_case, isolated), 0)[1]:
            return


def fork_child(run: Callable[..., None], *arguments: Any) -> int:
    """Fork a process that calls ``run`` and dies with this process; return its id."""
    pid = os.fork()
    if pid == 0:
        jail.die_with_parent()
        try:
            run(*arguments)
        finally:
            os._exit(1)
    return pid


def preload() -> None:
    """Import frequent modules (0.1 ms per program instead of 10), and modules that need system
    libraries, which the new root lacks.
    """
    names = """bisect collections copy datetime decimal fractions functools hashlib heapq math
        operator random re statistics string textwrap threading traceback typing"""
    for name in names.split():
        __import__(name)
    for name in ("zlib", "bz2", "lzma", "pyexpat", "uuid"):
        try:
            __import__(name)
        except ImportError:  # this Python was built without it
            continue


def probe(isolated: bool) -> None:
    """Raise `jail.MissingFeature` if a child process cannot be isolated like a program."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if isolated:
                jail.isolate_child(2**20)
            if not isolated or os.fork() == 0:
                jail.drop_privileges(2**34, 60, 0, 0, isolated)
            else:
                os.wait()
        except (jail.MissingFeature, OSError) as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    reason = os.read(read, 1000).decode()
    os.close(read)
    if reason:
        raise jail.MissingFeature(reason)


def run_case(isolated: bool) -> None:
    """Run one case and write its outcome to standard output; ends the process."""
    head = read_all(0, SIZES.size, or_end=True)
    if not head:
        os._exit(1)  # no more cases
    first, second = SIZES.unpack(head)
    request = json.loads(read_all(0, first))
    if isolated:
        jail.isolate_child(request["disk"])
    verdicts, verdict = os.pipe()
    texts, text = os.pipe()
    outputs, output = os.pipe()
    pid = fork_child(Tests(request, isolated).run, texts, output, verdict)
    for fd in (verdict, texts, output):
        os.close(fd)
    os.read(verdicts, 1)  # the program's process exists, or failed to start
    tests = read_all(0, second)
    try:
        write_all(text, tests)
    except OSError:  # the process of the tests ended without a verdict
        pass
    os.close(text)
    outcome = watch(request, verdicts, outputs, pid)
    os.write(1, json.dumps(outcome).encode() + b"\n")
    os._exit(0)


def watch(request: dict, verdicts: int, outputs: int, pid: int) -> dict[str, Any]:
    """Wait for the verdict within the limits, kill all processes, and return the outcome."""
    deadline = time.monotonic() + request["wall"]
    verdict, output, reason = b"", b"", ""
    waiting = {verdicts, outputs}
    while verdicts in waiting and not reason:
        left = deadline - time.monotonic()
        ready = select.select(waiting, [], [], max(0.0, left))[0]
        if not ready:
            reason = "wall"
        for fd in ready:
            data = os.read(fd, 65536)
            if not data:
                waiting.remove(fd)
            elif fd == verdicts:
                verdict += data
            else:
                output += data
                if len(output) > request["output"]:
                    reason = "output"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)  # this ends all processes of the namespace
    while outputs in waiting and len(output) <= request["output"]:
        data = os.read(outputs, 65536)
        output += data
        if not data:
            break
    if len(output) > request["output"]:  # also if the verdict came before the last output
        reason = "output"
    details = {
        "wall": f"more than {request['wall']:g} s of wall-clock time",
        "output": f"more than {request['output']:,} bytes",
        "crashed": "the process of the tests ended without a verdict",
    }
    if not reason and verdict.endswith(b"\n"):
        result = json.loads(verdict)
    else:
        reason = reason or "crashed"
        result = {"reason": reason, "detail": details[reason]}
    return {**result, "output": output[: request["output"]].decode("utf-8", "replace")}


class Tests:
    """Forks the program's process, then reads the tests and runs them against it.

    Descriptors: 0 the tests' text, 1 the program's output, 3 the verdict.
    """

    def __init__(self, request: dict, isolated: bool) -> None:
        self.request, self.isolated = request, isolated

    def run(self, texts: int, output: int, verdict: int) -> None:
        move_descriptors({texts: 0, output: 1, verdict: 3})
        test_end, program_end = socket.socketpair()
        self.child = fork_child(Program(self.request, self.isolated).run, program_end.fileno())
        program_end.close()
        self.channel = test_end.makefile("rwb")
        os.write(3, b" ")
        tests = json.loads(b"".join(iter(lambda: os.read(0, 65536), b"")))
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        limits = self.request
        jail.drop_privileges(
            limits["memory"], limits["seconds"] + 5, limits["disk"], 0, self.isolated
        )
        reason, detail = self.judge(tests)
        os.write(3, json.dumps({"reason": reason, "detail": detail[:DETAIL]}).encode() + b"\n")
        os._exit(0)

    def judge(self, tests: dict[str, Any]) -> tuple[str, str]:
        """Return the reason ("passed" for success) and one line of detail."""
        space: dict[str, Any] = {"__name__": "tests"}
        try:
            exec(compile(tests["setup"], "<setup>", "exec"), space)
            code = ast.parse(tests["tests"], "<tests>")
        except Exception as error:
            return "tests", f"they are invalid: {describe_error(error, '<setup>')}"
        try:
            self.receive()  # the program has run
            for name in {*tests["names"], *program_names(code, space)}:
                space[name] = Remote(self.ask, name)
            exec(compile(code, "<tests>", "exec"), space)
            return "passed", ""
        except ProgramEnded as error:
            return self.end_reason(str(error))
        except MemoryError:
            return "memory", f"more than {self.request['memory']:,} bytes"
        except AssertionError as error:
            return "wrong", describe_error(error, "<tests>")
        except BaseException as error:
            return "error", describe_error(error, "<tests>")

    def end_reason(self, reason: str) -> tuple[str, str]:
        self.channel.close()  # ends a program that waits for a call
        if reason != ENDED_EARLY:
            return "ended", reason
        # the CPU limit is hard: no program can ignore its signal
        status, usage = os.wait4(self.child, 0)[1:]
        if os.WIFSIGNALED(status):
            used, number = usage.ru_utime + usage.ru_stime, os.WTERMSIG(status)
            # the kernel counts clock ticks: up to a fifth more on a busy machine
            if number == signal.SIGKILL and used > self.request["seconds"] / 2:
                return "time", f"more than {self.request['seconds']} s of processor time"
            return "crashed", f"{signal.Signals(number).name} after {used:.1f} s"
        return "ended", f"{ENDED_EARLY}, with status {os.WEXITSTATUS(status)}"

    def ask(self, kind: str, target: "Remote", *values: Any) -> Any:
        try:
            self.channel.write(
                json.dumps([kind, pack(target), *map(pack, values)]).encode() + b"\n"
            )
            self.channel.flush()
        except OSError:
            raise ProgramEnded(ENDED_EARLY) from None
        return self.receive()

    def receive(self) -> Any:
        try:
            line = self.channel.readline(REPLY)
        except OSError:
            line = b""
        if not line:
            raise ProgramEnded(ENDED_EARLY)
        try:
            kind, value = json.loads(line)
            if kind == "value":
                return unpack(value, lambda index: Remote(self.ask, index))
            name, text = value
            if kind != "error" or type(name) is not str or type(text) is not str:
                raise ValueError("neither a value nor an error")
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            raise ProgramEnded(
                f"the program's process wrote an invalid answer: {line[:80]!r}"
            ) from None
        if name == "SystemExit":
            raise ProgramEnded("the program called sys.exit")
        error = getattr(builtins, name, None)
        # StopIteration would end a loop of the tests that calls the program, as if all had passed
        ends_loops = name in ("StopIteration", "StopAsyncIteration")
        if isinstance(error, type) and issubclass(error, Exception) and not ends_loops:
            try:
                error = error(text)
            except TypeError:  # UnicodeDecodeError takes five arguments
                error = ProgramError(f"{name}: {text}")
            raise error
        raise ProgramError(f"{name}: {text}")


class Program:
    """Runs the program, then answers calls on descriptor 3."""

    def __init__(self, request: dict, isolated: bool) -> None:
        self.request, self.isolated = request, isolated
        self.objects: list[Any] = []

    def run(self, channel: int) -> None:
        null = os.open("/dev/null", os.O_RDONLY)
        move_descriptors({null: 0, 1: 2, channel: 3}, also={1})
        reader = os.fdopen(3, "rb")
        request = self.request
        jail.drop_privileges(
            request["memory"], request["seconds"], request["disk"], request["threads"],
            self.isolated,
        )  # fmt: skip
        space = self.space = {"__name__": "solution", "__builtins__": builtins}

        def load() -> None:
            exec(compile(request["program"], "<program>", "exec"), space)

        write_all(3, self.reply(load))
        for line in reader:
            write_all(3, self.reply(partial(self.answer, line)))
        os._exit(0)

    def answer(self, line: bytes) -> Any:
        kind, *values = (unpack(part, self.find) for part in json.loads(line))
        return ANSWERS[kind](*values)

    def find(self, key: str | int) -> Any:
        if isinstance(key, int):
            return self.objects[key]
        if key not in self.space:
            raise NameError(f"the program does not define {key}")
        return self.space[key]

    def keep(self, value: Any) -> int:
        self.objects.append(value)
        return len(self.objects) - 1

    def reply(self, answer: Callable[[], Any]) -> bytes:
        try:
            text = json.dumps(["value", pack(answer(), self.keep)])
            if len(text) >= REPLY:
                raise ValueError(f"an answer of {len(text):,} bytes, more than {REPLY:,}")
        except BaseException as error:
            try:
                message = describe_error(error, "<program>", name=False)
            except BaseException:
                message = ""
            text = json.dumps(["error", [type(error).__name__, message]])
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except BaseException:  # the program closed or replaced it
                    continue
        return text.encode() + b"\n"


ANSWERS: dict[str, Callable[..., Any]] = {
    "call": lambda target, args, keywords: target(*args, **keywords),
    "attribute": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "list": lambda target: list(islice(target, ITEMS)),
    "length": len,
    "truth": bool,
}


class Remote:
    """A proxy of a function or object in the program's process. It equals only itself."""

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
    """Return ``value`` as JSON: text, numbers and None unchanged, other values as [kind, ...].

    Subclasses become their plain type. Other objects are stored by ``keep`` and referenced by
    number; without ``keep``, in the tests' process, they raise TypeError.
    """
    if value is None or value is True or value is False:
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, Remote):
        return ["object", value._key]
    if isinstance(value, dict):
        return ["dict", [[pack(k, keep), pack(v, keep)] for k, v in value.items()]]
    for kind in SEQUENCES:
        if isinstance(value, kind):
            return [kind.__name__, [pack(item, keep) for item in value]]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, value.decode("latin-1")]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if keep is None:
        raise TypeError(f"tests: expected an argument of plain data, got {type(value).__name__}")
    return ["object", keep(value)]


def unpack(value: Any, find: Callable[[Any], Any]) -> Any:
    """Invert `pack`. ValueError, TypeError or KeyError: the value is not from `pack`."""
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
        return getattr(builtins, kind)(content, "latin-1")
    sequence = {sequence_type.__name__: sequence_type for sequence_type in SEQUENCES}[kind]
    return sequence(unpack(item, find) for item in content)


def describe_error(error: BaseException, file: str, *, name: bool = True) -> str:
    """Describe an error in one line: its last line in ``file``, its type and text."""
    frames = traceback.walk_tb(error.__traceback__)
    line = next((n for frame, n in reversed([*frames]) if frame.f_code.co_filename == file), 0)
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


def program_names(code: ast.Module, space: dict[str, Any]) -> list[str]:
    """Return the names in the tests that neither they, the setup nor Python define."""
    nodes = list(ast.walk(code))
    used = {n.id: None for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    defined = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    defined |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    defined |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {
        (alias.asname or alias.name).split(".")[0]
        for n in nodes
        if isinstance(n, ast.Import | ast.ImportFrom)
        for alias in n.names
    }
    defined |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
    return [
        name for name in used if name not in defined | space.keys() and not hasattr(builtins, name)
    ]


def move_descriptors(moved: dict[int, int], also: Collection[int] = ()) -> None:
    """Move descriptors to their targets and close all others except ``also``."""
    # first to numbers above every target, so that none is overwritten
    aside = {fcntl.fcntl(fd, fcntl.F_DUPFD, 10): target for fd, target in moved.items()}
    for fd, target in aside.items():
        os.dup2(fd, target)
    open_descriptors = {*moved.values(), *also}
    for fd in {0, 1, 2} - open_descriptors:
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
    first = 3
    for fd in sorted(open_descriptors - {0, 1, 2}):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, 4096)


if __name__ == "__main__":
    os.environ.clear()
    sys.set_int_max_str_digits(0)
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    main(sys.argv[1], sys.argv[2] == "isolated")
