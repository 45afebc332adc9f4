"""Fixtures of all tests (poisoned memory, seeds) and the selection of tests.

`make test` runs each test on enough combinations of its parameters that every pair of values occurs
(pairs.py); `make test-all` runs all combinations.

Without a GPU, Triton kernels are interpreted: `TRITON_INTERPRET` is read when they are decorated.

`pytest -n auto` runs the tests in several processes of one thread each. Tests of kernels (`isa`)
have two threads, so that work is split. OpenMP reads its variables when torch is loaded.
"""

import ctypes
import gc
import os
import signal
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # a thread that waits for another must leave its core to the other processes
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell without job control starts a background command with SIGINT ignored, which all child
# processes inherit; tests send them one
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from pairs import all_pairs
from poison import patch_allocations, poison

from fastlm.threads import default_threads

SMALL = 700 << 20  # bytes of a process that has imported what tests import
TIERS = ("system", "kernels", "unit")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Debian's packages: a test that needs one of their programs fails without it, and is not skipped
REQUIRED = tuple(filter(None, os.environ.get("FASTLM_REQUIRE", "").split(",")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    return min(4, default_threads()) + 1  # tests of servers wait for them


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fail a test that is skipped because a required program is missing."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if any(f"(Debian: {name})" in reason for name in REQUIRED):
            report.outcome, report.longrepr = "failed", f"FASTLM_REQUIRE: {reason}"
    return report


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="Run what `make test-all` runs.")
    parser.addoption(
        "--kernels", choices=("cpu", "triton", "cuda"), help="Run only tests of these kernels."
    )


def pytest_collection_modifyitems(config, items):
    absent = set()
    if not torch.cuda.is_available():
        absent.add("gpu")
    if not config.option.all:
        absent.add("exhaustive")
    items[:] = [item for item in items if not any(map(item.get_closest_marker, absent))]
    selected = config.option.keyword or any("::" in name for name in config.args)
    if not (config.option.all or selected):  # tests selected by name run on every combination
        items[:] = all_pairs(items)
    if only := config.option.kernels:
        items[:] = [item for item in items if language(item) == only]
    # the longest files are in system: only short files remain at the end of a parallel run
    items.sort(key=lambda item: TIERS.index(item.path.parent.name))


def language(item: pytest.Item) -> str:
    """Return the language of the kernels that a test runs (tests/support/on_kernels.py)."""
    call = getattr(item, "callspec", None)
    if call and "kernel" in call.params:
        return call.params["kernel"].language
    for name in ("cuda", "triton"):
        if name in item.fixturenames or item.path.name.startswith(f"test_{name}_"):
            return name
    return "cpu"


@pytest.fixture(autouse=True)
def _same_folder():
    """Fail a test that leaves the process in another folder, so that no later test fails."""
    before = os.getcwd()
    yield
    after = os.getcwd()
    os.chdir(before)
    assert after == before


@pytest.fixture(autouse=True, scope="module")
def _compiled():
    """Release a file's compiled graphs at its end."""
    yield
    if "torch._dynamo" in sys.modules and resident() > SMALL:
        torch._dynamo.reset()
        give_memory_back()


@pytest.fixture(autouse=True)
def _memory():
    """Return memory to the system after a test that has grown its process: a run has several
    processes, and a machine with two cores may have 4 GiB.
    """
    yield
    if resident() > _limit:
        give_memory_back()


_limit = SMALL


def give_memory_back() -> None:
    global _limit
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _limit = max(SMALL, resident() + (150 << 20))  # do not collect again for the same memory


def resident() -> int:
    """Return the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    """Fill new memory with NaN, so that an output which a kernel does not write is noticed."""
    with patch_allocations(poison):
        yield


@pytest.fixture(params=FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def one_thread():
    """Use one thread: results are exact to the bit, and tiny models lose no time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
