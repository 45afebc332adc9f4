"""An S3 server (moto) for tests, in a process of its own: it can be stopped and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fastlm.sources import remote

SERVER = """
import sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
server.start()
sys.stdin.read()
"""


class ObjectStore:
    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.port)], stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)

    def pause(self) -> None:
        """Stop answering, as a store that hangs."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def object_store(bucket: str = "bucket") -> Iterator[ObjectStore]:
    """Context: an empty bucket that fsspec and its child processes find by their environment."""
    store = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}")
        _forget_clients()
        try:
            remote._filesystem().mkdir(bucket)
            yield store
        finally:
            store.stop()
            _forget_clients()


def _forget_clients() -> None:
    """fsspec keeps clients by their options, among which the environment is not."""
    import s3fs

    remote._filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
