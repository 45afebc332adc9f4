"""Unit tests start no process. A test that needs one belongs to tests/kernels or tests/system.

The exception is the process in which fastlm renders chat templates. It takes 20 ms, once.
"""

import sys

import pytest

STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pty.spawn")
running = None  # the unit test that runs now


def _audit(event: str, arguments: tuple) -> None:
    if running and event in STARTS and "template_worker.py" not in str(arguments):
        raise AssertionError(f"{running}: expected no child process in tests/unit, got {event}")


sys.addaudithook(_audit)  # no hook can be removed: between the tests it lets all events pass


@pytest.fixture(autouse=True)
def _no_child_process(request):
    global running
    running = request.node.nodeid
    yield
    running = None
