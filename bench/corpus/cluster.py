"""The same build in a pool, on a Ray cluster of two nodes, and on object storage.

    python bench/corpus/cluster.py [--package php-doc]

Both nodes are on this machine (`ray.cluster_utils`), with one CPU each, against a pool of two
workers. A node, and in another build a worker, is killed while it works. The store is moto's server
in a process of its own. CPU seconds are those of the build and its workers: of the pool from the
system's account of child processes, of Ray from /proc, its services included, the store not.
"""

import argparse
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from printing import print_rows

UNIT_BYTES = 4 << 20  # some 20 units
TICKS = os.sysconf("SC_CLK_TCK")
STORE = """
import sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False).start()
sys.stdin.read()
"""


def row(bar: str, value: object, target: object, unit: str, note: str = "") -> dict:
    return {"bar": bar, "value": value, "target": target, "unit": unit, "note": note}


def faulty(work, number: int, out: Path) -> dict:
    """A step of which unit 2 raises."""
    if number == 2:
        raise KeyError("a fault of the step")
    (out / "text.txt").write_text(f"{number}\n")
    return {}


@contextmanager
def cluster(folder: str) -> Iterator:
    """Context: a cluster of two nodes of one CPU each, which keeps its files in ``folder``."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder,
        "PYTHONPATH": str(Path(__file__).parent),
    }  # fmt: skip
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        nodes.add_node(num_cpus=1)
        os.environ["RAY_ADDRESS"] = nodes.address
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


@contextmanager
def store() -> Iterator[None]:
    """Context: an S3 server with an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "-c", STORE, str(port)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        import fsspec

        fsspec.filesystem("s3").mkdir("bucket")
        yield
    finally:
        server.kill()
        server.wait()


def processes() -> Iterator[tuple[int, int, str, list[str]]]:
    """Yield (id, parent, command, fields of stat after the name) of all processes."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (
                (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            )
        except OSError:
            continue
        yield int(entry.name), int(fields[1]), command, fields


def of_cluster(folder: str) -> list[tuple[int, str, float]]:
    """Return (id, command, CPU seconds) of the cluster's processes."""
    table = {pid: (parent, command, fields) for pid, parent, command, fields in processes()}
    members = []
    for pid, (parent, command, fields) in table.items():
        if folder in command or folder in table.get(parent, (0, "", []))[1]:
            members.append((pid, command, sum(map(int, fields[11:13])) / TICKS))
    return members


def cpu_seconds(folder: str = "") -> float:
    seconds = sum(os.times()[:4])  # of this process and the children it waited for
    return seconds + sum(entry[2] for entry in of_cluster(folder)) if folder else seconds


def digests(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def build(package: str, out: Path | str, folder: str = "", **options) -> tuple[float, float, float]:
    """Prepare the package. Return (wall, CPU seconds, documents)."""
    from fastlm.data.options import DataOptions
    from fastlm.data.prepare import prepare
    from fastlm.sources.packages import default_cache

    start, cpu = time.perf_counter(), cpu_seconds(folder)
    funnel = prepare(
        [f"deb:{package}"], Path(out), options=DataOptions(unit_bytes=UNIT_BYTES, **options),
        cache=default_cache(),
    )  # fmt: skip
    seconds = time.perf_counter() - start, cpu_seconds(folder) - cpu
    return *seconds, funnel.steps[0]["documents"]


def once_midway(out: Path, action: Callable[[], None]) -> threading.Thread:
    """Do ``action`` when two units have been read."""

    def wait() -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            if len(list((out / "work/read").glob("0*.json"))) >= 2:
                return action()
            time.sleep(0.05)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def rows(package: str = "php-doc") -> list[dict]:
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # names of sockets have 107 bytes
    out = Path(tempfile.mkdtemp())
    try:
        return [*on_ray(package, folder, out), *on_object_storage(package, out)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)


def on_ray(package: str, folder: str, out: Path) -> list[dict]:
    wall, cpu, documents = build(package, out / "pool", workers=2)
    expected = digests(out / "pool")
    note = f"{documents:,} pages of {package}; pool of two: {wall:.1f} s wall, {cpu:.1f} s CPU"
    result = []
    with cluster(folder) as nodes:
        build(package, out / "first", folder, executor="ray")  # the workers import their modules
        ray_wall, ray_cpu, _ = build(package, out / "ray", folder, executor="ray")
        same = [digests(out / name) == expected for name in ("first", "ray")]
        result += [
            row("Ray, two nodes: identical to the pool's bytes", all(same), True, "", note),
            row("Ray, two nodes: wall, times the pool's", round(ray_wall / wall, 2), None, "x"),
            row("Ray, two nodes: CPU, times the pool's", round(ray_cpu / cpu, 2), None, "x",
                f"{ray_cpu:.1f} s with Ray's services"),
        ]  # fmt: skip

        def kill_worker() -> None:
            pids = [pid for pid, command, _ in of_cluster(folder) if "ray::_call_in" in command]
            killed.extend(pids[:1])
            os.kill(pids[0], signal.SIGKILL)

        killed: list[int] = []
        thread = once_midway(out / "worker", kill_worker)
        seconds = build(package, out / "worker", executor="ray")[0]
        thread.join()
        same = len(killed) == 1 and digests(out / "worker") == expected
        result.append(row("Ray, a worker killed: identical", same, True, "", f"{seconds:.1f} s"))
        result.append(raising(out))
        node = next(iter(nodes.worker_nodes))
        thread = once_midway(out / "node", lambda: nodes.remove_node(node, allow_graceful=False))
        seconds = build(package, out / "node", executor="ray")[0]
        thread.join()
        same = not nodes.worker_nodes and digests(out / "node") == expected
        result.append(
            row("Ray, a node killed midway: identical", same, True, "",
                f"{seconds:.1f} s, the rest on one node")
        )  # fmt: skip
    return result


def raising(out: Path) -> dict:
    import cluster as module  # workers import the step from here

    from fastlm.pipeline.units import BuildError, Work, run_step

    work = Work(out / "raising")
    work.begin({})
    work.begin_step("faulty", units=6)
    message = ""
    try:
        run_step(work, module.faulty, range(6), executor="ray")
    except BuildError as error:
        message = str(error).partition("failed: ")[2]
    done = [number for number in range(6) if work.marker("faulty", number)]
    right = message.startswith("2; unit 2: KeyError") and done == [0, 1, 3, 4, 5]
    return row(
        "Ray, a step that raises: the build fails, names the unit, finishes the others", right,
        True, "", message,
    )  # fmt: skip


def on_object_storage(package: str, out: Path) -> list[dict]:
    local_wall, local_cpu, _ = build(package, out / "local")
    with store():
        wall, cpu, _ = build(package, "s3://bucket/corpus")
        import fsspec

        files = fsspec.filesystem("s3")
        files.get("bucket/corpus", str(out / "s3"), recursive=True)
    same = digests(out / "s3") == digests(out / "local")
    note = f"one worker: {wall:.1f} s wall, {cpu:.1f} s CPU; local {local_wall:.1f} and "
    return [
        row("object storage: identical to the local bytes", same, True, ""),
        row("object storage: CPU, times the local build's", round(cpu / local_cpu, 2), None, "x",
            f"{note}{local_cpu:.1f} s"),
        row("object storage: wall, times the local build's", round(wall / local_wall, 2), None,
            "x", "the server shares the cores"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--package", default="php-doc")
    print_rows(rows(parser.parse_args().package), ("ray", "s3fs", "moto"))


if __name__ == "__main__":
    main()
