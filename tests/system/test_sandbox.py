"""Sandbox: right programs pass, wrong ones fail, hostile ones are contained with a reason."""

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastlm import sandbox
from fastlm.sandbox import Case, Outcome, SandboxError, SandboxLimits, run_all, run_code

TESTS = "for i in range(3):\n    assert f(i) == 2 * i\n"
RIGHT = "def f(x):\n    return 2 * x\n"
SECRET = "the secret of the tests: 2cfcd7a1"
# Hostile programs define f right or wrong after what they try; each writes what it got.
TRY = """
import os, sys
def attempt(name, action):
    try:
        print(name, 'got', action(), flush=True)
    except BaseException as error:
        print(name, 'refused', type(error).__name__, flush=True)
"""
LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("victim")
    folder.chmod(0o777)
    (folder / "kept.txt").write_text(SECRET)
    (folder / "kept.txt").chmod(0o666)
    return folder


@pytest.fixture(scope="module")
def port():
    """Start a server on loopback; its queue shows connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()


def attacks(victim: Path, port: int) -> dict[str, tuple[str, str]]:
    """Return programs by name, each with the expected reason."""
    end = RIGHT
    return {
        "fork bomb": ("import os\nwhile True: os.fork()", "error"),
        "fork bomb that insists": (
            f"{TRY}import subprocess, multiprocessing\n"
            "attempt('fork', os.fork)\n"
            "attempt('spawn', lambda: os.posix_spawn('/bin/sh', ['sh'], {}))\n"
            "attempt('exec', lambda: os.execv(sys.executable, ['python']))\n"
            "attempt('run', lambda: subprocess.run(['true']))\n"
            "while True:\n    try: os.fork()\n    except OSError: pass",
            "time",
        ),
        "raw clone": (
            f"{TRY}{LIBC}"
            "for call in ((56, 17, 0, 0, 0, 0), (57,), (58,), (435, 0, 88)):\n"
            "    print('clone', libc.syscall(*call))\n" + end,
            "passed",
        ),
        "daemon": (
            f"{TRY}import time\n"
            "def daemon():\n    if os.fork() == 0:\n        os.setsid(); time.sleep(1000)\n"
            "attempt('daemon', daemon)\n" + end,
            "passed",
        ),
        "threads bomb": (
            f"{TRY}import threading, time\ncount = 0\n"
            "threading.stack_size(32768)\n"
            "def more():\n    global count\n"
            "    while True:\n"
            "        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
            "        count += 1\n"
            "attempt('threads', more)\nprint('count', count)\n" + end,
            "passed",
        ),
        "writes and removals": (
            f"{TRY}import shutil\nfolder = {str(victim)!r}\n"
            "attempt('write', lambda: open(folder + '/new.txt', 'w'))\n"
            "attempt('over', lambda: open(folder + '/kept.txt', 'w'))\n"
            "attempt('remove', lambda: os.remove(folder + '/kept.txt'))\n"
            "attempt('read', lambda: open(folder + '/kept.txt').read())\n"
            "attempt('tree', lambda: shutil.rmtree(folder))\n"
            "shutil.rmtree('/', ignore_errors=True)\n"
            "attempt('library', lambda: open(os.__file__, 'a'))\n"
            "attempt('root', lambda: os.mkdir('/new'))\n"
            "attempt('chmod', lambda: os.chmod('/', 0o777))\n"
            "attempt('disk', lambda: open('/dev/vda', 'rb'))\n" + end,
            "passed",
        ),
        "a full disk": (
            f"{TRY}attempt('disk', lambda: [open(f'/tmp/{{i}}', 'wb').write(bytes(2**20))"
            " for i in range(100)])\n"
            "attempt('inodes', lambda: [open(f'/tmp/a{i}', 'w').close() for i in range(10**5)])\n"
            + end,
            "passed",
        ),
        "network": (
            f"{TRY}{LIBC}import socket\n"
            f"attempt('connect', lambda: socket.create_connection(('127.0.0.1', {port})))\n"
            "attempt('unix', lambda: socket.socket(socket.AF_UNIX))\n"
            "attempt('listen', lambda: socket.create_server(('127.0.0.1', 0)))\n"
            "attempt('names', lambda: socket.getaddrinfo('localhost', 80, type=1))\n"
            "print('raw', libc.syscall(41, 2, 1, 0))\n" + end,
            "passed",
        ),
        "endless output": ("import sys\nwhile True: sys.stdout.write('x' * 1000)", "output"),
        "too much output and a right answer": ("print('x' * 70000, flush=True)\n" + end, "output"),
        "as much output as is allowed": ("print('x' * 65535, flush=True)\n" + end, "passed"),
        "endless errors": ("import os\nwhile True: os.write(2, b'x' * 1000)", "output"),
        "endless loop": ("while True: pass", "time"),
        "endless loop without signals": (
            "import signal\n"
            "for s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
            "while True: pass",
            "time",
        ),
        "endless loop in a call": ("def f(x):\n    while True: pass", "time"),
        "sleep": ("import time\ntime.sleep(1000)", "wall"),
        "memory at once": ("x = bytearray(10**11)", "memory"),
        "memory bit by bit": ("x = []\nwhile True: x.append(bytes(10**6))", "memory"),
        "memory in a call": ("def f(x): return [0] * 10**10", "memory"),
        "reading the answers": (
            f"{TRY}{LIBC}import gc\n"
            "def there(text, first, last):\n"
            "    at = text.find(first)\n"
            "    while at >= 0 and text[at + 4 : at + 8] != last:\n"
            "        at = text.find(first, at + 1)\n"
            "    return at >= 0\n"
            "def search():\n"
            "    frame, groups = sys._getframe(), gc.get_objects()\n"
            "    while frame is not None:\n"
            "        groups += [frame.f_globals, frame.f_locals, frame.f_code.co_consts]\n"
            "        frame = frame.f_back\n"
            "    for group in groups:\n"
            "        group = list(group.values()) if type(group) is dict else group\n"
            "        for text in group if type(group) in (list, tuple) else ():\n"
            "            if type(text) is str and there(text, '2cfc', 'd7a1'):\n"
            "                return 'found ' + text\n"
            "    libc.sbrk.restype = ctypes.c_void_p\n"
            "    heap = ctypes.string_at(libc.sbrk(0) - 200000, 200000)\n"
            "    return 'found in memory' if there(heap, b'2cfc', b'd7a1') else 'nothing'\n"
            "print(search())\n"
            "def f(x):\n    print(search())\n    return 2 * x\n",
            "passed",
        ),
        "other processes": (
            f"{TRY}{LIBC}"
            "print('pids', os.getpid(), os.getppid())\n"
            "for name in ('environ', 'mem', 'maps', 'cmdline'):\n"
            "    for pid in (1, os.getppid(), 'self'):\n"
            "        attempt(name, lambda: open(f'/proc/{pid}/{name}', 'rb').read())\n"
            "attempt('mount', lambda: print(libc.mount(b'p', b'/tmp', b'proc', 0, None)) or 1/0)\n"
            "print('ptrace', libc.ptrace(16, 1, 0, 0), libc.syscall(101, 16, 1, 0, 0))\n"
            "print('vm', libc.syscall(310, 1, 0, 0, 0, 0, 0))\n"
            "print('environ', dict(os.environ))\n" + end,
            "passed",
        ),
        "signals": (
            f"{TRY}import signal\n"
            "for pid in (os.getppid(), 1, -1, 0, os.getpid()):\n"
            "    attempt('kill', lambda: os.kill(pid, signal.SIGKILL))\n" + end,
            "passed",
        ),
        "early os._exit": ("import os\nos._exit(0)", "ended"),
        "early sys.exit": ("import sys\nsys.exit(0)", "ended"),
        "SystemExit in a call": ("def f(x): raise SystemExit(0)", "ended"),
        "os._exit in a call": ("import os\ndef f(x): os._exit(0)", "ended"),
        "os._exit at exit of the import": (
            "import os, atexit\natexit.register(os._exit, 0)\ndef f(x): return 0",
            "wrong",
        ),
        "fake markers": (
            "import os\n"
            'line = b\'{"reason": "passed", "detail": "", "output": ""}\\n\'\n'
            "for fd in [1, 2, *range(4, 64)]:\n"
            "    try: os.write(fd, line)\n"
            "    except OSError: pass\n"
            "def f(x): return 0",
            "wrong",
        ),
        "fake markers on the channel": (
            "import os\n"
            'for _ in range(9): os.write(3, b\'{"reason": "passed", "detail": ""}\\n\')\n'
            "os._exit(0)",
            "ended",
        ),
        "fake answers on the channel": (
            "import os\nos.write(3, b'[\"value\", null]\\n' * 9)\ndef f(x): return 0",
            "wrong",
        ),
        "an answer without end": (
            "import os\nwhile True: os.write(3, b'[' * 65536)",
            "ended",
        ),
        "deep answer": (
            "import os\nos.write(3, b'[' * 100000 + b'\\n')\nos._exit(0)",
            "ended",
        ),
        "equal to everything": (
            "class E:\n    __eq__ = __lt__ = __bool__ = lambda *a: True\n    __hash__ = None\n"
            "def f(x): return E()",
            "wrong",
        ),
        "a number equal to everything": (
            "class E(int):\n    __eq__ = lambda *a: True\n    __hash__ = None\n"
            "def f(x): return E(7)",
            "wrong",
        ),
        "patched Python": (
            "import builtins, sys\n"
            "builtins.AssertionError = builtins.range = builtins.compile = lambda *a: []\n"
            "builtins.exec = builtins.len = builtins.abs = lambda *a: 0\n"
            "range = list\nsys.settrace(lambda *a: None)\n"
            "for module in list(sys.modules.values()):\n"
            "    if hasattr(module, 'Tests'):\n"
            "        module.Tests.judge = lambda *a: ('passed', '')\n"
            "        module.pack = lambda *a: 0\n"
            "def f(x): return 1",
            "error",  # what it broke was its own
        ),
        "a thread that never ends": (
            "import threading\n"
            "def spin():\n    while True: pass\n"
            "threading.Thread(target=spin).start()\n" + end,
            "passed",
        ),
        "descriptors": (
            f"{TRY}def there(fd):\n"
            "    try: os.fstat(fd)\n"
            "    except OSError: return False\n"
            "    return True\n"
            "print(list(filter(there, range(5000))), os.read(0, 1))\n" + end,
            "passed",
        ),
        "calls of another architecture": (f"{LIBC}libc.syscall(0x40000000 + 57)", "crashed"),
        "stdin": (f"{TRY}attempt('stdin', input)\n" + end, "passed"),
        "packages": (f"{TRY}attempt('numpy', lambda: __import__('numpy'))\n" + end, "passed"),
        "a crash": ("import ctypes\nctypes.string_at(1)", "crashed"),
        "deep recursion": ("def f(x): return f(x)", "error"),
        "syntax": ("def f(x) return x", "error"),
        "nothing": ("", "error"),
        "a slow start": ("import unittest, asyncio, dataclasses\n" + end, "passed"),
        "threads and asyncio": (
            "import asyncio\nfrom concurrent.futures import ThreadPoolExecutor\n"
            "async def g(x):\n    await asyncio.sleep(0)\n    return x\n"
            "def f(x):\n    with ThreadPoolExecutor(4) as pool:\n"
            "        return sum(pool.map(lambda y: asyncio.run(g(y)), [x, x]))\n",
            "passed",
        ),
        "leaves a file": ("open('/tmp/left', 'w').write('x')\n" + end, "passed"),
        "finds no file": (
            f"{TRY}print(os.listdir('/tmp'), sorted(os.listdir('/')))\n" + end,
            "passed",
        ),
    }


LIMITS = SandboxLimits(seconds=1, wall=20, memory=2**28)


@pytest.fixture(scope="module")
def outcomes(victim, port) -> dict[str, Outcome]:
    os.environ["FASTLM_TEST_SECRET"] = SECRET
    programs = attacks(victim, port)
    cases = []
    for name, (program, _) in programs.items():
        answers = name == "reading the answers"
        cases.append(Case(program, TESTS + (f"word = {SECRET!r}\n" if answers else "")))
    sleeps = [name == "sleep" for name in programs]
    results = iter(run_all([c for c, s in zip(cases, sleeps) if not s], workers=2, limits=LIMITS))
    short = SandboxLimits(seconds=1, wall=1)
    outcome_of = {
        name: run_code(case.program, case.tests, limits=short) if s else next(results)
        for name, case, s in zip(programs, cases, sleeps)
    }
    del os.environ["FASTLM_TEST_SECRET"]
    return outcome_of


def test_each_attack_is_told_by_its_reason(outcomes, victim, port):
    expected = {name: reason for name, (_, reason) in attacks(victim, port).items()}
    got = {name: outcome.reason for name, outcome in outcomes.items()}
    assert got == expected
    for outcome in outcomes.values():
        assert outcome.passed == (outcome.reason == "passed")
        assert "\n" not in outcome.detail and (outcome.passed or outcome.detail)


def test_processes_are_refused(outcomes):
    assert "PermissionError" in outcomes["fork bomb"].detail
    lines = outcomes["fork bomb that insists"].output.splitlines()
    assert len(lines) == 4 and all("refused" in line for line in lines), lines
    assert outcomes["raw clone"].output == "clone -1\n" * 4
    assert outcomes["daemon"].output == "daemon refused PermissionError\n"
    lines = outcomes["threads bomb"].output.splitlines()
    assert lines[0] == "threads refused RuntimeError"
    assert int(lines[1].split()[1]) == LIMITS.threads
    assert "kill got" not in outcomes["signals"].output
    assert outcomes["signals"].output.count("PermissionError") == 5


def test_files_outside_are_neither_read_nor_written(outcomes, victim):
    lines = outcomes["writes and removals"].output.splitlines()
    assert len(lines) == 9 and all("refused" in line for line in lines), lines
    assert [path.name for path in victim.iterdir()] == ["kept.txt"]
    assert (victim / "kept.txt").read_text() == SECRET
    assert os.path.exists(os.__file__)
    assert outcomes["a full disk"].output == "disk refused OSError\ninodes refused OSError\n"
    observed = outcomes["finds no file"].output
    assert observed.startswith("[] ['dev', ") and "'tmp'" in observed and "proc" not in observed


def test_the_network_is_out_of_reach(outcomes, port):
    *lines, raw = outcomes["network"].output.splitlines()
    assert len(lines) == 4 and all("refused" in line for line in lines), lines
    assert raw == "raw -1"


def test_output_is_bounded(outcomes):
    assert outcomes["endless output"].output == "x" * LIMITS.output
    assert len(outcomes["endless errors"].output) == LIMITS.output


def test_the_tests_and_the_caller_cannot_be_read(outcomes):
    assert outcomes["reading the answers"].output == "nothing\n" * 4
    others = outcomes["other processes"].output.splitlines()
    assert others[0] == "pids 2 1"
    assert sum("refused FileNotFoundError" in line for line in others) == 12
    assert others[-4:] == [
        "mount refused ZeroDivisionError",
        "ptrace -1 -1",
        "vm -1",
        "environ {}",
    ]
    assert outcomes["packages"].output == "numpy refused ModuleNotFoundError\n"
    assert outcomes["descriptors"].output == "[0, 1, 2, 3] b''\n"
    assert "SIGSYS" in outcomes["calls of another architecture"].detail
    assert outcomes["stdin"].output == "stdin refused EOFError\n"
    assert not any(SECRET in outcome.output for outcome in outcomes.values())


def processes(*, group: int = -1, parent: int = -1) -> list[int]:
    """Return the processes of a group, or the children of a process, without zombies."""
    actual = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if state != "Z" and (int(pgrp) == group or int(ppid) == parent):
            actual.append(int(stat.parent.name))
    return actual


def test_no_process_outlives_its_tests_and_a_lost_worker_is_replaced():
    worker = sandbox._Worker(LIMITS, True)
    spin = attacks(Path("/"), 0)["a thread that never ends"][0]
    assert worker.run(Case(spin, TESTS)).passed
    for _ in range(1000):  # the keeper ends after it has told the outcome
        if processes(group=worker.process.pid) == [worker.process.pid]:
            break
        time.sleep(0.01)
    assert processes(group=worker.process.pid) == [worker.process.pid]
    lost = worker.process.pid
    os.kill(lost, signal.SIGKILL)
    assert worker.run(Case(RIGHT, TESTS)) == Outcome(False, "crashed", "the worker was lost")
    assert worker.run(Case(RIGHT, TESTS)).passed
    worker.close()
    assert processes(group=lost) == []


def test_nothing_is_left_where_the_caller_is_killed():
    code = "from fastlm.sandbox import *; run_code('import time; time.sleep(1000)', '1')"
    caller = subprocess.Popen([sys.executable, "-P", "-c", code])
    worker, deadline = 0, time.monotonic() + 300  # a guard: it takes a second
    while time.monotonic() < deadline:
        worker = max(processes(parent=caller.pid), default=-2)
        if len(processes(group=worker)) == 4:  # worker, keeper, tests, program
            break
        time.sleep(0.01)
    assert len(processes(group=worker)) == 4
    caller.kill()
    caller.wait()
    while processes(group=worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes(group=worker) == []


# As a data set has it: the tests' helper is in the prompt, which the program repeats.
PROMPT = '''
import math


def poly(xs: list, x: float):
    """Evaluate the polynomial with coefficients xs at x."""
    return sum(coefficient * math.pow(x, i) for i, coefficient in enumerate(xs))


def find_zero(xs: list):
    """Return one x such that poly(xs, x) = 0; len(xs) is even.

    >>> round(find_zero([1, 2]), 2)
    -0.5
    """
'''
SOLUTION = """
    begin, end = -1.0, 1.0
    while poly(xs, begin) * poly(xs, end) > 0:
        begin, end = 2 * begin, 2 * end
    while end - begin > 1e-10:
        center = (begin + end) / 2
        if poly(xs, center) * poly(xs, begin) > 0:
            begin = center
        else:
            end = center
    return begin
