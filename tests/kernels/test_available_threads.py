"""Tests of the threads of a command: how many there are, and how they wait."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fastlm import cli, threads


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Fake four cores with two hardware threads each, all of them available, and no cgroup."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for cpu in range(8):
        siblings = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        write(siblings, f"{cpu % 4},{cpu % 4 + 4}\n")
    return tmp_path


def test_physical_cores_that_the_process_may_use(machine, monkeypatch):
    assert threads.default_threads(machine) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 5})
    assert threads.default_threads(machine) == 2


@pytest.mark.parametrize(
    "limit, expected", [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 4)]
)
def test_quota_of_cgroup_2(machine, limit, expected):
    write(machine / "proc/self/cgroup", "0::/user.slice/mine\n")
    write(machine / "sys/fs/cgroup/user.slice/cpu.max", limit)
    write(machine / "sys/fs/cgroup/user.slice/mine/cpu.max", "max 100000")
    assert threads.default_threads(machine) == expected


@pytest.mark.parametrize("limit, expected", [("300000", 3), ("-1", 4)])
def test_quota_of_cgroup_1(machine, limit, expected):
    """The quota inside a container, where the process's own group is the root of the mount."""
    write(machine / "proc/self/cgroup", "7:memory:/box\n4:cpu,cpuacct:/box\n")
    write(machine / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", limit)
    write(machine / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert threads.default_threads(machine) == expected


@pytest.fixture
def environment(monkeypatch):
    """Restore the environment that `configure_threads` reads and changes."""
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that the test removes what `configure_threads` sets
        monkeypatch.delenv(name)
    before = torch.get_num_threads()
    yield os.environ
    torch.set_num_threads(before)


def test_configuration_bounds_the_wait_and_counts_cores(environment):
    threads.configure_threads()
    assert environment["GOMP_SPINCOUNT"] == threads.SPIN_ROUNDS
    assert environment["OMP_NUM_THREADS"] == str(threads.default_threads())


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7")])
def test_exported_variables_are_kept(environment, name, value):
    environment |= {"OMP_NUM_THREADS": "3", name: value}
    threads.configure_threads()
    assert environment["OMP_NUM_THREADS"] == "3" and environment[name] == value
    assert "GOMP_SPINCOUNT" not in environment or name == "GOMP_SPINCOUNT"
    threads.configure_threads(2)
    assert environment["OMP_NUM_THREADS"] == "2" and torch.get_num_threads() == 2


def test_threads_of_a_command():
    command = [sys.executable, "-P", "-m", "fastlm", "info", "--json", "--threads", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["threads"] == 3


@pytest.mark.parametrize("verb", ["run", "pretrain", "quantize", "eval", "generate", "chat"])
def test_every_verb_that_computes_takes_threads(verb):
    assert "--threads" in CliRunner().invoke(cli.app, [verb, "--help"]).stdout
