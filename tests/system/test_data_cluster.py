"""Builds on a Ray cluster of two nodes: the pool's bytes, and what is killed is done again."""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from object_store import object_store
from test_data_prepare import prose
from test_units import begin, calls, squares
from unit_functions import fragile, square

from fastlm.data import plan
from fastlm.data.options import DataOptions
from fastlm.data.prepare import prepare
from fastlm.errors import InputError
from fastlm.pipeline.executors import run_calls
from fastlm.pipeline.units import BuildError, Work, run_step
from fastlm.sources import remote

ray = pytest.importorskip("ray")  # has no wheel for some versions of Python
pytest.importorskip("moto.server")
SUPPORT = Path(__file__).parents[1] / "support"
NODES = ("first", "second")  # the folders of temporary files of the nodes
RESULT = ["9\n", "1\n", "16\n", "1\n", "25\n"]


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # names of sockets have 107 bytes
    with object_store(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", str(SUPPORT), prepend=os.pathsep)
        for name in NODES:
            Path(folder, name).mkdir()
        patch.setenv("TMPDIR", f"{folder}/{NODES[0]}")
        nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        try:
            patch.setenv("TMPDIR", f"{folder}/{NODES[1]}")
            nodes.add_node(num_cpus=1)
            patch.setenv("RAY_ADDRESS", nodes.address)
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_bytes_are_those_of_the_pool_and_paths_those_of_the_command(
    cluster, tmp_path, monkeypatch
):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(12):
        (source / f"{number:02d}.txt").write_text(prose(number))
    (source / "twin.txt").write_text(prose(3).upper())
    (source / "bad.txt").write_bytes(b"\0\0\0")
    monkeypatch.chdir(tmp_path)
    for executor in ("pool", "ray"):
        options = DataOptions(executor=executor, unit_bytes=4000, heldout_bytes=2000)
        funnel = prepare(["source"], Path(executor), options=options, cache=tmp_path / "cache")
        assert funnel.steps[0]["removed"] == {"file: unreadable": 1}
    assert contents(tmp_path / "ray") == contents(tmp_path / "pool")
    assert len(list((tmp_path / "ray" / "train").iterdir())) > 2


def test_nodes_that_share_only_object_storage(cluster, tmp_path):
    for number in range(12):
        remote.write_object(Path(f"s3:/bucket/in/{number:02d}.txt"), prose(number).encode())
    options = {"unit_bytes": 1000, "heldout_bytes": 2000, "memory": "64MiB"}
    funnels = [
        prepare(["s3://bucket/in"], out, options=DataOptions(executor=executor, **options),
                cache=tmp_path / "cache")
        for executor, out in (("pool", tmp_path / "pool"), ("ray", Path("s3://bucket/ray")))
    ]  # fmt: skip
    assert funnels[0] == funnels[1]
    sizes = remote.list_sizes(Path("s3://bucket/ray"))
    data = {name: remote.read_object(Path(f"s3://bucket/ray/{name}")) for name in sizes}
    sums = {name: hashlib.sha256(content or b"").hexdigest() for name, content in data.items()}
    assert sums == contents(tmp_path / "pool")
    copies = [Path(os.environ["RAY_TMPDIR"], name) for name in NODES]
    assert any(list(folder.iterdir()) for folder in copies)  # Ray may use one node for all
    assert not [path for folder in copies for path in folder.rglob("*.npy")]


@pytest.mark.parametrize("fault", ["other library", "no file", "other file"])
def test_a_node_with_other_libraries_or_sources_fails(tmp_path, monkeypatch, fault):
    """Its files are not counted as unreadable: the corpus would be another one."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.txt").write_text(prose(number))
    planned = plan.make_plan

    def change(*arguments, **options):
        result = planned(*arguments, **options)
        if fault == "other library":
            monkeypatch.setattr(plan, "_version", lambda name: "0.1")
        elif fault == "no file":
            (source / "1.txt").unlink()
        else:
            (source / "1.txt").write_text("another text")
        return result

    monkeypatch.setattr("fastlm.data.prepare.make_plan", change)
    message = "got 0.1" if fault == "other library" else r"1.txt: expected the [\d,]+ bytes"
    with pytest.raises(BuildError, match=message):
        prepare([str(source)], tmp_path / "out", cache=tmp_path / "cache")


def test_a_killed_worker_is_replaced_and_errors_are_named(cluster, tmp_path):
    """One build for each kind of fault would start as many workers."""
    fates = {"0": "bug", "1": "kill once", "3": "kill"}
    work = begin(tmp_path, fates=fates)
    with pytest.raises(BuildError, match=r"failed: 0, 3; unit 0: KeyError: 'oops'") as caught:
        run_step(work, fragile, range(5), executor="ray")
    assert isinstance(caught.value.__cause__, KeyError)
    done = [work.marker("fragile", n) is not None for n in range(5)]
    assert done == [False, True, True, False, True]
    with pytest.raises(BuildError, match=r"unit 3: WorkerKilledError: its worker was killed 3"):
        run_step(work, fragile, [3], executor="ray")


def test_bad_input_stops_the_step_with_its_own_message(cluster, tmp_path):
    work = begin(tmp_path, fates={"0": "bad input"})
    with pytest.raises(InputError, match=r"^page: expected text, got none$") as caught:
        run_step(work, fragile, range(5), executor="ray")
    assert not isinstance(caught.value, BuildError)


def test_a_node_that_is_killed_midway(cluster, tmp_path):
    work = begin(tmp_path, seconds=1)
    node = next(iter(cluster.worker_nodes))
    done: list[int] = []  # units when the node was gone
    arguments = cluster, node, tmp_path, done
    killer = threading.Thread(target=_kill_when_both_work, args=arguments)
    killer.start()
    run_step(work, square, range(5), executor="ray")
    killer.join()
    assert not node.any_processes_alive() and done[0] < 5
    assert squares(work) == RESULT
    cluster.add_node(num_cpus=1)


def _kill_when_both_work(cluster, node, folder: Path, done: list[int]) -> None:
    deadline = time.monotonic() + 60
    log = folder / "calls.log"
    while time.monotonic() < deadline:
        lines = log.read_text().splitlines() if log.exists() else []
        if len({line.split()[1] for line in lines}) == 2:
            break
        time.sleep(0.01)
    cluster.remove_node(node, allow_graceful=False)
    done.append(len(calls(folder)))


BUILD = """
import sys
from pathlib import Path
from unit_functions import square
from fastlm.pipeline.units import Work, run_step
work = Work(Path(sys.argv[1]) / "work")
work.begin({"values": [3, 1, 4, 1, 5], "seconds": 1})
work.begin_step("square", units=5)
run_step(work, square, range(5), executor="ray")
"""


def test_ctrl_c_ends_the_tasks_and_a_restart_finishes(cluster, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, tmp_path], stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not calls(tmp_path):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0
    assert stderr.count("Traceback") <= 1 and "KeyboardInterrupt" in stderr
    workers = {int(line.split()[1]) for line in (tmp_path / "calls.log").read_text().splitlines()}
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its build"
        time.sleep(0.05)
    work = Work(tmp_path / "work")
    done = [work.marker("square", n) is not None for n in range(5)]
    assert not all(done)
    run_step(work, square, range(5), executor="ray")
    assert squares(work) == RESULT
    assert len(calls(tmp_path)) <= 5 + 2


def test_a_cluster_that_is_not_there(monkeypatch):
    ray.shutdown()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    start = time.monotonic()
    with pytest.raises(InputError, match=f"executor: expected a Ray cluster at '{address}'"):
        list(run_calls(print, [1], executor="ray"))
    assert time.monotonic() - start < 10


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"package ray for 'ray'.*fastlm\[cluster\]"):
        list(run_calls(print, [1], executor="ray"))
