"""Fixtures for all tests: poisoned memory, the instruction sets of this machine, seeds.

Without a GPU Triton kernels are interpreted: `TRITON_INTERPRET` is read when they are decorated.

`pytest -n auto` runs the tests in several processes of one thread each. Tests of kernels (`isa`)
have two threads, so that work is split. OpenMP reads its variables when torch is loaded.
"""

import importlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # where there are two, one that waits must leave its core to the other processes
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from poison import guarded_memory, patched, poisoned

from fastlm import backend
from fastlm.threads import default_threads

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# thread orders in which every test of a CUDA kernel runs if there is no GPU
SIMT_SEEDS = int(os.environ.get("FASTLM_SIMT_SEEDS") or 2)

# Debian's packages without whose programs a test fails that else is skipped
REQUIRED = tuple(filter(None, os.environ.get("FASTLM_REQUIRE", "").split(",")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    return min(4, default_threads())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Let a test fail that is skipped for want of a program that has to be there."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if any(f"(Debian: {name})" in reason for name in REQUIRED):
            report.outcome, report.longrepr = "failed", f"FASTLM_REQUIRE: {reason}"
    return report


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def _same_folder():
    """Let a test fail that leaves the process in another folder, and not a later one."""
    before = os.getcwd()
    yield
    after = os.getcwd()
    os.chdir(before)
    assert after == before


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    """Fill new memory with NaN, so that an output that a kernel leaves unwritten is noticed."""
    with patched(poisoned):
        yield


@pytest.fixture(params=backend.cpu_isas())
def isa(request):
    """Run the test on every instruction set of this machine, and on emulated AMX tiles, with two
    threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with backend.use_cpu_isa(request.param):
        yield request.param
    torch.set_num_threads(threads)


@pytest.fixture
def triton():
    """Run every op on its Triton kernel. Returns the device for its tensors."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        with backend.use_backend("triton"):
            yield "cuda"
        return
    from interpreter import repair_bfloat16

    repair_bfloat16()
    # masked-off lanes also compute; numpy warns where a GPU returns inf or NaN
    with backend.use_backend("triton"), np.errstate(all="ignore"), guarded_memory() as memory:
        yield "cpu"
        memory.check()  # nothing was written outside an output


@pytest.fixture(params=range(1, SIMT_SEEDS + 1), ids=lambda seed: f"seed {seed}")
def cuda(request):
    """Run every op on its CUDA kernel. Returns the device for its tensors. Without a GPU that is
    the CPU, where csrc/simt runs the kernels with their threads in the seed's order. Even seeds
    also look for races in global memory.
    """
    if torch.cuda.is_available():
        with backend.use_backend("cuda"):
            yield "cuda"
        return
    with backend.use_backend("simt"), guarded_memory() as memory:
        simt = importlib.import_module("fastlm._simt")
        simt.set_options(seed=request.param, races=request.param % 2 == 0)
        yield "cpu"
        memory.check()  # nothing was written outside an output


@pytest.fixture(params=FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def one_thread():
    """One thread: results to the bit, and no time lost on tiny models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def postgresql():
    """The URL of a database in a server of its own, which only a socket reaches."""
    from fastlm.errors import InputError
    from fastlm.serve.feedback import FeedbackStore

    programs = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    initdb = next(iter(sorted(programs, reverse=True)), None)
    if initdb is None:
        pytest.skip("wanted PostgreSQL (Debian: postgresql), not found")
    folder = Path(tempfile.mkdtemp(prefix="fastlm-pg-"))  # pytest's are closed to other users
    folder.chmod(0o755)
    data, other = folder / "data", {}
    data.mkdir()
    if os.geteuid() == 0:  # as whom PostgreSQL refuses to run
        shutil.chown(data, "postgres")
        other = {"user": "postgres", "group": "postgres", "extra_groups": []}
    made = [initdb, "-D", data, "-U", "postgres", "--no-sync", "--auth=trust"]
    subprocess.run(made, check=True, capture_output=True, cwd=data, **other)
    options = ["-c", "listen_addresses=", "-k", data, "-c", "fsync=off"]
    command = [initdb.with_name("postgres"), "-D", data, *options]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=data, **other)
    url = f"postgresql://postgres@/postgres?host={data}"
    until = time.monotonic() + 120
    while True:
        try:
            FeedbackStore(url).close()
            break
        except InputError:
            assert time.monotonic() < until and server.poll() is None
            time.sleep(0.05)
    yield url
    server.send_signal(signal.SIGQUIT)
    server.wait()
    shutil.rmtree(folder)


@pytest.fixture(params=("sqlite", "postgresql"))
def where(request, tmp_path):
    """A database for feedback, on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
        yield str(tmp_path / "feedback.sqlite")
        return
    from fastlm.serve.feedback import FeedbackStore

    url = request.getfixturevalue("postgresql")
    yield url
    with FeedbackStore(url) as store, store.write() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