"""
CHECK = """
METADATA = {}

def check(candidate):
    import math
    import random
    rng = random.Random(42)
    import copy
    for _ in range(20):
        zeros = [rng.randint(-9, 9) for _ in range(1)]
        coeffs = [-zeros[0], 1]
        solution = candidate(copy.deepcopy(coeffs))
        assert math.fabs(poly(coeffs, solution)) < 1e-4

check(find_zero)
"""


@pytest.mark.parametrize(
    "body, reason",
    [
        (SOLUTION, "passed"),
        ("    return 0.0\n", "wrong"),
        ("    return 0.0\ndef poly(xs, x): return 0.0\n", "wrong"),  # its helper is not asked
        ("    return undefined\n", "error"),
    ],
)
def test_a_humaneval_like_case(body, reason):
    outcome = run_code(PROMPT + body, CHECK, setup=PROMPT, names=["find_zero"])
    assert outcome.reason == reason, outcome


SAME = "def f(x): return x"


@pytest.mark.parametrize(
    "program, tests",
    [
        (
            "def f(*a, **k): return a, k",
            "assert f(1, [2], k={3: (4,)}) == ((1, [2]), {'k': {3: (4,)}})",
        ),
        (SAME, "assert f((1, 2)) != [1, 2] and type(f((1,))) is tuple"),
        (SAME, "x = {1: {2, 3}, (4,): frozenset()}\nassert f(x) == x"),
        (SAME, "assert f(True) is True and f(None) is None and f(1) is not True"),
        (SAME, "assert f(float('inf')) > 1e308 and f(float('nan')) != f(float('nan'))"),
        (SAME, "assert f(-7 ** 9000) == -7 ** 9000 and f(1j) == 1j"),
        (SAME, "assert f(b'\\xff') == b'\\xff' and f('\\ud800\\n') == '\\ud800\\n'"),
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2] and f(2) != [0, 1]"),
        ("from collections import Counter as f", "assert f('aab') == {'a': 2, 'b': 1}"),
        (
            "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
            "def f(pairs): return max(p.b for p in pairs)",
            "p = Pair(5, 24)\nassert f([p, Pair(1, 2)]) == 24 and p.a == 5 and p != Pair(5, 24)\n"
            "p.b = [Pair]\nassert f([p]) == [Pair] or p.b[0](1, 2).a == 1",
        ),
        (
            "def f(x):\n    if x < 0: raise ValueError('below 0')\n    return x",
            "try:\n    f(-1)\n    assert 0\n"
            "except ValueError as e:\n    assert e.args == ('below 0',)",
        ),
        ("import math\ndef f(x: list[int]): return math.fsum(x)", "assert f([.1] * 10) == 1"),
        ("if __name__ == '__main__':\n    exit()\ndef f(x): return x", "assert f(1) == 1"),
    ],
)
def test_what_tests_may_do(program, tests):
    assert run_code(program, tests) == Outcome(True, "passed")


def test_names_replace_those_of_python():
    program, tests = "def sum(a, b): return a + b", "assert sum(1, 2) == abs(-3)"
    assert run_code(program, tests, names=["sum"]).passed
    assert run_code(program, tests).detail.endswith("TypeError: 'int' object is not iterable")
    assert run_code("def abs(x): return 3\ndef sum(a, b): return 3", tests, names=["sum"]).passed
    wrong = "def abs(x): return 4\ndef sum(a, b): return 4"  # abs is Python's, whatever it says
    assert run_code(wrong, tests, names=["sum"]).reason == "wrong"


@pytest.mark.parametrize(
    "tests, reason, detail",
    [
        ("assert f(1) ==", "tests", "they are invalid: SyntaxError"),
        ("assert f(lambda: 1) == 1", "error", "expected an argument of plain data, got function"),
        ("assert g(1) == 1", "error", "line 1: NameError: the program does not define g"),
        ("x = 1\nassert f(1) == 3, 'one is not three'", "wrong", "line 2: AssertionError: one is"),
    ],
)
def test_tests_that_fail_say_where(tests, reason, detail):
    outcome = run_code(RIGHT, tests)
    assert outcome.reason == reason and detail in outcome.detail


@pytest.mark.parametrize("error", ["StopIteration", "StopAsyncIteration", "GeneratorExit"])
def test_an_error_that_ends_loops_passes_no_tests(error):
    """map() would take it for its end, and the loop for a pass."""
    tests = "for a in map(f, [1, 2]):\n    assert a == 1\nassert all(map(f, [0]))"
    outcome = run_code(f"def f(x): raise {error}", tests)
    assert outcome.reason == "error" and error in outcome.detail
    generator = "def f(x):\n    yield x\n    return"  # an end is an end
    assert run_code(generator, "assert list(f(1)) == [1]").passed


def test_outcomes_are_in_order_and_told_as_they_come():
    cases = [Case(f"def f(): return {i}", f"assert f() == {i if i % 3 else -1}") for i in range(12)]
    reported: list[Outcome] = []
    outcomes = run_all(cases, workers=3, on_outcome=reported.append)
    assert [o.passed for o in outcomes] == [bool(i % 3) for i in range(12)] and reported == outcomes
    assert run_all([]) == []


def test_limits_and_workers_are_checked():
    for name, value in (("seconds", 0), ("memory", 1000), ("threads", -1), ("output", 1.5)):
        with pytest.raises(SandboxError, match=f"{name}: expected .*, got {value}"):
            SandboxLimits(**{name: value})
    with pytest.raises(SandboxError, match="workers: expected 1 or more, got 0"):
        run_all([Case("", "")], workers=0)


# Refuses a call by number in a process of its own, then runs a program there.
REFUSING = """
import sys
sys.path.append({folder!r})
import jail
sys.path.pop()
from fastlm import sandbox
filter = jail.assemble_bpf({{}}, {refused})[:-8] + jail.struct.pack('HBBI', 6, 0, 0, 0x7fff0000)
buffer = jail.ctypes.create_string_buffer(filter)
program = jail.struct.pack('HxxxxxxQ', len(filter) // 8, jail.ctypes.addressof(buffer))
assert jail._libc.prctl(38, 1, 0, 0, 0) == 0 and jail._libc.prctl(22, 2, program, 0, 0) == 0
try:
    limits = sandbox.SandboxLimits(seconds=1)
    outcomes = [sandbox.run_code(program, tests, isolated={isolated}, limits=limits)
                for program, tests in {cases!r}]
    print([[o.reason, o.output] for o in outcomes])
except sandbox.SandboxError as error:
    print([str(error)])
"""


def on_a_machine_without(
    refused: list[int], *cases: tuple[str, str], isolated: bool = True
) -> list:
    folder = str(Path(sandbox.__file__).parent)
    code = REFUSING.format(folder=folder, refused=refused, isolated=isolated, cases=cases)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


UNSHARE, MOUNT, PIVOT_ROOT, MOUNT_SETATTR = 272, 165, 155, 442


@pytest.mark.parametrize(
    "refused, missing",
    [
        (UNSHARE, "a (user|mount) namespace: unshare: Operation not permitted"),
        (MOUNT, "private root: mount of /: Operation not permitted"),
        (PIVOT_ROOT, "private root: pivot_root: Operation not permitted"),
        (MOUNT_SETATTR, r"a read-only root: mount_setattr \(Linux 5.12\): Operation not permitted"),
    ],
)
def test_a_machine_that_cannot_isolate_is_refused_in_one_line(refused, missing):
    (line,) = on_a_machine_without([refused], (RIGHT, TESTS))
    assert re.fullmatch(f"sandbox: this machine lacks {missing}; isolated=False runs .*", line), (
        line
    )


def test_limits_alone_where_a_machine_cannot_isolate(victim, port):
    hostile = (
        f"{TRY}import socket, signal, threading\nfolder = {str(victim)!r}\n"
        "attempt('fork', os.fork)\n"
        "attempt('thread', threading.Thread(target=print).start)\n"
        "attempt('kill', lambda: os.kill(os.getppid(), signal.SIGKILL))\n"
        f"attempt('connect', lambda: socket.create_connection(('127.0.0.1', {port})))\n"
        "attempt('write', lambda: open(folder + '/new.txt', 'w'))\n"
        "attempt('over', lambda: open(folder + '/kept.txt', 'r+'))\n"
        "attempt('remove', lambda: os.remove(folder + '/kept.txt'))\n"
        "attempt('make', lambda: os.mkdir(folder + '/new'))\n" + RIGHT
    )
    right, attack, loop, memory, early = on_a_machine_without(
        [UNSHARE],
        (RIGHT, TESTS),
        (hostile, TESTS),
        ("while True: pass", TESTS),
        ("x = bytearray(10**11)", TESTS),
        ("import os; os._exit(0)", TESTS),
        isolated=False,
    )
    assert right == ["passed", ""] and attack[0] == "passed"
    lines = attack[1].splitlines()
    assert len(lines) == 8 and all("refused" in line for line in lines), lines
    assert (loop[0], memory[0], early[0]) == ("time", "memory", "ended")
    assert (victim / "kept.txt").read_text() == SECRET


SYSTEM_PYTHON = "/usr/bin/python3"  # below /root the user nobody reaches none


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists(SYSTEM_PYTHON), reason="(Debian: python3), for root"
)
def test_a_user_without_rights_has_the_same_sandbox(tmp_path):
    """Root drops its rights in another way than a normal user; both get the same sandbox."""
    folder = Path(sandbox.__file__).parent
    place = Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("__*")))
    for path in (tmp_path, *tmp_path.parents[:-1], place):
        if path.owner() == "root" and path.stat().st_mode & 0o005 != 0o005:
            path.chmod(path.stat().st_mode | 0o005)
    tell = "import os; print(os.path.dirname(os.path.realpath(os.__file__)))"
    library = subprocess.run([SYSTEM_PYTHON, "-c", tell], capture_output=True, text=True).stdout
    program = (
        f"{TRY}attempt('fork', os.fork)\nattempt('proc', lambda: os.listdir('/proc'))\n" + RIGHT
    )
    request = {"program": program, **vars(LIMITS)}
    tests = {"setup": "", "tests": TESTS, "names": []}
    parts = [json.dumps(part).encode() for part in (request, tests)]
    done = subprocess.run(
        [
            SYSTEM_PYTHON,
            "-s",
            "-S",
            "-P",
            "-B",
            place / "worker.py",
            library.strip(),
            "isolated",
        ],
        input=sandbox.SIZES.pack(*map(len, parts)) + b"".join(parts),
        capture_output=True,
        user=65534,
        group=65534,
        extra_groups=[],
    )
    assert done.returncode == 0, done.stderr
    ready, answer = map(json.loads, done.stdout.splitlines())
    assert ready == {} and answer["reason"] == "passed"
    assert answer["output"] == "fork refused PermissionError\nproc refused FileNotFoundError\n"


def test_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "aarch64")
    with pytest.raises(SandboxError, match="sandbox: expected Linux on x86-64, got linux aarch64"):
        run_code(RIGHT, TESTS)
